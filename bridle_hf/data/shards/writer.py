"""Writer of shards, tar or parquet with the files' bytes inside, of a folder or of what else pretraining reads.

    bridle shard --data DIR --modality audio --output_dir OUT --num_workers 8

Writes OUT/<split>-000000.tar (or .parquet) and so on ("data-..." where there are no splits), OUT/index.jsonl, which
spares a run the scan of the shards, and OUT/skipped.jsonl with the files left out because they cannot be read. Samples
are mixed, so that any few shards in a row are a fair sample of all; bytes are copied as they are. The same input gives
the same bytes, whoever writes them: `--resume` makes just the shards that are missing.

In a tar, a sample is <key>.json (file name, label or labels, split, fold, group, events) and <key>.<extension>, as
WebDataset has it; in parquet, a row with the same as columns and the media as `datasets` has them. The order of the
classes, where the data have one, stands in the tar's global header, or in the type of the parquet column, and in the
index.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from bridle_hf.common.errors import ArgumentError, MediaError, RunError, TooManyBadFiles, reason_of
from bridle_hf.common.files import read_json, write_json, write_text
from bridle_hf.common.output_folder import SHARDS, prepare, release
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.decoding import check_audio, read_image, read_video
from bridle_hf.data.finding import find_asked
from bridle_hf.data.labels import class_orders
from bridle_hf.data.metadata import EVENT_FIELDS
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.order import Places
from bridle_hf.data.sample import SKIPPED, Sample, name_within
from bridle_hf.data.shards.arguments import ShardArguments
from bridle_hf.data.shards.entries import index_lines, scan
from bridle_hf.data.shards.listing import INDEX_NAME
from bridle_hf.data.shards.sources import Entry, Unreadable
from bridle_hf.data.shards.tars import CLASS_ORDER


logger = logging.getLogger(__name__)

COLUMNS = ("label", "labels", "split", "fold", "group", "events")
# A row group is read for each of its rows that are not at hand: small ones, but not so small that there are many.
ROW_GROUP_BYTES = 4 << 20
# How the bytes of the usual formats begin, for media without a file name: extension by (position, bytes).
SIGNATURES = {
    (8, b"WAVE"): ".wav", (0, b"fLaC"): ".flac", (0, b"OggS"): ".ogg", (0, b"ID3"): ".mp3", (0, b"\xff\xfb"): ".mp3",
    (0, b"\xff\xfa"): ".mp3", (0, b"\xff\xf3"): ".mp3", (0, b"\xff\xf2"): ".mp3", (0, b"\xff\xe3"): ".mp3",
    (8, b"AIFF"): ".aiff", (0, b".snd"): ".au", (0, b"caff"): ".caf", (0, b"riff"): ".w64",
    (0, b"\xff\xd8"): ".jpg", (0, b"\x89PNG"): ".png", (8, b"WEBP"): ".webp", (0, b"GIF8"): ".gif", (0, b"BM"): ".bmp",
    (0, b"II*\0"): ".tif", (0, b"MM\0*"): ".tif", (4, b"ftypavif"): ".avif", (4, b"ftyp"): ".mp4",
    (0, b"\x1aE\xdf\xa3"): ".mkv", (8, b"AVI "): ".avi",
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A sample on its way into a shard: its key and its columns there, `file_name` and those of `COLUMNS` it has."""

    key: str
    sample: Sample
    row: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """One shard to write: all that decides its bytes.

    Args:
        columns: those of the whole set, for parquet.
        class_order: see `Sample.class_order`.
    """

    name: str
    modality: str
    columns: tuple[str, ...]
    members: tuple[Member, ...]
    class_order: tuple[str, ...] | None = None


def make_shards(args: ShardArguments) -> dict[str, Any]:
    """Write the shards that are asked for and not there yet.

    Returns:
        `output_dir`, and how many `samples` are in how many `shards`, of how many that were `found`.

    Raises:
        ArgumentError: arguments, data or folder are not fit for it, or the disk is full.
        RunError: a worker died.
    """
    out = Path(args.output_dir)
    try:
        samples = find_asked(args, args.modality)
        plans = make_plans(args, samples)
        lock = prepare_shard_folder(out, args, plans)
        entries = write_shards(out, plans, args.num_workers, SkippedFiles(out / "skipped.jsonl", len(samples)))
        write_text(out / INDEX_NAME, "".join(index_lines(entries)))
        release(lock)
    except (ValueError, TooManyBadFiles) as error:
        raise ArgumentError(str(error)) from error
    except OSError as error:
        raise ArgumentError(f"{error}; mend this (output_dir is {out}), and --resume goes on") from error
    except BrokenProcessPool as error:
        raise RunError("a worker died, of memory most likely; go on with --resume, fewer workers") from error
    return {"output_dir": out, "samples": len(entries), "found": len(samples), "shards": len(plans)}


