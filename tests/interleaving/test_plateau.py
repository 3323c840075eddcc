"""Phases that end by evidence: the rule against a plain oracle, and what follows of a schedule when one ends."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.interleaving.plateau import Plateau
from bridle_hf.interleaving.schedule import Schedule


@pytest.fixture(scope="module")
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def entry(gain: float, over: int, **fields) -> dict:
    return {"train": "encoder", "steps": 200, "until": {"accuracy_gain": gain, "over": over}, **fields}


def oracle(accuracies: np.ndarray, gain: float, over: int, warmup: int) -> int:
    """Steps after which the phase is over; all of them where it never is. Rows of NaN are skipped steps."""
    levels = accuracies[warmup:].mean(axis=1)
    windows = levels[: len(levels) // over * over].reshape(-1, over)
    before = None
    for number, window in enumerate(windows):
        kept = window[~np.isnan(window)]
        if not len(kept):
            continue
        if before is not None and math.fsum(kept) / len(kept) - before < gain:
            return warmup + (number + 1) * over
        before = math.fsum(kept) / len(kept)
    return len(accuracies)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 30), st.floats(1e-4, 0.2), st.integers(0, 199))
def test_the_end_is_that_of_a_plain_rule_also_when_resumed(accelerator, seed, over, warmup, gain, resumed):
    rng = np.random.default_rng(seed)
    rising = 0.8 * (1 - np.exp(-np.arange(200) / 60))[:, None]
    accuracies = (rising + 0.05 * rng.random((200, 4))).astype(np.float32)
    accuracies[rng.random(200) < 0.1] = np.nan
    schedule = Schedule([{"train": "encoder", "steps": 7}, entry(gain, over, warmup_steps=warmup)], 1.0)
    plateau, done = Plateau(accelerator, schedule, 1), 0
    while done < 200:
        if done == resumed:
            state, plateau = plateau.state_dict(), Plateau(accelerator, schedule, 1)
            plateau.load_state_dict(state)
        metrics = {"encoder/accuracy": torch.from_numpy(accuracies[done])}
        done += 1
        if plateau.update(7 + done, {} if np.isnan(accuracies[done - 1]).any() else metrics):
            break
    assert done == oracle(accuracies.astype(np.float64), gain, over, warmup)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.data())
def test_phases_that_end_early_move_up_those_after_them(lengths, data):
    schedule = Schedule([{"train": "encoder", "steps": steps, "warmup_steps": 2} for steps in lengths], 1.0)
    full = Schedule([{"train": "encoder", "steps": steps, "warmup_steps": 2} for steps in lengths], 1.0)
    shorter = [data.draw(st.integers(1, steps)) for steps in lengths]
    for number, steps in enumerate(shorter):
        schedule.end_phase(number, sum(shorter[:number]) + steps)
    assert schedule.total_steps == sum(shorter)
    numbers = [schedule.phase_number(step) for step in range(schedule.total_steps)]
    assert numbers == [number for number, steps in enumerate(shorter) for _ in range(steps)]
    for number, steps in enumerate(shorter):
        for offset in range(steps):
            rates = schedule.learning_rates(schedule.starts[number] + offset)
            assert rates == full.learning_rates(full.starts[number] + offset)
    described = [(phase["steps"], phase["full_steps"]) for phase in schedule.describe()]
    assert described == list(zip(shorter, lengths))


def test_a_scale_shortens_the_windows():
    assert Schedule([entry(0.1, 40), {"train": "tokenizer", "steps": 3}], 1.0, 0.1).windows == [4, None]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"until": 5}, "until is 5: expected {accuracy_gain"),
        ({"until": {"accuracy_gain": 0.1}}, "expected {accuracy_gain"),
        ({"until": {"accuracy_gain": 0.1, "over": 4, "patience": 2}}, "expected {accuracy_gain"),
        ({"until": {"accuracy_gain": 0, "over": 4}}, "until.accuracy_gain is 0,"),
        ({"until": {"accuracy_gain": math.nan, "over": 4}}, "until.accuracy_gain is nan"),
        ({"until": {"accuracy_gain": "1e-3", "over": 4}}, "until.accuracy_gain is '1e-3'"),
        ({"until": {"accuracy_gain": 0.1, "over": 0}}, "until.over is 0"),
        ({"until": {"accuracy_gain": 0.1, "over": 2.0}}, "until.over is 2.0"),
        ({"train": "tokenizer"}, "until is for phases of train: encoder"),
        ({"train": "joint"}, "until is for phases of train: encoder"),
        ({"target": "patches"}, "with target: codes"),
    ],
    ids=str,
)
def test_wrong_evidence_is_refused(changes, expected):
    with pytest.raises(ValueError, match=r"phases\[0\]: ") as caught:
        Schedule([{**entry(0.1, 4), **changes}], 1.0)
    assert expected in str(caught.value)
