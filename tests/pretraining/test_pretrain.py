"""Pretraining end to end: what it leaves, what it refuses, and that kills do not change its result."""

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers.forks import in_forks
from helpers.killed_runs import kill_and_resume
from helpers.tiny_run import PHASES, RATE, SHORTCUTS, pretrain, rows, weights, write_recipe, write_recordings
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

import bridle_hf.pretraining.run
from bridle_hf import BridleFeatureExtractor, BridleForPreTraining, BridleTokenizerModel
from bridle_hf.common.errors import ArgumentError, NonFiniteError, RunError, TooManyBadFiles
from bridle_hf.common.manifest import write_manifest
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.finding import find_samples
from bridle_hf.data.normalization import measure_normalization
from bridle_hf.pretraining.checkpointing import list_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    return write_recordings(tmp_path_factory.mktemp("labelled"), labels=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, labelled) -> Path:
    """A finished run, with everything that can be switched on."""
    out = tmp_path_factory.mktemp("finished") / "run"
    recipe = write_recipe(out.parent / "recipe.yaml", probe_every=9, report_every=12, keep_iterations=True)
    pretrain(recipe, labelled, out, "--tracker", "tensorboard", "--num_workers", "1")
    return out


@pytest.fixture
def quick(monkeypatch):
    """Without pictures and report, which take most of the time of so small a run."""
    import bridle_hf.pretraining.run

    monkeypatch.setattr(bridle_hf.pretraining.run, "draw_example", lambda *args: None)
    monkeypatch.setattr(bridle_hf.pretraining.run, "write_report", lambda *args: None)


