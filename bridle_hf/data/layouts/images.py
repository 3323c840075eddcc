"""ImageNet (ILSVRC) as Kaggle gives it: class folders to train on, validation and test images flat."""

from collections import Counter
from pathlib import Path

from bridle_hf.data.layouts.files import Reading, lines_of, require_files, rows_with


SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
DATA = "ILSVRC/Data/CLS-LOC/"
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def read_imagenet(folder: Path, files: list[str]) -> Reading:
    """`LOC_synset_mapping.txt` names and numbers the classes; `ILSVRC/Data/CLS-LOC/` has `train/SYNSET/`, `val/` flat
    (labels in `LOC_val_solution.csv`) or in class folders, and `test/`, of which no labels are given."""
    require_files(folder, "imagenet", (SYNSETS, DATA.rstrip("/")))
    names = synset_names(folder / SYNSETS)
    reading = Reading(classes=tuple(names.values()))
    reading.files = {path: path for path in (path.replace("\\", "/") for path in files) if path.startswith(DATA)}
    flat = f"{DATA}val/"
    if any(path.startswith(flat) and path.count("/") == flat.count("/") for path in reading.files):
        require_files(folder, "imagenet", (SOLUTION,))
    if (folder / SOLUTION).exists() and not any(path.startswith(f"{flat}n") for path in reading.files):
        for line, row in rows_with(folder / SOLUTION, "ImageId", "PredictionString"):
            synset = row["PredictionString"].split()[0]
            name, where = f"{flat}{row['ImageId']}.JPEG", f"{folder / SOLUTION}, line {line}"
            reading.add(name, where, label=names.get(synset, synset), split="validation")
    for path in reading.files:
        part, *within = path.removeprefix(DATA).split("/")
        if part == "test":
            reading.listed.setdefault(path, {"label": None, "split": "test"})
        elif len(within) == 2 and part in _SPLITS:
            reading.listed.setdefault(path, {"label": names.get(within[0], within[0]), "split": _SPLITS[part]})
    return reading


def synset_names(path: Path) -> dict[str, str]:
    """Synset to name, in order; two that share a name have the synset behind it."""
    rows = [line.partition(" ") for _, line in lines_of(path)]
    count = Counter(name for _, _, name in rows)
    return {synset: name if count[name] == 1 else f"{name} ({synset})" for synset, _, name in rows}