# --- What goes where ---


def make_plans(args: ShardArguments, samples: Sequence[Sample]) -> list[Plan]:
    """Shards of each split, their samples mixed; what cannot be read is found later, and changes no other shard."""
    order = mixed_order(samples)
    rows = [_row_of(sample, args.data) for sample in samples]
    columns = ("file_name", *(name for name in COLUMNS if any(name in row for row in rows)))
    class_order, plans, key = _class_order(samples), [], 0
    for split in sorted({sample.split or "data" for sample in samples}):
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise ValueError(f"split {split!r} of the data cannot begin the name of a file: give it another name")
        numbers = [number for number in order if (samples[number].split or "data") == split]
        for place, shard in enumerate(_chunks(args, samples, numbers)):
            members = tuple(Member(f"{key + i:09d}", samples[m], rows[m]) for i, m in enumerate(shard))
            name = f"{split}-{place:06d}.{args.format}"
            plans.append(Plan(name, args.modality, columns, members, class_order))
            key += len(shard)
    return plans


def _class_order(samples: Sequence[Sample]) -> tuple[str, ...] | None:
    orders = class_orders(samples)
    if len(orders) > 1:
        logger.warning("the label columns number the classes in different ways: the shards keep their names alone")
        return None
    return orders.pop()


def mixed_order(samples: Sequence[Sample]) -> np.ndarray:
    """A fixed permutation, (samples,) int64, of samples that lie in shards one that reads from few at a time."""
    places, rng = Places.of(samples), np.random.default_rng(0)
    return rng.permutation(len(samples)) if places is None else places.order(rng)


def _row_of(sample: Sample, data: str) -> dict[str, Any]:
    row = {"file_name": name_within(sample.path, data)}
    row |= {name: value for name in COLUMNS if (value := getattr(sample, name)) is not None}
    if sample.events is not None:
        row["events"] = [dict(zip(EVENT_FIELDS, event)) for event in sample.events]
    return row | {"labels": list(sample.labels)} if sample.labels else row


def _chunks(args: ShardArguments, samples: Sequence[Sample], numbers: Sequence[int]) -> Iterator[list[int]]:
    chunk, size = [], 0
    for number in numbers:
        added = 0 if args.samples_per_shard else _num_bytes(samples[number])
        full = (
            len(chunk) == args.samples_per_shard if args.samples_per_shard else size + added > args.shard_size_mb << 20
        )
        if chunk and full:
            yield chunk
            chunk, size = [], 0
        chunk.append(number)
        size += added
    yield chunk


def _num_bytes(sample: Sample) -> int:
    try:
        media = sample.media()
        return os.stat(media).st_size if isinstance(media, str) else len(media)
    except (MediaError, OSError):
        return 0  # whoever writes its shard reports it


def prepare_shard_folder(out: Path, args: ShardArguments, plans: Sequence[Plan]) -> FileLock:
    """Make the folder, or see that what it holds belongs to the same plans.

    Returns:
        Its lock: see `output_folder.prepare`.

    Raises:
        ValueError: it does not, or the folder is not for shards of these data.
    """
    samples = "\n".join(repr((plan.name, plan.columns, s.key, s.row)) for plan in plans for s in plan.members)
    samples += repr(plans[0].class_order) if plans[0].class_order else ""
    ours = {
        "kind": SHARDS.name,
        "modality": args.modality,
        "shards": len(plans),
        "plan": hashlib.sha256(samples.encode()).hexdigest(),
    }
    lock = prepare(out, SHARDS, {"data": args.data}, args.resume)
    theirs = read_json(out / SHARDS.record)
    if theirs not in (None, ours):
        raise ValueError(f"--resume: {out} was begun with other data or arguments: give the same, or start anew")
    write_json(out / SHARDS.record, ours)
    return lock


# --- Writing ---


def write_shards(out: Path, plans: Sequence[Plan], num_workers: int, ledger: SkippedFiles) -> list[Entry]:
    """Write the shards that are not there yet; returns what all of them hold. Bad files go to `ledger`, in order.

    Raises:
        TooManyBadFiles: see `SkippedFiles`. OSError: a shard cannot be written.
    """
    ledger.load_state_dict({})
    entries = []
    pool = ProcessPoolExecutor(num_workers, initializer=end_with_parent) if num_workers else None
    try:
        results = (pool.map if pool else map)(partial(finish_shard, out), plans)
        for found, skipped in tqdm(results, total=len(plans), unit="shard", disable=None):
            ledger.update(skipped)
            entries += found
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return entries


