"""`bridle finetune --folds all`: a run for each fold, mean and deviation; what is broken off goes on where it was."""

import json
import os
import signal
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.forks import in_forks
from helpers.killed_runs import run_child
from helpers.miniatures import write_esc50
from helpers.sounds import save_encoder, write_sounds
from safetensors.torch import load_file
from transformers import pipeline

from bridle_hf.commands import main
from bridle_hf.finetuning.callbacks import SkipNonFinite


OPTIONS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": "true",
    "load_best_model_at_end": "false", "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def run(model: str, data: str, out: Path, *words: str, **options: object) -> None:
    options = {"model": model, "data": data, "output_dir": out, **OPTIONS, **options}
    main("finetune", [*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    return str(write_esc50(tmp_path_factory.mktemp("data"), folds=3, takes=2))


@pytest.fixture(scope="module")
def whole(encoder, esc50, tmp_path_factory):
    """All folds, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(encoder, esc50, out, folds="all")
    return out


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_results_are_mean_and_deviation_of_the_folds(whole, encoder, esc50, capsys):
    results = results_of(whole)
    assert list(results["folds"]) == ["1", "2", "3"] and results["of_folds"] == 3
    for name, found in results["folds"].items():
        assert found == results_of(whole / f"fold_{name}") and found["evaluated_on"] == f"fold {name}"
        assert found["samples"] == {"train": 12, "evaluation": 6, "test": 0}
    for measure in ("accuracy", "loss"):
        values = [found["evaluation"][measure] for found in results["folds"].values()]
        assert results["evaluation"][measure] == pytest.approx(sum(values) / 3)
        assert results["deviation"][measure] == pytest.approx(statistics.stdev(values))
    run(encoder, esc50, whole, folds="all", resume="true")  # all is done: nothing is run again
    assert results_of(whole) == results
    line = capsys.readouterr().out.splitlines()[-1]
    shown = "accuracy {:.4f} (deviation {:.4f}) on folds 1, 2, 3".format(
        *(results[kind]["accuracy"] for kind in ("evaluation", "deviation"))
    )
    assert line.startswith(shown) and line.endswith(f"the classifiers are in {whole}/fold_*")
    classify = pipeline("audio-classification", str(whole / "fold_3"))
    assert classify.model.config.id2label == {0: "dog", 1: "chirping_birds", 2: "chainsaw"}  # by target


def test_a_fold_is_the_run_that_it_would_be_alone(whole, encoder, esc50, tmp_path):
    run(encoder, esc50, tmp_path / "alone", eval_fold=2)
    assert results_of(tmp_path / "alone") == results_of(whole)["folds"]["2"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "alone", whole / "fold_2")]
    assert weights[0] == weights[1]


def test_the_recipe_of_esc50(encoder, esc50, tmp_path):
    changes = {"max_length": 48, "mel_mask": 8, "num_train_epochs": 1, "dataloader_num_workers": 0, "bf16": "false"}
    run(encoder, esc50, tmp_path / "out", "audio_finetune_esc50", **changes, folds="all")
    assert results_of(tmp_path / "out")["of_folds"] == 3


def kill_and_resume(encoder: str, esc50: str, folder: Path, kills: list) -> None:
    for number, kill in enumerate(kills):
        again = partial(run, encoder, esc50, folder / str(number), folds="all")
        assert run_child(again, (), kill), f"{kill} never came"
        assert not run_child(partial(again, resume="true"), (), None)


@pytest.mark.slow
def test_killed_and_resumed_is_equal(whole, encoder, esc50, tmp_path):
    """After a fold and before it is listed, and in the middle of the second."""
    step = "finetuning.callbacks:SkipNonFinite.on_pre_optimizer_step"
    kills = [["finetuning.cross_validation:write_json", 2], [step, 10]]
    in_forks(tmp_path / "log", kill_and_resume, encoder, esc50, tmp_path, kills)
    for number in range(len(kills)):
        assert results_of(tmp_path / str(number)) == results_of(whole)


def test_a_signal_ends_it_and_it_goes_on(whole, encoder, esc50, tmp_path, monkeypatch):
    act = SkipNonFinite.on_pre_optimizer_step

    def interrupted(self, args, state, *rest, **kwargs):
        if "fold_2" in args.output_dir and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return act(self, args, state, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SkipNonFinite, "on_pre_optimizer_step", interrupted)
        run(encoder, esc50, tmp_path / "out", folds="all")
    assert list(results_of(tmp_path / "out")["folds"]) == ["1"] and "evaluation" not in results_of(tmp_path / "out")
    run(encoder, esc50, tmp_path / "out", folds="all", resume="true")
    assert results_of(tmp_path / "out") == results_of(whole)


@pytest.mark.slow
def test_two_processes_run_the_same_folds(encoder, esc50, tmp_path):
    options = {"folds": "all", "num_train_epochs": 1, "learning_rate": 1e-3}
    run(encoder, esc50, tmp_path / "one", **options)
    two = partial(run, encoder, esc50, tmp_path / "two", **options, per_device_train_batch_size=2)
    in_forks(tmp_path / "log", two, processes=2)
    found, expected = results_of(tmp_path / "two"), results_of(tmp_path / "one")
    assert list(found["folds"]) == list(expected["folds"]) and found.keys() == expected.keys()
    for name in found["folds"]:
        weights = [load_file(tmp_path / folder / f"fold_{name}" / "model.safetensors") for folder in ("one", "two")]
        # The gradient of a key's bias is zero but for rounding, which Adam makes as large as any other.
        assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-3) for key in weights[0] if
                   "k_proj.bias" not in key)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": "all", "eval_fold": 1}, "--folds and --eval_fold both say what to evaluate on"),
        ({"folds": "all", "resume": "true", "seed": 1}, "--resume: not as in the run in"),
        ({"folds": "all"}, "is not empty: give --resume to go on"),
        ({"resume": "true", "eval_fold": 1}, "does not hold a run of fine-tuning"),
    ],
)
def test_what_does_not_fit_is_refused(whole, encoder, esc50, capsys, options, message):
    with pytest.raises(SystemExit):
        run(encoder, esc50, whole, **options)
    assert message in capsys.readouterr().err
    assert results_of(whole)["of_folds"] == 3


def test_data_without_folds_is_refused_and_overwriting_removes_all_folds(encoder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(encoder, write_sounds(tmp_path / "sounds"), tmp_path / "out", folds="all")
    assert "has no folds: give --validation_fraction" in capsys.readouterr().err
    three, two = (str(write_esc50(tmp_path / str(folds), folds=folds)) for folds in (3, 2))
    run(encoder, three, tmp_path / "out", folds="all", num_train_epochs=1)
    run(encoder, two, tmp_path / "out", folds="all", num_train_epochs=1, overwrite="true")
    assert list(results_of(tmp_path / "out")["folds"]) == ["1", "2"]
    assert not (tmp_path / "out" / "fold_3" / "model.safetensors").exists()
