"""Masks that come with the samples: drawn for each sample, of real patches alone, whatever else is drawn."""

import itertools

import numpy as np
import torch

from bridle_hf.data.masked_loader import MaskedLoader
from bridle_hf.data.sample import Sample


def load(frames: int):
    """A loader of one clip of so many frames, padded to 96."""
    mask = (torch.arange(96) < frames).long()
    return lambda sample, rng: {"input_values": torch.zeros(96, 64), "attention_mask": mask}


def draw(config, frames: int = 96, seed: int = 0) -> dict[str, torch.Tensor]:
    return MaskedLoader(load(frames), config, {"random": 1, "mel_band": 1})(
        Sample("a.wav"), np.random.default_rng(seed)
    )


def test_masks_of_a_sample_follow_each_other(tiny_config):
    config = tiny_config("audio", decoder_type="cross", decoded_ratio=0.5)
    one, four = (MaskedLoader(load(70), config, {"random": 1, "mel_band": 1}, count) for count in (1, 4))
    single, several = (each(Sample("a.wav"), np.random.default_rng(3)) for each in (one, four))
    for name in ("bool_masked_pos", "bool_decoded_pos"):
        assert single[name].shape == (24,) and several[name].shape == (4, 24)
        assert torch.equal(several[name][0], single[name])
    assert len({tuple(mask) for mask in several["bool_masked_pos"].tolist()}) == 4
    assert not several["bool_masked_pos"][:, 20:].any()


def test_dropped_patches_are_a_share_of_the_real_ones(tiny_config):
    """Drawn after the masks, which stay as they are."""
    config, found = tiny_config("audio", decoder_type="cross", decoded_ratio=0.5), set()
    for seed, share in itertools.product(range(10), (0.25, 0.5, 0.99)):
        frames, real = [(96, 24), (50, 16), (16, 4)][seed % 3]
        plain, dropping = (
            MaskedLoader(load(frames), config, {}, 3, patch_dropout=dropout)(Sample("a"), np.random.default_rng(seed))
            for dropout in (0.0, share)
        )
        dropped = dropping.pop("bool_dropped_pos")
        assert plain.keys() == dropping.keys() and all(torch.equal(plain[name], dropping[name]) for name in plain)
        assert dropped.shape == (24,) and not dropped[real:].any()
        assert real - int(dropped.sum()) == max(1, round(real * (1 - share)))
        found.add(tuple(dropped.tolist()))
    assert len(found) > 25


def test_what_is_decoded_is_a_share_of_what_is_hidden(tiny_config):
    whole, half = (tiny_config("audio", decoder_type="cross", decoded_ratio=ratio) for ratio in (1.0, 0.5))
    shares = set()
    for seed in range(20):
        frames = [96, 50, 17][seed % 3]
        found, expected = draw(half, frames, seed), draw(whole, frames, seed)
        hidden, decoded = found["bool_masked_pos"], found["bool_decoded_pos"]
        # The mask is the one that would be drawn without it.
        assert torch.equal(hidden, expected["bool_masked_pos"]) and "bool_decoded_pos" not in expected
        assert not (decoded & ~hidden).any() and int(decoded.sum()) == round(0.5 * int(hidden.sum()))
        assert torch.equal(draw(half, frames, seed)["bool_decoded_pos"], decoded)
        shares.add(tuple(decoded.tolist()))
    assert len(shares) > 15
