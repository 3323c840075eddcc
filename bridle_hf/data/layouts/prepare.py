"""metadata.csv and label_order.csv of a set: what its own files say, where it can be seen and changed.

    bridle prepare esc50 ESC-50-master

`--data ESC-50-master` then reads these two, with the same samples, labels and class numbers as the set's own files.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError
from bridle_hf.common.files import write_text
from bridle_hf.data.labels import LABEL_ORDER
from bridle_hf.data.layouts.arguments import PrepareArguments
from bridle_hf.data.layouts.lists import names_lists, read_lists
from bridle_hf.data.layouts.table import LAYOUTS, find_layout, read_layout
from bridle_hf.data.metadata import METADATA_NAMES, Columns
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import Sample


def prepare(**options: Any) -> dict[str, Any]:
    """Write metadata.csv of a set: `prepare(layout="esc50", data=DIR)`.

    Args:
        options: the fields of [`PrepareArguments`].

    Returns:
        `path` of metadata.csv; how many `samples`, `classes`, `splits` and `folds` it has.

    Raises:
        ArgumentError: the data is not laid out so, or there is a metadata.csv. It is a `ValueError`.
    """
    (args,) = make_arguments(PrepareArguments, recipe=None, values=options)
    return run_preparing(args)


def run_preparing(args: PrepareArguments) -> dict[str, Any]:
    """[`prepare`], with its arguments."""
    try:
        samples, folder = _samples(args)
        out = Path(args.output_dir) if args.output_dir else folder
        paths = [out / METADATA_NAMES[0], out / LABEL_ORDER]
        if (there := [path for path in paths if path.exists()]) and not args.overwrite:
            raise ValueError(f"{there[0]} is there: give --overwrite, or another --output_dir")
        out.mkdir(parents=True, exist_ok=True)
        order = samples[0].class_order
        rows = metadata_rows(samples, out)
        if order:
            numbered = [{"index": number, "mid": name, "display_name": name} for number, name in enumerate(order)]
            write_text(paths[1], _csv(numbered))
        else:
            paths[1].unlink(missing_ok=True)
        write_text(paths[0], _csv(rows))
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    return {
        "path": paths[0],
        "samples": len(samples),
        "classes": len(order or ()),
        "splits": len({sample.split for sample in samples} - {None}),
        "folds": len({sample.fold for sample in samples} - {None}),
    }


def _samples(args: PrepareArguments) -> tuple[list[Sample], Path]:
    """The samples, and the folder that they are of."""
    folder, layout = Path(args.data), args.layout
    modalities = [args.modality] if args.modality else list(MODALITIES)
    if layout == "folder":
        raise ValueError("--layout folder is what metadata.csv is read as: there is nothing to prepare")
    if layout in LAYOUTS:
        return read_layout(layout, folder, args.modality or LAYOUTS[layout].modality), folder
    if layout == "auto" and folder.is_dir():
        found = {modality: own for modality in modalities if (own := find_layout(folder, modality))}
        found = {modality: own for modality, own in found.items() if own[0] != "lists"} or found
        if not found:
            raise ValueError(f"{folder}: is not laid out as any of {', '.join(LAYOUTS)}, and has no list files")
        modality, (layout, folder) = next(iter(found.items()))
        if layout in LAYOUTS:
            return read_layout(layout, folder, modality), folder
    if not (names_lists(args.data) or folder.is_dir()):
        raise ValueError(f"{args.data}: neither a folder nor a list file")
    if args.modality is None:
        raise ValueError("give --modality: what the list files list")
    samples = read_lists(args.data, args.modality, Columns("label", "group", False))
    return samples, folder if folder.is_dir() else folder.parent


def metadata_rows(samples: list[Sample], out: Path) -> list[dict[str, str]]:
    """Rows of a metadata.csv in `out`, with the columns that any sample has; files elsewhere by their whole path.

    Raises:
        ValueError: of several labels, one has a ";" in it.
    """
    several = any(sample.labels is not None for sample in samples)
    root = out.resolve()
    rows = []
    for sample in samples:
        path = Path(os.path.abspath(sample.path))
        labels = ";".join(sample.labels or ())
        if several and labels.count(";") != max(len(sample.labels or ()) - 1, 0):
            raise ValueError(f"{sample.path}: a label of {sample.labels} has a ; in it, which stands between labels")
        rows.append({
            "file_name": (path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
            "labels" if several else "label": labels if several else sample.label or "",
            "split": sample.split or "", "fold": sample.fold or "", "group": sample.group or "",
        })  # fmt: skip
    kept = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in kept} for row in rows]


def _csv(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
