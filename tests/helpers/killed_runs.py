"""Runs of pretraining that are killed and resumed, in forks of this process.

Moments are lists of kills, each either ["room.module:attribute", n], at the n-th call of a function, or seconds.
After the kills of a list the run is resumed once more and must finish. What it leaves in FOLDER/<number>/ is for the
caller to compare with FOLDER/undisturbed_<schedule>/.
"""

import functools
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.tiny_run import SHORTCUTS, VIEWS, pretrain, write_recipe, write_recordings

import bridle_hf.pretraining.run


def kill_at_call(target: str, number: int) -> None:
    """Make the `number`-th call of `room.module:attribute` kill this process before it does anything."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(f"bridle_hf.{module}"))
    function, calls = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, call)


def run_child(run: Callable[..., None], arguments: tuple, kill: list | float | None) -> bool:
    """Whether a run was killed; anything but a kill or an end without error is an error."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if isinstance(kill, list):
            kill_at_call(*kill)
        status = 1
        try:
            run(*arguments)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the run ended with {status}"
    return status != 0


def kill_and_resume(folder: Path, moments: list) -> None:
    """All of `moments`, one after the other."""
    torch.set_num_threads(1)
    # Pictures and the report take most of the time of so small a run, and nothing of it depends on them.
    bridle_hf.pretraining.run.draw_example = bridle_hf.pretraining.run.write_report = lambda *args: None
    data = write_recordings(folder / "data")
    (folder / "data" / "broken.wav").write_bytes(b"no sound")
    options = ("--micro_batch_size", "3")
    recipes = {name: write_recipe(folder / f"{name}.yaml", name) for name in ("phases", "joint", "alternate")}
    recipes["views"] = write_recipe(folder / "views.yaml", **VIEWS)
    recipes["shortcuts"] = write_recipe(folder / "shortcuts.yaml", **SHORTCUTS)
    for schedule in {entry["schedule"] for entry in moments}:
        arguments = (recipes[schedule], data, folder / f"undisturbed_{schedule}", *options)
        assert not run_child(pretrain, arguments, None)
    for number, entry in enumerate(moments):
        arguments = (recipes[entry["schedule"]], data, folder / str(number), *options)
        for kill in entry["kills"]:
            killed = run_child(pretrain, arguments, kill)
            assert killed or isinstance(kill, float), f"{kill} never came"
            arguments = (*arguments, "--resume")
        assert not run_child(pretrain, arguments, None)
