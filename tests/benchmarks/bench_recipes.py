"""
The fast recipe against the exact one, ViT-B audio, 8 masked views at a time, float32: peak memory of a process that
does steps of encoder 1 (VmHWM of Linux, weights, optimizer and libraries included), and seconds per masked view. Each
is a process of its own; the seconds are those of the CPU, on one thread. Once, without `--rounds`: it takes three
minutes.

    python tests/benchmarks/bench_recipes.py --step audio_base 2 8    # one process: phase 2 of a recipe, 8 samples
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import row, run
from steps import Steps

from bridle_hf.common.heap import keep_large_tensors_out_of_the_heap


VIEWS, STEPS = 8, 3
SAMPLES = {"audio_base_fast": 1, "audio_base": VIEWS}  # by recipe; of the fast one, each has 8 masks


def rows(rounds):
    found = {recipe: [] for recipe in SAMPLES}
    for _ in range(rounds):
        for recipe, samples in SAMPLES.items():
            found[recipe].append(in_process(recipe, "2", str(samples)))
    ours, peer = found.values()
    what = f"audio_base_fast, encoder 1, {VIEWS} masked views at a time: "
    for name, unit in (("peak memory", "GiB"), ("seconds per masked view", "s")):
        yield row(what + name, "audio_base", [one[unit] for one in ours], [one[unit] for one in peer], unit)


def in_process(*arguments):
    command = [sys.executable, __file__, "--step", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def measure(recipe, number, samples, *options):
    """Of steps of phase `number`, of which the first warms up."""
    keep_large_tensors_out_of_the_heap()  # as `bridle pretrain` does
    torch.set_num_threads(1)
    steps, seconds = Steps(recipe, int(samples), options=options), []
    if int(number) == 2:
        steps.enter(1)  # the tokenizer whose codes it predicts
    _, step = steps.enter(int(number))
    for _ in range(STEPS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    views = steps.batch["bool_masked_pos"].shape[:-1].numel()
    return {"GiB": peak_memory(), "s": statistics.median(seconds[1:]) / views}


def peak_memory():
    """GiB of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**20


if __name__ == "__main__":
    if "--step" in sys.argv:
        print(json.dumps(measure(*sys.argv[sys.argv.index("--step") + 1 :])))
    else:
        run(__doc__, [rows], rounds=1)
