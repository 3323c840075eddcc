"""Several processes: what they compute is what one computes, and none outlives another."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import process_runs
from helpers.forks import in_forks
from helpers.tiny_run import PHASES, ROOT, SHORTCUTS, VIEWS, rows, weights, write_recipe, write_recordings
from helpers.waiting import DEADLINE


CONFIGS = ROOT / "training" / "accelerate_configs"
# Seconds that children may need to end after the process that started them.
LINGER = 60
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--config_file"]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "ddp": [*ACCELERATE, str(CONFIGS / "ddp_8gpu.yaml")],
    "fsdp2": [*ACCELERATE, str(CONFIGS / "fsdp2_8gpu.yaml")],
}


def launch(log: Path, launcher: list[str], *argv: str) -> subprocess.Popen:
    """A script under a launcher; what they say goes to `log`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "FSDP"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with open(log, "w") as file:
        return subprocess.Popen([sys.executable, *launcher, *argv], env=kept, cwd=ROOT, stdout=file, stderr=file)


def ended(process: subprocess.Popen, log: Path) -> str:
    """What was said, once it has ended; that takes too long, or leaves a process behind, is an error."""
    family, deadline = set(), time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.1)
    left = [*psutil.wait_procs(family, timeout=LINGER)[1], *([process] if process.poll() is None else [])]
    for member in left:
        member.kill()
    process.wait()
    assert not left, log.read_text()[-3000:]
    return log.read_text()


def run_all(launcher: str, folder: Path, runs: list) -> None:
    """`process_runs.py` alone, in forks or under a launcher; runs are [name, recipe, step to stop at, options]."""
    log, script = folder / f"{launcher}.log", str(ROOT / "tests" / "helpers" / "process_runs.py")
    if launcher in ("alone", "forks"):
        in_forks(log, process_runs.do, folder, runs, processes=2 if launcher == "forks" else 1)
        return
    process = launch(log, LAUNCHERS[launcher], script, str(folder), json.dumps(runs))
    errors = ended(process, log)
    assert process.returncode == 0, errors[-4000:]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Recordings of many lengths, one of them broken, and a recipe for each schedule.

    Padded clips and masks of several kinds make the processes hold different numbers of patches; a fast codebook and a
    high threshold make codes die; and samples lose layers by stochastic depth.
    """
    write_recordings(tmp_path / "data")
    (tmp_path / "data" / "00_broken.wav").write_bytes(b"no sound")
    for name in PHASES:
        tokenizer = {"ema_decay": 0.6, "dead_code_threshold": 0.6, "drop_path_rate": 0.3}
        write_recipe(tmp_path / f"{name}.yaml", name, tokenizer=tokenizer, encoder={"drop_path_rate": 0.3})
    views = {**VIEWS, "encoder": {**VIEWS["encoder"], "drop_path_rate": 0.3}, "micro_batch_size": 3}
    write_recipe(tmp_path / "views.yaml", **views, tokenizer=tokenizer)
    write_recipe(tmp_path / "options.yaml", "joint", tokenizer=tokenizer, encoder_ema=0.5, levels_join_at=0.02)
    fitted = [{"train": "encoder", "steps": 4}, {"train": "alternate", "steps": 6, "switch_every": 3}]
    write_recipe(tmp_path / "kmeans.yaml", phases=fitted, tokenizer={"tokenizer_type": "kmeans"})
    write_recipe(tmp_path / "shortcuts.yaml", **SHORTCUTS, tokenizer=tokenizer, encoder={"drop_path_rate": 0.3})
    return tmp_path


def seen_by(folder: Path, name: str, ranks: int) -> list[list[dict]]:
    """What each rank saw: one entry for each start of the run."""
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_same_run(folder: Path, found: str, expected: str) -> None:
    """Losses and weights to 1e-5 (what is larger than 1, as the sums of the codebooks, in proportion).

    Where a gradient is nearly 0, Adam makes a step of its rounding: of one weight in 10,000 only to 1e-4.
    """
    ours, theirs = weights(folder / found), weights(folder / expected)
    assert ours.keys() == theirs.keys()
    far = 0
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        far += int((~torch.isclose(ours[name], tensor, atol=1e-5, rtol=1e-5)).sum())
    assert far <= sum(tensor.numel() for tensor in theirs.values()) / 10_000
    for row, other in zip(rows(folder / found), rows(folder / expected), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if name.endswith("loss"):
                # What is logged has six digits: two roundings of one number may differ by the last of them.
                assert abs(value - other[name]) <= 1.01e-5, (row["step"], name)
            if "grad_norm" in name:
                assert abs(value - other[name]) <= 1e-4 * abs(other[name]), (row["step"], name)
            if name in ("usage/used_fraction", "usage/reseeded", "skipped_steps"):
                assert value == other[name], (row["step"], name)


def assert_same_steps(found: list[list[dict]], expected: list[list[dict]]) -> None:
    """The ranks' parts, put together, are the samples of one process in the same order, and have the same codes."""

    def together(ranks: list[list[dict]], name: str) -> dict:
        steps = {}
        for parts in zip(*ranks, strict=True):
            for step in parts[0][name]:
                steps[step] = [entry for part in parts for entry in part[name][step]]
        return steps

    assert together(found, "index") == together(expected, "index")
    ours, theirs = together(found, "codes"), together(expected, "codes")
    assert ours.keys() == theirs.keys() and len(ours) > 5
    assert all(torch.equal(torch.cat(ours[step]), torch.cat(theirs[step])) for step in ours)


