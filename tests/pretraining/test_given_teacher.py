"""Tests of `tokenizer: {teacher: ...}`: the first tokenizer distilled from an encoder of transformers."""

import json

import pytest
import torch
from helpers.tiny_run import RECIPE, rows, weights, write_recordings
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

import bridle_hf
import bridle_hf.pretraining.run
from bridle_hf import BridleTokenizerConfig
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.teacher import Teacher
from bridle_hf.pretraining.arguments import FlopsArguments, PretrainArguments
from bridle_hf.pretraining.cost import cost_lines


ENCODER = {"train": "encoder", "steps": 2, "learning_rate": 1e-3}
TOKENIZER = {"train": "tokenizer", "steps": 4, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(bridle_hf.pretraining.run, "draw_example", lambda *args: None)
    monkeypatch.setattr(bridle_hf.pretraining.run, "write_report", lambda *args: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    grid = {"patch_size": 8, "time_stride": 8, "frequency_stride": 8, "max_length": 48, "num_mel_bins": 32}
    torch.manual_seed(3)
    ASTModel(ASTConfig(**sizes, **grid)).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=32, max_length=48, mean=-5.0, std=3.0).save_pretrained(folder)
    return str(folder)


def recipe_of(data, teacher, phases, **options):
    tokenizer = {**RECIPE["tokenizer"], "teacher": teacher, **options.pop("tokenizer", {})}
    return {**RECIPE, "data": data, "tokenizer": tokenizer, "phases": phases, **options}


def run(tmp_path, *recipe, out="out", **options):
    return bridle_hf.pretrain(output_dir=str(tmp_path / out), **recipe_of(*recipe, **options))


@pytest.mark.parametrize("fields", [{}, {"teacher_layers": [1, 2], "center_teacher": True}])
def test_the_first_tokenizer_learns_from_the_teacher_and_later_ones_from_the_encoder(
    fields, data, teacher, tmp_path, monkeypatch
):
    widths, teach = [], Interleaving._teacher
    monkeypatch.setattr(Interleaving, "_teacher", lambda self, *args: (found := teach(self, *args), widths.append(
        (self.teacher is not None, found.shape[-1])))[0])  # fmt: skip
    run(tmp_path, data, teacher, [TOKENIZER, ENCODER, TOKENIZER], tokenizer=fields, keep_iterations=True)
    assert set(widths) == {(True, 24), (False, 16)}
    found = [BridleTokenizerConfig.from_pretrained(tmp_path / "out" / name / "tokenizer")
             for name in ("iterations/0_tokenizer", "iterations/1_encoder", "")]  # fmt: skip
    assert [config.teacher_hidden_size for config in found] == [24, 24, 16]
    ends = [row for row in rows(tmp_path / "out") if row.get("event") == "phase_end"]
    assert all(len(row["tokenizer"]["explained_variance"]) == 2 for row in ends)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["teacher"] == {"name": teacher, "model_type": "audio-spectrogram-transformer"}
    card = (tmp_path / "out" / "encoder" / "README.md").read_text()
    assert "a model of type `audio-spectrogram-transformer`" in card and f"`{teacher.split('/')[-1]}`" in card


def test_a_resumed_run_is_the_run_that_was_not_interrupted(data, teacher, tmp_path, monkeypatch):
    """Off in the first phase, and off in the one after it."""
    phases = [TOKENIZER, ENCODER]
    run(tmp_path, data, teacher, phases, out="whole", save_every=1)
    step = Interleaving.step
    for last in (2, 5):

        def fails(self, number, batch, last=last):
            if number == last:
                raise OSError("the machine is off")
            return step(self, number, batch)

        monkeypatch.setattr(Interleaving, "step", fails)
        with pytest.raises(RuntimeError, match="the machine is off"):
            run(tmp_path, data, teacher, phases, save_every=1, resume=last > 2)
    monkeypatch.setattr(Interleaving, "step", step)
    run(tmp_path, data, teacher, phases, save_every=1, resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "out")[name], value), name
    assert rows(tmp_path / "out")[-1] == rows(tmp_path / "whole")[-1]


@pytest.mark.parametrize(
    ("phases", "fields", "reason"),
    [
        ([ENCODER, TOKENIZER], {}, "the first phase trains one: begin with {train: tokenizer, ...}"),
        (
            [TOKENIZER, ENCODER, {**TOKENIZER, "start": "continue"}],
            {},
            "phases.2. goes on with .* 24 wide, .* 16 wide",
        ),
        ([TOKENIZER], {"teacher_layers": [4]}, "tokenizer.teacher_layers.* is .4."),
        ([TOKENIZER], {"teacher": "nowhere/at/all"}, "tokenizer.teacher nowhere/at/all: no model is there"),
        ([TOKENIZER], {"teacher": 3}, "tokenizer.teacher is 3: give a folder or Hub id"),
        ([TOKENIZER], {"teachers": "x"}, "tokenizer.teachers is not a field"),
    ],
)
def test_what_does_not_fit_is_refused(phases, fields, reason, data, teacher, tmp_path):
    with pytest.raises(ArgumentError, match=reason):
        run(tmp_path, data, teacher, phases, tokenizer=fields)
    assert not (tmp_path / "out").exists()


def test_its_flops_are_counted(data, teacher):
    recipe = recipe_of(data, teacher, [TOKENIZER, ENCODER, TOKENIZER])
    (args,) = make_arguments(PretrainArguments, recipe=None, values={**recipe, "output_dir": "nowhere"})
    lines = [line for line in cost_lines(FlopsArguments(samples=24), args) if "teacher" in line]
    config = bridle_hf.BridleConfig(**RECIPE["encoder"])
    flops = Teacher(teacher, config, bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=48)).flops
    assert f"teacher {flops / 1e9:.4g}" in lines[0] and lines[0] != lines[1]
