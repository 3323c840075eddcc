"""Exported programs, run by ONNX Runtime and by torch.export's loader, against the models themselves."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession

from bridle_hf import (
    BridleForAudioClassification,
    BridleForAudioFrameClassification,
    BridleForImageClassification,
    BridleForPreTraining,
    BridleForVideoClassification,
    BridleModel,
    BridleTokenizerModel,
)
from bridle_hf.commands import run
from bridle_hf.common.errors import ArgumentError, RunError
from bridle_hf.data.modalities import make_processor
from bridle_hf.exporting.arguments import ExportArguments
from bridle_hf.exporting.export import checked_sizes, load_program, run_export
from bridle_hf.exporting.programs import LogMel
from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor


SECONDS = (0.3, 10, 31)


@pytest.fixture
def saved(tmp_path, tiny_config, tiny_tokenizer_config):
    """Saves a model with its processor; returns the folder and the model."""

    def save(model_class, modality, **fields):
        make = tiny_tokenizer_config if model_class is BridleTokenizerModel else tiny_config
        torch.manual_seed(0)
        model = model_class(make(modality, **fields)).eval()
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        make_processor(tiny_config(modality)).save_pretrained(folder)
        return str(folder), model

    return save


def exported(folder: str, path: Path, **options) -> dict:
    return run_export(ExportArguments(model=folder, output=str(path), **options))


@torch.no_grad()
def test_one_file_of_onnx_takes_any_batch_and_time(tmp_path, saved):
    folder, model = saved(BridleForAudioClassification, "audio", id2label={0: "cat", 1: "dog"})
    made = exported(folder, tmp_path / "a.onnx")
    assert made["inputs"] == ["input_values", "attention_mask"] and made["outputs"] == ["logits"]
    session = InferenceSession(tmp_path / "a.onnx")
    for batch in (1, 3, 5):
        for seconds in SECONDS:
            frames = int(100 * seconds)
            values = torch.randn(batch, frames, model.config.num_mel_bins)
            mask = torch.ones(batch, frames, dtype=torch.long)
            mask[1:, frames // 3 :] = 0
            (logits,) = session.run(None, {"input_values": values.numpy(), "attention_mask": mask.numpy()})
            np.testing.assert_allclose(logits, model(values, mask).logits, atol=1e-4)
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(told["id2label"]) == {"0": "cat", "1": "dog"} and told["modality"] == "audio"


@pytest.mark.slow
@torch.no_grad()
def test_from_the_waveform_on(tmp_path, saved):
    """Where it runs, nobody needs to know what log-mel is."""
    folder, model = saved(BridleTokenizerModel, "audio")
    exported(folder, tmp_path / "a.onnx", input="waveform")
    extractor = BridleFeatureExtractor.from_pretrained(folder)
    session = InferenceSession(tmp_path / "a.onnx")
    for seconds in SECONDS:
        waveform = np.random.default_rng(0).standard_normal((2, int(16000 * seconds))).astype(np.float32) / 10
        (codes,) = session.run(["codes"], {"waveform": waveform})
        inputs = extractor(
            list(waveform), sampling_rate=16000, padding="longest", truncation=False, return_tensors="pt"
        )
        expected = model.encode(**inputs).numpy()
        assert codes.shape == expected.shape and (codes == expected).mean() > 0.99


@pytest.mark.parametrize("rate, mels", [(16000, 128), (16000, 64), (8000, 40), (44100, 128)])
def test_log_mel_by_one_convolution(rate, mels):
    extractor = BridleFeatureExtractor(sampling_rate=rate, num_mel_bins=mels, mean=-3.0, std=2.0)
    noise = np.random.default_rng(0).standard_normal(rate) * np.linspace(1e-3, 0.5, rate)
    waveform = (noise + 0.2).astype(np.float32)
    expected = extractor([waveform], sampling_rate=rate, padding="longest", return_tensors="pt")["input_values"]
    torch.testing.assert_close(LogMel(extractor)(torch.from_numpy(waveform)[None]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "model_class, modality, options",
    [
        (BridleForAudioFrameClassification, "audio", {}),
        (BridleForPreTraining, "audio", {"input": "waveform"}),
        (BridleTokenizerModel, "image", {"tokenizer_type": "self_distilled"}),
    ],
)
def test_exported_by_torch(tmp_path, saved, model_class, modality, options):
    takes = options.pop("input", "features")
    folder, _ = saved(model_class, modality, **options)
    made = exported(folder, tmp_path / "a.pt2", input=takes)
    program, config = load_program(folder, takes)
    module = torch.export.load(tmp_path / "a.pt2").module()
    for batch, frames in checked_sizes(config):
        inputs = program.example(batch, frames)
        for one, other in zip(module(**inputs), program(**inputs), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert made["outputs"] == list(program.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    "model_class, modality",
    [
        (BridleModel, "audio"),
        (BridleModel, "image"),
        (BridleModel, "video"),
        (BridleForAudioFrameClassification, "audio"),
        (BridleForImageClassification, "image"),
        (BridleForVideoClassification, "video"),
        (BridleTokenizerModel, "audio"),
        (BridleTokenizerModel, "video"),
    ],
)
def test_every_model_can_be_exported(tmp_path, saved, model_class, modality, suffix):
    """The command itself runs both and compares."""
    folder, _ = saved(model_class, modality)
    exported(folder, tmp_path / f"a{suffix}")


def test_stored_positions_bound_the_length(tmp_path, saved):
    """Such a model refuses longer clips, so a program of it is neither wrong nor checked there."""
    folder, model = saved(BridleForAudioClassification, "audio", position_embedding_type="table")
    exported(folder, tmp_path / "a.pt2")
    assert {frames for _, frames in checked_sizes(model.config)} == {30, model.config.max_length}


def test_a_program_that_is_wrong_for_a_size_is_not_kept(tmp_path, saved, monkeypatch):
    folder, _ = saved(BridleForAudioClassification, "audio")
    held = {"input_values": (0,), "attention_mask": (0,)}
    monkeypatch.setattr("bridle_hf.exporting.programs.ModelProgram.free_axes", lambda self: held)
    with pytest.raises(RunError, match="the exported program, given 1 samples of 30 frames, fails"):
        exported(folder, tmp_path / "a.pt2")
    assert not list(tmp_path.glob("*.pt2"))


def test_what_cannot_be_exported_is_refused(tmp_path, saved):
    folder, _ = saved(BridleForImageClassification, "image")
    for options, message in (
        ({"output": "a.tflite"}, "must end with .onnx or .pt2"),
        ({"output": "a.onnx", "input": "waveform"}, "is of image"),
        ({"output": "a.onnx", "model": str(tmp_path / "none")}, "no model is there"),
        ({"output": "config.json.onnx", "model": folder}, "exists"),
    ):
        (tmp_path / "config.json.onnx").touch()
        with pytest.raises(ArgumentError, match=message):
            exported(options.pop("model", folder), tmp_path / options.pop("output"), **options)


def test_the_command_says_what_it_made(tmp_path, saved, capsys):
    folder, _ = saved(BridleModel, "image")
    run(None, ["export", folder, str(tmp_path / "a.pt2")])
    printed = capsys.readouterr().out
    assert "pixel_values -> last_hidden_state, pooler_output; given 1 to 5 samples it differs" in printed
