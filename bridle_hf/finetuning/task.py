"""Task of fine-tuning: the classes, and which samples train the classifier and which test it."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

from bridle_hf.common.output_folder import hash_of_names
from bridle_hf.data.finding import find_asked
from bridle_hf.data.folds import canonical_split, required, split_by_groups
from bridle_hf.data.labels import Labels
from bridle_hf.data.sample import Sample
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.probing.event_metrics import EVENT_METRICS
from bridle_hf.probing.metrics import METRIC_NAMES, TOP5


logger = logging.getLogger(__name__)


@dataclass
class Task:
    """Who is to be told from whom: the classes, and the samples to train and to evaluate on.

    `of_events`: what sounds when is to be told, of recordings with strong labels.
    """

    labels: Labels
    train: list[Sample]
    evaluation: list[Sample]
    test: list[Sample]
    held_out: str  # in words, for results.json
    targets: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # by sample path; none of events
    of_events: bool = False

    @property
    def kind(self) -> str:
        return "multi_label" if self.labels.multi_label else "single_label"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured, the first of which a best epoch is chosen by."""
        if self.of_events:
            return EVENT_METRICS
        more_than_5 = self.kind == "single_label" and len(self.labels.names) > 5
        return (METRIC_NAMES[self.kind], *((TOP5,) if more_than_5 else ()))

    def describe(self) -> dict[str, int | str]:
        """What must be alike when a run is resumed: numbers, and hashes of names and labels, JSON-serialisable."""
        described = {"number of classes": len(self.labels.names), "classes": hash_of_names(["", *self.labels.names])}
        for name in ("train", "evaluation", "test"):
            described |= describe_samples(getattr(self, name), name)
        return described


def describe_samples(samples: list[Sample], name: str) -> dict[str, int | str]:
    """Their number, and hashes of names and labels, JSON-serialisable."""
    labels = [repr(sample.events or (sample.label if sample.labels is None else sample.labels)) for sample in samples]
    return {
        f"number of {name} samples": len(samples),
        f"names of the {name} samples": hash_of_names([sample.path for sample in samples]),
        f"labels of the {name} samples": hash_of_names(["", *labels]),
    }


def make_task(args: FinetuneArguments, config: Any, seed: int) -> Task:
    """Find the samples, hold some out and number the classes.

    Raises:
        ValueError: nothing to evaluate on, a sample without label, or a label seen in evaluation only.
    """
    samples = find_asked(args, config.modality, need_labels=True)
    train, evaluation, test, held_out = split_samples(samples, args, seed)
    if any(sample.events is not None for sample in samples):
        return _task_of_events(args, config, Task(_labels_of_events(train, args), train, evaluation, test, held_out))
    labels = Labels(train, args.label_order)
    labels.check_several(f"{args.data}: the training samples")
    if PartialState().is_main_process:
        labels.log({"training": train, f"evaluation ({held_out})": evaluation})
    task = Task(labels, train, evaluation, test, held_out)
    for part in (train, evaluation, test):
        task.targets |= {sample.path: target for sample, target in zip(part, labels.encode(part))}
    return task


def _labels_of_events(train: list[Sample], args: FinetuneArguments) -> Labels:
    sounding = [sample for sample in train if sample.events]
    if not sounding:
        raise ValueError(f"{args.data}: no training sample has an event: fill onset, offset and {args.label_column}")
    return Labels(sounding, args.label_order)


def _task_of_events(args: FinetuneArguments, config: Any, task: Task) -> Task:
    """Recordings in which nothing sounds are of the task, too."""
    if config.modality != "audio":
        raise ValueError(
            f"{args.data}: strong labels are for audio, but --model {args.model} is for {config.modality}"
        )
    task.of_events = True
    parts = {"training": task.train, f"evaluation ({task.held_out})": task.evaluation, "test": task.test}
    for name, samples in parts.items():
        if missing := [sample.path for sample in samples if sample.events is None]:
            raise ValueError(f"{missing[0]} has no strong labels, and others have: give all an onset and an offset")
        sounding = [sample for sample in samples if sample.events]
        task.labels.encode(sounding)  # raises for a label that training has not
        if PartialState().is_main_process and sounding:
            count = sum(len(sample.events) for sample in sounding)
            logger.info("%s: %d recordings, of which %d have %d events", name, len(samples), len(sounding), count)
            task.labels.log({name: sounding})
    return task


def split_samples(
    samples: list[Sample], args: FinetuneArguments, seed: int
) -> tuple[list[Sample], list[Sample], list[Sample], str]:
    """(to train on, to evaluate on after each epoch, to test the final model on or [], what is evaluated on in words).

    Raises:
        ValueError: more than one way to hold out is asked for, or none is and the data has no splits.
    """
    asked = [name for name in ("eval_split", "eval_fold", "eval_group", "validation_fraction") if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} both say what to evaluate on: give one")
    splits = {sample.split for sample in samples} - {None}
    train_split = canonical_split(args.train_split)
    train = [sample for sample in samples if sample.split in (train_split, None)]
    if not train:
        raise ValueError(f"{args.data}: no samples of split {args.train_split!r}; the splits are {sorted(splits)}")
    if asked and asked[0] != "eval_split":
        train, evaluation, held_out = _hold_out(train, args, seed)
        return train, evaluation, [sample for sample in samples if sample.split == "test"], held_out
    split = (
        canonical_split(args.eval_split)
        if args.eval_split
        else next((name for name in ("validation", "test") if name in splits), None)
    )
    evaluation = [sample for sample in samples if sample.split == split and split not in (None, train_split)]
    if not evaluation:
        raise ValueError(
            f"{args.data}: nothing to evaluate on (its splits: {sorted(splits) or 'none'}); give --eval_split, "
            "--eval_fold, --eval_group or --validation_fraction"
        )
    test = [sample for sample in samples if sample.split == "test" != split]
    return train, evaluation, test, f"split {split}"


def _hold_out(samples: list[Sample], args: FinetuneArguments, seed: int) -> tuple[list[Sample], list[Sample], str]:
    if args.eval_group:
        return *split_by_groups(samples, args.eval_group), f"group {', '.join(args.eval_group)}"
    if args.eval_fold:
        unknown = set(args.eval_fold) - {sample.fold for sample in samples}
        if unknown:
            found = sorted({str(sample.fold) for sample in samples})
            raise ValueError(f"--eval_fold: no samples of fold {', '.join(sorted(unknown))}; the folds are {found}")
        rest = [sample for sample in samples if sample.fold not in args.eval_fold]
        held_out = [sample for sample in samples if sample.fold in args.eval_fold]
        return rest, held_out, f"fold {', '.join(args.eval_fold)}"
    options = {"n_splits": 1, "test_size": args.validation_fraction, "random_state": seed}
    labels = [sample.label for sample in samples]
    if any(sample.group is not None for sample in samples):
        groups = [required(sample, "group") for sample in samples]
        chosen = GroupShuffleSplit(**options).split(samples, labels, groups)
    elif None not in labels:
        chosen = StratifiedShuffleSplit(**options).split(samples, labels)
    else:
        chosen = ShuffleSplit(**options).split(samples)
    train, held_out = next(chosen)
    where = f"a random fraction of {args.validation_fraction} (seed {seed})"
    return [samples[index] for index in train], [samples[index] for index in held_out], where
