"""metrics.jsonl: the numbers of its rows against numpy, crashes, and resuming."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.monitoring import MetricsLog, Monitor, read_metrics, write_json


POSITION = {"phase": 0, "kind": "joint", "iteration": 1}
RATES = {"encoder": 1e-3, "tokenizer": 2e-3}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def make_monitor(path, accelerator, **options) -> Monitor:
    log = MetricsLog(path)
    return Monitor(log, accelerator, total_steps=100, first_step=0, global_batch_size=8, **options)


def test_rows_hold_means_over_their_stretch_and_sums_of_counts(tmp_path, accelerator):
    rng = np.random.default_rng(0)
    losses, errors = rng.normal(size=5), rng.uniform(size=(5, 2))
    counts = rng.integers(0, 9, size=(5, 2, 4))
    counts[:, 1, 3] = 0
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator)
    for step in range(5):
        metrics = {"encoder/loss": torch.tensor(losses[step]), "counts": torch.tensor(counts[step], dtype=torch.float)}
        if step % 2 == 0:
            # The tokenizer learns at every second step alone: its mean is over those.
            metrics |= {"tokenizer/loss": torch.tensor(2 * losses[step])}
            metrics |= {"usage/quantization_error": torch.tensor(errors[step])}
            metrics |= {"usage/reseeded": torch.tensor([step, 0])}
        monitor.update(metrics if step != 3 else {}, waited=0.0)
        if step in (1, 4):
            monitor.flush(step + 1, POSITION, RATES, skipped_steps=int(step == 4))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert {name: first[name] for name in ("step", "samples", "skipped_steps", *POSITION)} == {
        "step": 2, "samples": 16, "skipped_steps": 0, **POSITION
    }  # fmt: skip
    assert (second["step"], second["samples"], second["skipped_steps"]) == (5, 40, 1)
    # Step 3 was skipped: it counts nowhere.
    expected = {"encoder/loss": losses[[2, 4]].mean(), "tokenizer/loss": 2 * losses[[2, 4]].mean()}
    assert all(math.isclose(second[name], value, rel_tol=1e-5) for name, value in expected.items())
    np.testing.assert_allclose(second["usage/quantization_error"], errors[[2, 4]].mean(axis=0), rtol=1e-5)
    assert second["usage/reseeded"] == [6, 0]
    shares = counts[[2, 4]].sum(axis=0) / counts[[2, 4]].sum(axis=(0, 2))[:, None]
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1)
    np.testing.assert_allclose(second["usage/perplexity"], np.exp(entropy), rtol=1e-5)
    np.testing.assert_allclose(second["usage/normalized_entropy"], entropy / np.log(4), rtol=1e-5)
    np.testing.assert_allclose(second["usage/used_fraction"], (shares > 0).mean(axis=1))
    assert (second["encoder/lr"], second["tokenizer/lr"]) == (1e-3, 2e-3)
    assert 0 <= second["data_wait_share"] <= 1 and second["samples_per_second"] > 0


def test_a_side_that_did_not_learn_has_no_rate_and_an_empty_stretch_no_row(tmp_path, accelerator):
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator, seconds=1000.0)
    monitor.flush(0, POSITION, RATES, 0)
    monitor.update({"encoder/loss": torch.tensor(1.0)}, waited=0.0)
    monitor.flush(1, POSITION, RATES, 0)
    monitor.event({"event": "phase_end", "step": 1})
    row, event = read_metrics(tmp_path / "metrics.jsonl")
    assert "encoder/lr" in row and "tokenizer/lr" not in row
    assert event["event"] == "phase_end"
    # The clock of a resumed run goes on.
    assert row["time"] >= 1000 and event["time"] >= row["time"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 40))
def test_resuming_cuts_rows_back(tmp_path, rows, resume_step, cut):
    """What lies behind the checkpoint goes, and so does a last line that a crash cut short."""
    path = tmp_path / "metrics.jsonl"
    written = [{"step": step, "note": 'naïve "quotes"\u2028'} for step in range(1, rows + 1)]
    text = "".join(json.dumps(row) + "\n" for row in written)
    path.write_text(text[: len(text) - cut], encoding="utf-8")
    whole = text[: len(text) - cut].count("\n") + (cut == 1)
    assert read_metrics(path) == written[:whole]
    log = MetricsLog(path, resume_step)
    log.write({"step": resume_step + 1})
    assert read_metrics(path) == [
        *(row for row in written[:whole] if row["step"] <= resume_step),
        {"step": resume_step + 1},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_with_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path)
    assert read_metrics(path) == [] and read_metrics(tmp_path / "absent.jsonl") == []


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_json(path, {"name": "Übung"})
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("training.monitoring.os.replace", lambda *args: (_ for _ in ()).throw(OSError()))
        write_json(path, {"name": "other"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Übung"}


def test_other_ranks_write_nothing(tmp_path, accelerator, capsys):
    monitor = Monitor(None, accelerator, total_steps=2, first_step=0, global_batch_size=8)
    monitor.update({"encoder/loss": torch.tensor(1.0)}, waited=0.0)
    monitor.flush(1, POSITION, RATES, 0)
    monitor.event({"event": "phase_end", "step": 1})
    monitor.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""
