"""What a classifier is fine-tuned on: the classes, and which items train it and which test it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

from bridle_hf.common.arguments import FinetuneArguments
from bridle_hf.data.decoding import Item
from bridle_hf.data.finding import find_items
from bridle_hf.data.labels import Labels, split_by_groups


@dataclass
class Task:
    """Who is to be told from whom: the classes, and the items to train and to evaluate on."""

    labels: Labels
    train: list[Item]
    evaluation: list[Item]
    test: list[Item]
    held_out: str  # in words, for results.json
    targets: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # by item path

    @property
    def kind(self) -> str:
        return "multi_label" if self.labels.multi_label else "single_label"


def make_task(args: FinetuneArguments, config: Any, seed: int) -> Task:
    """Find the items, hold some out and number the classes.

    Raises:
        ValueError: nothing to evaluate on, an item without label, or a label seen in evaluation only.
    """
    items = find_items(args.data, config.modality, None, args.label_column, args.group_column)
    train, evaluation, test, held_out = split_items(items, args, seed)
    labels = Labels(train, args.label_order)
    labels.check_several(f"{args.data}: the training items")
    task = Task(labels, train, evaluation, test, held_out)
    for part in (train, evaluation, test):
        task.targets |= {item.path: target for item, target in zip(part, labels.encode(part))}
    return task


def split_items(
    items: list[Item], args: FinetuneArguments, seed: int
) -> tuple[list[Item], list[Item], list[Item], str]:
    """(to train on, to evaluate on after each epoch, to test the final model on or [], what is evaluated on in words).

    Raises:
        ValueError: more than one way to hold out is asked for, or none is and the data has no splits.
    """
    asked = [name for name in ("eval_split", "eval_fold", "eval_group", "validation_fraction") if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} both say what to evaluate on: give one")
    splits = {item.split for item in items} - {None}
    train = [item for item in items if item.split in (args.train_split, None)]
    if not train:
        raise ValueError(f"{args.data}: no items of split {args.train_split!r}; the splits are {sorted(splits)}")
    if asked and asked[0] != "eval_split":
        train, evaluation, held_out = _hold_out(train, args, seed)
        return train, evaluation, [item for item in items if item.split == "test"], held_out
    split = args.eval_split or next((name for name in ("validation", "test") if name in splits), None)
    evaluation = [item for item in items if item.split == split and split not in (None, args.train_split)]
    if not evaluation:
        raise ValueError(
            f"{args.data}: nothing to evaluate on (its splits: {sorted(splits) or 'none'}); give --eval_split, "
            "--eval_fold, --eval_group or --validation_fraction"
        )
    test = [item for item in items if item.split == "test" != split]
    return train, evaluation, test, f"split {split}"


def _hold_out(items: list[Item], args: FinetuneArguments, seed: int) -> tuple[list[Item], list[Item], str]:
    if args.eval_group:
        return *split_by_groups(items, args.eval_group), f"group {', '.join(args.eval_group)}"
    if args.eval_fold:
        unknown = set(args.eval_fold) - {item.fold for item in items}
        if unknown:
            found = sorted({str(item.fold) for item in items})
            raise ValueError(f"--eval_fold: no items of fold {', '.join(sorted(unknown))}; the folds are {found}")
        rest = [item for item in items if item.fold not in args.eval_fold]
        held_out = [item for item in items if item.fold in args.eval_fold]
        return rest, held_out, f"fold {', '.join(args.eval_fold)}"
    options = {"n_splits": 1, "test_size": args.validation_fraction, "random_state": seed}
    labels, groups = [item.label for item in items], [item.group for item in items]
    if None not in groups:
        chosen = GroupShuffleSplit(**options).split(items, labels, groups)
    elif None not in labels:
        chosen = StratifiedShuffleSplit(**options).split(items, labels)
    else:
        chosen = ShuffleSplit(**options).split(items)
    train, held_out = next(chosen)
    where = f"a random fraction of {args.validation_fraction} (seed {seed})"
    return [items[index] for index in train], [items[index] for index in held_out], where
