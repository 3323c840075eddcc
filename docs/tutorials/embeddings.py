# %% [markdown]
# # Embeddings and search
#
# What one does with a frozen encoder: a vector for each file, for each moment, and the nearest neighbours. Any
# encoder will do; here a small one is pretrained in half a minute, on the notes of [the tutorial on
# sounds](audio.ipynb).

# %%
# %matplotlib inline
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import soundfile

import bridle_hf
from bridle_hf.demos.data import render_notes
from bridle_hf.embedding.search import Neighbours


notes = Path(render_notes(programs=range(0, 96, 8), pitches=range(36, 84)))
run = bridle_hf.pretrain(
    "audio_demo", data=str(notes), output_dir="runs/tutorial", overwrite=True,
    global_batch_size=32, num_workers=0,
    phases=[{"train": "encoder", "steps": 100, "warmup_steps": 10, "learning_rate": 1.0e-3}],
)  # fmt: skip
print("finished:", run.finished)

# %% [markdown]
# ## From Python
#
# An `Embedder` takes paths, bytes, arrays with their rate, or what `datasets` has of a recording; of any rate and
# length.

# %%
embedder = bridle_hf.Embedder.from_pretrained(str(run.encoder))
programs = {"piano": 0, "violin": 40, "trumpet": 56, "saxophone": 64}


def path_of(name, key):
    return str(notes / "audio" / f"{programs[name]:03d}_{key:03d}.wav")


paths = [path_of(name, key) for name in programs for key in range(54, 66)]
vectors = embedder.embed(paths)
print(vectors.shape, "= (recordings, dim)")

# %% [markdown]
# Four instruments on their first two principal components.

# %%
centred = vectors - vectors.mean(axis=0)
x, y = (centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T).T
figure, ax = plt.subplots(figsize=(5, 3.5))
for name, places in zip(programs, np.arange(len(paths)).reshape(4, -1)):
    ax.scatter(x[places], y[places], label=name)
ax.legend(title="octaves 3 and 4", loc="upper center")
ax.set(xlabel="first component", ylabel="second component", title="Embeddings of notes")
figure.tight_layout()

# %% [markdown]
# ## What sounds when
#
# `level="frame"` gives an embedding for each 160 ms, with its time. A melody, played by three instruments one after
# the other; the picture shows how similar each moment is to each other one.

# %%
melody = [path_of(name, key) for name in ("piano", "violin", "trumpet") for key in (60, 64, 67)]
wave = np.concatenate([soundfile.read(path)[0] for path in melody])
found = embedder.embed((wave, 16_000), level="frame")
print(found.values.shape, "= (steps, dim), from", found.times[0], "to", found.times[-1], "s")
rows = found.values - found.values.mean(axis=0)
rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
figure, ax = plt.subplots(figsize=(4.6, 3.8))
image = ax.imshow(rows @ rows.T, extent=(0, 9, 9, 0), vmin=-1, vmax=1, cmap="RdBu_r")
ax.set(xlabel="s", ylabel="s", title="Piano, violin, trumpet: similarity")
figure.colorbar(image, label="cosine")
figure.tight_layout()

# %% [markdown]
# ## A folder, and search in it
#
# A table with a row for each file, `.parquet`, `.npz` or `.npy`; a run that was ended goes on where it was. From a
# shell: `bridle embed DIR --model runs/tutorial/encoder --output notes.parquet`.

# %%
print(bridle_hf.embed(data=str(notes), model=str(run.encoder), output="notes.parquet"))

# %% [markdown]
# The nearest neighbours of a file, by `bridle search notes.parquet FILE`, or from Python. The first is the file
# itself.

# %%
neighbours = Neighbours("notes.parquet")
rows = neighbours.find(path_of("violin", 60), top_k=6)
for row in rows:
    print(f"{row['similarity']:.3f}", row["id"], row["label"])

# %%
neighbours.draw(path_of("violin", 60), rows[1:3])