def assert_equal_ranks(ranks: list[list[dict]]) -> None:
    """Bit-equal codebooks after k-means and after each step; bit-equal models in the end."""
    first, second = ranks
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours["codebooks"]) > 4 and ours["codebooks"] == theirs["codebooks"]
        for side in ("encoder", "tokenizer"):
            for name, tensor in ours["state"][side].items():
                assert torch.equal(tensor, theirs["state"][side][name]), name


# The same result


def check_against_one_process(folder: Path, launcher: str, *options: str, recipes: Iterable[str] = PHASES) -> None:
    """That one holds its batch whole, with all of its padding; the others cut theirs by length."""
    run_all("alone", folder, [[f"alone_{name}", name, None, ["--bucket_by_length", "false"]] for name in recipes])
    run_all(launcher, folder, [[name, name, None, options] for name in recipes])
    for name in recipes:
        assert_same_run(folder, name, f"alone_{name}")
        ranks = seen_by(folder, name, 2)
        assert_same_steps(ranks, seen_by(folder, f"alone_{name}", 1))
        assert_equal_ranks(ranks)
        assert all(part[-1]["sharded"] == (launcher == "fsdp2") for part in ranks)
        assert len((folder / name / "skipped.jsonl").read_text().splitlines()) <= 2
        assert any(sum(row.get("usage/reseeded", [])) for row in rows(folder / name)) or name == "kmeans"


