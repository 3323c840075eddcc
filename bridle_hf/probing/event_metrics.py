"""Metrics of sound events: F1 of events, and of segments of a second, as sed_eval and DCASE count them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching


class Event(NamedTuple):
    """What sounds from `onset` to `offset`, in seconds."""

    onset: float
    offset: float
    label: str


ONSET_COLLAR = 0.2  # seconds that an onset may be wrong by
OFFSET_SHARE = 0.5  # of the length of an event, that an offset may be wrong by, if that is more
SEGMENT = 1.0  # seconds
EVENT_METRICS = ("event_f1", "segment_f1", "event_f1_micro", "segment_f1_micro")


def event_metrics(
    references: Sequence[Sequence[Event]], found: Sequence[Sequence[Event]], labels: Sequence[str]
) -> dict[str, float]:
    """F1 of events and of segments: the mean over the classes, and, as `_micro`, over all events.

    An event is right if a reference of its label has an onset within 0.2 s, and an offset within 0.2 s or half of its
    length; each answers for one. In segments of a second, a label is right if it sounds anywhere within one in both. A
    class without references does not count in the mean; where there is nothing to count, F1 is 0.

    Args:
        references, found: the events of each recording.
        labels: all classes.
    """
    metrics = {}
    for name, count in (("event_f1", _count_events), ("segment_f1", _count_segments)):
        counts = np.array([
            [count(*([event for event in events if event.label == label] for events in pair)) for label in labels]
            for pair in zip(references, found, strict=True)
        ]).sum(axis=0)  # fmt: skip
        sizes = counts[:, 1] + counts[:, 2]
        by_class, there = 2.0 * counts[:, 0] / np.maximum(sizes, 1), counts[:, 1] > 0
        metrics[name] = float(by_class[there].mean()) if there.any() else 0.0
        metrics[f"{name}_micro"] = float(2.0 * counts[:, 0].sum() / max(sizes.sum(), 1))
    return {name: metrics[name] for name in EVENT_METRICS}


def _count_events(references: list[Event], found: list[Event]) -> tuple[int, int, int]:
    """How many match, the most that can at the same time; how many there are; and how many were found."""
    if not references or not found:
        return 0, len(references), len(found)
    hits = np.array([[_matches(reference, event) for event in found] for reference in references])
    matching = maximum_bipartite_matching(csr_matrix(hits), perm_type="column")
    return int((matching >= 0).sum()), len(references), len(found)


def _matches(reference: Event, event: Event) -> bool:
    tolerance = max(ONSET_COLLAR, OFFSET_SHARE * (reference.offset - reference.onset))
    return abs(reference.onset - event.onset) <= ONSET_COLLAR and abs(reference.offset - event.offset) <= tolerance


def _count_segments(references: list[Event], found: list[Event]) -> tuple[int, int, int]:
    ours, theirs = (
        {
            segment
            for event in events
            for segment in range(math.floor(event.onset / SEGMENT), math.ceil(event.offset / SEGMENT))
        }
        for events in (references, found)
    )
    return len(ours & theirs), len(ours), len(theirs)
