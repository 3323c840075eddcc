"""
Step time and peak memory of encoder 1 against batch, clip length and masks per sample, as a picture. Run:

    python tests/benchmarks/draw_scale.py [--recipe audio_small] [--out docs/scale.png]

CPU time on one thread, float32; the memory is that of weights, optimizer, gradients and activations, counted tensor by
tensor. What is not varied is a clip of 10 s with 4 masks.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib
import torch
from steps import Steps

from bridle_hf.pretraining.dry_run import PeakMemory


matplotlib.use("Agg")

FIXED = {"clips of a batch": 1, "seconds of a clip": 10, "masks of a clip": 4}
VARIED = {
    "clips of a batch": (1, 2, 4, 8),
    "seconds of a clip": (1, 5, 10, 30),
    "masks of a clip": (1, 2, 4, 8),
}
FRAMES_PER_SECOND = 100


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="audio_small")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/scale.png"), help="the picture; its numbers lie beside it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, values in VARIED.items():
        found[name] = [{name: value, **measure(options.recipe, {**FIXED, name: value})} for value in values]
        print(json.dumps(found[name]), flush=True)
    draw(found, options.recipe, options.out)


def measure(recipe, sizes):
    clips, seconds, masks = sizes.values()
    patches = -(-seconds * FRAMES_PER_SECOND // 16)
    given = {"encoder.max_length": 16 * patches, "masks_per_sample": masks, "global_batch_size": clips}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    steps = Steps(recipe, clips, options=options)
    steps.enter(1)  # the tokenizer whose codes it predicts
    _, step = steps.enter(2)
    step()
    began = time.process_time()
    step()
    taken = time.process_time() - began
    with PeakMemory() as memory:
        step()
    models = steps.interleaving.unwrapped_encoder, steps.interleaving.unwrapped_tokenizer
    held = sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
    for optimizer in steps.interleaving.optimizers.values():
        held += sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    return {"seconds per step": taken, "GiB": (held + memory.peak) / 2**30}


def draw(found, recipe, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(12, 6), sharex="col", sharey="row", layout="constrained")
    for column, (name, points) in enumerate(found.items()):
        for axis, unit in zip(axes[:, column], ("seconds per step", "GiB")):
            axis.plot([point[name] for point in points], [point[unit] for point in points], marker="o")
            axis.axvline(FIXED[name], color="0.8", zorder=0)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(name)
        axes[1, column].set_xlim(left=0)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("peak memory, GiB")
    fixed = ", ".join(f"{value} {name}" for name, value in FIXED.items())
    figure.suptitle(
        f"A step of {recipe}, encoder 1, on one core (where not varied, the grey line: {fixed})", fontsize=11
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
