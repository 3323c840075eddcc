"""Masked samples: a loader that draws a mask with each sample."""

import hashlib
import math

import numpy as np
import torch

from bridle_hf import BridleConfig
from bridle_hf.data.loaders import Load
from bridle_hf.data.sample import Sample
from bridle_hf.masking_bridle import draw_share, make_mask
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patch_grid_of


class MaskedLoader:
    """A loader whose samples carry `bool_masked_pos` (patches,), drawn for each sample from a mix of masks.

    Only real patches are hidden, so that a padded clip has its share of visible ones. Where a share of the hidden ones
    is decoded (`config.decoded_ratio`), that is drawn, too: `bool_decoded_pos` (patches,). With several masks of a
    sample both are (masks, patches).

    Args:
        load: loader of a modality.
        config: `BridleConfig` of the encoder; gives patches and `mask_ratio`.
        masks: weight by kind of mask, such as {"random": 1, "mel_band": 3}; empty: the config's `mask_type` alone.
        masks_per_sample: masks drawn for each sample, one after the other.
        fingerprint: add `fingerprint` (), int64: a hash of what `load` gave, by which one sees that a crop repeats.
        patch_dropout: add `bool_dropped_pos` (patches,): this share of the real patches, which the training of a
            tokenizer leaves out. It is drawn after the masks, which are those without it.

    Raises:
        ValueError: a kind of mask that is unknown or does not fit the grid, or weights that are not.
    """

    def __init__(
        self,
        load: Load,
        config: BridleConfig,
        masks: dict[str, float],
        masks_per_sample: int = 1,
        fingerprint: bool = False,
        patch_dropout: float = 0.0,
    ):
        self.load, self.config, self.masks_per_sample = load, config, masks_per_sample
        self.fingerprint, self.patch_dropout = fingerprint, patch_dropout
        masks = masks or {config.mask_type: 1.0}
        for kind, weight in masks.items():
            make_mask(kind, config.patch_grid, config.mask_ratio)
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"masks: the weight of '{kind}' is {weight!r}, expected a number of 0 or more")
        total = sum(masks.values())
        if total <= 0:
            raise ValueError("masks: all weights are 0")
        self.kinds, self.shares = list(masks), [weight / total for weight in masks.values()]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        loaded = self.load(sample, rng)
        if self.fingerprint:
            loaded = {**loaded, "fingerprint": _fingerprint(loaded)}
        values = loaded[INPUT_NAMES[self.config.modality]][None]
        grid = patch_grid_of(values, self.config)
        steps = grid[0]
        if "attention_mask" in loaded:
            real = patch_attention_mask(loaded["attention_mask"][None], self.config)
            steps = int(real.sum()) // math.prod(grid[1:])
        drawn = [self._draw(steps, grid, rng) for _ in range(self.masks_per_sample)]
        if self.masks_per_sample == 1:
            masks = drawn[0]
        else:
            masks = {name: torch.stack([masks[name] for masks in drawn]) for name in drawn[0]}
        if self.patch_dropout:
            masks["bool_dropped_pos"] = self._draw_dropped(steps, grid, rng)
        return {**loaded, **masks}

    def _draw_dropped(self, steps: int, grid: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        real = torch.arange(math.prod(grid)) < steps * math.prod(grid[1:])
        return real & ~draw_share(real[None], 1 - self.patch_dropout, generator)[0]

    def _draw(self, steps: int, grid: tuple[int, ...], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """A mask over the first `steps` of the grid, and what of it is decoded."""
        kind = self.kinds[rng.choice(len(self.kinds), p=self.shares)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = make_mask(kind, (steps, *grid[1:]), self.config.mask_ratio, generator, padded_grid=grid)
        if self.config.decoded_ratio == 1:
            return {"bool_masked_pos": mask}
        decoded = draw_share(mask[None], self.config.decoded_ratio, generator)[0]
        return {"bool_masked_pos": mask, "bool_decoded_pos": decoded}


def _fingerprint(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    hashes = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        hashes.update(tensors[name].contiguous().numpy())
    return torch.tensor(int.from_bytes(hashes.digest(), "little", signed=True))
