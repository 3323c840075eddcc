"""
Steps of pretraining, ViT-B audio with a quarter of its layers: the share of the machine's matrix rate that they reach.
A step's seconds per FLOP (by `bridle flops`), against those of its matrix products alone, at the same shapes.
"""

import time

from harness import row, run
from steps import MatrixProducts, Steps


SAMPLES, DEPTH = 2, (3, 4)


def rows(rounds):
    steps = Steps("audio_base", SAMPLES, DEPTH)
    for number in range(3):
        name, step = steps.enter(number)
        step()
        with MatrixProducts() as products:
            step()
        flops = steps.flops.of_phases[number] * SAMPLES
        ours, alone = [], []
        for _ in range(rounds):
            began = time.process_time()
            step()
            ours.append((time.process_time() - began) / flops * 1e12)
            alone.append(products.seconds(1) / products.flops() * 1e12)
        what = f"audio_base, {name}, {SAMPLES} samples: 10^12 FLOPs of a step"
        yield row(what, "the matrix products alone", ours, alone, "s")


if __name__ == "__main__":
    run(__doc__, [rows], rounds=3)
