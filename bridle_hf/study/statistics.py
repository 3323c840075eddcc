"""Statistics of paired runs: differences of two arms, bootstrapped over seeds and over clusters of samples; Holm.

Both arms of a pair have the same seeds (initial weights, order of the data, masks) and the same samples. Seeds and
clusters are crossed, and both are a draw from many: an interval over samples alone takes the luck of a seed for the
truth, and one over seeds alone takes the test set for the world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


DRAWS, DRAWS_AT_ONCE = 10_000, 500
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean paired difference, as a fraction, with its interval and two-sided p-value, and that of each seed."""

    mean: float
    low: float
    high: float
    p: float
    per_seed: tuple[float, ...]


def paired_difference(first: np.ndarray, second: np.ndarray, clusters: Sequence[str] | None = None) -> Difference:
    """First minus second, with a two-level bootstrap: seeds and clusters are drawn with replacement.

    Args:
        first, second: (seeds, samples) bool, which samples each got right.
        clusters: (samples,) what is drawn together; each sample alone if not given.

    Raises:
        ValueError: shapes that do not fit.
    """
    if first.shape != second.shape or first.ndim != 2 or (clusters is not None and len(clusters) != first.shape[1]):
        raise ValueError(f"{first.shape} and {second.shape} with {clusters and len(clusters)} clusters: must be alike")
    gains = first.astype(np.float64) - second
    names, index = np.unique(np.arange(gains.shape[1]) if clusters is None else clusters, return_inverse=True)
    sizes = np.bincount(index, minlength=len(names))
    sums = np.stack([np.bincount(index, weights=gain, minlength=len(names)) for gain in gains])
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS // DRAWS_AT_ONCE):
        seeds = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS_AT_ONCE)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS_AT_ONCE)
        draws.append(((seeds @ sums) * drawn).sum(axis=1) / len(sums) / (drawn @ sizes))
    means = np.concatenate(draws)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = 1 + min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * beyond / (len(means) + 1))
    return Difference(float(gains.mean()), float(low), float(high), float(p), tuple(gains.mean(axis=1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), by the same names."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def verdict(difference: Difference, margin: float, p: float | None = None) -> str:
    """`above`, `below`, `equal` (within the margin) or `open`: what the interval says; or `one seed`, whose luck it
    does not hold.

    Args:
        margin: a difference of less is none worth having.
        p: adjusted; if given, `above` and `below` need it under 1 - `LEVEL`.
    """
    if len(difference.per_seed) == 1:
        return "one seed"
    sure = p is None or p < 1 - LEVEL
    if difference.low > 0 and sure:
        return "above"
    if difference.high < 0 and sure:
        return "below"
    return "equal" if -margin < difference.low and difference.high < margin else "open"


def with_deviation(values: Sequence[float], form: str = ".1f") -> str:
    """The mean over seeds, and their standard deviation where there are several, as text."""
    text = f"{np.mean(values):{form}}"
    return f"{text} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else text
