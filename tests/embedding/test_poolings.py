"""Tests of embedding/poolings.py, against means over slices and torch's adaptive pooling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.embedding.poolings import POOLINGS, POOLINGS_OF, pool_cells, select_layers


GRIDS = {"audio": (6, 4), "image": (5, 7), "video": (3, 5, 6)}
sizes = st.integers(1, 6)


@settings(max_examples=40, deadline=None)
@given(rows=sizes, columns=sizes, data=st.data())
def test_cells_are_those_of_adaptive_pooling(rows, columns, data):
    cells = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns)))
    tokens = torch.randn(2, rows * columns, 3)
    pooled = pool_cells(tokens, (rows, columns), None, cells)
    expected = torch.nn.functional.adaptive_avg_pool2d(tokens.mT.unflatten(2, (rows, columns)), cells)
    torch.testing.assert_close(pooled, expected.flatten(2).mT)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4), cells=st.tuples(st.integers(1, 2), sizes))
def test_padding_changes_no_pooling(lengths, cells):
    bands = 6
    clips = [torch.randn(1, length * bands, 3) for length in lengths]
    padded = torch.full((len(clips), max(lengths) * bands, 3), torch.pi)
    real = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for row, flags, clip in zip(padded, real, clips):
        row[: clip.shape[1]], flags[: clip.shape[1]] = clip[0], True
    grid = (max(lengths), bands)
    alone = [pool_cells(clip, (length, bands), None, cells) for clip, length in zip(clips, lengths)]
    torch.testing.assert_close(pool_cells(padded, grid, real, cells), torch.cat(alone))
    for name in POOLINGS_OF["audio"]:
        alone = [POOLINGS[name](clip, (length, bands)) for clip, length in zip(clips, lengths)]
        torch.testing.assert_close(POOLINGS[name](padded, grid, real), torch.cat(alone))


@pytest.mark.parametrize("modality", GRIDS)
def test_poolings_by_slices(modality):
    grid = GRIDS[modality]
    tokens = torch.randn(2, torch.Size(grid).numel(), 3)
    image = tokens.unflatten(1, grid)
    expected = {"mean": tokens.mean(dim=1), "mean_std": torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1)}
    if modality == "audio":
        expected["band_mean"] = image.mean(dim=1).flatten(1)
    else:
        frame = image if modality == "image" else image.mean(dim=1)
        expected["region_mean"] = torch.nn.functional.adaptive_avg_pool2d(frame.permute(0, 3, 1, 2), 4)
        expected["region_mean"] = expected["region_mean"].permute(0, 2, 3, 1).flatten(1)
    assert expected.keys() == set(POOLINGS_OF[modality])
    for name, wanted in expected.items():
        torch.testing.assert_close(POOLINGS[name](tokens, grid), wanted)


def test_small_grids_have_a_region_a_patch():
    tokens = torch.randn(1, 6, 3)
    torch.testing.assert_close(POOLINGS["region_mean"](tokens, (2, 3)), tokens.flatten(1))


def test_what_does_not_fit_is_refused():
    tokens = torch.randn(1, 6, 3)
    with pytest.raises(ValueError, match=r"6 tokens, a grid of \(2, 4\)"):
        pool_cells(tokens, (2, 4), None, (1, 1))
    with pytest.raises(ValueError, match="3 cells along an axis"):
        pool_cells(tokens, (2, 3), None, (3, 1))
    real = torch.tensor([[True] * 3 + [False] * 3])
    with pytest.raises(ValueError, match="2 cells along an axis"):
        pool_cells(tokens, (2, 3), real, (2, 1))


def test_layers():
    states = torch.randn(4, 2, 5, 3)
    for index in (-1, 3, 0):
        torch.testing.assert_close(select_layers(states, index), states[index])
    torch.testing.assert_close(select_layers(states, [-1, 1]), torch.cat([states[3], states[1]], dim=2))
    torch.testing.assert_close(select_layers(states, "mean"), states[1:].mean(dim=0))
    torch.testing.assert_close(select_layers(states, "all"), states.transpose(0, 1))
    for wrong in (4, -5, [0, 4], [], "last", None, [None]):
        with pytest.raises(ValueError, match=r"layer"):
            select_layers(states, wrong)
