"""Cross-validation: a run for each fold, OUT/fold_NAME, one after the other; their mean and deviation in one file.

OUT/results.json has the folds that are done, each as in its own results.json, and in the end `evaluation` (means over
folds) and `deviation` (the sample standard deviation over folds). `--resume` goes on with the fold that broke off.
"""

import copy
import dataclasses
import gc
import logging
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from bridle_hf.common.files import read_json, write_json
from bridle_hf.common.output_folder import CROSS_VALIDATION, prepare, release, run_record
from bridle_hf.data.finding import find_asked
from bridle_hf.data.folds import canonical_split, fold_names
from bridle_hf.data.modalities import load_config
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.resume import check_unchanged, global_batch_size
from bridle_hf.finetuning.task import describe_samples
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments


logger = logging.getLogger(__name__)

RunOne = Callable[[FinetuneArguments, FinetuneTrainingArguments], dict[str, Any] | None]


@dataclasses.dataclass
class Folds:
    """The folds to run, and the results of those that are done, in a folder that is locked by rank 0."""

    names: list[str]
    results: dict[str, Any]
    lock: FileLock | None


def begin_folds(args: FinetuneArguments, training_args: FinetuneTrainingArguments, arguments: dict[str, Any]) -> Folds:
    """Find the folds and make the folder ready; all processes call it.

    Args:
        arguments: all of them, for run.json.

    Raises:
        ValueError: the data has no folds, another option says what to evaluate on, the folder is not fit, or what is
            resumed is another run.
    """
    out = Path(training_args.output_dir)
    if training_args.push_to_hub:
        raise ValueError("--push_to_hub pushes one model, and --folds all makes several: `bridle push` one of them")
    names, described = find_folds(args)
    run = run_record(
        CROSS_VALIDATION, arguments, args.data, training_args.seed,
        global_batch_size=global_batch_size(training_args), task=described,
    )  # fmt: skip
    lock, results = None, {}
    if PartialState().is_main_process:
        inputs = {"data": args.data, "model": args.model, "label_order": args.label_order}
        lock = prepare(out, CROSS_VALIDATION, inputs, args.resume, args.overwrite)
        if args.resume and (out / "run.json").exists():
            check_unchanged(out, run)
            results = (read_json(out / "results.json") or {}).get("folds", {})
        write_json(out / "run.json", run)
    (results,) = broadcast_object_list([results])
    return Folds(names, results, lock)


def run_folds(
    args: FinetuneArguments, training_args: FinetuneTrainingArguments, folds: Folds, run_one: RunOne
) -> dict[str, Any] | None:
    """Run every fold that is not done.

    Args:
        run_one: a run of fine-tuning; gives its results, or None if a signal ended it.

    Returns:
        What results.json holds; None if a signal ended a run.
    """
    out, names, results = Path(training_args.output_dir), folds.names, folds.results
    for number, name in enumerate(names, 1):
        logger.info("fold %s, %d of %d%s", name, number, len(names), ": done before" if name in results else "")
        if name in results:
            continue
        own = copy.copy(training_args)  # what a run sets in them is of this run
        own.output_dir = str(out / f"fold_{name}")
        found = run_one(dataclasses.replace(args, folds=None, eval_fold=[name], overwrite=False), own)
        if found is None:
            break
        results[name] = found
        gc.collect()  # the trainer's parts refer to each other, and to the model
        if PartialState().is_main_process:
            write_json(out / "results.json", summary(results, names))
    release(folds.lock)
    return summary(results, names) if len(results) == len(names) else None


def find_folds(args: FinetuneArguments) -> tuple[list[str], dict[str, int | str]]:
    """The folds to run, and what must be alike when they are resumed.

    Raises:
        ValueError: there are none, or another option says what to evaluate on.
    """
    for name in ("eval_split", "eval_fold", "eval_group", "validation_fraction"):
        if getattr(args, name):
            raise ValueError(f"--folds and --{name} both say what to evaluate on: give one")
    train_split = canonical_split(args.train_split)
    samples = find_asked(args, load_config(args.model).modality, need_labels=True)
    samples = [sample for sample in samples if sample.split in (train_split, None)]
    if all(sample.fold is None for sample in samples):
        raise ValueError(
            f"--folds all: {args.data} has no folds: give --validation_fraction, or a column `fold` in metadata.csv"
        )
    names = fold_names(samples)
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"--folds all: fold {name!r} cannot name a folder: give it another name")
    return names, describe_samples(samples, "train") | {"folds": " ".join(names)}


def summary(folds: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What results.json holds; means and deviations once all folds are there."""
    found: dict[str, Any] = {"metric": folds[next(iter(folds))]["metric"], "of_folds": len(names)}
    if len(folds) == len(names):
        measured = [folds[name]["evaluation"] for name in names]
        columns = {key: [entry[key] for entry in measured] for key in measured[0]}
        found |= {
            "evaluation": {key: statistics.fmean(values) for key, values in columns.items()},
            "deviation": {key: statistics.stdev(values) for key, values in columns.items()},
            "evaluated_on": f"folds {', '.join(names)}: mean of {len(names)} runs, each tested on a fold",
        }
    return found | {"folds": folds}
