"""Fine-tuning that is killed, told to stop or resumed with something else: nothing lost, nothing wrong in silence."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.forks import in_forks
from helpers.killed_finetunes import kill_and_resume, run
from helpers.sounds import save_encoder, write_sounds
from safetensors.torch import load_file, save_file

from bridle_hf.common.errors import ArgumentError, RunError
from bridle_hf.finetuning import callbacks
from bridle_hf.finetuning.callbacks import SkipNonFinite
from bridle_hf.finetuning.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture
def sounds(tmp_path):
    return write_sounds(tmp_path / "sounds")


@pytest.fixture(scope="module")
def undisturbed(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(encoder, write_sounds(folder / "sounds"), folder / "out")
    return folder / "out"


def assert_same(out: Path, expected: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (out, expected))
    differing = [name for name in second if not torch.equal(first[name], second[name])]
    assert not differing and first.keys() == second.keys()
    assert json.loads((out / "results.json").read_text()) == json.loads((expected / "results.json").read_text())
    listed = [
        {Path(json.loads(line)["path"]).name for line in (folder / "skipped.jsonl").read_text().splitlines()}
        if (folder / "skipped.jsonl").exists() else set()
        for folder in (out, expected)
    ]  # fmt: skip
    assert listed[0] == listed[1]


def interrupt_at(monkeypatch, step: int, name: str) -> None:
    act = SkipNonFinite.on_pre_optimizer_step

    def interrupted(self, args, state, *rest, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), getattr(signal, name))
        return act(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(SkipNonFinite, "on_pre_optimizer_step", interrupted)


# Kills


def run_killed(folder: Path, moments: list) -> None:
    in_forks(folder / "log", kill_and_resume, folder, moments)
    for number in range(len(moments)):
        assert_same(folder / str(number), folder / "undisturbed")


@pytest.mark.slow
def test_killed_and_resumed_is_equal(tmp_path):
    """Before the first checkpoint, in a save, before old ones are removed, and while the end is written."""
    step = "finetuning.callbacks:SkipNonFinite.on_pre_optimizer_step"
    run_killed(tmp_path, [
        [[step, 2], ["common.manifest:sha256", 3], ["finetuning.trainer:remove_old", 2]],
        [["finetuning.trainer:FinetuneTrainer._save_optimizer_and_scheduler", 3], [step, 4],
         ["finetuning.finetune:write_outputs", 1]],
    ])  # fmt: skip


@pytest.mark.slow
def test_killed_at_twenty_random_moments_is_equal(tmp_path):
    random.seed(0)
    saves = ["common.manifest:sha256", "finetuning.trainer:FinetuneTrainer._save_optimizer_and_scheduler",
             "finetuning.trainer:write_manifest", "finetuning.trainer:remove_old"]  # fmt: skip
    moments = [[random.uniform(0.1, 1.0), [random.choice(saves), 1]] for _ in range(10)]
    moments += [[[random.choice(saves), random.randint(1, 4)], random.uniform(0.1, 1.0)] for _ in range(10)]
    run_killed(tmp_path, moments)


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_full_disk_ends_the_run_and_the_one_before_goes_on(
    undisturbed, encoder, sounds, tmp_path, monkeypatch, limit
):
    """A limit on the size of files stands for it: the weights fail, or the optimizer's state."""
    save, out = SkipNonFinite.on_pre_optimizer_step, tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self, args, state, *rest, **kwargs):
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return save(self, args, state, *rest, **kwargs)

    try:
        with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
            patch.setattr(SkipNonFinite, "on_pre_optimizer_step", fill)
            run(encoder, sounds, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "the one before is intact" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in list_checkpoints(out / "checkpoints")][-1] == "checkpoint-4"
    run(encoder, sounds, out, resume=True)
    assert_same(out, undisturbed)


def test_a_broken_checkpoint_is_passed_over(undisturbed, encoder, sounds, tmp_path, caplog, capsys):
    out = tmp_path / "out"
    run(encoder, sounds, out, save_total_limit=9)
    for path in list_checkpoints(out / "checkpoints")[-2:]:
        (path / "optimizer.pt").write_bytes((path / "optimizer.pt").read_bytes()[:-9])
    shutil.move(out, tmp_path / "moved")
    run(encoder, sounds, tmp_path / "moved", resume=True, save_total_limit=9)
    assert "optimizer.pt is not what was written" in caplog.text
    assert_same(tmp_path / "moved", undisturbed)
    for path in list_checkpoints(tmp_path / "moved" / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"every checkpoint in .* is broken; start anew with --overwrite"):
        run(encoder, sounds, tmp_path / "moved", resume=True)


# Signals


