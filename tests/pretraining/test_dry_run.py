"""Before the run: --dry_run, --overfit_one_batch, --deterministic."""

import hashlib
import math
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.forks import in_forks
from helpers.tiny_run import PHASES, pretrain, rows, run_script, weights, write_recipe, write_recordings
from torch import nn
from torch.utils.checkpoint import checkpoint

from bridle_hf.common.errors import ArgumentError
from bridle_hf.pretraining.dry_run import PeakMemory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def quick(monkeypatch):
    """Without pictures and report."""
    import bridle_hf.pretraining.run

    monkeypatch.setattr(bridle_hf.pretraining.run, "draw_example", lambda *args: None)
    monkeypatch.setattr(bridle_hf.pretraining.run, "write_report", lambda *args: None)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def dry_run(recipe: str, data: str, out: Path, *options: str) -> str:
    return "\n".join(pretrain(recipe, data, out, "--dry_run", *options))


# --dry_run


def test_dry_run_tells_what_the_run_then_does(data, tmp_path, quick):
    """Shapes, parameters and schedule against the finished run; and it leaves an existing folder as it is."""
    recipe, out = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "out"
    shown = dry_run(recipe, data, out)
    assert not out.exists()
    pretrain(recipe, data, out)
    before = contents(out)
    for options in (("--overwrite",), ("--resume", "--tracker", "tensorboard")):
        dry_run(recipe, data, out, *options)
    assert contents(out) == before

    assert re.search(r"input_values +\(8, 48, 32\) +float32", shown)
    assert re.search(r"bool_masked_pos +\(8, 24\) +bool", shown)
    padding = re.search(r"padding: ([\d.]+)% .* by length, ([\d.]+)% .* otherwise", shown)
    by_length, otherwise = map(float, padding.groups())
    assert by_length <= 5 < otherwise
    buffers = ("quantizer.", "positions.")
    for side, model in (("encoder", "encoder"), ("tokenizer", "tokenizer, self distilled")):
        saved = [(name, tensor) for name, tensor in weights(out).items() if name.startswith(f"{side}.")]
        count = sum(tensor.numel() for name, tensor in saved if not any(part in name for part in buffers))
        assert re.search(rf"{model} +{count:,} +embeddings", shown)
    for number, (phase, name) in enumerate(zip(PHASES["phases"], ("encoder 0", "tokenizer 1", "encoder 1"))):
        # Of 24 recordings, 8 a step.
        assert re.search(rf"{number}: {name} +{phase['steps']} +{phase['steps'] // 3} +{8 * phase['steps']} ", shown)
    assert "encoder/loss" in shown and "tokenizer/loss" in shown and "all: 18 steps" in shown


def test_dry_run_does_every_kind_of_step(data, tmp_path, monkeypatch):
    import bridle_hf.interleaving.interleaving

    done = []
    step = bridle_hf.interleaving.interleaving.Interleaving.step
    monkeypatch.setattr(
        bridle_hf.interleaving.interleaving.Interleaving,
        "step",
        lambda self, number, batch: (done.append(self.schedule.sides(number)), step(self, number, batch))[1],
    )
    both = [*PHASES["joint"], *PHASES["alternate"]]
    shown = dry_run(write_recipe(tmp_path / "recipe.yaml", phases=both), data, tmp_path / "out")
    assert dict.fromkeys(done[:6]) == dict.fromkeys([(True, True), (True, False)])
    assert dict.fromkeys(done[6:]) == dict.fromkeys([(True, False), (False, True)])
    assert "0: joint 1" in shown and "1: alternate 2" in shown


def test_dry_run_refuses_what_the_run_would(data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml")
    for options, expected in ((("--masks", "{no_such: 1}"), "no_such"), (("--peak_tflops", "0"), "--peak_tflops")):
        with pytest.raises(ArgumentError, match=expected):
            dry_run(recipe, data, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run_in_two_processes(data, tmp_path):
    code = "from bridle_hf.commands import main; main('pretrain')"
    arguments = (write_recipe(tmp_path / "recipe.yaml"), "--data", data, "--output_dir", str(tmp_path / "out"))
    done = run_script(code, *arguments, "--dry_run", str(tmp_path / "script.py"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    # Told once, and of the half of the batch that each process has.
    assert done.stdout.count("Schedule") == 1 and re.search(r"input_values +\(4, 48, 32\)", done.stdout)


def test_peak_memory_counts_what_lives_at_the_same_time():
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(10))
    inputs = torch.randn(1000, 64)
    size = inputs.numel() * 4

    def forward(through) -> torch.Tensor:
        hidden = inputs
        for layer in layers:
            hidden = through(layer, hidden)
        return hidden

    with PeakMemory() as memory, torch.no_grad():
        forward(lambda layer, hidden: torch.tanh(layer(hidden)))
    # One layer's product and its tanh, beside the tanh before; the inputs were there.
    assert 2 * size <= memory.peak <= 3 * size
    assert memory.live == 0
    with PeakMemory() as kept:
        forward(lambda layer, hidden: torch.tanh(layer(hidden))).sum().backward()
    # Autograd keeps the tanh of every layer; what comes beside are temporaries of one layer, and the gradients.
    gradients = sum(layer.weight.numel() * 4 for layer in layers)
    assert 10 * size <= kept.peak <= 14 * size + gradients and kept.live == gradients

    def longer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(hidden)).exp().exp()

    with PeakMemory() as checkpointed:
        forward(lambda layer, hidden: checkpoint(longer, layer, hidden, use_reentrant=False)).sum().backward()
    with PeakMemory() as whole:
        forward(longer).sum().backward()
    assert checkpointed.peak < 0.6 * whole.peak


# --overfit_one_batch


@pytest.mark.slow
def test_one_batch_can_be_overfitted(data, tmp_path, quick):
    """The loss falls near zero on one batch, and not so on many."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "decoder_hidden_size": 64, "decoder_type": "plain"}
    phases = [{"train": "encoder", "steps": 100, "warmup_steps": 10, "learning_rate": 5e-3}]
    options = {"encoder": sizes, "phases": phases, "global_batch_size": 4, "save_every": 50, "log_every": 10}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options)
    pretrain(recipe, data, tmp_path / "one", "--overfit_one_batch", "true")
    pretrain(recipe, data, tmp_path / "many")
    one, many = (
        [row["encoder/loss"] for row in rows(tmp_path / name) if "samples" in row] for name in ("one", "many")
    )
    assert one[0] > 1.5 and one[-1] < 0.1 < many[-1]
    assert all(math.isfinite(loss) for loss in one)


# --deterministic


@pytest.mark.slow
def test_deterministic_algorithms_are_asked_for(data, tmp_path, quick):
    """In a process of its own: each kind of step runs under them, and twice to the same bit."""
    recipe = write_recipe(tmp_path / "recipe.yaml", phases=[*PHASES["phases"], *PHASES["joint"]])

    def run_twice() -> None:
        for name in ("a", "b"):
            pretrain(recipe, data, tmp_path / name, "--deterministic", "true")
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    in_forks(tmp_path / "log", run_twice)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_dry_run_makes_no_repository(data, tmp_path, monkeypatch):
    import bridle_hf.pretraining.run

    monkeypatch.setattr(bridle_hf.pretraining.run, "open_repositories", lambda *args: pytest.fail("asked the Hub"))
    recipe = write_recipe(tmp_path / "recipe.yaml")
    hub = ("--push_to_hub", "--hub_model_id", "me/secret", "--hub_private", "--license", "mit")
    assert "encoder 0" in dry_run(recipe, data, tmp_path / "out", *hub)
