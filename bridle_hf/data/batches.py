"""Batches: samples drawn in an order that nothing can disturb, read, and stacked; bad files go to a ledger.

The order of the data and every random choice about a sample are pure functions of (seed, draw), where a *draw* is the
position of a sample in the whole run: 0, 1, 2, ... without end. Workers, processes and restarts only decide who
computes a draw, and so cannot change it. On the way:

    find_samples -> [Sample] -> DrawDataset (sample of a draw, read by a loader) -> GlobalBatches -> make_loader
                                                                           -> train_batches (bad files to the ledger)

So it is for shards, too: a sample of a shard is read where it lies, and an epoch's order takes shards and their parts
as they come near each other (`DrawDataset`). What differs between modalities stands in one table, `MODALITIES` of
data/loaders.py.
"""

import contextlib
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, dataloader

from bridle_hf.common.errors import TooManyBadFiles, reason_of
from bridle_hf.common.signals import leave_signals_to_parent
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.loaders import Load
from bridle_hf.data.order import Places
from bridle_hf.data.sample import SKIPPED, Sample


logger = logging.getLogger(__name__)

WORKER_DIED = "a loader worker has died, of memory most likely"
MAX_ATTEMPTS = 32  # with 10% bad files, 32 bad ones in a row are a matter of 1e-32

# Random streams beside that of the sample itself, kept apart by the spawn key.
_PERMUTATION_STREAM, _REPLACEMENT_STREAM = 1, 2


# --- Drawing samples ---


class DrawDataset(Dataset):
    """Map-style data set over an endless sequence of draws.

    `dataset[draw]` is `load(sample, rng)` of sample `order(seed, draw // n)[draw % n]` with
    `rng = np.random.default_rng([seed, draw])`, so that each sample comes once in every n draws. The order of an epoch
    is any permutation of the samples, or, where they lie in many shards, one that reads from few at a time: `Places`.
    Added to what `load` returns: `index`, the sample's place in `samples`, and `skipped`, a list of (path, reason) of
    bad files met on the way.

    A bad file (`load` raises one of `SKIPPED`, mostly MediaError) is replaced by a sample that depends on
    (seed, draw, attempt) alone. After 32 bad ones in a row the sample holds nothing but `skipped`;
    `train_batches` makes an error of it.
    """

    def __init__(self, samples: Sequence[Sample], load: Load, seed: int):
        if not samples:
            raise ValueError("`samples` is empty: there is nothing to draw from")
        self.samples, self.load, self.seed = samples, load, seed
        self._places = Places.of(samples)
        self._permutations: dict[int, np.ndarray] = {}

    def index_of(self, draw: int) -> int:
        """Place in `samples` of the draw, were no file bad."""
        epoch, position = divmod(draw, len(self.samples))
        if epoch not in self._permutations:
            rng = _rng(_PERMUTATION_STREAM, self.seed, epoch)
            order = rng.permutation(len(self.samples)) if self._places is None else self._places.order(rng)
            # Two are kept: near the turn of an epoch, batches ask for both.
            latest = sorted(self._permutations)[-1:]
            self._permutations = {kept: self._permutations[kept] for kept in latest} | {epoch: order}
        return int(self._permutations[epoch][position])

    def __getitem__(self, draw: int) -> dict[str, Any]:
        skipped: list[tuple[str, str]] = []
        index = self.index_of(draw)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            loaded = _load_or_skip(self.samples, index, self.load, np.random.default_rng([self.seed, draw]), skipped)
            if loaded:
                return {**loaded, "skipped": skipped}
            index = int(_rng(_REPLACEMENT_STREAM, self.seed, draw, attempt).integers(len(self.samples)))
        return {"skipped": skipped}


def _load_or_skip(
    samples: Sequence[Sample],
    index: int,
    load: Load,
    rng: np.random.Generator | None,
    skipped: list[tuple[str, str]],
) -> dict[str, Any]:
    """The sample with its `index`, or {} and one more entry in `skipped`."""
    sample = samples[index]
    try:
        return {**load(sample, rng), "index": index}
    except SKIPPED as error:
        skipped.append((sample.path, reason_of(error)))
        return {}


def _rng(stream: int, *entropy: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(stream,)))


