"""Statistics of paired runs: against their definitions, and their own promise on simulated runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.study import statistics
from bridle_hf.study.statistics import Difference, holm, paired_difference, verdict


def simulate(rng, seeds=8, clusters=40, size=5, effect=0.0, seed_spread=0.03, cluster_spread=0.1):
    """Two arms' answers, whose difference varies from seed to seed and from cluster to cluster."""
    names = np.repeat(np.arange(clusters), size)
    shift = rng.normal(0, seed_spread, (seeds, 1)) + rng.normal(0, cluster_spread, clusters)[names]
    first = rng.random((seeds, len(names))) < 0.6 + effect + shift
    second = rng.random((seeds, len(names))) < 0.6
    return first, second, names.astype(str).tolist()


def test_the_mean_is_that_of_the_pairs_and_lies_in_its_interval():
    first, second, clusters = simulate(np.random.default_rng(0), effect=0.2)
    found = paired_difference(first, second, clusters)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert found.per_seed == pytest.approx(first.mean(axis=1) - second.mean(axis=1))
    assert found.low < found.mean < found.high and found.low > 0 and found.p < 0.01
    swapped = paired_difference(second, first, clusters)
    assert swapped.mean == -found.mean and swapped.high < 0


def test_intervals_hold_the_truth_as_often_as_they_promise(monkeypatch):
    """No effect: of 200 intervals, about 10 leave 0 out; were clusters taken for samples, many more."""
    monkeypatch.setattr(statistics, "DRAWS", 500)
    rng = np.random.default_rng(1)
    missed = {"clusters": 0, "samples": 0}
    for _ in range(200):
        first, second, clusters = simulate(rng)
        for name, given_clusters in {"clusters": clusters, "samples": None}.items():
            found = paired_difference(first, second, given_clusters)
            missed[name] += not found.low <= 0 <= found.high
    assert missed["clusters"] <= 24 and missed["samples"] > missed["clusters"]


def test_one_cluster_per_sample_is_the_default():
    first, second, _ = simulate(np.random.default_rng(2), clusters=50, size=1)
    alone = [str(number) for number in range(50)]
    found, expected = paired_difference(first, second), paired_difference(first, second, sorted(alone, key=int))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="alike"):
        paired_difference(np.ones((2, 3), bool), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="alike"):
        paired_difference(np.ones((2, 3), bool), np.ones((2, 3), bool), ["a"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(values, level):
    """By the definition: in order of p, each is rejected as long as it is at most level / (how many are left)."""
    adjusted = holm({str(number): value for number, value in enumerate(values)})
    rejected = set()
    for rank, number in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if (len(values) - rank) * values[number] > level:
            break
        rejected.add(str(number))
    assert {name for name, value in adjusted.items() if value <= level} == rejected


def test_verdicts():
    def of(low, high, p=None):
        return verdict(Difference((low + high) / 2, low, high, 0.0, ()), 0.01, p)

    assert [of(0.002, 0.03), of(-0.03, -0.002), of(-0.009, 0.009), of(-0.02, 0.01)] == [
        "above",
        "below",
        "equal",
        "open",
    ]
    assert verdict(Difference(0.016, 0.002, 0.03, 0.0, (0.016,)), 0.01, 0.001) == "one seed"
    assert of(0.002, 0.03, p=0.2) == "open" and of(0.002, 0.03, p=0.01) == "above"