@pytest.mark.parametrize(
    "recipes",
    [
        ["alternate", "shortcuts", "options"],
        pytest.param(["phases", "joint", "views", "kmeans"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_equal_one(folder, recipes):
    check_against_one_process(folder, "forks", recipes=recipes)


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each_equal_one(folder):
    check_against_one_process(folder, "fsdp2", recipes=[*PHASES, "options"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_two_processes_with_micro_batches_equal_one(folder, launcher):
    check_against_one_process(folder, launcher, "--micro_batch_size", "3")


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(folder):
    """The checkpoint of a sharded run is whole: weights, their average, both optimizers, codebooks."""
    run_all("fsdp2", folder, [["moved", "options", 8, []]])
    run_all("alone", folder, [["alone", "options", None, []], ["moved", "options", None, ["--resume"]]])
    assert_same_run(folder, "moved", "alone")
    ours, theirs = ([part[-1]["state"] for part in seen_by(folder, name, 1)] for name in ("moved", "alone"))
    torch.testing.assert_close(ours[0]["optimizers"], theirs[0]["optimizers"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp2"])
@pytest.mark.parametrize("last", ["ddp", "fsdp2"])
def test_from_two_processes_to_one_and_back(folder, first, last):
    """Step 8 and 14 are in the middle of phases."""
    run_all(first, folder, [["moved", "phases", 8, []]])
    run_all("alone", folder, [["alone", "phases", None, []]])
    run_all("alone", folder, [["moved", "phases", 12, ["--resume"]]])
    run_all(last, folder, [["moved", "phases", None, ["--resume"]]])
    assert_same_run(folder, "moved", "alone")
    alone = seen_by(folder, "alone", 1)[0][0]["index"]
    rank_0, rank_1 = seen_by(folder, "moved", 2)
    assert [sorted(part["index"]) for part in rank_0] == [[*range(8)], [*range(8, 12)], [*range(12, 18)]]
    for step in range(18):
        parts = [part["index"][step] for rank in (rank_0, rank_1) for part in rank if step in part["index"]]
        assert list(itertools.chain(*parts)) == alone[step]


# None outlives another

FATE = """
import os, sys, time
from datetime import timedelta
import bridle_hf.pretraining.run as run
from bridle_hf.commands import main
from bridle_hf.common.errors import TooManyBadFiles
from bridle_hf.pretraining import processes
from bridle_hf.pretraining.checkpointing import CheckpointError

fate = sys.argv.pop(1)
step, save, evaluate = run.Interleaving.step, run.save_checkpoint, run.evaluate_tokenizer

def fateful_step(interleaving, number, batch):
    if number == 3 and interleaving.accelerator.process_index == 1:
        if fate == "killed":
            os.kill(os.getpid(), 9)
        if fate == "refuses":
            raise TooManyBadFiles("rank 1 alone has met too many bad files")
        if fate == "hangs":
            while True:
                time.sleep(1)
    return step(interleaving, number, batch)

def fateful_save(*args):
    if fate == "disk full":
        raise CheckpointError("rank 0 cannot write the checkpoint")
    return save(*args)

def fateful_evaluate(*args):
    if fate == "takes long":
        time.sleep(25)
    return evaluate(*args)

# Where none hangs, only the end of another process can end one before the test gives up.
processes.STEP_TIMEOUT = timedelta(seconds=20) if fate in ("hangs", "takes long") else timedelta(days=1)
run.Interleaving.step, run.save_checkpoint = fateful_step, fateful_save
run.evaluate_tokenizer = fateful_evaluate
main("pretrain")
"""


def meet(fate: str, folder: Path, launcher: list[str]) -> tuple[subprocess.Popen, str]:
    (folder / "fate.py").write_text(FATE, encoding="utf-8")
    data = ["--data", str(folder / "data"), "--output_dir", str(folder / "out")]
    log = folder / "fate.log"
    process = launch(log, launcher, str(folder / "fate.py"), fate, str(folder / "joint.yaml"), *data)
    return process, ended(process, log)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("killed", "Signal 9 (SIGKILL) received"),
        ("refuses", "error: rank 1 alone has met too many bad files"),
        ("disk full", "error: rank 0 cannot write the checkpoint"),
        ("hangs", "error: another process of the run has ended or hangs"),
    ],
)
def test_the_end_of_one_process_is_the_end_of_all(folder, launcher, fate, message):
    process, errors = meet(fate, folder, LAUNCHERS[launcher])
    assert process.returncode != 0 and message in errors
    # What the launcher says aside, there are lines and no tracebacks.
    assert "[rank" not in errors


def test_a_killed_process_ends_the_others(folder):
    process, errors = meet("killed", folder, LAUNCHERS["torchrun"])
    assert process.returncode != 0 and "Signal 9 (SIGKILL) received" in errors
    assert "error: another process of the run has ended" in errors and "[rank" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_rank_0_may_take_longer_than_a_step(folder, launcher):
    process, errors = meet("takes long", folder, LAUNCHERS[launcher])
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other(folder):
    """Two launchers, as on two machines; one is killed with its process in the middle of the run."""
    (folder / "fate.py").write_text(FATE, encoding="utf-8")
    data = ["--data", str(folder / "data"), "--output_dir", str(folder / "out"), "--phases.0.steps", "100000"]
    port = 29000 + os.getpid() % 900
    machines = [
        launch(
            folder / f"{rank}.log",
            [*ACCELERATE[:-3], "--config_file", str(CONFIGS / "multi_node.yaml"), "--machine_rank", str(rank),
             "--main_process_port", str(port)],
            str(folder / "fate.py"), "none", str(folder / "joint.yaml"), *data,
        )
        for rank in range(2)
    ]  # fmt: skip
    metrics = folder / "out" / "metrics.jsonl"
    deadline = time.monotonic() + DEADLINE
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline and machines[0].poll() is None
        time.sleep(0.2)
    machine = psutil.Process(machines[1].pid)
    for process in (*machine.children(recursive=True), machine):
        process.kill()
    machines[1].wait()
    errors = ended(machines[0], folder / "0.log")
    assert machines[0].returncode != 0 and "error: another process of the run has ended" in errors


# Configs of accelerate


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    machines, processes = {"one_gpu": (1, 1), "multi_node": (2, 16)}.get(path.stem, (1, 8))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    # The recipe's word is the only one on precision.
    assert config.mixed_precision == "no"
    assert yaml.safe_load(path.read_text()).get("fsdp_config", {}).get("fsdp_version", 2) == 2


def test_the_first_fsdp_is_refused(folder, monkeypatch, capsys):
    from helpers.tiny_run import pretrain

    from bridle_hf.common.errors import ArgumentError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ArgumentError, match="fsdp_version: 2"):
        pretrain(str(folder / "joint.yaml"), str(folder / "data"), folder / "out")
