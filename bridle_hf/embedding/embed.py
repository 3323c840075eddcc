"""Embedding of a data set into a table, part by part: killed at any moment, it goes on where it was.

    bridle embed DIR_OR_HUB_ID --model DIR_OR_ID --output X.parquet

Which samples make up a part does not depend on what was done before, nor on the number of processes: nor do the rows.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError, MediaError, RunError
from bridle_hf.common.files import read_json, write_bytes, write_json, write_text
from bridle_hf.common.output_folder import EMBEDDING, changed, hash_of_names, prepare, release
from bridle_hf.data.finding import find_asked
from bridle_hf.data.modalities import load_config
from bridle_hf.data.sample import Sample, name_within
from bridle_hf.embedding.arguments import EmbedArguments
from bridle_hf.embedding.embedder import Embedder, Embedding
from bridle_hf.embedding.poolings import Layers
from bridle_hf.embedding.tables import FORMATS, Part, files_of, load_columns, load_values, part_bytes, write_table


logger = logging.getLogger(__name__)

# Of a part, which is what a run that is killed loses.
MOST_FILES, MOST_BYTES = 256, 64 << 20
# What may differ where a run goes on.
_FREE = {"overwrite"}


def embed(**options: Any) -> dict[str, Any]:
    """Embed a data set: `embed(data=DIR, model=DIR, output="X.parquet")`.

    Args:
        options: the fields of [`EmbedArguments`].

    Returns:
        `output`; `rows`, `samples` and `skipped`: how many.

    Raises:
        ArgumentError: arguments, model or data are not fit. RunError: no file could be embedded.
    """
    (args,) = make_arguments(EmbedArguments, recipe=None, values=options)
    return run_embedding(args)


def run_embedding(args: EmbedArguments) -> dict[str, Any]:
    """[`embed`], with its arguments."""
    state = PartialState(cpu=not torch.cuda.is_available())  # else processes on CPUs would not know of each other
    output = Path(args.output)
    folder = output.with_name(f"{output.name}.parts")
    layers = read_layers(args.layers)
    lock = None
    try:
        if output.suffix not in FORMATS:
            raise ValueError(f"--output {args.output}: expected a name that ends in {', '.join(FORMATS)}")
        config = load_config(args.model)
        samples = find_asked(args, config.modality)
        embedder = Embedder.from_pretrained(
            args.model, state.device, batch_size=args.batch_size, overlap=args.overlap, stride=args.stride
        )
        args = replace(args, stride=embedder.stride)
        shape = embedder.shape(args.level, layers, args.pooling)
        plan = _plan(args, samples, embedder)
        if state.is_main_process:
            lock = _prepare(output, folder, args, plan)
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    state.wait_for_everyone()
    try:
        paths = [folder / f"part-{number:06d}.npz" for number in range(len(plan["bounds"]) - 1)]
        mine = [number for number, path in enumerate(paths) if number % state.num_processes == state.process_index]
        for number in tqdm(mine, unit="part", disable=not state.is_main_process):
            if not paths[number].exists():
                some = samples[plan["bounds"][number] : plan["bounds"][number + 1]]
                part, skipped = _embed_part(embedder, some, args, layers, shape)
                write_bytes(paths[number], part_bytes(part, skipped))
        state.wait_for_everyone()
        result = _finish(output, folder, args, paths, shape, plan, len(samples)) if state.is_main_process else {}
        state.wait_for_everyone()
        return result
    finally:
        release(lock)


def read_layers(words: Sequence[str]) -> Layers:
    """`--layers` as `select_layers` takes it.

    Raises:
        ArgumentError: neither numbers, nor mean, nor all.
    """
    if list(words) in (["mean"], ["all"]):
        return words[0]
    try:
        numbers = [int(word) for word in words]
    except ValueError as error:
        raise ArgumentError(f"--layers {' '.join(words)}: numbers, or mean, or all") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _plan(args: EmbedArguments, samples: list[Sample], embedder: Embedder) -> dict[str, Any]:
    """What must be the same where a run goes on, and where its parts begin and end."""
    bounds, size = [0], 0
    for number, sample in enumerate(samples):
        size += os.path.getsize(sample.path) if sample.source is None and os.path.isfile(sample.path) else 0
        if number + 1 - bounds[-1] == MOST_FILES or size > MOST_BYTES or number + 1 == len(samples):
            bounds.append(number + 1)
            size = 0
    return {
        "kind": EMBEDDING.name,
        "arguments": vars(args),
        "weights": embedder.hash_of_weights(),
        "samples": hash_of_names([sample.path for sample in samples]),
        "bounds": bounds,
    }


def _prepare(output: Path, folder: Path, args: EmbedArguments, plan: dict[str, Any]) -> Any:
    """Make the folder of parts ready, to begin or to go on, and lock it."""
    there = [path for path in files_of(output) if path.exists()]
    if there and not args.overwrite and not folder.exists():
        raise ValueError(f"--output {output}: {there[0]} exists: give --overwrite to write it anew")
    lock = prepare(folder, EMBEDDING, {"data": args.data, "model": args.model}, resume=True)
    old = read_json(folder / EMBEDDING.record)
    if old is not None and args.overwrite and changed(plan, old, _FREE):
        release(lock)
        lock = prepare(folder, EMBEDDING, {}, overwrite=True)
        old = None
    if old is not None:
        differ = changed(plan["arguments"], old["arguments"], _FREE)
        if not differ and (plan["samples"], plan["bounds"]) != (old["samples"], old["bounds"]):
            differ = ["the files"]
        if not differ and plan["weights"] != old.get("weights"):
            differ = ["the weights of --model"]
        if differ:
            raise ValueError(f"{folder} was begun with other arguments: {'; '.join(differ)}: give --overwrite")
        logger.info("going on with what stands in %s", folder)
    write_json(folder / EMBEDDING.record, plan)
    return lock


def _embed_part(
    embedder: Embedder, samples: list[Sample], args: EmbedArguments, layers: Layers, shape: tuple[int, ...]
) -> tuple[Part, list[tuple[str, str]]]:
    found: list[Embedding] = []
    kept: list[Sample] = []
    skipped: list[tuple[str, str]] = []
    for sample, result in zip(samples, embedder.iterate(samples, args.level, layers, args.pooling)):
        if isinstance(result, MediaError):
            logger.warning("skipped %s: %s", sample.path, result.reason)
            skipped.append((sample.path, result.reason))
        else:
            found.append(result)
            kept.append(sample)
    rows = [1 if args.level == "clip" else len(entry.values) for entry in found]
    values = [entry.values[None] if args.level == "clip" else entry.values for entry in found]
    columns = {name: np.repeat(np.array(column, str), rows) for name, column in _names(kept, args.data).items()}
    if args.level != "clip" and embedder.config.modality != "image":
        columns["time"] = np.concatenate([entry.times for entry in found] or [np.empty(0)])
    if args.level == "patch":
        axes = ("band",) if embedder.config.modality == "audio" else ("row", "column")
        positions = np.concatenate([entry.positions for entry in found] or [np.empty((0, len(axes)), np.int64)])
        columns |= dict(zip(axes, positions.T))
    return Part(np.concatenate([np.empty((0, *shape), np.float32), *values]), columns), skipped


def _names(samples: list[Sample], data: str) -> dict[str, list[str]]:
    """What is known of the samples, by column; ids are relative to the folder of the data."""
    columns = {"id": [name_within(sample.path, data) for sample in samples]}
    for name in ("label", "split", "fold", "group"):
        columns[name] = [getattr(sample, name) or "" for sample in samples]
    columns["labels"] = [";".join(sample.labels or ()) for sample in samples]
    return columns


def _finish(
    output: Path, folder: Path, args: EmbedArguments, paths: list[Path], shape: tuple[int, ...], plan: dict, total: int
) -> dict[str, Any]:
    """The parts as one table; what was skipped beside it."""
    columns, lists = zip(*map(load_columns, paths))
    skipped = [entry for entries in lists for entry in entries]
    if len(skipped) == total:
        raise RunError(f"none of {total} files can be embedded; the first: {skipped[0][0]}: {skipped[0][1]}")
    used = {name for part in columns for name, column in part.items() if _is_used(name, column)}
    parts = (
        Part(load_values(path), {name: column for name, column in part.items() if name in used})
        for path, part in zip(paths, columns)
    )
    rows = sum(len(part["id"]) for part in columns)
    write_table(output, parts, (rows, *shape), {**plan["arguments"], "weights": plan["weights"]})
    listed = output.with_name(f"{output.name}.skipped.jsonl")
    lines = [json.dumps({"path": path, "reason": reason}, ensure_ascii=False) for path, reason in skipped]
    write_text(listed, "".join(f"{line}\n" for line in lines)) if lines else listed.unlink(missing_ok=True)
    shutil.rmtree(folder)
    return {"output": str(output), "rows": rows, "samples": total - len(skipped), "skipped": len(skipped)}


def _is_used(name: str, column: np.ndarray) -> bool:
    return name == "id" or column.dtype.kind != "U" or bool((column != "").any())
