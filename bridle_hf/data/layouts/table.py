"""The table of layouts: what tells each, who reads it; a folder's layout, found by itself."""

import fnmatch
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from pathlib import Path

from bridle_hf.data.folds import split_of
from bridle_hf.data.layouts.events import BALANCED, SEGMENTS, read_audioset, read_fsd50k
from bridle_hf.data.layouts.files import PLACES, Reading, logger, refuse_other_encodings, samples_of, walk
from bridle_hf.data.layouts.images import SYNSETS, read_imagenet
from bridle_hf.data.layouts.lists import split_lists
from bridle_hf.data.layouts.sounds import (
    BACKGROUND_NOISE,
    SPEECH_LISTS,
    read_esc50,
    read_speech_commands,
    read_urbansound8k,
)
from bridle_hf.data.layouts.videos import (
    KINETICS_LISTS,
    SSV2,
    UCF_CLASSES,
    is_kinetics_csv,
    read_kinetics,
    read_ssv2,
    read_ucf101,
)
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import Sample


@dataclass(frozen=True)
class Layout:
    """How a set lies on disk as downloaded.

    Args:
        modality: of its samples.
        read: its folder, and the media files below it, to what the set's own files say.
        signs: patterns below the folder, one of which tells the layout (none: it is asked for by name alone).
        media: patterns of what it has beside its lists, to tell what is missing where these are.
        tells: whether a file that fits the pattern is one.
    """

    modality: str
    read: Callable[[Path, list[str]], Reading]
    signs: tuple[str, ...]
    media: tuple[str, ...] = ()
    tells: Callable[[Path], bool] = Path.exists


def _in_places(*names: str) -> tuple[str, ...]:
    return tuple(f"{place}/{name}".lstrip("/") for place in PLACES for name in names)


MAX_INSIDE = 50  # folders in a folder that may be one around a set

LAYOUTS = {
    "esc50": Layout("audio", read_esc50, ("meta/esc50.csv",), ("audio/[1-5]-*-[A-Z]-*.wav",)),
    "urbansound8k": Layout("audio", read_urbansound8k, ("metadata/UrbanSound8K.csv",), ("audio/fold10",)),
    "speech_commands": Layout("audio", read_speech_commands, tuple(SPEECH_LISTS.values()), (BACKGROUND_NOISE,)),
    "audioset": Layout(
        "audio", read_audioset, _in_places(*SEGMENTS), tuple(name.removesuffix(".csv") for name in SEGMENTS)
    ),
    "audioset_balanced": Layout("audio", partial(read_audioset, lists=BALANCED), ()),
    "fsd50k": Layout("audio", read_fsd50k, ("FSD50K.ground_truth",), ("FSD50K.dev_audio", "FSD50K.eval_audio")),
    "imagenet": Layout("image", read_imagenet, (SYNSETS,), ("ILSVRC",)),
    "kinetics": Layout("video", read_kinetics, KINETICS_LISTS, tells=is_kinetics_csv),
    "ssv2": Layout(
        "video", read_ssv2, ("labels/labels.json", *_in_places(f"{SSV2}*.json")), ("20bn-something-something-v2",)
    ),
    "ucf101": Layout("video", read_ucf101, _in_places(UCF_CLASSES, "trainlist0?.txt", "testlist0?.txt"), ("UCF-101",)),
}


def find_layout(folder: Path, modality: str) -> tuple[str, Path] | None:
    """The layout of a folder, or of one folder directly inside, and that folder; None where nothing tells one.

    `lists` are list files named like splits, directly inside.

    Raises:
        ValueError: several readings fit: names them.
    """
    names, inside = _listed(folder)
    found = [(name, place) for name, layout in LAYOUTS.items() if layout.modality == modality
             for place in _places(layout, folder, names, inside)]  # fmt: skip
    at_top = [reading for reading in found if reading[1] == folder]
    found = at_top or found
    if not found and (lists := split_lists(folder, names, modality)):
        found = [("lists", folder)]
        if folders := [name for name in sorted(names) if split_of(name) and (folder / name).is_dir()]:
            raise ValueError(
                f"{folder}: can be read by its list files ({', '.join(path.name for path in lists)}) or by its split "
                f"folders ({', '.join(folders)}): give --layout lists, or --layout folder"
            )
    if len(found) > 1:
        readings = " or ".join(f"{name} ({place})" for name, place in found)
        raise ValueError(
            f"{folder}: can be read as {readings}: give one of the folders, and --layout with one of these"
        )
    return found[0] if found else None


def half_there(folder: Path, modality: str) -> str:
    """What a folder lacks that has the media of a set, but not its lists; empty where it has no such media."""
    names = set(os.listdir(folder))
    for layout in LAYOUTS.values():
        if layout.modality == modality and any(_fits(layout, folder, sign, names) for sign in layout.media):
            try:
                layout.read(folder, [])
            except ValueError as error:
                return str(error)
    return ""


def _listed(folder: Path) -> tuple[set[str], list[Path]]:
    """Names of what is directly in a folder, and the folders among these, if they are few."""
    with os.scandir(folder) as found:
        # On a link to itself, `is_dir` of an entry raises.
        entries = [(each.name, os.path.isdir(each.path) if each.is_symlink() else each.is_dir()) for each in found]
    inside = sorted(folder / name for name, is_folder in entries if is_folder and not name.startswith("."))
    return {name for name, _ in entries}, inside if len(inside) <= MAX_INSIDE else []


def _places(layout: Layout, folder: Path, names: Collection[str], inside: Sequence[Path]) -> list[Path]:
    """The folder, if it has a sign of the layout; else those inside that have one. None of these is listed: they may
    hold many files."""
    if any(_fits(layout, folder, sign, names) for sign in layout.signs):
        return [folder]
    firsts = {sign: sign.split("/")[0] for sign in layout.signs}
    plain = {sign: first for sign, first in firsts.items() if not has_magic(first)}
    return [
        place
        for place in inside
        if any((place / first).exists() and _fits(layout, place, sign, (first,)) for sign, first in plain.items())
    ]


def _fits(layout: Layout, folder: Path, sign: str, names: Collection[str]) -> bool:
    """Whether a folder that has these names directly inside has what fits the sign."""
    first, _, rest = sign.partition("/")
    found = fnmatch.filter(names, first) if has_magic(first) else [first] if first in names else []
    paths = (path for name in found for path in ((folder / name).glob(rest) if rest else (folder / name,)))
    return any(path.exists() and layout.tells(path) for path in paths)


def read_layout(name: str, folder: Path, modality: str) -> list[Sample]:
    """The samples of a folder that is laid out so, sorted by path.

    Raises:
        ValueError: another modality; the set's own files are missing, broken, or do not fit its media.
    """
    layout = LAYOUTS[name]
    if layout.modality != modality:
        raise ValueError(f"--layout {name} is of {layout.modality}, not of {modality}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder: --layout {name} is for the set as downloaded and unpacked")
    places = _places(layout, folder, *_listed(folder))
    folder = places[0] if len(places) == 1 else folder
    files = [path for path in walk(folder) if path.lower().endswith(MODALITIES[modality].extensions)]
    refuse_other_encodings(folder, files)
    samples = samples_of(layout.read(folder, files), folder, name)
    folds = sorted({sample.fold for sample in samples} - {None}, key=lambda fold: (len(fold), fold))
    splits = sorted({sample.split for sample in samples} - {None})
    logger.info(
        "%s: read as %s: %d samples, %d classes, splits %s, folds %s", folder, name, len(samples),
        len(samples[0].class_order or ()), ", ".join(splits) or "none", ", ".join(folds) or "none",
    )  # fmt: skip
    return samples
