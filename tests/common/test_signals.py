"""Runs that are told to stop: in one process, in two, with loader workers, at once."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.forks import in_forks
from helpers.tiny_run import ROOT, pretrain, rows, weights, write_recipe, write_recordings
from helpers.waiting import DEADLINE

import bridle_hf.pretraining.run
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.pretraining.checkpointing import list_checkpoints


# Sends signals to its own process, to its whole group, or to what has launched it, before it makes a step.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import bridle_hf.pretraining.run
from helpers.tiny_run import pretrain
from bridle_hf.interleaving.interleaving import Interleaving

recipe, data, out, name, step, rank, options = sys.argv[1:8]
bridle_hf.pretraining.run.draw_example = bridle_hf.pretraining.run.write_report = lambda *args: None
take = Interleaving.step

def interrupted(self, number, batch):
    if number == int(step) and rank in (str(self.accelerator.process_index), "group", "launcher"):
        for sent in name.split("+"):
            receiver = os.getppid() if rank == "launcher" else os.getpid()
            (os.killpg if rank == "group" else os.kill)(receiver, getattr(signal, sent))
            time.sleep(0.6)
            while rank == "launcher" and os.getppid() == receiver:
                time.sleep(0.1)
    return take(self, number, batch)

Interleaving.step = interrupted
pretrain(recipe, data, Path(out), *options.split())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return write_recipe(folder / "recipe.yaml"), write_recordings(folder / "data")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    for name in ("draw_example", "write_report"):
        monkeypatch.setattr(bridle_hf.pretraining.run, name, lambda *args: None)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pretrain(*tiny, out)
    return weights(out)


def assert_same(out, expected):
    found = weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# The first step, the last of a phase, one in the middle.
@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 0), ("SIGUSR1", 5), ("SIGINT", 9)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    tiny, undisturbed, tmp_path, monkeypatch, caplog, name, step
):
    take = Interleaving.step

    def interrupted(self, number, batch):
        if number == step:
            os.kill(os.getpid(), getattr(signal, name))
        return take(self, number, batch)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Interleaving, "step", interrupted)
        pretrain(*tiny, tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert f"stopped after step {step + 1} of 18" in caplog.text and name in caplog.text
    assert list_checkpoints(tmp_path / "out" / "checkpoints")[-1].name == f"step_{step + 1}"
    pretrain(*tiny, tmp_path / "out", "--resume")
    assert_same(tmp_path / "out", undisturbed)
    assert rows(tmp_path / "out")[-1]["step"] == 18


@pytest.mark.parametrize(("stage", "done"), [("_resume", 0), ("_end_phase", 6), ("_save", 4), ("finish", 18)])
def test_a_signal_between_steps_needs_no_further_step(tiny, undisturbed, tmp_path, monkeypatch, caplog, stage, done):
    """While the run starts, at the end of a phase, during a save, and after the last step."""
    act = getattr(bridle_hf.pretraining.run.Run, stage)

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return act(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(bridle_hf.pretraining.run.Run, stage, interrupted)
        pretrain(*tiny, tmp_path / "out")
    assert (f"stopped after step {done} of 18" in caplog.text) == (done < 18)
    saved = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in saved[-1:]] == ([f"step_{done}"] if done else [])
    if done < 18:
        pretrain(*tiny, tmp_path / "out", "--resume")
    assert_same(tmp_path / "out", undisturbed)


def test_one_of_two_processes_stops_both(tiny, undisturbed, tmp_path):
    out = tmp_path / "out"
    in_forks(tmp_path / "log", do_program, [*tiny, str(out), "SIGUSR1", "7", "1", ""], processes=2)
    assert list_checkpoints(out / "checkpoints")[-1].name == "step_8"
    pretrain(*tiny, out, "--resume")
    found = weights(out)
    for name, tensor in undisturbed.items():
        # Two processes sum in another order; where a gradient is nearly 0, Adam makes a step of that.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_loader_workers_outlive_a_signal_to_the_whole_group(tiny, undisturbed, tmp_path):
    out = tmp_path / "out"
    in_forks(tmp_path / "log", do_program, [*tiny, str(out), "SIGTERM", "4", "group", "--num_workers 2"])
    assert list_checkpoints(out / "checkpoints")[-1].name == "step_5"
    pretrain(*tiny, out, "--resume")
    assert_same(out, undisturbed)


def test_a_run_does_not_outlive_its_launcher(tiny, undisturbed, tmp_path):
    """`accelerate launch` of one process does not pass a SIGTERM on."""
    out = tmp_path / "out"
    arguments = [*tiny, str(out), "SIGTERM", "4", "launcher", ""]
    stopped = run_program(arguments, tmp_path, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    assert stopped.returncode == -signal.SIGTERM and "the launcher has ended" in stopped.stderr, stopped.stderr[-3000:]
    assert list_checkpoints(out / "checkpoints")[-1].name == "step_5"
    pretrain(*tiny, out, "--resume")
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tiny, tmp_path):
    """Loader workers, which signals do not end, end with the process."""
    stopped = run_program([*tiny, str(tmp_path / "out"), "SIGINT+SIGINT", "4", "0", "--num_workers 1"], tmp_path)
    assert stopped.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in stopped.stderr
    assert list_checkpoints(tmp_path / "out" / "checkpoints")[-1].name == "step_4"


def do_program(arguments):
    """`PROGRAM` in this process."""
    sys.argv[1:] = arguments
    exec(compile(PROGRAM, "program.py", "exec"), {})


def run_program(arguments, folder, *launcher):
    """`PROGRAM` in a process group of its own."""
    (folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *launcher, str(folder / "program.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, env=environment, cwd=ROOT, start_new_session=True
    )
