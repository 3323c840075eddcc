# %% [markdown]
# # Sounds: pretrain, look, probe
#
# From unlabelled recordings to an encoder, in a minute on one core: the same calls as for a large run, with a small
# recipe that is cut short. It shows how the parts fit; what they reach when trained for longer is told in [the
# demos](../demos.md).
#
# `pip install '.[train]'` from a checkout, and the packages that the notes lie in: `pip install
# pretty_midi==0.2.11.post0 tinysoundfont==0.3.7 --no-deps`.

# %%
# %matplotlib inline
import csv
from pathlib import Path

import soundfile
from transformers import AutoFeatureExtractor, AutoModel

import bridle_hf
from bridle_hf.demos.data import render_notes
from bridle_hf.visualization_bridle import plot_codes


# %% [markdown]
# ## The recordings
#
# 12 instruments of a real soundfont, 48 keys each, a second long. To pretrain, a folder of sound files is enough.
# This one also has a `metadata.csv` with labels, which are used to probe alone, and groups that folds keep apart:
# here octaves.

# %%
notes = Path(render_notes(programs=range(0, 96, 8), pitches=range(36, 84)))
with open(notes / "metadata.csv", newline="") as file:
    rows = list(csv.DictReader(file))
print(len(rows), "recordings")
for row in rows[::144]:
    print(row["file_name"], "|", row["label"], "| octave", row["group"])

# %% [markdown]
# ## Pretrain
#
# The recipe trains in three phases: an encoder that predicts the codes of a random projection (iteration 0), a
# tokenizer that is distilled from it, and a fresh encoder that predicts the codes of this tokenizer (iteration 1).
# Here each is cut short. From a shell it is `bridle pretrain audio_demo --data DIR --output_dir runs/tutorial`, with
# the phases of the recipe.

# %%
run = bridle_hf.pretrain(
    "audio_demo", data=str(notes), output_dir="runs/tutorial", overwrite=True,
    global_batch_size=32, num_workers=0, keep_iterations=False,
    phases=[
        {"train": "encoder", "steps": 50, "warmup_steps": 5, "learning_rate": 1.0e-3},
        {"train": "tokenizer", "steps": 60, "warmup_steps": 6, "learning_rate": 1.0e-3},
        {"train": "encoder", "steps": 50, "warmup_steps": 5, "learning_rate": 1.0e-3},
    ],
)  # fmt: skip
print("finished:", run.finished, "after", run.metrics["step"], "steps")
print(*sorted(path.name for path in run.output_dir.glob("[!.]*")))

# %% [markdown]
# `report.html` shows losses, codes and what was predicted, in one page. `encoder` and `tokenizer` are
# `from_pretrained` folders with their processor.
#
# ## Look at the codes
#
# Each patch of 160 ms and 16 mel bins has four codes: the first says most, each next one what the ones before left
# out.

# %%
extractor = AutoFeatureExtractor.from_pretrained(run.tokenizer)
tokenizer = AutoModel.from_pretrained(run.tokenizer).eval()
wave, rate = soundfile.read(notes / "audio" / "040_060.wav")
inputs = extractor(wave, sampling_rate=rate, return_tensors="pt")
codes = tokenizer.encode(**inputs)
print(tuple(codes.shape), "= (recordings, patches, codebooks)")
plot_codes(codes[0], tokenizer.config, title="A violin, C4")

# %% [markdown]
# ## Probe
#
# What does the frozen encoder know of the instrument, in an octave that the probe has not seen? The controls stand
# beside it: the same encoder untrained, and a regression on the log-mel itself. After so few steps do not expect to
# beat them: that is what the controls are for.

# %%
result = bridle_hf.probe(model=str(run.encoder), data=str(notes))
for row in result["probes"]:
    if row["pooling"] in ("mean_std", ""):
        print(f"{row['features']:20} {row['linear']:.1%} (folds deviate by {row['linear_deviation']:.1%})")

# %% [markdown]
# ## Go on
#
# * Your own files: give their folder as `data`, and a recipe that fits their length ([the
#   guide](../../training/README.md)).
# * A classifier: [images](image.ipynb) are fine-tuned by `bridle_hf.finetune`, or [by the stock
#   Trainer](trainer.ipynb).
# * [Embeddings](embeddings.ipynb) of recordings of any length, and search in them.
