"""Tests of event_metrics.py: sed_eval 0.2.1's own numbers, and what matching and segments must obey."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.probing.event_metrics import Event, _count_events, event_metrics


LABELS = ["bell", "dog", "rain", "siren"]
REFERENCES = [
    [(2.43, 2.6, "dog"), (0.15, 2.6, "dog"), (5.46, 7.66, "rain"), (4.89, 7.7, "bell"), (0.02, 2.6, "rain")],
    [(8.01, 10.82, "dog"), (3.22, 4.96, "bell")],
    [(2.15, 4.79, "rain"), (0.53, 1.57, "dog")],
    [],
    [(4.5, 5.8, "rain"), (5.58, 8.57, "dog"), (4.14, 6.43, "rain")],
    [(4.32, 5.06, "rain"), (7.22, 9.99, "rain")],
]
FOUND = [
    [(0.04, 2.44, "dog"), (5.62, 7.62, "bell"), (5.03, 7.73, "bell"), (0, 2.67, "rain"), (3.5, 3.95, "dog"),
     (4.73, 5.7, "rain")],
    [(8.13, 10.9, "dog"), (3.51, 5.5, "bell")],
    [(2.25, 4.43, "bell"), (0.35, 2.09, "dog"), (6.05, 6.69, "bell"), (8.48, 9.61, "dog")],
    [(8.34, 9.69, "dog")],
    [(4.53, 5.61, "rain"), (5.39, 8.76, "bell"), (4.39, 6.34, "rain"), (8.83, 11.7, "dog"), (8.75, 11.43, "bell")],
    [(4.45, 4.68, "bell"), (6.88, 10.11, "rain")],
]  # fmt: skip


def events(recordings):
    return [[Event(*event) for event in recording] for recording in recordings]


def test_numbers_are_those_of_sed_eval():
    """EventBasedMetrics(t_collar=0.2, percentage_of_length=0.5, event_matching_type="optimal") and
    SegmentBasedMetrics(time_resolution=1.0), each over all of the recordings."""
    assert event_metrics(events(REFERENCES), events(FOUND), LABELS) == pytest.approx({
        "event_f1": 0.3444444444444444,
        "event_f1_micro": 0.3529411764705882,
        "segment_f1": 0.5611111111111111,
        "segment_f1_micro": 0.5714285714285715,
    })  # fmt: skip


def test_a_class_that_is_nowhere_counts_by_its_wrong_events_alone():
    found = [*FOUND[:3], [*FOUND[3], (1.0, 2.0, "siren")], *FOUND[4:]]
    assert event_metrics(events(REFERENCES), events(found), LABELS) == pytest.approx({
        "event_f1": 0.3444444444444444,
        "event_f1_micro": 0.34285714285714286,
        "segment_f1": 0.5611111111111111,
        "segment_f1_micro": 0.5647058823529412,
    })  # fmt: skip


def test_nothing_is_0_and_all_is_1():
    assert set(event_metrics(events(REFERENCES), [[]] * 6, LABELS).values()) == {0.0}
    assert set(event_metrics([[]] * 2, [[]] * 2, LABELS).values()) == {0.0}
    assert set(event_metrics(events(REFERENCES), events(REFERENCES), LABELS).values()) == {1.0}


TIMES = st.integers(0, 12).map(lambda number: number / 10)


@given(*[st.lists(st.tuples(TIMES, TIMES.map(lambda length: length + 0.1)), max_size=4)] * 2)
@settings(max_examples=60, deadline=None)
def test_the_most_events_that_can_match_do(ours, theirs):
    """By trying all assignments."""
    references, found = ([Event(onset, onset + length, "x") for onset, length in entry] for entry in (ours, theirs))

    def match(pair):
        reference, event = pair
        slack = max(0.2, (reference.offset - reference.onset) / 2)
        return abs(reference.onset - event.onset) <= 0.2 and abs(reference.offset - event.offset) <= slack

    fewer, more = sorted((references, found), key=len)
    swapped = fewer is not references
    best = max(
        sum(match(pair[::-1] if swapped else pair) for pair in zip(fewer, chosen))
        for chosen in itertools.permutations(more, len(fewer))
    )
    assert _count_events(references, found)[0] == best
