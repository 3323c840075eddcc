"""What a run tells: rows of metrics.jsonl against numpy, speeds, time left, trackers; crashes and resuming."""

import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers.tiny_run import run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_flops import make_batch, make_configs

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.common.files import write_json
from bridle_hf.common.output_folder import git_revision
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops
from bridle_hf.monitoring.metrics_log import MetricsLog, read_metrics
from bridle_hf.monitoring.monitor import Monitor
from bridle_hf.monitoring.trackers import check_tracker, start_tracker


POSITION = {"phase": 0, "kind": "joint", "iteration": 1}
RATES = {"encoder": 1e-3, "tokenizer": 2e-3}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def make_flops() -> ScheduleFlops:
    """A joint phase and one of the tokenizer, 100 steps in all, of small models."""
    phases = [{"train": "joint", "steps": 60, "tokenizer_every": 3}, {"train": "tokenizer", "steps": 40}]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 32}
    schedule = Schedule(phases, steps_per_epoch=1.0)
    return ScheduleFlops(schedule, BridleConfig(**sizes), BridleTokenizerConfig(**sizes), masks={})


def make_monitor(path, accelerator, **options) -> Monitor:
    options = {"flops": make_flops(), "peak_tflops": 1.0, "first_step": 0, "global_batch_size": 8, **options}
    return Monitor(None if path is None else MetricsLog(path), accelerator, **options)


def update(monitor: Monitor, metrics: dict, waited: float = 0.0) -> None:
    monitor.update(metrics, time.monotonic(), waited)


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
        update(monitor, metrics if step != 3 else {})
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


@pytest.fixture
def clock(monkeypatch):
    """`time.monotonic()` of the monitor, moved by hand."""
    now = [1000.0]
    monkeypatch.setattr("bridle_hf.monitoring.monitor.time.monotonic", lambda: now[0])
    return now


def test_speeds_are_those_of_the_steps_alone(tmp_path, accelerator, clock):
    flops = make_flops()
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator, flops=flops, peak_tflops=2.0)
    for step in range(58, 66):
        monitor.done = step
        monitor.update({}, began=clock[0], waited=0.5)
        clock[0] += 2.0
        if step in (59, 61):
            monitor.flush(step + 1, POSITION, RATES, 0)
            clock[0] += 100.0  # a save, a probe
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    for row, steps in ((first, (58, 59)), (second, (60, 61))):
        assert row["samples_per_second"] == 8 / 2.0 and row["data_wait_share"] == 0.25
        expected = sum(flops.of_step(step) for step in steps) * 8 / 4.0
        assert math.isclose(row["flops_per_second"], expected, rel_tol=1e-5)
        assert math.isclose(row["mfu"], expected / 2e12, rel_tol=1e-5)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert math.isclose(second["memory_gib"], resident, rel_tol=0.2)


def test_time_left_follows_the_flops_of_later_phases(tmp_path, accelerator, clock):
    """Where a FLOP takes as long in every phase, what is told to be left is what it takes in the end."""
    flops = make_flops()
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator, flops=flops)
    told = {}
    for step in range(100):
        monitor.update({}, began=clock[0], waited=0.0)
        clock[0] += flops.of_step(step) * 1e-6
        told[step + 1] = clock[0], monitor.seconds_left()
    end = clock[0]
    # Within the joint phase steps differ: only whole rounds of three are told exactly.
    for step in (3, 30, 60, 61, 80, 99):
        assert math.isclose(told[step][1], end - told[step][0], rel_tol=1e-9), step
    assert told[100][1] == 0


