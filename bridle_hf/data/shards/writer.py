"""Make shards, tar or parquet with the files' bytes inside, of a folder or of anything else that pretraining reads.

    python training/shard.py --data DIR --modality audio --output_dir OUT --num_workers 8

Writes OUT/<split>-000000.tar (or .parquet) and so on ("data-..." where there are no splits), OUT/index.jsonl, which
spares a run the scan of the shards, and OUT/skipped.jsonl with the files left out because they cannot be read. Items
are mixed, so that any few shards in a row are a fair sample of all; bytes are copied as they are. The same input gives
the same bytes, whoever writes them: `--resume` makes just the shards that are missing.

In a tar, a sample is <key>.json (file name, label or labels, split, fold, group) and <key>.<extension>, as WebDataset
has it; in parquet, a row with the same as columns and the media as `datasets` has them.
"""

import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from bridle_hf.common.arguments import ArgumentError, parse_arguments
from bridle_hf.data.batches import Places, SkippedFiles, TooManyBadFiles
from bridle_hf.data.decoding import Item, MediaError, read_audio, read_image, read_video, reason_of
from bridle_hf.data.finding import find_items
from bridle_hf.data.loaders import MODALITIES
from bridle_hf.data.shards.entries import INDEX_NAME, Entry, index_line, scan
from bridle_hf.data.shards.sources import Unreadable
from bridle_hf.monitoring.monitor import write_text


COLUMNS = ("label", "labels", "split", "fold", "group")
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


@dataclass
class ShardArguments:
    """Arguments of `training/shard.py`."""

    data: str = field(metadata={"help": "folder, shards or Hub id of the recordings, images or clips"})
    output_dir: str = field(metadata={"help": "folder to write; must be empty without --resume"})
    modality: Literal["audio", "image", "video"] = field(default="audio", metadata={"help": "what the data is"})
    format: Literal["tar", "parquet"] = field(default="tar", metadata={"help": "of the shards"})
    shard_size_mb: int = field(default=256, metadata={"help": "bytes of media in a shard, at most, MiB"})
    items_per_shard: int | None = field(default=None, metadata={"help": "items in a shard, whatever their size"})
    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column that is kept as the label"})
    group_column: str = field(default="group", metadata={"help": "column that is kept as the group"})
    num_workers: int = field(default=0, metadata={"help": "processes that write; 0: this one"})
    resume: bool = field(default=False, metadata={"help": "make the shards that are missing in output_dir"})

    def __post_init__(self):
        for name, least in {"shard_size_mb": 1, "items_per_shard": 1, "num_workers": 0}.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= 1e9:
                raise ValueError(f"--{name} is {value}: expected {least} to 1e9")


@dataclass(frozen=True)
class Sample:
    """An item on its way into a shard: its key and its columns there, `file_name` and those of `COLUMNS` it has."""

    key: str
    item: Item
    row: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """One shard to write: all that decides its bytes. `columns` are those of the whole set, for parquet."""

    name: str
    modality: str
    columns: tuple[str, ...]
    samples: tuple[Sample, ...]


def main() -> None:
    (args,) = parse_arguments(ShardArguments)
    out = Path(args.output_dir)
    try:
        items = find_items(args.data, args.modality, args.split, args.label_column, args.group_column)
        plans = make_plans(args, items)
        prepare_folder(out, args, plans)
        entries = write_shards(out, plans, args.num_workers, SkippedFiles(out / "skipped.jsonl", len(items)))
        write_text(out / INDEX_NAME, "".join(map(index_line, entries)))
    except (ValueError, TooManyBadFiles) as error:
        raise ArgumentError(str(error)) from error
    except OSError as error:
        raise ArgumentError(f"{error}; mend this (output_dir is {out}), and --resume goes on") from error
    except BrokenProcessPool as error:
        raise SystemExit("error: a worker died, of memory most likely; go on with --resume, fewer workers") from error
    print(f"{len(entries)} of {len(items)} items in {len(plans)} shards in {out}")


# ---------------------------------------------------------------------------------------------------------------------
# What goes where
# ---------------------------------------------------------------------------------------------------------------------


def make_plans(args: ShardArguments, items: Sequence[Item]) -> list[Plan]:
    """Shards of each split, their items mixed; what cannot be read is found later, and changes no other shard."""
    order = mixed_order(items)
    rows = [_row_of(item, args.data) for item in items]
    columns = ("file_name", *(name for name in COLUMNS if any(name in row for row in rows)))
    plans, key = [], 0
    for split in sorted({item.split or "data" for item in items}):
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise ValueError(f"split {split!r} of the data cannot begin the name of a file: give it another name")
        members = [number for number in order if (items[number].split or "data") == split]
        for number, shard in enumerate(_chunks(args, items, members)):
            samples = tuple(Sample(f"{key + i:09d}", items[m], rows[m]) for i, m in enumerate(shard))
            name = f"{split}-{number:06d}.{args.format}"
            plans.append(Plan(name, args.modality, columns, samples))
            key += len(shard)
    return plans


def mixed_order(items: Sequence[Item]) -> np.ndarray:
    """A fixed permutation, (items,) int64, of items that lie in shards one that reads from few at a time."""
    places, rng = Places.of(items), np.random.default_rng(0)
    return rng.permutation(len(items)) if places is None else places.order(rng)


