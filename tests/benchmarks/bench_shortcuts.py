"""
Steps of pretraining, ViT-S audio, with what a step need not do: codes read from the cache instead of made (encoder 1),
and half of the patches dropped (tokenizer 1), against the same step without.
"""

import tempfile
import time
from pathlib import Path

import torch
from harness import row, run
from steps import Steps

from bridle_hf.masking_bridle import draw_share


SAMPLES = 2


def rows(rounds):
    steps = Steps("audio_small", SAMPLES, options=("--masks_per_sample", "1"))
    batch, interleaving = steps.batch, steps.interleaving
    _, step = steps.enter(1)
    every = torch.ones(SAMPLES, batch["bool_masked_pos"].shape[-1], dtype=torch.bool)
    dropped = {"bool_dropped_pos": ~draw_share(every, 0.5)}
    yield row("audio_small, tokenizer 1, half of the patches dropped", "none dropped",
              *_seconds(steps, step, dropped, rounds), "s")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        interleaving.code_cache_folder = Path(folder)
        batch |= {"index": torch.arange(SAMPLES), "fingerprint": torch.zeros(SAMPLES, dtype=torch.int64)}
        _, step = steps.enter(2)
        cache = interleaving.code_cache
        step()
        ours, theirs = [], []
        for _ in range(rounds):
            for codes, times in ((cache, ours), (None, theirs)):
                interleaving.code_cache = codes
                times.append(_time(step))
        yield row("audio_small, encoder 1, codes read", "codes made", ours, theirs, "s")


def _seconds(steps, step, changes, rounds):
    """Of a step on a batch that is changed, and of one on the batch as it is."""
    plain, times = steps.batch, ([], [])
    for number in range(2 * (rounds + 1)):
        steps.batch = plain if number % 2 else plain | changes
        times[number % 2].append(_time(step))
    steps.batch = plain
    return times[0][1:], times[1][1:]


def _time(step) -> float:
    """CPU time, which other processes of the machine disturb less."""
    began = time.process_time()
    step()
    return time.process_time() - began


if __name__ == "__main__":
    run(__doc__, [rows], rounds=3)
