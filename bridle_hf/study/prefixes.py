"""Prefixes: phases that several runs of a study begin with, trained once and gone on from, to the bit as if by each.

Runs of one set and seed share their first phases where they agree in all that counts up to the end of these. A prefix
is trained as a run of its own, in OUT/prefixes/HASH.part, which becomes OUT/prefixes/HASH when it is done; a run that
goes on from it begins with a copy of what it left. Rows of metrics.jsonl up to there are the prefix's.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridle_hf.common.output_folder import PRETRAINING, remove_written
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import list_checkpoints, load_newest, save_checkpoint
from bridle_hf.pretraining.resume import plain
from bridle_hf.study.grid import DEFAULTS, RunSpec, counted


FOLDER = "prefixes"
# Of the tokenizer; these play no part until a phase trains or fits one.
LATER = ("tokenizer_type", "teacher_layers", "center_teacher")


@dataclass(frozen=True)
class Prefix:
    """The first phases of runs.

    Args:
        phases: how many.
        options: arguments of pretraining, but for data and output_dir, that do these phases and no more.
        folder: where they are trained; it is there when they are.
    """

    phases: int
    options: Mapping[str, Any]
    folder: Path

    @property
    def part(self) -> Path:
        """The folder while they are trained."""
        return self.folder.with_suffix(".part")


def prefixes_of(spec: RunSpec, out: Path) -> list[Prefix]:
    """All that a run has, the shortest first; the last is the whole of it, which may be read out in several ways."""
    found = []
    for phases in range(1, len(spec.options["phases"]) + 1) if spec.features == "trained" else ():
        options = prefix_options(spec.options, phases)
        parts = json.dumps([spec.set, counted(options)], sort_keys=True)
        found.append(Prefix(phases, options, out / FOLDER / hashlib.sha256(parts.encode()).hexdigest()[:16]))
    return found


def prefix_options(options: Mapping[str, Any], phases: int) -> dict[str, Any]:
    """Options of a run that does the first phases alone; what cannot count up to there is as by default."""
    if phases == len(options["phases"]):
        return dict(options)
    first = options["phases"][:phases]
    until = {**options, "phases": first, "code_cache": DEFAULTS["code_cache"]}
    fits = options["tokenizer"].get("tokenizer_type") == "kmeans" and phases > 1
    if not fits and all(phase["train"] == "encoder" for phase in first):
        until["tokenizer"] = {name: value for name, value in options["tokenizer"].items() if name not in LATER}
        until["tokenizer_patch_dropout"] = DEFAULTS["tokenizer_patch_dropout"]
    return until


def shared_prefixes(specs: Sequence[RunSpec], out: Path) -> dict[str, list[Prefix]]:
    """By the hash of each run, those of its prefixes that another of these runs has, too, or that are trained."""
    of_runs = {spec.hash: prefixes_of(spec, out) for spec in specs}
    users = Counter(prefix.folder for prefixes in of_runs.values() for prefix in prefixes)
    return {
        key: [prefix for prefix in prefixes if users[prefix.folder] > 1 or prefix.folder.exists()]
        for key, prefixes in of_runs.items()
    }


def untrained(prefixes: Sequence[Prefix], folder: Path) -> set[Path]:
    """Folders of the prefixes that a run in `folder` would have to train before it goes on."""
    missing: set[Path] = set()
    if list_checkpoints(folder / "checkpoints"):
        return missing
    for prefix in reversed(prefixes):
        if prefix.folder.exists():
            break
        missing.add(prefix.folder)
    return missing


def branch(prefix: Prefix, folder: Path, args: PretrainArguments) -> None:
    """Let a run of `args` stand in `folder` as if it had done the phases of the prefix itself.

    Raises:
        CheckpointError: the prefix's checkpoint is broken.
    """
    state = load_newest(prefix.folder / "checkpoints")
    kmeans = args.tokenizer.get("tokenizer_type") == "kmeans"
    schedule = Schedule(args.phases, state["scheduled_samples"] / args.global_batch_size, args.steps_scale, kmeans)
    # A phase may have ended before its full length.
    lengths = [*state["lengths"], *schedule.lengths[prefix.phases :]]
    shutil.copy(prefix.folder / PRETRAINING.record, folder)  # at first: it says whose the folder is
    left_out = shutil.ignore_patterns("checkpoints", ".lock*")
    shutil.copytree(prefix.folder, folder, ignore=left_out, dirs_exist_ok=True)
    # At last: what is killed before begins again. Optimizers do not outlive a phase.
    state |= {"arguments": plain(args), "lengths": lengths, "optimizers": {}}
    save_checkpoint(folder / "checkpoints", state["step"], state, keep_last=1)


def remove_prefix(folder: Path) -> None:
    """Remove what the study wrote of a prefix, trained or in training."""
    for path in (folder, folder.with_suffix(".part")):
        if path.exists():
            remove_written(path, PRETRAINING)
            (path / ".lock").unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()
