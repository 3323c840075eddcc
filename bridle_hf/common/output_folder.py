"""Output folder of a run: what it holds, whether a run may write to it, its lock, and its run.json.

A run prepares its folder once, before it writes anything: `prepare` refuses a folder that is not its own, locks it,
and removes what an earlier run of the same kind left if it is to be overwritten. `run.json` (of shards: `plan.json`)
is the first file that a run writes, and says by its `kind` whose folder it is.
"""

import hashlib
import logging
import os
import re
import shutil
import socket
import subprocess
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import psutil
import torch
import transformers
from filelock import FileLock, Timeout

import bridle_hf
from bridle_hf.common.files import read_json, write_json


logger = logging.getLogger(__name__)

# What `from_pretrained` needs of a folder, and its card.
MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "*processor_config.json",
                "README.md", "*_bridle*.py")  # fmt: skip
_MODEL_FOLDERS = ("encoder", "tokenizer", "iterations/*/encoder", "iterations/*/tokenizer")


@dataclass(frozen=True)
class RunKind:
    """A kind of run and what it writes.

    Args:
        name: as in `kind` of its record.
        writes: all that it writes, as patterns below the folder; what they match is the run's own, and nothing else.
        begun: what may stand in a folder that has no record: a run killed before, or left over, has no more.
        record: the file that says whose folder it is.
    """

    name: str
    writes: tuple[str, ...]
    begun: tuple[str, ...] = ("checkpoints", "metrics.jsonl", "skipped.jsonl", "tracker")
    record: str = "run.json"


PRETRAINING = RunKind(
    "pretraining",
    ("run.json", "metrics.jsonl", "skipped.jsonl", "report.html", "results.json", "figures/*.png", "tracker",
     "checkpoints/step_*", "checkpoints/.step_*.tmp", "codes/*.codes",
     *(f"{folder}/{name}" for folder in _MODEL_FOLDERS for name in MODEL_FILES)),
)  # fmt: skip
FINETUNING = RunKind(
    "fine-tuning",
    ("run.json", "results.json", "skipped.jsonl", "checkpoints/checkpoint-*", *MODEL_FILES),
)
CROSS_VALIDATION = RunKind(
    "fine-tuning of all folds",
    ("run.json", "results.json", *(f"fold_*/{name}" for name in FINETUNING.writes)),
    begun=(),
)
STUDY = RunKind(
    "a study",
    ("run.json", "results.jsonl", "items/*.json", "report.md", "figures/*.png", "runs/*", "prefixes/*"),
    begun=("runs",),
)
SHARDS = RunKind(
    "shards",
    ("plan.json", "index.jsonl", "skipped.jsonl", "*.tar", "*.parquet", ".*.part"),
    begun=(),
    record="plan.json",
)

EMBEDDING = RunKind("embedding", ("plan.json", "part-*.npz"), begun=(".plan.json.tmp",), record="plan.json")

_LOCK, _OWNER = ".lock", ".lock.json"
# How long a run waits for what a killed one has left: its loader workers hold the lock until they see that it is gone.
ORPHANS_SECONDS = 30.0
# By this process, whose next run may go on in a folder that the last one left by an error.
_held: "weakref.WeakValueDictionary[Path, FileLock]" = weakref.WeakValueDictionary()


# --- Prepare, refuse, overwrite, resume ---


