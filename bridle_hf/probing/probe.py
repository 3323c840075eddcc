"""Probe a frozen encoder (linear, nearest neighbours) beside an untrained one, the input itself and the majority.

    python training/probe.py --model DIR_OR_ID --data DIR_OR_HUB_ID [--random_init]

Folds are those of the column `fold`; else no group is in two folds, where items have a group; else each label is
spread evenly. Prints a table; the last line is JSON.
"""

import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

import bridle_hf  # noqa: F401 (registers the model with the Auto classes)
from bridle_hf.common.arguments import ArgumentError, Mapping, check_ranges, parse_arguments
from bridle_hf.data.batches import SkippedFiles, TooManyBadFiles
from bridle_hf.data.decoding import Item
from bridle_hf.data.finding import find_items
from bridle_hf.data.labels import Labels, assign_folds
from bridle_hf.data.loaders import load_config, load_processor, make_item_loader
from bridle_hf.probing.probes import format_probes, run_probes, untrained_encoder


@dataclass
class ProbeArguments:
    """Arguments of `training/probe.py`."""

    model: str = field(metadata={"help": "folder or Hub id of a saved encoder"})
    data: str = field(metadata={"help": "folder or Hub id of labelled recordings, images or clips"})
    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    group_column: str = field(default="group", metadata={"help": "column of the groups that folds keep together"})
    folds: int | None = field(
        default=None,
        metadata={"help": "number of folds where no column `fold` gives them (default: 5, or the groups)"},
    )
    loader: Mapping = field(
        default_factory=dict, metadata={"help": "arguments of the video loader, as {stride: 4, sampling: segments}"}
    )
    random_init: bool = field(default=False, metadata={"help": "random weights in place of the saved ones"})
    batch_size: int = field(default=64, metadata={"help": "items per forward pass"})
    num_workers: int = field(default=0, metadata={"help": "loader processes"})
    seed: int = field(default=0, metadata={"help": "of the random weights"})

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, 1e9), "num_workers": (0, 1e4)})


def main() -> None:
    (args,) = parse_arguments(ProbeArguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(args.model)
        items = find_items(args.data, config.modality, args.split, args.label_column, args.group_column)
        labels = Labels(items)
        labels.check_several(f"{args.data}: the items")
        folds = make_folds(items, args.folds)
        encoder = AutoModel.from_pretrained(args.model)
        load = make_item_loader(config, load_processor(args.model, config), args.loader)
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    if args.random_init:
        encoder = untrained_encoder(encoder, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        ledger = SkippedFiles(Path(folder) / "skipped.jsonl", len(items))
        try:
            rows = run_probes(
                encoder,
                items,
                load,
                labels,
                folds,
                ledger,
                controls=not args.random_init,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                device="cuda" if torch.cuda.is_available() else "cpu",
                seed=args.seed,
                name="untrained encoder" if args.random_init else "encoder",
            )
        except TooManyBadFiles as error:
            # The file that the error speaks of goes with the folder.
            raise ArgumentError(f"{args.data}: {len(ledger.reasons)} files cannot be read, see above") from error
    report(args, rows, items, labels, folds, ledger)


def make_folds(items: list[Item], num_folds: int | None) -> np.ndarray:
    """Fold number of each item: see `assign_folds`.

    Raises:
        ValueError: a number of folds is asked for where the column `fold` gives them, or cannot be had.
    """
    if num_folds is not None and any(item.fold is not None for item in items):
        raise ValueError("--folds: the data has a column `fold`, which gives the folds; leave --folds out")
    return assign_folds(items, num_folds)


def report(
    args: ProbeArguments,
    rows: list[dict[str, Any]],
    items: list[Item],
    labels: Labels,
    folds: np.ndarray,
    ledger: SkippedFiles,
) -> None:
    """Print the table, then all of it as one line of JSON."""
    num_folds = len(np.unique(folds))
    skipped = len(ledger.reasons)
    print(f"{len(items) - skipped} items ({skipped} skipped), {len(labels.names)} classes, {num_folds} folds")
    print(format_probes(rows))
    result = {
        "arguments": vars(args),
        "items": len(items) - skipped,
        "skipped": skipped,
        "classes": len(labels.names),
        "folds": num_folds,
        "probes": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
