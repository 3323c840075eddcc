"""Data sets of the study: how each is made, which recipe trains on it, and what its features are asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridle_hf.demos.data import make_digits, make_moving_digits, render_notes


@dataclass(frozen=True)
class Task:
    """A question to frozen features, in the columns of metadata.csv.

    Args:
        label: column of the answer.
        group: column of what folds keep together; without it, `fold`, or each label spread evenly.
        folds: how many, where `group` makes them.
        cluster: column of what the bootstrap draws together; `group` if not given, single samples where there is none.
    """

    label: str = "label"
    group: str = "group"
    folds: int | None = None
    cluster: str | None = None


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
}