def test_progress_bar(tmp_path, accelerator, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator)
    update(monitor, {"encoder/loss": torch.tensor(2.5), "tokenizer/loss": torch.tensor(0.25)})
    monitor.flush(1, POSITION, RATES, 0)
    monitor.bar.refresh()
    monitor.close()
    shown = capsys.readouterr().err
    beside = r"\[.*encoder loss 2.5, tokenizer loss 0.25, .* samples/s, wait 0%, left \d+:"
    assert re.search(r"joint 1: +1%\|.*1/100 " + beside, shown)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_gradient_norms_of_parts_make_up_the_whole(accelerator, max_grad_norm):
    """Before clipping, against the norm that torch takes of all gradients; and each by autograd, part by part."""
    encoder, tokenizer = make_configs("audio")
    schedule = Schedule([{"train": "joint", "steps": 2, "tokenizer_every": 1}], steps_per_epoch=1.0)
    interleaving = Interleaving(accelerator, schedule, encoder, tokenizer, seed=0, max_grad_norm=max_grad_norm)
    interleaving.enter_phase(0, lambda: iter([make_batch(encoder, 40)]))
    metrics = interleaving.step(0, make_batch(encoder, 4))
    parts = {"encoder": {"embeddings", "layers", "decoder"},
             "tokenizer": {"embeddings", "layers", "projection", "estimator"}}  # fmt: skip
    for side, names in parts.items():
        found = {name.split("/")[-1]: float(value) for name, value in metrics.items() if f"{side}/grad_norm/" in name}
        assert found.keys() == names
        total = math.sqrt(sum(value**2 for value in found.values()))
        assert math.isclose(total, float(metrics[f"{side}/grad_norm"]), rel_tol=1e-4)


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


# Trackers


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    check_tracker("none")
    check_tracker("tensorboard")
    monkeypatch.setattr("bridle_hf.monitoring.trackers.get_available_trackers", list)
    for name in ("tensorboard", "trackio"):
        with pytest.raises(ValueError, match=f"--tracker {name}: the package is not installed; pip install {name}"):
            check_tracker(name)


def test_every_tracker_that_accelerate_knows_is_taken_by_name(monkeypatch):
    monkeypatch.setattr("bridle_hf.monitoring.trackers.get_available_trackers", lambda: list(LOGGER_TYPE_TO_CLASS))
    assert len(LOGGER_TYPE_TO_CLASS) > 5
    for name in LOGGER_TYPE_TO_CLASS:
        check_tracker(name)
    with pytest.raises(ValueError, match=r"--tracker comet: expected one of none, .*; did you mean 'comet_ml'\?"):
        check_tracker("comet")
    with pytest.raises(ValueError, match="--tracker all: expected one of"):
        check_tracker("all")


def test_tensorboard_shows_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_from, steps in ((None, range(2, 13, 2)), (6, range(8, 11, 2)), (10, range(12, 15, 2))):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        start_tracker(accelerator, tmp_path, resumed_from)
        for step in steps:
            accelerator.log({"loss": float(resumed_from or 0)}, step=step)
        accelerator.end_training()
        time.sleep(1.1)  # the files are told apart by the second
    events = EventAccumulator(str(tmp_path / "tracker")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        (2, 0), (4, 0), (6, 0), (8, 6), (10, 6), (12, 10), (14, 10)
    ]  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trackio_works_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    code = """
import sys
from pathlib import Path
from accelerate import Accelerator
from bridle_hf.monitoring.trackers import start_tracker

out = Path(sys.argv[1]) / "run"
for resumed_from in (None, 4):
    accelerator = Accelerator(cpu=True, log_with="trackio", project_dir=out)
    start_tracker(accelerator, out, resumed_from)
    for step in (2, 4, 6):
        accelerator.log({"loss": 0.5 * step}, step=step)
    accelerator.end_training()
"""
    offline = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script(code, str(tmp_path), str(tmp_path / "script.py"), **offline)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    read = "import trackio; runs = trackio.Api().runs('bridle_hf'); print(sorted(run.name for run in runs))"
    done = run_script(read, str(tmp_path / "read.py"), **offline)
    assert "['run', 'run, from step 4']" in done.stdout, done.stderr[-2000:]


# The file


def test_a_side_that_did_not_learn_has_no_rate_and_an_empty_stretch_no_row(tmp_path, accelerator):
    monitor = make_monitor(tmp_path / "metrics.jsonl", accelerator, seconds=1000.0)
    monitor.flush(0, POSITION, RATES, 0)
    update(monitor, {"encoder/loss": torch.tensor(1.0)})
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
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)  # as in skipped.jsonl
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
        patch.setattr("bridle_hf.common.files.os.replace", lambda *args: (_ for _ in ()).throw(OSError()))
        write_json(path, {"name": "other"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Übung"}


def test_other_ranks_write_nothing(tmp_path, accelerator, capsys):
    monitor = make_monitor(None, accelerator)
    update(monitor, {"encoder/loss": torch.tensor(1.0)})
    monitor.flush(1, POSITION, RATES, 0)
    monitor.event({"event": "phase_end", "step": 1})
    monitor.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""