class GlobalBatches:
    """Endless batch sampler: which draws make up each batch of this process.

    Step s of the run covers draws [s * G, (s + 1) * G) of the global batch G, and process r of W takes the r-th of W
    equal slices of them. Iteration starts at step `start_batch`.

    Raises:
        ValueError: W does not divide G, or a value is out of range.
    """

    def __init__(self, global_batch_size: int, rank: int = 0, world_size: int = 1, start_batch: int = 0):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"a global batch of {global_batch_size} cannot be shared equally by {world_size} processes: "
                "choose a multiple of their number"
            )
        if not 0 <= rank < world_size or start_batch < 0:
            raise ValueError(f"rank {rank} of {world_size}, start_batch {start_batch}: out of range")
        self.global_batch_size, self.start_batch = global_batch_size, start_batch
        self.local_batch_size = global_batch_size // world_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start_batch
        while True:
            first = batch * self.global_batch_size + self.rank * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))
            batch += 1


def collate(loaded_samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of the samples that could be read.

    Returns each tensor with a batch dimension in front, `index` (batch,) int64, and `skipped`, the (path, reason)
    of all bad files.
    """
    readable = [loaded for loaded in loaded_samples if "index" in loaded]
    batch: dict[str, Any] = {"index": torch.tensor([loaded["index"] for loaded in readable], dtype=torch.int64)}
    for name in readable[0].keys() - {"index", "skipped"} if readable else ():
        batch[name] = torch.stack([loaded[name] for loaded in readable])
    batch["skipped"] = [entry for loaded in loaded_samples for entry in loaded["skipped"]]
    return batch


def make_loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    collate: Callable[[Sequence[dict]], dict] = collate,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> DataLoader:
    """A DataLoader that yields `batches` of `dataset` in order; workers run one torch thread each (torch's rule).

    Args:
        timeout: seconds that workers may take for a batch; 0: any time.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,  # their caches live as long as they do
        prefetch_factor=4 if num_workers > 0 else None,
        timeout=timeout,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # the loader seeds its workers from it, and leaves torch's global state alone
    )


@contextlib.contextmanager
def loader_errors_as_os_errors(timeout: float) -> Iterator[None]:
    """What a DataLoader says of its workers in errors of any kind, as the OSErrors that they are.

    Raises:
        TimeoutError: a batch took longer than `timeout`, in seconds.
        ChildProcessError: a worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" in str(error):
            raise TimeoutError(f"the loader gave no batch within {timeout:g} s: is the file system there?") from error
        if "DataLoader worker" in str(error):
            raise ChildProcessError(WORKER_DIED) from error
        raise
    except (ConnectionError, EOFError) as error:
        # It died while it handed a batch over. What a worker itself has met says "Caught ... in DataLoader worker".
        of_loader = any(
            frame.f_code.co_filename == dataloader.__file__ for frame, _ in traceback.walk_tb(error.__traceback__)
        )
        if not of_loader or "DataLoader worker" in str(error):
            raise
        raise ChildProcessError(WORKER_DIED) from error


def without_interruptions(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of a loader; that a worker has died shows when the next one is asked for, not before.

    Torch's handler of SIGCHLD would raise in the middle of whatever is going on, such as a step or a save.
    """
    for batch in batches:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield batch


def train_batches(loader: DataLoader, ledger: SkippedFiles) -> Iterator[dict[str, Any]]:
    """Batches of a loader over `DrawDataset`, endless, with the bad files handed to `ledger` on the way.

    Raises:
        TooManyBadFiles: see `SkippedFiles`; or a draw that found no readable file in 32 attempts.
    """
    expected = loader.batch_sampler.local_batch_size
    for batch in loader:
        skipped = batch.pop("skipped")
        ledger.update(skipped)
        if len(batch["index"]) < expected:
            path, reason = skipped[-1]
            raise TooManyBadFiles(f"{MAX_ATTEMPTS} files in a row cannot be read; the last is {path}: {reason}")
        yield batch


class _InOrder(Dataset):
    """The samples one after the other, as in evaluation: nothing random, nothing replaced."""

    def __init__(self, samples: Sequence[Sample], load: Load):
        self.samples, self.load = samples, load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[tuple[str, str]] = []
        return _load_or_skip(self.samples, index, self.load, None, skipped) | {"skipped": skipped}


def iterate_eval(
    samples: Sequence[Sample], load: Load, batch_size: int, ledger: SkippedFiles, num_workers: int = 0
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Every sample once, in order: yields (indices of the samples kept, batch); bad files go to `ledger`.

    `load` is called without a random generator. The last batch may be smaller, and so is one with bad files in it.

    Raises:
        TooManyBadFiles: see `SkippedFiles`.
    """
    order = range(len(samples))
    batches = [list(order[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    for batch in make_loader(_InOrder(samples, load), batches, num_workers=num_workers):
        ledger.update(batch.pop("skipped"))
        kept = batch.pop("index").tolist()
        if kept:
            yield kept, batch
