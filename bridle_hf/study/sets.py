"""Data sets of the study: how each is made, which recipe trains on it, and what its features are asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bridle_hf.demos.data import make_digits, make_moving_digits, render_notes
from bridle_hf.sets.creatures import make_creatures
from bridle_hf.sets.pictures import make_emoji, make_fashion
from bridle_hf.sets.speech import make_keywords, make_spoken


@dataclass(frozen=True)
class Task:
    """A question to frozen features, in the columns of metadata.csv.

    Args:
        label: column of the answer.
        group: column of what folds keep together; without it, `fold`, or each label spread evenly.
        folds: how many, where `group` makes them.
        cluster: column of what the bootstrap draws together; `group` if not given, single samples where there is none.
        tested: the one group that is tested, by a probe trained on all others; every group in turn if not given.
    """

    label: str = "label"
    group: str = "group"
    folds: int | None = None
    cluster: str | None = None
    tested: str | None = None


@dataclass(frozen=True)
class StudySet:
    """A data set.

    Args:
        make: its folder, made once, below a folder for caches.
        recipe, options: what pretrains on it; options are as of `bridle_hf.pretrain`.
        tasks: by name; the first is the one that counts.
    """

    make: Callable[[str | None], str]
    recipe: str
    tasks: Mapping[str, Task]
    options: Mapping[str, Any] = field(default_factory=dict)


SPEECH = {"masks": {"random": 1.0, "mel_band": 1.0}}
SETS: dict[str, StudySet] = {
    # Octave 4 is kept for the report.
    "notes": StudySet(
        render_notes,
        "audio_demo",
        {
            "instrument": Task(folds=3, cluster="program"),
            "pitch class": Task("pitch_class", "program", folds=4),
        },
        {"exclude_groups": ["4"]},
    ),
    "digits": StudySet(make_digits, "image_demo", {"digit": Task()}),
    "moving_digits": StudySet(make_moving_digits, "video_demo", {"direction": Task(folds=5)}),
    # Those that are reported: recipes of the sets above, with no more changed than sizes, statistics of the pixels
    # and, as speech is not steady, masks.
    "notes_musescore": StudySet(
        partial(render_notes, soundfont="MuseScore_General_Lite"),
        "audio_demo",
        {"instrument": Task(cluster="program", tested="4"), "pitch class": Task("pitch_class", "program", folds=4)},
        {"exclude_groups": ["4"]},
    ),
    "keywords": StudySet(make_keywords, "audio_demo", {"word": Task(folds=4)}, SPEECH),
    "spoken": StudySet(
        make_spoken, "audio_demo", {"language": Task(folds=4)}, {**SPEECH, "encoder": {"max_length": 32}}
    ),
    "emoji": StudySet(
        make_emoji,
        "image_demo",
        {"category": Task(folds=5)},
        {
            "encoder": {"image_size": 64, "patch_size": 16, "num_channels": 3},
            "processor": {"image_mean": [0.7, 0.7, 0.7], "image_std": [0.3, 0.3, 0.3]},
        },
    ),
    "fashion": StudySet(
        make_fashion,
        "image_demo",
        {"kind": Task(folds=5)},
        {"processor": {"image_mean": [0.29], "image_std": [0.35]}},
    ),
    "creatures": StudySet(
        make_creatures,
        "video_demo",
        {"action": Task(folds=5), "direction": Task("direction", folds=5)},
        {"processor": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.1, 0.1]}},
    ),
}
