"""Masks by their properties, over grids and ratios that hypothesis draws."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.configuration_bridle import MASK_TYPES
from bridle_hf.masking_bridle import MASKS, make_mask, num_hidden, visible_patches


settings.register_profile("bridle", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("bridle")

sizes = st.integers(1, 12)
grids_2d = st.tuples(sizes, st.integers(2, 12))
grids_3d = st.tuples(st.integers(1, 5), sizes, sizes)
# In hundredths, so that what a ratio means in decimals is known exactly.
ratios = st.integers(5, 95).map(lambda hundredths: Fraction(hundredths, 100))
seeds = st.integers(0, 2**31)
kinds_and_grids = st.one_of(
    st.tuples(st.sampled_from(["random", "time_frequency", "mel_band", "block"]), grids_2d),
    st.tuples(st.sampled_from(["random", "tube", "block"]), grids_3d),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected_count(kind: str, grid: tuple[int, ...], ratio: Fraction) -> int:
    """All but floor(patches * (1 - ratio)), one at least visible, in exact arithmetic."""

    def hidden(patches):
        return patches - max(1, math.floor(patches * (1 - ratio)))

    if kind == "mel_band":
        return grid[0] * min(max(round(float(grid[1] * ratio)), 1), grid[1] - 1)
    if len(grid) == 3 and kind in ("tube", "block"):
        return grid[0] * hidden(grid[1] * grid[2])
    return hidden(math.prod(grid))


@given(kinds_and_grids, ratios, seeds)
def test_count_is_exact_and_something_stays_visible(kind_and_grid, ratio, seed):
    kind, grid = kind_and_grid
    mask = make_mask(kind, grid, float(ratio), generator(seed))
    assert mask.dtype == torch.bool and mask.shape == (math.prod(grid),)
    assert int(mask.sum()) == expected_count(kind, grid, ratio)
    assert not mask.all()


@given(kinds_and_grids, ratios, seeds)
def test_a_generator_decides_the_mask(kind_and_grid, ratio, seed):
    kind, grid = kind_and_grid
    drawn = [make_mask(kind, grid, float(ratio), generator(seed)) for _ in range(2)]
    assert torch.equal(*drawn)


@given(kinds_and_grids, ratios, seeds, st.integers(0, 5))
def test_padding_is_never_hidden(kind_and_grid, ratio, seed, padding):
    kind, grid = kind_and_grid
    padded = (grid[0] + padding, *grid[1:])
    mask = make_mask(kind, grid, float(ratio), generator(seed), padded_grid=padded)
    assert mask.shape == (math.prod(padded),)
    assert torch.equal(mask[: math.prod(grid)], make_mask(kind, grid, float(ratio), generator(seed)))
    assert not mask[math.prod(grid) :].any()


@given(grids_2d, ratios, seeds)
def test_mel_band_hides_whole_rows(grid, ratio, seed):
    mask = make_mask("mel_band", grid, float(ratio), generator(seed)).view(grid)
    assert (mask == mask[:1]).all()


@given(grids_3d, ratios, seeds, st.sampled_from(["tube", "block"]))
def test_tube_and_block_are_the_same_in_all_frames(grid, ratio, seed, kind):
    mask = make_mask(kind, grid, float(ratio), generator(seed)).view(grid)
    assert (mask == mask[:1]).all()


@given(grids_2d, ratios, seeds)
def test_time_frequency_is_whole_columns_and_rows_but_for_the_last(grid, ratio, seed):
    mask = make_mask("time_frequency", grid, float(ratio), generator(seed)).view(grid)
    whole = mask.all(dim=1, keepdim=True) | mask.all(dim=0, keepdim=True)
    partial = mask & ~whole
    # What is hidden beside whole columns and rows lies in one column or in one row.
    assert partial.any(dim=1).sum() <= 1 or partial.any(dim=0).sum() <= 1


def test_block_masks_are_more_connected_than_random_ones():
    def neighbours(kind):
        masks = [make_mask(kind, (14, 14), 0.5, generator(seed)).view(14, 14) for seed in range(50)]
        return sum(float((mask[1:] & mask[:-1]).sum()) for mask in masks)

    assert neighbours("block") > 1.4 * neighbours("random")


@pytest.mark.parametrize(("kind", "grid"), [("random", (6, 8)), ("time_frequency", (6, 8)), ("tube", (2, 6, 8))])
def test_every_patch_is_hidden_equally_often(kind, grid):
    draws = 2000
    shared = generator(0)
    often = sum(make_mask(kind, grid, 0.75, shared).float() for _ in range(draws)) / draws
    rate = expected_count(kind, grid, Fraction(3, 4)) / math.prod(grid)
    # Five standard deviations of a binomial share. For time-frequency only the marginals of a row and column are
    # exchangeable, and the ties of the last, partial one are not broken at random.
    tolerance = 5 * math.sqrt(rate * (1 - rate) / draws)
    assert (often - rate).abs().max() < (tolerance if kind != "time_frequency" else 2 * tolerance)


def test_mel_bands_are_hidden_equally_often():
    shared = generator(0)
    rows = sum(make_mask("mel_band", (2, 8), 0.5, shared).view(2, 8)[0].float() for _ in range(2000)) / 2000
    assert (rows - 0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)


@given(st.integers(1, 2000), ratios)
def test_num_hidden_is_exact_in_decimals(patches, ratio):
    assert num_hidden(patches, float(ratio)) == expected_count("random", (patches,), ratio)


@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 1), seeds)
def test_visible_patches_against_a_loop(batch, patches, share, seed):
    visible = torch.rand(batch, patches, generator=generator(seed)) < share
    if not visible.any():
        with pytest.raises(ValueError, match="visible"):
            visible_patches(visible)
        return
    indices, valid = visible_patches(visible)
    assert indices.shape == valid.shape == (batch, int(visible.sum(1).max()))
    for row in range(batch):
        assert indices[row][valid[row]].tolist() == [i for i in range(patches) if visible[row, i]]
        left_over = indices[row][~valid[row]]
        assert not visible[row, left_over].any()
        assert len(set(indices[row].tolist())) == indices.shape[1]


def test_the_config_knows_every_mask():
    assert {name for names in MASK_TYPES.values() for name in names} == set(MASKS)


@pytest.mark.parametrize(
    ("kind", "grid", "message"),
    [
        ("stripes", (4, 4), "stripes.*choose from"),
        ("tube", (4, 4), "tube"),
        ("mel_band", (2, 4, 4), "mel_band"),
        ("mel_band", (4, 1), "at least 2"),
        ("time_frequency", (2, 4, 4), "time_frequency"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(kind, grid, message):
    with pytest.raises(ValueError, match=message):
        make_mask(kind, grid, 0.5)


@pytest.mark.parametrize("padded", [(3, 4), (4, 5)])
def test_a_padded_grid_only_grows_along_the_first_axis(padded):
    with pytest.raises(ValueError, match="cannot be padded"):
        make_mask("random", (4, 4), 0.5, padded_grid=padded)
