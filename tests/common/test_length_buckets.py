"""Length buckets: a permutation in groups of little padding and bounded size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle_hf.common.length_buckets import MOST_PADDING, length_buckets


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 600))
def test_groups_are_a_permutation_of_little_padding(lengths, most):
    groups = length_buckets(lengths, most)
    places = [place for group in groups for place in group]
    assert sorted(places) == list(range(len(lengths)))
    # Longest first, equal ones in their order.
    assert places == sorted(places, key=lambda place: (-lengths[place], place))
    for group in groups:
        padded = len(group) * lengths[group[0]]
        assert padded <= most or len(group) == 1
        assert sum(lengths[place] for place in group) >= (1 - MOST_PADDING) * padded


@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 12))
def test_equal_lengths_are_cut_one_after_the_other(length, count, size):
    groups = length_buckets([length] * count, size * length)
    assert groups == [list(range(count))[first : first + size] for first in range(0, count, size)]


@pytest.mark.parametrize("draw", ["uniform", "log_uniform"])
def test_recordings_of_0_2_to_10_seconds(draw):
    """In steps of 160 ms: padded to 10 s, half and three quarters are padding."""
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.2, 10, 320) if draw == "uniform" else np.exp(rng.uniform(*np.log([0.2, 10]), 320))
    steps = np.ceil(seconds / 0.16).astype(int)
    assert 1 - steps.mean() / 63 > (0.4 if draw == "uniform" else 0.7)
    padded = filled = 0
    for batch in steps.reshape(10, 32).tolist():
        for group in length_buckets(batch, 8 * 64):
            padded += len(group) * batch[group[0]]
            filled += sum(batch[place] for place in group)
    assert 1 - filled / padded < 0.05