@pytest.mark.parametrize(
    ("name", "step", "strategy"),
    [("SIGTERM", 0, "steps"), ("SIGINT", 4, "epoch"), ("SIGUSR1", 5, "epoch"), ("SIGTERM", 11, "epoch")],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    undisturbed, encoder, sounds, tmp_path, monkeypatch, caplog, name, step, strategy
):
    """In the middle of an epoch (of three steps), at its end, and at the last step."""
    out, options = tmp_path / "out", {"save_strategy": strategy, "eval_strategy": strategy}
    expected = undisturbed
    if strategy == "epoch":
        expected = tmp_path / "expected"
        run(encoder, sounds, expected, **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, name)
        run(encoder, sounds, out, **options)
    finished = step == 11
    assert (f"stopped after step {step + 1} of 12" in caplog.text) != finished
    assert (out / "results.json").exists() == finished
    assert list_checkpoints(out / "checkpoints")[-1].name == f"checkpoint-{step + 1}"
    if not finished:
        run(encoder, sounds, out, resume=True, **options)
    assert_same(out, expected)


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(encoder, sounds, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for step, tick in ((5, 1000), (None, 1)):  # seconds that pass from one look at the clock to the next
        with monkeypatch.context() as patch:
            patch.setattr(callbacks, "time", SimpleNamespace(monotonic=itertools.count(step=tick).__next__))
            if step is not None:
                interrupt_at(patch, step, "SIGTERM")
            run(encoder, sounds, out, resume=step is None)
        if step is not None:
            (state,) = out.glob("checkpoints/checkpoint-6/trainer_state.json")
            seconds = json.loads(state.read_text())["stateful_callbacks"]["Clock"]["attributes"]["seconds"]
            assert seconds >= 1000
    assert seconds < json.loads((out / "run.json").read_text())["seconds"] < seconds + 1000


# What may not change


def test_other_arguments_and_data_are_refused(undisturbed, encoder, tmp_path, capsys):
    out, data = tmp_path / "out", tmp_path / "sounds"
    shutil.copytree(undisturbed, out)
    write_sounds(data)
    metadata = (data / "metadata.csv").read_text()
    lines = metadata.splitlines()

    def refused(message, text=metadata, **options):
        (data / "metadata.csv").write_text(text)
        with pytest.raises(ArgumentError, match="--resume: not as in the run in") as caught:
            run(encoder, str(data), out, resume=True, **options)
        assert message in str(caught.value), caught.value
        assert json.loads((out / "run.json").read_text())["results"], "and nothing is overwritten"

    refused("seed (0, now 9)", seed=9)
    refused("learning_rate (0.01, now 0.1)", learning_rate=0.1)
    refused("global batch size (4, now 8)", gradient_accumulation_steps=2)
    refused("number of evaluation samples (12, now 11)", "\n".join(lines[:-1]))
    refused("names of the train samples", metadata.replace("noise_0.wav", "noise_00.wav"))
    refused("classes", metadata.replace(",noise,", ",zoise,"))
    refused("labels of the train samples", "\n".join([lines[0], lines[1].replace(",noise,", ",tone,"), *lines[2:]]))
    refused("names of the train samples", metadata.replace(",0", ",x").replace(",1", ",0").replace(",x", ",1"))
    (data / "metadata.csv").write_text(metadata)
    run(encoder, str(data), out, resume=True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same(out, undisturbed)


def test_the_folder_is_that_of_a_fine_tuning_run(encoder, sounds, tmp_path, capsys):
    pretraining = tmp_path / "pretraining"
    shutil.copytree(encoder, pretraining / "encoder")
    (pretraining / "checkpoints" / "step_4").mkdir(parents=True)
    (pretraining / "run.json").write_text('{"kind": "pretraining"}')
    cases = {
        "does not hold a run of fine-tuning": (encoder, pretraining),
        "lies inside output_dir": (str(pretraining / "encoder"), pretraining),
        "is --model itself": (str(pretraining / "encoder"), pretraining / "encoder"),
    }
    for message, (model, out) in cases.items():
        with pytest.raises(ArgumentError, match=message):
            run(model, sounds, out, overwrite="true")
    assert (pretraining / "checkpoints" / "step_4").exists() and (pretraining / "encoder" / "config.json").exists()


# Steps and weights that are not finite


def test_weights_that_are_not_finite_are_refused(encoder, sounds, tmp_path, capsys):
    sick = Path(shutil.copytree(encoder, tmp_path / "sick"))
    tensors = load_file(sick / "model.safetensors")
    tensors["bridle.layers.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, sick / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"bridle\.layers\.1\.mlp\.fc1\.weight is not finite"):
        run(str(sick), sounds, tmp_path / "out")


@pytest.mark.parametrize("sick", ["all steps", "evaluation"])
def test_a_run_that_learned_nothing_does_not_end_well(encoder, sounds, tmp_path, monkeypatch, caplog, sick):
    healthy = torch.nn.functional.layer_norm

    def poisoned(values, *rest):
        found = healthy(values, *rest)
        return found * float("nan") if torch.is_grad_enabled() == (sick == "all steps") else found

    monkeypatch.setattr(torch.nn.functional, "layer_norm", poisoned)
    with pytest.raises(RunError) as caught:
        run(encoder, sounds, tmp_path / "out", eval_strategy="no", load_best_model_at_end="false")
    if sick == "all steps":
        assert "not finite in 12 of all 12 steps" in str(caught.value)
        (warning,) = [text for text in caplog.messages if "is skipped, because its loss" in text]
        assert warning.startswith("step 0 ") and warning.count(".wav") == 4
    else:
        assert "output is not finite for" in str(caught.value) and ".wav" in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()