def refusal(*arguments: str) -> str:
    """The one line that is raised before the first step."""
    with pytest.raises(ArgumentError) as caught:
        pretrain(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a run leaves


def test_output_folder(finished):
    for side in ("encoder", "tokenizer"):
        card = (finished / side / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\n")
    phases = ["0_encoder", "1_tokenizer", "2_encoder"]
    assert sorted(path.name for path in (finished / "iterations").iterdir()) == phases
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step_16", "step_18"]
    pictures = {path.name for path in (finished / "figures").glob("*.png")}
    assert {"losses.png", "usage.png", "masked_input_phase_0_encoder_0.png"} <= pictures
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" in report and not re.search(r"(src|href)=.https?:", report)
    run = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert run["samples"] == 24 and run["seed"] == 0 and run["seconds"] > 0
    assert run["arguments"]["global_batch_size"] == 8 and {"torch", "transformers"} <= run["versions"].keys()
    assert [(phase["kind"], phase["iteration"], phase["steps"]) for phase in run["phases"]] == [
        ("encoder", 0, 6), ("tokenizer", 1, 6), ("encoder", 1, 6)
    ]  # fmt: skip


@torch.no_grad()
def test_saved_folders_load_through_the_auto_classes(finished):
    encoder = AutoModelForPreTraining.from_pretrained(finished / "encoder")
    tokenizer = AutoModel.from_pretrained(finished / "tokenizer")
    assert isinstance(encoder, BridleForPreTraining) and isinstance(tokenizer, BridleTokenizerModel)
    assert bool(tokenizer.quantizer.initialized)
    processor = AutoFeatureExtractor.from_pretrained(finished / "encoder")
    inputs = processor(np.random.default_rng(0).normal(size=RATE // 2), sampling_rate=RATE, return_tensors="pt")
    codes = tokenizer.encode(**inputs)
    assert codes.shape == (1, 24, 2) and int(codes.max()) < 8
    assert bool(torch.isfinite(encoder(**inputs, labels=codes).loss))
    # The normalisation measured on the data, not the default.
    assert processor.mean != -4.4446096


def test_rows_of_metrics(finished):
    found = rows(finished)
    steps = [row for row in found if "samples" in row]
    # Every second step, and not over the end of a phase or a checkpoint.
    assert [row["step"] for row in steps] == list(range(2, 19, 2))
    assert all(row["samples"] == 8 * row["step"] for row in steps)
    # Recordings of 0.1 to 0.6 s, of which a model takes 24 patches.
    assert all(row["input/padding"] <= 0.05 and 4 <= row["input/patches"] <= 24 for row in steps)
    assert ["encoder/loss" in row for row in steps] == [True] * 3 + [False] * 3 + [True] * 3
    assert ["tokenizer/loss" in row for row in steps] == [False] * 3 + [True] * 3 + [False] * 3
    assert [row["step"] for row in found if row.get("event") == "phase_end"] == [6, 12, 18]
    probes = [row for row in found if "probe/linear" in row]
    assert [row["step"] for row in probes] == [9, 18]
    assert all(0 <= row["probe/linear"] <= 1 and 0 <= row["probe/knn"] <= 1 for row in probes)


def test_tensorboard_gets_the_numbers_of_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = finished.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    expected = {row["step"]: row["encoder/loss"] for row in rows(finished) if "encoder/loss" in row}
    found = {event.step: event.value for event in accumulator.Scalars("encoder/loss")}
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 1e-5 for step in found)
    assert "usage/perplexity/2" in accumulator.Tags()["scalars"]


@pytest.mark.parametrize("schedule", ["alternate", "joint"])
def test_other_schedules_run(data, tmp_path, quick, schedule):
    pretrain(write_recipe(tmp_path / "recipe.yaml", schedule), data, tmp_path / "out", "--mixed_precision", "bf16")
    last = [row for row in rows(tmp_path / "out") if "samples" in row]
    losses = {name for row in last for name in row if name.endswith("/loss")}
    assert losses == {"encoder/loss", "tokenizer/loss"} and last[-1]["step"] == 12
    assert all(np.isfinite(row[name]) for row in last for name in losses & row.keys())


def resume_from(step: int, recipe: str, data: str, folder: Path) -> None:
    """See that a run which goes on from a step's checkpoint ends as one that was not disturbed, `folder/whole`."""
    pretrain(recipe, data, folder / "whole")
    pretrain(recipe, data, folder / "resumed", "--keep_every", "1")
    for checkpoint in list_checkpoints(folder / "resumed" / "checkpoints")[step:]:
        shutil.rmtree(checkpoint)
    pretrain(recipe, data, folder / "resumed", "--keep_every", "1", "--resume")
    ours, theirs = weights(folder / "whole"), weights(folder / "resumed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_centred_teacher_is_resumed(data, tmp_path, quick):
    """Its mean is part of the checkpoint; a tokenizer that is not trained alone is refused."""
    phases = [{"train": "encoder", "steps": 2}, {"train": "tokenizer", "steps": 4}]
    options = {"phases": phases, "save_every": 1, "tokenizer": {"center_teacher": True}}
    resume_from(3, write_recipe(tmp_path / "recipe.yaml", **options), data, tmp_path)
    joint = write_recipe(tmp_path / "joint.yaml", "joint", tokenizer={"center_teacher": True})
    assert "center_teacher" in refusal(joint, data, tmp_path / "joint")


def test_the_average_of_the_encoder_is_saved_and_resumed(data, tmp_path, quick):
    phases = [{"train": "encoder", "steps": 3, "learning_rate": 1e-2}]
    resume_from(2, write_recipe(tmp_path / "recipe.yaml", phases=phases, encoder_ema=0.5), data, tmp_path)
    found = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step_3")
    saved = {name.removeprefix("encoder."): value for name, value in weights(tmp_path / "whole").items()}
    assert all(torch.equal(found["average"][name], value) for name, value in saved.items() if name in found["encoder"])
    assert not all(torch.equal(found["encoder"][name], value) for name, value in found["average"].items())
    assert "--encoder_ema is 1.0" in refusal(str(tmp_path / "recipe.yaml"), data, tmp_path / "x", "--encoder_ema", "1")


def test_levels_that_join_are_resumed(data, tmp_path, quick):
    phases = [{"train": "encoder", "steps": 4, "learning_rate": 1e-2}]
    recipe = write_recipe(tmp_path / "recipe.yaml", phases=phases, levels_join_at=0.005, save_every=1, log_every=1)
    resume_from(2, recipe, data, tmp_path)
    levels = [row["encoder/levels"] for row in rows(tmp_path / "whole") if "samples" in row]
    assert levels[0] == 1 and levels[-1] == 2 and levels == sorted(levels)
    for name, fields in {"target: codes": {"target": "patches"}, "weights": {"codebook_loss_weights": [0, 1]}}.items():
        wrong = write_recipe(tmp_path / "wrong.yaml", phases=phases, levels_join_at=0.1, encoder=fields)
        assert name in refusal(wrong, data, tmp_path / "x")


def test_mixtures_are_resumed_and_no_part_of_the_evaluation(data, tmp_path, quick):
    options = {"phases": [{"train": "encoder", "steps": 3}], "save_every": 1, "mixture": 0.5}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options)
    resume_from(1, recipe, data, tmp_path)
    pretrain(recipe, data, tmp_path / "plain", "--mixture", "0")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "plain")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "--mixture is for audio" in refusal(recipe, data, tmp_path / "x", "--modality", "image")


def test_a_run_older_than_an_option_is_resumed(data, tmp_path, quick):
    """Its checkpoint does not name it: it was as it is by default."""
    recipe = write_recipe(tmp_path / "recipe.yaml", phases=[{"train": "encoder", "steps": 2}])
    pretrain(recipe, data, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoints" / "step_2"
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    del state["arguments"]["encoder_ema"]
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    write_manifest(checkpoint)
    pretrain(recipe, data, tmp_path / "out", "--resume")
    assert "encoder_ema (0.0, now 0.5)" in refusal(recipe, data, tmp_path / "out", "--resume", "--encoder_ema", "0.5")


def test_codes_of_kmeans(data, tmp_path, quick):
    """Without a tokenizer phase; the saved tokenizer gives codes by itself; resumed where it is fitted anew."""
    phases = [{"train": "encoder", "steps": 2}, {"train": "alternate", "steps": 4, "switch_every": 2}]
    options = {"phases": phases, "tokenizer": {"tokenizer_type": "kmeans"}, "save_every": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options)
    resume_from(4, recipe, data, tmp_path)
    tokenizer = AutoModel.from_pretrained(tmp_path / "whole" / "tokenizer")
    assert tokenizer.config.tokenizer_type == "kmeans" and tokenizer.config.code_dim == 16
    codes = tokenizer.encode(torch.randn(2, 48, 32))
    assert codes.shape == (2, 24, 2) and codes.unique().numel() > 2
    assert [row["iteration"] for row in rows(tmp_path / "whole") if row.get("event")] == [0, 1]
    wrong = {"target": "features", "start": "fresh", "train": "encoder", "steps": 1}
    centred = {"tokenizer_type": "kmeans", "center_teacher": True}
    for name, changes in {"features": {"phases": [wrong]}, "center_teacher": {"tokenizer": centred}}.items():
        changed = write_recipe(tmp_path / "wrong.yaml", **{**options, **changes})
        assert name in refusal(changed, data, tmp_path / "x")


@pytest.mark.parametrize("step", [2, 4])
def test_a_loader_that_dies_where_models_are_made_anew(data, tmp_path, quick, monkeypatch, step):
    """At the first step of a phase, and where k-means fits again: what is saved then is as the step before left it."""
    phases = [{"train": "encoder", "steps": 2}, {"train": "alternate", "steps": 4, "switch_every": 2}]
    options = {"phases": phases, "tokenizer": {"tokenizer_type": "kmeans"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options)
    pretrain(recipe, data, tmp_path / "whole")
    batches = bridle_hf.pretraining.run.Run.batches

    def die(run, first):
        for number, batch in enumerate(batches(run, first), first):
            if number == step:
                raise OSError("a loader worker has died")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(bridle_hf.pretraining.run.Run, "batches", die)
        with pytest.raises(RunError, match="worker has died"):
            pretrain(recipe, data, tmp_path / "died")
    pretrain(recipe, data, tmp_path / "died", "--resume")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "died")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_phases_end_by_evidence(data, tmp_path, quick):
    """Of 10 steps after 6; learning rates are those of the full length."""
    out = tmp_path / "out"
    pretrain(write_recipe(tmp_path / "recipe.yaml", **SHORTCUTS, log_every=1, probe_every=5), data, out)
    steps = [row for row in rows(out) if "samples" in row]
    assert [(row["step"], row["phase"]) for row in steps] == [(step, (step - 1) // 6) for step in range(1, 19)]
    ends = [row for row in rows(out) if row.get("event") == "phase_end"]
    assert [(row["step"], row["steps"], row["full_steps"]) for row in ends] == [(6, 6, 10), (12, 6, 6), (18, 6, 10)]
    expected = [1e-3 * (1 + np.cos(np.pi * offset / 10)) / 2 for offset in range(6)]
    for first in (0, 12):
        assert np.allclose([row["encoder/lr"] for row in steps[first : first + 6]], expected)
    run = json.loads((out / "run.json").read_text())
    assert [(phase["steps"], phase["full_steps"]) for phase in run["phases"]] == [(6, 10), (6, 6), (6, 10)]
    shutil.rmtree(out / "checkpoints" / "step_18")
    pretrain(str(tmp_path / "recipe.yaml"), data, out, "--resume")
    assert rows(out)[-1]["step"] == 18
    for target in ("patches", "features"):
        message = refusal(str(tmp_path / "recipe.yaml"), data, tmp_path / "no", "--encoder.target", target)
        assert "phases[0]: until is for phases with target: codes; encoder.target" in message


@pytest.mark.slow
def test_codes_from_the_cache_are_those_without_it(data, tmp_path, quick):
    """Where clips are no longer than the input; of those that are cropped, codes are made each time."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **SHORTCUTS, log_every=1)
    options = ("--micro_batch_size", "1", "--bucket_by_length", "false")
    for name in ("on", "off"):
        pretrain(recipe, data, tmp_path / name, *options, "--code_cache", str(name == "on"))
    ours, theirs = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows(tmp_path / "on") == rows(tmp_path / "off")
    assert not (tmp_path / "off" / "codes").exists()
    (codes,) = (tmp_path / "on" / "codes").iterdir()
    assert codes.stat().st_size <= 24 * (12 + 24 * 2)
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    cached = {line["step"]: line["codes/cached"] for line in lines if "codes/cached" in line}
    samples = [soundfile.info(path).frames for path in Path(data).glob("*.wav")]
    whole = sum(1 + (count - 400) // 160 <= 48 for count in samples)
    # Three steps make an epoch, and every clip comes once in it; each of the two phases has a tokenizer of its own.
    assert list(cached) == [*range(1, 7), *range(13, 19)]
    for first in (1, 13):
        assert not any(cached[step] for step in range(first, first + 3))
        assert sum(8 * cached[step] for step in range(first + 3, first + 6)) == whole
    pretrain(recipe, data, tmp_path / "on", "--overwrite", *options, "--code_cache", "false", "--phases.0.steps", "1")
    assert not list((tmp_path / "on").glob("codes/*"))


def test_a_code_cache_that_could_do_nothing_is_refused(data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", **SHORTCUTS)
    assert "with --augment none does" in refusal(recipe, data, tmp_path / "out", "--augment", "true")
    joint = write_recipe(tmp_path / "joint.yaml", "joint", augment=False)
    assert "there is none" in refusal(joint, data, tmp_path / "out", "--code_cache", "true")


@pytest.mark.slow
def test_options_of_the_method_beside_shortcuts_are_resumed(data, tmp_path, quick):
    """The average, levels, visible patches and mixtures with kept codes, dropped patches and phases ended early."""
    options = {"encoder_ema": 0.5, "levels_join_at": 0.005, "mixture": 0.5, "encoder": {"visible_loss_weight": 0.3}}
    resume_from(8, write_recipe(tmp_path / "recipe.yaml", **SHORTCUTS, **options), data, tmp_path)


@pytest.mark.slow
def test_codes_of_kmeans_from_the_cache(data, tmp_path, quick):
    """A phase that fits anew has codes of its own; one that fits within itself keeps none."""
    until = {"accuracy_gain": 0.9, "over": 6}
    phases = [{"train": "encoder", "steps": 20, "until": until}, {"train": "encoder", "steps": 20, "until": until}]
    phases += [{"train": "alternate", "steps": 4, "switch_every": 2}]
    options = {"phases": phases, "tokenizer": {"tokenizer_type": "kmeans"}, "augment": False, "encoder_ema": 0.5}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options, log_every=1, code_cache=True)
    resume_from(21, recipe, data, tmp_path)
    pretrain(recipe, data, tmp_path / "off", "--code_cache", "false")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "off")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    cached = {line["step"]: line["codes/cached"] for line in lines if "codes/cached" in line}
    assert list(cached) == list(range(1, 25)) and not any(cached[step] for step in (1, 2, 3, 13, 14, 15))
    assert all(any(cached[step] for step in range(first, first + 9)) for first in (4, 16))
    changes = {"tokenizer_patch_dropout": 0.5, "tokenizer": {"tokenizer_type": "kmeans", "teacher": "any"}}
    for name, value in changes.items():
        wrong = write_recipe(tmp_path / "wrong.yaml", **{**options, name: value})
        assert name in refusal(wrong, data, tmp_path / "x")


def test_regressions_run(data, tmp_path, quick):
    """The controls of the codes, as targets of the same run; they draw, log and report no codes."""
    phases = [{"train": "encoder", "steps": 2, "target": target} for target in ("patches", "features")]
    pretrain(write_recipe(tmp_path / "recipe.yaml", phases=phases, log_every=1), data, tmp_path / "out")
    steps = [row for row in rows(tmp_path / "out") if "samples" in row]
    assert [row["encoder/loss"] > 0 for row in steps] == [True] * 4
    assert not [name for row in steps for name in row if name.startswith(("encoder/accuracy", "usage"))]
    saved = json.loads((tmp_path / "out" / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert (saved["target"], saved["target_feature_size"]) == ("features", 4)


# Restarts


def test_existing_folders(finished, data, labelled, tmp_path, quick):
    recipe = write_recipe(tmp_path / "recipe.yaml", probe_every=9, report_every=5, keep_iterations=True)
    before = weights(finished)
    assert "--resume" in refusal(recipe, labelled, finished)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "does not hold a run" in refusal(recipe, labelled, tmp_path / "thesis", "--overwrite")
    assert (tmp_path / "thesis" / "chapter.txt").exists()
    # A wrong argument must not cost the run that --overwrite names.
    options = ("--overwrite", "--masks", "{no_such: 1}")
    assert "no_such" in refusal(recipe, labelled, finished, *options)
    assert "seed" in (message := refusal(recipe, labelled, finished, "--resume", "--seed", "1"))
    assert "0, now 1" in message
    message = refusal(recipe, labelled, finished, "--resume", "--phases.0.steps", "7", "--augment", "false")
    assert "phases" in message and "augment" in message
    few = write_recordings(tmp_path / "few", count=12)
    assert "samples (24, now 12)" in refusal(recipe, few, finished, "--resume")
    moved, renamed = shutil.copytree(labelled, tmp_path / "moved"), shutil.copytree(labelled, tmp_path / "renamed")
    (renamed / "noise" / "0.wav").rename(renamed / "noise" / "z.wav")
    assert "the names of the samples" in refusal(recipe, str(renamed), finished, "--resume")
    # Resuming a finished run does no step and leaves the same models.
    pretrain(recipe, str(moved), finished, "--resume", "--log_every", "7")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(finished).items())


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(data, tmp_path, quick):
    """OUT may be a link to a larger disk, and hold links and files that are not the run's."""
    disk, other, out = tmp_path / "disk", tmp_path / "other", tmp_path / "out"
    (other / "checkpoints").mkdir(parents=True)
    disk.mkdir()
    out.symlink_to(disk)
    recipe = write_recipe(tmp_path / "recipe.yaml", "joint")
    pretrain(recipe, data, out, "--phases.0.steps", "2")
    (out / "link").symlink_to(other)
    foreign = ("thesis.txt", "checkpoints/mine.pt", "figures/photo.jpg", "encoder/notes.txt")
    for name in foreign:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    pretrain(recipe, data, out, "--phases.0.steps", "1", "--overwrite")
    assert out.is_symlink() and (out / "link" / "checkpoints").exists()
    assert all((out / name).read_text() == "mine" for name in foreign)
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step_1"]
    (disk / "run.json").write_text('{"kind": "fine-tuning"}')
    assert "does not hold a run of pretraining" in refusal(recipe, data, out, "--overwrite")
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step_1"]


def test_data_and_output_keep_apart(tmp_path, quick):
    recipe, data = write_recipe(tmp_path / "recipe.yaml"), write_recordings(tmp_path / "out" / "data")
    (tmp_path / "out" / "run.json").write_text('{"kind": "pretraining"}')
    assert "lies inside output_dir" in refusal(recipe, data, tmp_path / "out", "--overwrite")
    assert "would become data" in refusal(recipe, data, Path(data) / "runs" / "1")
    assert "is --data itself" in refusal(recipe, data, Path(data), "--overwrite")
    assert len(list(Path(data).iterdir())) == 24


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_run_killed_as_it_starts_can_go_on_or_start_anew(data, tmp_path, quick, monkeypatch, option):
    recipe, out = write_recipe(tmp_path / "recipe.yaml", "joint", measure_normalization=False), tmp_path / "out"
    for killed in ("run_record", "MetricsLog", "start_tracker"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"bridle_hf.pretraining.run.{killed}", interrupt)
            pretrain(recipe, data, out, "--phases.0.steps", "1", *([option] if out.exists() else []))
    pretrain(recipe, data, out, "--phases.0.steps", "1", option)
    run = json.loads((out / "run.json").read_text())
    assert run["kind"] == "pretraining" and {"bridle_hf", "torch", "transformers", "accelerate"} == set(
        run["versions"]
    )


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_list_of_files_that_has_changed(data, tmp_path, quick, caplog):
    """One file of 24 is gone; epochs say how long the phase is, and it stays as long."""
    phase = {"train": "joint", "epochs": 4, "learning_rate": 1e-3}
    recipe = write_recipe(tmp_path / "recipe.yaml", measure_normalization=False, phases=[phase])
    options = ("--save_every", "5")
    fewer, out = Path(shutil.copytree(data, tmp_path / "fewer")), tmp_path / "out"
    pretrain(recipe, data, out, *options)
    shutil.rmtree(out / "checkpoints" / "step_12")
    (fewer / "7.wav").unlink()
    assert "--allow_changed_data" in refusal(recipe, str(fewer), out, "--resume", *options)
    pretrain(recipe, str(fewer), out, "--resume", "--allow_changed_data", "true", *options)
    assert "from step 10 on, the run draws from another list of files (23, before 24)" in caplog.text
    run = json.loads((out / "run.json").read_text())
    assert run["data_changes"] == [{"step": 10, "samples_before": 24, "samples": 23}]
    assert rows(out)[-1]["step"] == 12, "as many steps as it began with"
    pretrain(recipe, str(fewer), out, "--resume", *options)
    assert len(json.loads((out / "run.json").read_text())["data_changes"]) == 1


def test_processes_that_find_different_checkpoints_are_refused(data, tmp_path, quick, monkeypatch):
    """As where OUT is a folder of each machine's own: they would train at different steps."""
    monkeypatch.setattr("bridle_hf.pretraining.resume.gather_object", lambda own: [*own, 8])
    recipe = write_recipe(tmp_path / "recipe.yaml", "joint")
    assert "[None, 8]" in (message := refusal(recipe, data, tmp_path / "out", "--resume"))
    assert "all machines share" in message


def test_a_disk_that_is_full_at_the_end_of_a_phase_is_one_line(data, tmp_path, quick, monkeypatch):
    """A limit on the size of files stands for it: here it is safetensors that fails, at the second end."""
    import bridle_hf.pretraining.run

    save, calls = bridle_hf.pretraining.run.Run._save_models, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save_on_a_full_disk(*args):
        calls.append(1)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        save(*args)

    recipe, out = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "out"
    try:
        with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
            patch.setattr(bridle_hf.pretraining.run.Run, "_save_models", save_on_a_full_disk)
            pretrain(recipe, data, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    message = str(caught.value)
    assert str(out) in message and "--resume" in message and "\n" not in message
    pretrain(recipe, data, out, "--resume")
    assert rows(out)[-1]["step"] == 18


def test_a_run_that_came_to_no_checkpoint_starts_with_an_empty_ledger(data, tmp_path, quick):
    out = tmp_path / "out"
    out.mkdir()
    (out / "skipped.jsonl").write_text('{"path": "mended.wav", "reason": "no sound"}\n')
    pretrain(write_recipe(tmp_path / "recipe.yaml", "joint"), data, out, "--phases.0.steps", "1", "--resume")
    assert not (out / "skipped.jsonl").exists()


def check_against_undisturbed(folder: Path, moments: list[dict]) -> None:
    for number, entry in enumerate(moments):
        undisturbed, resumed = folder / f"undisturbed_{entry['schedule']}", folder / str(number)
        expected, found = weights(undisturbed), weights(resumed)
        differing = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert not differing and expected.keys() == found.keys(), (entry, differing)
        assert rows(resumed) == rows(undisturbed), entry
        assert len((resumed / "skipped.jsonl").read_text().splitlines()) == 1


def run_killed(folder: Path, moments: list[dict]) -> None:
    in_forks(folder / "log", kill_and_resume, folder, moments)
    check_against_undisturbed(folder, moments)


_STEP, _FORWARD = "interleaving.interleaving:Interleaving._update", "interleaving.interleaving:Interleaving._losses"
_WRITE = "interleaving.code_cache:CodeCache.write"
# By schedule: lists of kills, each of one run.
KILLS = {
    "phases": [
        # Before the first checkpoint; in the middle of accumulation; in the middle of a save.
        [[_STEP, 2], [_FORWARD, 14], ["common.manifest:sha256", 2]],
        # A save that is all but renamed; the start of the second phase; its k-means.
        [["pretraining.checkpointing:os.replace", 3], ["interleaving.interleaving:Interleaving.enter_phase", 1],
         ["quantization_bridle:kmeans", 1]],
        # Within the second phase; between a row of metrics and its checkpoint; after the last checkpoint.
        [[_STEP, 10], ["pretraining.run:Run._save", 1], ["pretraining.run:Run.finish", 1]],
    ],
    "joint": [[[_STEP, 7]]],
    "alternate": [[[_FORWARD, 16]]],
    "views": [[[_FORWARD, 14], ["pretraining.run:Run._save", 2], [_STEP, 5]]],
    # As codes are kept; in the second window; between the end by evidence and its checkpoint; after that; in the
    # tokenizer's phase and as the last one keeps codes.
    "shortcuts": [
        [[_WRITE, 3], [_STEP, 6], ["pretraining.run:Run._end_phase", 1], ["pretraining.checkpointing:sync", 1],
         ["interleaving.interleaving:Interleaving.enter_phase", 1], [_STEP, 3], [_WRITE, 2],
         ["pretraining.run:Run.finish", 1]],
    ],
}  # fmt: skip


# The two that meet most of what there is are quick.
@pytest.mark.parametrize(
    "schedule",
    ["alternate", "shortcuts", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phases", "joint", "views"))],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, schedule):
    run_killed(tmp_path, [{"schedule": schedule, "kills": kills} for kills in KILLS[schedule]])


@pytest.mark.slow
def test_killed_at_twenty_random_moments_is_bit_equal(tmp_path):
    random.seed(0)
    schedules = [*PHASES, "views", "shortcuts"]
    moments = [
        {
            "schedule": random.choice(schedules),
            "kills": [random.uniform(0.1, 2.5) for _ in range(2)],
        }
        for _ in range(20)
    ]
    run_killed(tmp_path, moments)


# Data


def test_bad_files_are_skipped_and_listed(tmp_path, quick, caplog):
    folder = tmp_path / "data"
    write_recordings(folder)
    (folder / "broken.wav").write_bytes(b"RIFF, but no sound")
    soundfile.write(folder / "short.wav", np.zeros(10), RATE)
    with caplog.at_level(logging.WARNING):
        pretrain(write_recipe(tmp_path / "recipe.yaml"), str(folder), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in lines) == ["broken.wav", "short.wav"]
    assert sum("broken.wav" in record.getMessage() for record in caplog.records) == 1


def test_an_absurd_recording_is_skipped_and_changes_nothing(tmp_path, quick):
    """Finite samples whose power is not: the run ends as one of the other recordings would."""
    folder = tmp_path / "data"
    write_recordings(folder)
    absurd = np.random.default_rng(0).normal(size=RATE) * 0.1
    absurd[100] = 1e19
    soundfile.write(folder / "a.wav", absurd, RATE, subtype="FLOAT")
    pretrain(write_recipe(tmp_path / "recipe.yaml", probe_every=6), str(folder), tmp_path / "out")
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": str(folder / "a.wav"), "reason": json.loads(line)["reason"]}
    assert json.loads(line)["reason"] == "holds a sample of 1e+19, over the bound of 2.15e+09"
    (folder / "a.wav").unlink()
    expected = [
        measure_normalization(
            find_samples(str(folder), "audio"),
            BridleFeatureExtractor(num_mel_bins=32, max_length=48),
            SkippedFiles(tmp_path / "skipped.jsonl", 24),
        )
    ]
    processor = AutoFeatureExtractor.from_pretrained(tmp_path / "out" / "encoder")
    assert [(processor.mean, processor.std)] == expected
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


def test_one_recording_is_too_few(tmp_path, quick):
    data = write_recordings(tmp_path / "data", count=1)
    message = refusal(write_recipe(tmp_path / "recipe.yaml"), data, tmp_path / "out")
    assert "0.wav alone is left, of at least 2" in message


def test_features_that_are_not_finite_end_the_phase_and_name_the_files(data, tmp_path, quick, monkeypatch):
    from bridle_hf.interleaving.interleaving import Interleaving

    teach = Interleaving.teach
    monkeypatch.setattr(Interleaving, "teach", lambda *models: lambda *args: teach(*models)(*args) / torch.zeros(1))
    with pytest.raises(NonFiniteError, match=r"the teacher's features are not finite for .*wav"):
        pretrain(write_recipe(tmp_path / "recipe.yaml"), data, tmp_path / "out")


@pytest.mark.parametrize("measure", ["true", "false"], ids=["before the first step", "in training"])
def test_too_many_bad_files_end_the_run(tmp_path, quick, measure):
    folder = tmp_path / "data"
    write_recordings(folder, count=20)
    for number in range(4):
        (folder / f"broken_{number}.wav").write_bytes(b"no sound")
    with pytest.raises((ArgumentError, TooManyBadFiles)) as caught:
        pretrain(
            write_recipe(tmp_path / "recipe.yaml"), str(folder), tmp_path / "out", "--measure_normalization", measure
        )
    message = str(caught.value)
    assert "cannot be read, more than 10%" in message and "skipped.jsonl" in message and "\n" not in message


def test_errors_of_data_and_arguments_are_one_line_before_the_first_step(data, tmp_path):
    recipe, out = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "no audio files found" in refusal(recipe, str(tmp_path / "empty"), out)
    cases = {
        ("--exclude_groups", "choir"): "no sample is of group choir",
        ("--tokenizer.codebook_size", "16"): "tokenizer.codebook_size is 16, but encoder.codebook_size is 8",
        ("--tokenizer.max_length", "96"): "tokenizer.patch_grid",
        ("--tokenizer.teacher_layers", "[0, 3]"): "tokenizer.teacher_layers",
        ("--encoder.hiden_size", "8"): "encoder.hiden_size is not a field; did you mean 'hidden_size'?",
        ("--encoder.hidden_size", "15"): "hidden_size",
        ("--encoder.modality", "image"): "encoder.modality",
        ("--processor.num_mel_bin", "8"): "processor.num_mel_bin is not a field; did you mean 'num_mel_bins'?",
        ("--processor.max_length", "64"): "those of the encoder",
        ("--processor.mean", "low"): "processor.mean",
        ("--phases.0.stepz", "8"): "phases[0]: unknown key 'stepz'; did you mean 'steps'?",
        ("--phases.0.warmup_steps", "1", "--phases.0.warmup_epochs", "1"): "phases[0]: give the warm-up either as",
        ("--encoder.mask_type", "time_frequency"): "encoder.mask_type is time_frequency, but the masks are drawn by",
        ("--split", "validation"): "no samples of split",
    }
    for options, expected in cases.items():
        assert expected in refusal(recipe, data, out, *options)
    assert not out.exists() or not any(out.iterdir())


def test_not_a_number_stops_the_run_and_names_the_files(data, tmp_path, quick, monkeypatch):
    import bridle_hf.pretraining.run

    step = bridle_hf.pretraining.run.Interleaving.step

    def poisoned(self, number, batch):
        batch["input_values"][0] = float("nan")
        return step(self, number, batch)

    monkeypatch.setattr(bridle_hf.pretraining.run.Interleaving, "step", poisoned)
    recipe = write_recipe(tmp_path / "recipe.yaml", "joint")
    with pytest.raises(NonFiniteError) as caught:
        pretrain(recipe, data, tmp_path / "out", "--phases.0.steps", "40")
    message = str(caught.value)
    assert "20 in a row" in message.replace("steps ", "") and ".wav" in message and "\n" not in message


def test_skipped_steps_are_warned_of_and_a_share_of_them_ends_the_run(data, tmp_path, quick, monkeypatch, caplog):
    """Every third step: never two in a row."""
    import bridle_hf.pretraining.run

    step = bridle_hf.pretraining.run.Interleaving.step

    def poisoned(self, number, batch):
        if number % 3 == 1:
            batch["input_values"][0] = float("nan")
        return step(self, number, batch)

    monkeypatch.setattr(bridle_hf.pretraining.run.Interleaving, "step", poisoned)
    recipe, out = write_recipe(tmp_path / "recipe.yaml", "joint"), tmp_path / "out"
    with pytest.raises(RunError) as caught:
        pretrain(recipe, data, out, "--phases.0.steps", "70")
    assert "in 21 of the last 200 steps, up to 61" in str(caught.value) and ".wav" in str(caught.value)
    warned = [
        record.getMessage() for record in caplog.records if "is skipped, because its loss" in record.getMessage()
    ]
    assert len(warned) == 1 and warned[0].startswith("step 1 ") and warned[0].count(".wav") == 8


@pytest.mark.parametrize("failure", ["killed", "hung"])
def test_a_loader_that_fails_saves_and_ends_the_run(data, tmp_path, quick, monkeypatch, failure):
    load = bridle_hf.pretraining.run.MaskedLoader.__call__

    def fail(self, sample, rng):
        in_worker = torch.utils.data.get_worker_info() is not None
        if in_worker and sample.path.endswith("/11.wav") and not (tmp_path / "mended").exists():
            # It reads ahead: a worker that dies before the first step is done leaves nothing to save.
            while not (tmp_path / "stepped").exists():
                time.sleep(0.1)
            if failure == "killed":
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return load(self, sample, rng)

    step = bridle_hf.pretraining.run.Interleaving.step

    def stepped(self, number, batch):
        metrics = step(self, number, batch)
        (tmp_path / "stepped").touch()
        return metrics

    monkeypatch.setattr(bridle_hf.pretraining.run.Interleaving, "step", stepped)
    monkeypatch.setattr(bridle_hf.pretraining.run.MaskedLoader, "__call__", fail)
    recipe, out = write_recipe(tmp_path / "recipe.yaml", "joint", measure_normalization=False), tmp_path / "out"
    options = ("--num_workers", "1", "--loader_timeout", "3", "--save_every", "0", "--seed", "3")
    with pytest.raises(RunError) as caught:
        pretrain(recipe, data, out, *options)
    assert ("a loader worker has died" if failure == "killed" else "no batch within 3 s") in str(caught.value)
    assert "--resume goes on" in str(caught.value) and "\n" not in str(caught.value)
    assert list_checkpoints(out / "checkpoints"), "what was done is saved"
    (tmp_path / "mended").touch()
    pretrain(recipe, data, out, *options, "--resume")
