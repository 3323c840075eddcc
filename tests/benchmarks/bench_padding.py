"""
Clips of 0.2 to 10 s, uniform and log-uniform, in micro batches by length against the same padded to 10 s: the share of
patches that is padding, in batches of `audio_small` (32 clips, 8 at a time) and of `audio_base` on 8 GPUs (128 at a
time); and steps of 16 clips, 8 at a time, of `audio_small` with a quarter of its layers and one mask.
"""

import math

import torch
from harness import race, row, run
from steps import Steps

from bridle_hf import BridleConfig
from bridle_hf.interleaving.micro_batches import micro_batches
from bridle_hf.masking_bridle import make_mask


SHORTEST, LONGEST = 0.2, 10.0  # s
PADDED = "padded to 10 s"


def lengths(draw: str, count: int, generator: torch.Generator) -> list[int]:
    """In frames."""
    low, high = (SHORTEST, LONGEST) if draw == "uniform" else (math.log(SHORTEST), math.log(LONGEST))
    drawn = low + (high - low) * torch.rand(count, generator=generator)
    return (100 * (drawn if draw == "uniform" else drawn.exp())).round().int().tolist()


def draw_batch(config: BridleConfig, draw: str, count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames, (full, mel), kind = lengths(draw, count, generator), config.patch_grid, config.mask_type
    steps = [math.ceil(length / config.patch_shape[1]) for length in frames]
    masks = [make_mask(kind, (step, mel), config.mask_ratio, generator, padded_grid=(full, mel)) for step in steps]
    return {
        "input_values": torch.randn(count, config.max_length, config.num_mel_bins, generator=generator),
        "attention_mask": (torch.arange(config.max_length) < torch.tensor(frames)[:, None]).long(),
        "bool_masked_pos": torch.stack(masks),
    }


def padding(rounds):
    config = BridleConfig(modality="audio")
    for draw in ("uniform", "log-uniform"):
        for recipe, count, size in (("audio_small", 32, 8), ("audio_base", 128, None)):
            found = {True: [], False: []}
            for number in range(6 * rounds):
                batch = draw_batch(config, draw, count, number)
                for by_length, shares in found.items():
                    parts = list(micro_batches(batch, config, size, torch.device("cpu"), by_length))
                    real, patches = sum(sum(part.num_real) for part in parts), sum(part.num_patches for part in parts)
                    shares.append(100 * (1 - real / patches))
            yield row(f"{draw} lengths, {recipe}: padding", PADDED, found[True], found[False], "%")


def seconds(rounds):
    for draw in ("uniform", "log-uniform"):
        steps = Steps("audio_small", 1, depth=(3, 1))
        steps.interleaving.micro_batch_size = 8
        steps.batch = draw_batch(steps.configs[0], draw, 16, 0)
        for number in (1, 2):
            name, step = steps.enter(number)

            def cut(by_length, step=step, interleaving=steps.interleaving):
                interleaving.bucket_by_length = by_length
                step()

            yield from race(f"{draw} lengths, {name}: a step", lambda cut=cut: cut(True),
                            {PADDED: lambda cut=cut: cut(False)}, rounds)  # fmt: skip


if __name__ == "__main__":
    run(__doc__, [padding, seconds], rounds=2)
