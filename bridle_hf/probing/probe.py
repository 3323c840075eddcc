"""Probing of a frozen encoder (linear, nearest neighbours) beside an untrained one, the input itself and the majority.

    bridle probe --model DIR_OR_ID --data DIR_OR_HUB_ID [--random_init]

Folds are those of the data (column `fold`, or a set's own); else no group is in two folds, where samples have one;
else each label is spread evenly. The last line that the command prints is JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

import bridle_hf  # noqa: F401 (registers the model with the Auto classes)
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError, TooManyBadFiles
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.finding import find_asked
from bridle_hf.data.folds import assign_folds
from bridle_hf.data.labels import Labels
from bridle_hf.data.modalities import load_config, load_processor, load_weights, make_sample_loader
from bridle_hf.data.sample import Sample
from bridle_hf.probing.arguments import ProbeArguments
from bridle_hf.probing.features import untrained_encoder
from bridle_hf.probing.probes import format_probes, run_probes
from bridle_hf.probing.readouts import run_readouts


def probe(**options: Any) -> dict[str, Any]:
    """Probe a frozen encoder: `probe(model=DIR, data=DIR)`.

    Args:
        options: the fields of [`ProbeArguments`].

    Returns:
        `probes`: rows of the table, see [`run_probes`] and [`run_readouts`]; `samples`, `skipped`, `classes`, `folds`:
        how many; `arguments`.

    Raises:
        ArgumentError: arguments or data are not fit to be probed. It is a `ValueError`.
    """
    (args,) = make_arguments(ProbeArguments, recipe=None, values=options)
    return run_probing(args)


def run_probing(args: ProbeArguments) -> dict[str, Any]:
    """[`probe`], with its arguments."""
    try:
        config = load_config(args.model)
        samples = find_asked(args, config.modality, need_labels=True)
        labels = Labels(samples)
        labels.check_several(f"{args.data}: the samples")
        labels.log({"probes": samples})
        folds = make_folds(samples, args.folds)
        encoder = load_weights(AutoModel, args.model)
        load = make_sample_loader(config, load_processor(args.model, config), args.loader)
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    if args.random_init:
        encoder = untrained_encoder(encoder, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        ledger = SkippedFiles(Path(folder) / "skipped.jsonl", len(samples))
        try:
            of = (encoder, samples, load, labels, folds, ledger)
            how = {
                "controls": not args.random_init,
                "batch_size": args.batch_size,
                "num_workers": args.num_workers,
                "seed": args.seed,
                "name": "untrained encoder" if args.random_init else "encoder",
            }
            rows = run_probes(*of, device="cuda" if torch.cuda.is_available() else "cpu", **how)
            if args.readouts:
                rows += run_readouts(args.readouts, *of, **how)
        except TooManyBadFiles as error:
            # The file that the error speaks of goes with the folder.
            raise ArgumentError(f"{args.data}: {len(ledger.reasons)} files cannot be read, see above") from error
    skipped = len(ledger.reasons)
    return {
        "arguments": vars(args),
        "samples": len(samples) - skipped,
        "skipped": skipped,
        "classes": len(labels.names),
        "folds": len(set(folds.tolist()) - {-1}),
        "probes": rows,
    }


def make_folds(samples: list[Sample], asked: str | int | None) -> np.ndarray:
    """Fold number of each sample: see `assign_folds`.

    Args:
        asked: how many, `all` those of the data, or None for these where there are any.

    Raises:
        ValueError: a number of folds is asked for where the data has folds, or `all` where it has none; or they cannot
            be had.
    """
    there = any(sample.fold is not None for sample in samples)
    if asked == "all" and not there:
        raise ValueError("--folds all: the data has no folds: give their number, or a column `fold` in metadata.csv")
    if asked not in (None, "all") and there:
        raise ValueError("--folds: the data has folds of its own (column `fold`): leave --folds out, or give all")
    return assign_folds(samples, None if asked in (None, "all") else int(asked))


def probe_lines(result: dict[str, Any]) -> list[str]:
    """What [`probe`] returns as a table, then all of it as one line of JSON."""
    counts = "{samples} samples ({skipped} skipped), {classes} classes, {folds} folds".format(**result)
    return [counts, format_probes(result["probes"]), json.dumps(result)]