def prepare(
    out: Path, kind: RunKind, inputs: Mapping[str, str | None], resume: bool = False, overwrite: bool = False
) -> FileLock:
    """Make the folder ready for a run; one process of the run does it.

    Args:
        inputs: what the run reads, folders, files, patterns or ids, by the name of its argument.
        resume: the run may go on with what stands there.
        overwrite: what an earlier run of this kind wrote there is removed, and nothing else.

    Returns:
        The lock of the folder, held until `release`, or as long as the object or the process lives.

    Raises:
        ValueError: the folder lies where the inputs are, or they in it; it is not empty and neither `resume` nor
            `overwrite` is given, or it holds something else than a run of this kind; another run writes to it.
        OSError: it cannot be made or read.
    """
    _refuse_overlap(out, inputs)
    if out.exists() and {path.name for path in out.iterdir()} - {_LOCK, _OWNER}:
        if not resume and not overwrite:
            or_else = "another folder" if kind is SHARDS else "--overwrite to start anew"
            raise ValueError(f"output_dir {out} is not empty: give --resume to go on, or {or_else}")
        if not holds_run(out, kind):
            raise ValueError(f"output_dir {out} does not hold a run of {kind.name}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    if overwrite and not resume:
        remove_written(out, kind)
    return lock


def holds_run(out: Path, kind: RunKind) -> bool:
    """Whether a folder holds what a run of this kind wrote: its record says so, or it has not come to write one."""
    try:
        record = read_json(out / kind.record)
    except (OSError, ValueError):
        return False
    if record is not None:
        return isinstance(record, dict) and record.get("kind") == kind.name
    return all(path.name in (*kind.begun, _LOCK, _OWNER) for path in out.iterdir())


def _refuse_overlap(out: Path, inputs: Mapping[str, str | None]) -> None:
    """Refuse a folder that holds an input, or that is written where data are read."""
    folder = out.resolve()
    for name, given in inputs.items():
        if given is None or "://" in given or not (os.path.exists(given) or set("*?[{") & set(given)):
            continue  # not of this machine's file system
        path = Path(given).resolve()
        if path == folder:
            raise ValueError(f"output_dir {out} is --{name} itself: choose another folder")
        if path.is_relative_to(folder):
            raise ValueError(f"--{name} {given} lies inside output_dir {out}: choose another folder")
        if name == "data" and folder.is_relative_to(path):
            raise ValueError(
                f"output_dir {out} lies inside --data {given}, and what the run writes would become data: "
                "choose another folder"
            )


def remove_written(out: Path, kind: RunKind, keep: Collection[str] = ()) -> None:
    """Remove what a run of this kind wrote, but for these patterns of it; links are removed, not followed."""
    folders = set()
    for pattern in kind.writes:
        if pattern in keep:
            continue
        for path in list(out.glob(pattern)):
            # Through a link lies what is not the run's.
            if any(parent.is_symlink() for parent in path.parents if parent != out and out in parent.parents):
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            folders |= {parent for parent in path.parents if out in parent.parents}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def changed(ours: Mapping[str, Any], theirs: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """What differs between a run as it is asked for now (`ours`) and as it was (`theirs`), in words; both as JSON."""
    return [f"{name} ({theirs.get(name)!r}, now {ours.get(name)!r})" for name in sorted(ours.keys() | theirs.keys())
            if name not in free and ours.get(name) != theirs.get(name)]  # fmt: skip


def hash_of_names(paths: Sequence[str]) -> str:
    """Hash of the names of samples and their order, wherever the data lie."""
    folder = os.path.commonprefix(paths)  # noqa: RUF071 (they may be URLs)
    names = "\n".join(path.removeprefix(folder) for path in paths)
    return hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()


# --- Lock ---


def _lock(out: Path) -> FileLock:
    """Lock the folder for this process; the system unlocks it when the process is gone, however it ends.

    Raises:
        ValueError: another process holds it: names it and its machine.
    """
    key = out.resolve()
    lock = _held.get(key)
    if lock is not None and lock.is_locked:
        return lock
    lock = FileLock(out / _LOCK, thread_local=False)
    deadline = None
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = _owner(out)
            if deadline is None:
                deadline = time.monotonic() + (ORPHANS_SECONDS if _is_gone(owner) else 0)
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"another run writes to output_dir {out}: process {owner.get('process', '?')} on "
                    f"{owner.get('host', 'an unknown machine')}; wait for its end, or choose another folder"
                ) from None
            time.sleep(0.2)
        except (OSError, NotImplementedError) as error:
            logger.warning("output_dir %s cannot be locked (%s): let no second run write there", out, error)
            return lock
    process = psutil.Process()
    write_json(out / _OWNER, {"host": socket.gethostname(), "process": process.pid, "since": process.create_time()})
    _held[key] = lock
    return lock


def release(lock: FileLock | None) -> None:
    """End what `prepare` began, where this process did."""
    if lock is not None:
        Path(lock.lock_file).with_name(_OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(out: Path) -> dict[str, Any]:
    """Who has locked the folder last, as far as it can be told."""
    try:
        return read_json(out / _OWNER) or {}
    except (OSError, ValueError):
        return {}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine, and is no more."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(owner["process"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - owner["since"]) > 1
    except psutil.Error:
        return True


# --- run.json ---


def run_record(kind: RunKind, arguments: dict[str, Any], data: str, seed: int, **more: Any) -> dict[str, Any]:
    """What `run.json` holds: how the run came about, and `more` of what this kind has to say."""
    packages = (bridle_hf, torch, transformers, accelerate)
    inputs = (data, arguments.get("model"), arguments.get("encoder_from"))
    return {
        "kind": kind.name,
        "arguments": arguments,
        "data": data,
        # Told now: a path may lead nowhere from where the card is written.
        "hub_ids": [name for name in inputs if name and hub_id(name)],
        "seed": seed,
        **more,
        "versions": {package.__name__: package.__version__ for package in packages},
        "git_revision": git_revision(),
    }


def hub_id(name: str) -> str | None:
    """`name` if it is the id of a data set or a model on the Hub, `None` for a path."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def git_revision() -> str | None:
    """Revision of this source tree, if it is a git checkout and git is there to ask."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