def _row_of(item: Item, data: str) -> dict[str, Any]:
    # However the folder is spelled, as "./notes": items of a folder are named by its plain path.
    name = item.path.removeprefix(data.rstrip("/") + "/").removeprefix(f"{Path(data)}/")
    row = {"file_name": name}
    row |= {name: value for name in COLUMNS if (value := getattr(item, name)) is not None}
    return row | {"labels": list(item.labels)} if item.labels else row


def _chunks(args: ShardArguments, items: Sequence[Item], members: Sequence[int]) -> Iterator[list[int]]:
    chunk, size = [], 0
    for member in members:
        added = 0 if args.items_per_shard else _num_bytes(items[member])
        full = len(chunk) == args.items_per_shard if args.items_per_shard else size + added > args.shard_size_mb << 20
        if chunk and full:
            yield chunk
            chunk, size = [], 0
        chunk.append(member)
        size += added
    yield chunk


def _num_bytes(item: Item) -> int:
    try:
        media = item.media()
        return os.stat(media).st_size if isinstance(media, str) else len(media)
    except (MediaError, OSError):
        return 0  # whoever writes its shard reports it


def prepare_folder(out: Path, args: ShardArguments, plans: Sequence[Plan]) -> None:
    """Make the folder, or see that what it holds belongs to the same plans.

    Raises:
        ValueError: it does not.
    """
    samples = "\n".join(repr((plan.name, plan.columns, s.key, s.row)) for plan in plans for s in plan.samples)
    ours = {"modality": args.modality, "shards": len(plans), "plan": hashlib.sha256(samples.encode()).hexdigest()}
    path = out / "plan.json"
    if out.exists() and any(out.iterdir()):
        if not args.resume:
            raise ValueError(f"output_dir {out} is not empty: give --resume to go on, or another folder")
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if theirs != ours:
            raise ValueError(f"--resume: {out} was begun with other data or arguments: give the same, or start anew")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(ours) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


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
        write(part, plan, readable(plan, skipped))
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        entries = _entries_of(path, plan) or []
    elif len(entries) < len(plan.samples):
        for _ in readable(plan, skipped):  # to tell again what was left out of it, and why
            pass
    if len(entries) + len(skipped) != len(plan.samples):
        raise ValueError(f"{path} holds {len(entries)} items, not what the data has for it now: delete it to go on")
    return entries, skipped


def _entries_of(path: Path, plan: Plan) -> list[Entry] | None:
    """What a shard holds; None if it is missing or broken."""
    try:
        entries = scan(str(path), plan.modality, MODALITIES[plan.modality].extensions, COLUMNS)
    except ValueError:
        return None
    return None if any(isinstance(entry.source, Unreadable) for entry in entries) else entries


def readable(plan: Plan, skipped: list[tuple[str, str]]) -> Iterator[tuple[Sample, bytes, str]]:
    """Each sample that can be decoded, with its bytes and its extension; others are added to `skipped`."""
    for sample in plan.samples:
        item = sample.item
        try:
            media = item.media()
            if isinstance(media, str):
                extension, media = Path(media).suffix.lower(), Path(media).read_bytes()
            else:
                extension = Path(item.path).suffix.lower()
            if extension not in MODALITIES[plan.modality].extensions:
                extension = _extension_of(media, item.path)
            decode(media, item.path, plan.modality)
        except (OSError, ValueError) as error:
            skipped.append((item.path, reason_of(error)))
        else:
            yield sample, media, extension


def _extension_of(media: bytes, path: str) -> str:
    for (position, signature), extension in SIGNATURES.items():
        if media[position : position + len(signature)] == signature:
            return extension
    raise MediaError(path, "has neither a file name nor a known signature, so that its format cannot be told")


def decode(media: bytes, name: str, modality: str) -> None:
    """Raise `MediaError` if it cannot be trained on; recordings and images are decoded whole, of films both ends."""
    if modality == "audio":
        read_audio(media, name)
    elif modality == "video":
        read_video(media, name, lambda total, rate: np.array([0, total - 1]))
    else:
        read_image(media, name)


def write_tar(path: Path, plan: Plan, samples: Iterator[tuple[Sample, bytes, str]]) -> None:
    """A tar of the samples; nothing in it depends on when, where or by whom it was written."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, media, extension in samples:
            text = json.dumps(sample.row, ensure_ascii=False).encode()
            # The label first: if the shard is cut later, the media have theirs.
            for suffix, content in ((".json", text), (extension, media)):
                member = tarfile.TarInfo(sample.key + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, plan: Plan, samples: Iterator[tuple[Sample, bytes, str]]) -> None:
    """A parquet file of the samples that `datasets` reads, too; the media are in the column named by the modality."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    text = datasets.Value("string")
    kinds = {name: datasets.List(text) if name == "labels" else text for name in plan.columns}
    media_kind = getattr(datasets, plan.modality.capitalize())()
    schema = datasets.Features({plan.modality: media_kind, **kinds}).arrow_schema
    stored = {"compression": "none", "use_dictionary": list(plan.columns), "write_page_checksum": True}
    with parquet.ParquetWriter(path, schema, **stored) as writer:
        rows, size = [], 0
        for sample, media, extension in samples:
            rows.append({plan.modality: {"bytes": media, "path": sample.key + extension}, **sample.row})
            size += len(media)
            if size >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


if __name__ == "__main__":
    main()
