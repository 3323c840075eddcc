"""A study: the runs of a grid, side by side, one line of results.jsonl each; it goes on where it was.

    bridle study development --output_dir DIR --workers 2

A run is done when its hash stands in DIR/results.jsonl. Each is a process of one thread in a folder of its own below
DIR/runs, of which nothing but run.json and metrics.jsonl is kept once its scores are in. Phases that several runs
begin with are trained once, in DIR/prefixes, and removed when the last of these runs has ended.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridle_hf.common.errors import ArgumentError
from bridle_hf.common.files import read_json, write_json
from bridle_hf.common.output_folder import (
    PRETRAINING,
    STUDY,
    git_revision,
    prepare,
    release,
    remove_written,
    run_record,
)
from bridle_hf.common.signals import StopRequest
from bridle_hf.study.arguments import StudyArguments
from bridle_hf.study.grid import RunSpec, read_grid
from bridle_hf.study.prefixes import FOLDER as PREFIXES
from bridle_hf.study.prefixes import remove_prefix, shared_prefixes, untrained
from bridle_hf.study.results import append_result, keep_items, read_results
from bridle_hf.study.run import RESULT, folder_of


logger = logging.getLogger(__name__)

# What a run leaves when its scores are in.
KEPT = ("run.json", "metrics.jsonl")
# A run that ended because it was told to, not because it was done.
STOPPED = 3


def run_study(args: StudyArguments) -> list[dict[str, Any]]:
    """Do what is left of a grid; returns the results of all of its runs that are done or have failed.

    Raises:
        ArgumentError: the grid or the folder is not fit to start.
    """
    specs = chosen(read_grid(args.grid), args)
    out = Path(args.output_dir)
    try:
        lock = prepare(out, STUDY, {}, resume=True)
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    write_json(out / "run.json", run_record(STUDY, vars(args), "-", 0, runs=len(specs)))
    done = {row["hash"]: row for row in read_results(out)}
    if args.retry_failed:
        done = {key: row for key, row in done.items() if row["status"] == "done"}
    left = [spec for spec in specs if spec.hash not in done]
    logger.info("%d runs, %d of them done", len(specs), len(specs) - len(left))
    with StopRequest() as stop:
        workers = _Workers(args, out, stop, left)
        try:
            for row in tqdm(workers.results(), total=len(left), unit="run", mininterval=0):
                done[row["hash"]] = row
        finally:
            workers.stop()
            release(lock)
    return [done[spec.hash] for spec in specs if spec.hash in done]


def chosen(specs: Sequence[RunSpec], args: StudyArguments) -> list[RunSpec]:
    """Those that `only` and `seeds` name.

    Raises:
        ArgumentError: there is no such arm or set.
    """
    arms, sets = {spec.arm for spec in specs}, {spec.set for spec in specs}
    if unknown := set(args.only) - arms - sets:
        raise ArgumentError(f"--only {min(unknown)}: the arms are {sorted(arms)}, the sets {sorted(sets)}")
    return [
        spec
        for spec in specs
        if spec.set in (set(args.only) & sets or sets)
        and spec.arm in (set(args.only) & arms or arms)
        and (not args.seeds or spec.seed in args.seeds)
    ]


class _Workers:
    """Processes that do a run each, so many at a time."""

    def __init__(self, args: StudyArguments, out: Path, stop: StopRequest, specs: Sequence[RunSpec]):
        self.args, self.out, self.asked = args, out, stop
        self.waiting = list(specs)
        self.running: dict[subprocess.Popen, tuple[RunSpec, float]] = {}
        self.prefixes = shared_prefixes(specs, out)
        needed = {prefix.folder for prefixes in self.prefixes.values() for prefix in prefixes}
        for folder in {path.with_suffix("") for path in (out / PREFIXES).glob("*")} - needed:
            remove_prefix(folder)

    def results(self) -> Iterator[dict[str, Any]]:
        """A row of each run, as they end; it stands in results.jsonl by then. A signal ends it."""
        while (self.waiting or self.running) and self.asked.received is None:
            while len(self.running) < self.args.workers and (spec := self._next()) is not None:
                self._start(spec)
            for process in [process for process in self.running if process.poll() is not None]:
                spec, began = self.running.pop(process)
                if process.returncode != STOPPED:
                    yield self._end(spec, process.returncode, time.monotonic() - began)
            time.sleep(0.2)

    def _next(self) -> RunSpec | None:
        """The first that waits for no prefix which another run is training."""
        in_training = set().union(*(self._untrained(spec) for spec, _ in self.running.values()))
        for number, spec in enumerate(self.waiting):
            if not in_training & self._untrained(spec):
                return self.waiting.pop(number)
        return None

    def _untrained(self, spec: RunSpec) -> set[Path]:
        return untrained(self.prefixes[spec.hash], folder_of(spec, self.out))

    def _forget_prefixes(self, spec: RunSpec, users: Sequence[RunSpec]) -> None:
        """Remove those prefixes of a run that none of `users` shares."""
        needed = {prefix.folder for user in users for prefix in self.prefixes[user.hash]}
        for prefix in self.prefixes[spec.hash]:
            if prefix.folder not in needed:
                remove_prefix(prefix.folder)

    def stop(self) -> None:
        """End what is still running, at its next step and with a checkpoint where it trains; wait for it."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()

    def _start(self, spec: RunSpec) -> None:
        folder = folder_of(spec, self.out)
        folder.mkdir(parents=True, exist_ok=True)
        shared = ",".join(str(prefix.phases) for prefix in self.prefixes[spec.hash])
        words = [self.args.grid, spec.set, spec.arm, str(spec.seed), str(self.out), shared]
        words += filter(None, [self.args.cache_dir])
        # Many small runs side by side: one thread each is the fastest, and the same result anywhere.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(folder.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bridle_hf.study", *words], stdout=log, stderr=log, env=environment
            )
        self.running[process] = spec, time.monotonic()

    def _end(self, spec: RunSpec, status: int, seconds: float) -> dict[str, Any]:
        """Note the result, and remove what is not needed any more."""
        folder = folder_of(spec, self.out)
        log = folder.with_suffix(".log")
        row = read_json(folder / RESULT) if status == 0 else None
        if row is None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            row = {"hash": spec.hash, "set": spec.set, "arm": spec.arm, "seed": spec.seed, "status": "failed",
                   "revision": git_revision(), "seconds": round(seconds, 1), "options": dict(spec.options),
                   "error": f"status {status}: {lines[-1]}"}  # fmt: skip
            logger.error("%s: %s (see %s)", spec.name, row["error"], log)
        if row["status"] == "done":
            keep_items(self.out, row)
        append_result(self.out, row)
        if row["status"] == "done" and not self.args.keep_models:
            log.unlink()
            (folder / RESULT).unlink()
            remove_written(folder, PRETRAINING, keep=KEPT)
        running = [running for running, _ in self.running.values()]
        # What a run has failed with may be its prefix: the next one trains that anew, and has no part in the failure.
        self._forget_prefixes(spec, running if row["status"] == "failed" else [*running, *self.waiting])
        return row
