"""Order of an epoch: a permutation of the samples, for shards one that reads from few of them at a time."""

from collections.abc import Sequence

import numpy as np

from bridle_hf.data.sample import Sample


WINDOW = 16  # shards, or row groups of them, that are read at a time: see `DrawDataset`


class Places:
    """Which samples of a set of shards lie near each other: by shard, and by part (a tar has one, parquet row groups).

    Args:
        part_of_sample: (samples,) numbers of the parts.
        shard_of_part: (parts,) numbers of the shards.
    """

    def __init__(self, part_of_sample: np.ndarray, shard_of_part: np.ndarray):
        self.part_of_sample, self.shard_of_part = part_of_sample, shard_of_part

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Places | None":
        """Places of the samples; None if any can be read as well as any other: files, rows of a Hub set, few parts."""
        parts: dict[tuple[str, int], int] = {}
        part_of_sample = np.empty(len(samples), np.int64)
        for number, sample in enumerate(samples):
            if (place := sample.place) is None:
                return None
            part_of_sample[number] = parts.setdefault(place, len(parts))
        if len(parts) <= WINDOW:
            return None
        shards: dict[str, int] = {}
        return cls(part_of_sample, np.array([shards.setdefault(shard, len(shards)) for shard, _ in parts]))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation of the samples, (samples,) int64, that has them from `WINDOW` parts of as many shards at a
        time.

        The window slides: shards stand in line at random, and parts begin up to `WINDOW` places behind their shard,
        samples up to `WINDOW` places behind their part. So shards are asked for one by one, not many at once.
        """
        shards = rng.permutation(self.shard_of_part.max() + 1)
        parts = _ranks(shards[self.shard_of_part] + WINDOW * rng.random(len(self.shard_of_part)))
        return np.argsort(parts[self.part_of_sample] + WINDOW * rng.random(len(self.part_of_sample)), kind="stable")


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