def end_with_parent() -> None:
    """End a worker as soon as its parent is gone; else it would wait for ever, and write where a resumed run does."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def finish_shard(out: Path, plan: Plan) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Write a shard unless it is there; returns what it holds, and (path, reason) of what it should but cannot."""
    path = out / plan.name
    skipped: list[tuple[str, str]] = []
    entries = _entries_of(path, plan)
    if entries is None:
        part = out / f".{plan.name}.part"
        write = write_tar if path.suffix == ".tar" else write_parquet
        write(part, plan, decodable(plan, skipped))
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        entries = _entries_of(path, plan) or []
    elif len(entries) < len(plan.members):
        for _ in decodable(plan, skipped):  # to tell again what was left out of it, and why
            pass
    if len(entries) + len(skipped) != len(plan.members):
        raise ValueError(f"{path} holds {len(entries)} samples, not what the data has for it now: delete it to go on")
    return entries, skipped


def _entries_of(path: Path, plan: Plan) -> list[Entry] | None:
    """What a shard holds; None if it is missing or broken."""
    try:
        entries = scan(str(path), plan.modality, MODALITIES[plan.modality].extensions, COLUMNS)
    except ValueError:
        return None
    return None if any(isinstance(entry.source, Unreadable) for entry in entries) else entries


def decodable(plan: Plan, skipped: list[tuple[str, str]]) -> Iterator[tuple[Member, bytes, str]]:
    """Each sample that can be decoded, with its bytes and its extension; others are added to `skipped`."""
    for member in plan.members:
        sample = member.sample
        try:
            media = sample.media()
            if isinstance(media, str):
                extension, media = Path(media).suffix.lower(), Path(media).read_bytes()
            else:
                extension = Path(sample.path).suffix.lower()
            if extension not in MODALITIES[plan.modality].extensions:
                extension = _extension_of(media, sample.path)
            decode(media, sample.path, plan.modality)
        except (OSError, *SKIPPED) as error:
            skipped.append((sample.path, reason_of(error)))
        else:
            yield member, media, extension


def _extension_of(media: bytes, path: str) -> str:
    for (position, signature), extension in SIGNATURES.items():
        if media[position : position + len(signature)] == signature:
            return extension
    raise MediaError(path, "has neither a file name nor a known signature, so that its format cannot be told")


def decode(media: bytes, name: str, modality: str) -> None:
    """Raise `MediaError` if it cannot be trained on; recordings and images are decoded whole, of videos both ends."""
    if modality == "audio":
        check_audio(media, name)
    elif modality == "video":
        read_video(media, name, lambda total, rate: np.array([0, total - 1]))
    else:
        read_image(media, name)


def write_tar(path: Path, plan: Plan, members: Iterator[tuple[Member, bytes, str]]) -> None:
    """A tar of the samples; nothing in it depends on when, where or by whom it was written."""
    order = {} if plan.class_order is None else {CLASS_ORDER: json.dumps(plan.class_order)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=order) as tar:
        for member, media, extension in members:
            text = json.dumps(member.row, ensure_ascii=False).encode()
            # The label first: if the shard is cut later, the media have theirs.
            for suffix, content in ((".json", text), (extension, media)):
                entry = tarfile.TarInfo(member.key + suffix)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_parquet(path: Path, plan: Plan, members: Iterator[tuple[Member, bytes, str]]) -> None:
    """A parquet file of the samples that `datasets` reads, too; the media are in the column named by the modality."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    text = datasets.Value("string")
    names = text if plan.class_order is None else datasets.ClassLabel(names=list(plan.class_order))
    seconds = datasets.Value("float64")
    events = datasets.List(dict(zip(EVENT_FIELDS, (seconds, seconds, text))))
    lists = {"label": names, "labels": datasets.List(names), "events": events}
    kinds = {name: lists.get(name, text) for name in plan.columns}
    media_kind = getattr(datasets, plan.modality.capitalize())()
    schema = datasets.Features({plan.modality: media_kind, **kinds}).arrow_schema
    stored = {"compression": "none", "use_dictionary": list(plan.columns), "write_page_checksum": True}
    with parquet.ParquetWriter(path, schema, **stored) as writer:
        rows, size = [], 0
        for member, media, extension in members:
            row = {plan.modality: {"bytes": media, "path": member.key + extension}, **member.row}
            if plan.class_order is not None:
                row |= {name: names.str2int(row[name]) for name in ("label", "labels") if name in row}
            rows.append(row)
            size += len(media)
            if size >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
