"""Tests of `--tokenizer_from`: pretraining on the codes of a tokenizer that another run made."""

import json

import pytest
import torch
from helpers.tiny_run import RECIPE, rows, weights, write_recordings
from transformers import AutoModel

import bridle_hf
import bridle_hf.pretraining.run
from bridle_hf import BridleFeatureExtractor, BridleTokenizerConfig, BridleTokenizerModel
from bridle_hf.common.errors import ArgumentError
from bridle_hf.interleaving.interleaving import Interleaving


GRID = {"patch_size": 8, "num_mel_bins": 32, "max_length": 48}
SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {"train": "encoder", "steps": 3, "learning_rate": 1e-3}
TOKENIZER = {"train": "tokenizer", "steps": 3, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(bridle_hf.pretraining.run, "draw_example", lambda *args: None)
    monkeypatch.setattr(bridle_hf.pretraining.run, "write_report", lambda *args: None)


def save_tokenizer(folder, **fields):
    """Trained, as far as code can tell: its codebooks are set."""
    torch.manual_seed(7)
    own = {**RECIPE["tokenizer"], "num_codebooks": 3, "codebook_size": 8, "teacher_hidden_size": 40}
    model = BridleTokenizerModel(BridleTokenizerConfig(**{**GRID, **SIZES, **own, **fields}))
    model.quantizer.initialize(torch.randn(300, 4))
    model.save_pretrained(folder)
    BridleFeatureExtractor(num_mel_bins=32, max_length=48, mean=-2.5, std=1.5).save_pretrained(folder)
    return model.eval()


def run(tmp_path, *phases, encoder=None, **options):
    sizes = {**RECIPE["encoder"], **(encoder or {})}
    for name in ("num_codebooks", "codebook_size"):
        del sizes[name]
    recipe = {**RECIPE, "tokenizer": {}, "measure_normalization": False, "augment": False, "encoder": sizes}
    given = {"tokenizer_from": str(tmp_path / "tokenizer"), "output_dir": str(tmp_path / "out"), **options}
    return bridle_hf.pretrain(
        data=write_recordings(tmp_path / "data"), **{**recipe, **given}, phases=list(phases or [ENCODER])
    )


@pytest.mark.parametrize("fields", [{}, {"tokenizer_type": "random_projection", "hidden_size": 16},
                                    {"position_embedding_type": "table"}])  # fmt: skip
def test_the_first_encoder_learns_the_codes_of_the_given_tokenizer(fields, tmp_path, monkeypatch):
    """On a grid of more steps; the tokenizer is left as it was, with its processor's statistics."""
    source, seen = save_tokenizer(tmp_path / "tokenizer", **fields), []
    labels = Interleaving._labels

    def noted(self, batch, part):
        found = labels(self, batch, part)
        seen.append((part.inputs, part.attention_mask, found[0]))
        return found

    monkeypatch.setattr(Interleaving, "_labels", noted)
    table = {name: fields[name] for name in fields if name == "position_embedding_type"}
    run(tmp_path, encoder={"max_length": 64, **table}, bucket_by_length=False)
    encoder, tokenizer = (AutoModel.from_pretrained(tmp_path / "out" / name) for name in ("encoder", "tokenizer"))
    assert (encoder.config.num_codebooks, encoder.config.codebook_size) == (3, 8)
    assert tokenizer.config.max_length == 64 and tokenizer.config.tokenizer_type == source.config.tokenizer_type
    for name, value in source.state_dict().items():
        if not name.endswith("positions.table"):
            assert torch.equal(tokenizer.state_dict()[name], value), name
    assert len(seen) == 3
    for inputs, mask, codes in seen:
        assert torch.equal(tokenizer.encode(inputs, mask, soft=True), codes)
        # Within the clips that both grids hold, they are the given tokenizer's own.
        if "position_embedding_type" not in fields:
            short = mask.sum(dim=1) <= 48
            assert torch.equal(source.encode(inputs[short, :48], mask[short, :48]), codes[short, : 6 * 4, :, 0])
    extractor = BridleFeatureExtractor.from_pretrained(tmp_path / "out" / "encoder")
    assert (extractor.mean, extractor.std) == (-2.5, 1.5)
    arguments = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]
    assert arguments["tokenizer_from"] == str(tmp_path / "tokenizer")


def test_later_tokenizers_are_those_of_the_run(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    run(tmp_path, ENCODER, TOKENIZER, ENCODER)
    found = BridleTokenizerConfig.from_pretrained(tmp_path / "out" / "tokenizer")
    assert (found.teacher_hidden_size, found.hidden_size, found.code_dim) == (16, 24, 4)


def test_it_can_be_trained_on(tmp_path):
    source = save_tokenizer(tmp_path / "tokenizer", teacher_hidden_size=16)
    run(tmp_path, {**TOKENIZER, "start": "continue", "learning_rate": 1e-12}, ENCODER)
    found = BridleTokenizerModel.from_pretrained(tmp_path / "out" / "tokenizer")
    for name, value in source.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, atol=1e-6, rtol=0)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "tokenizer")
    phases = [{**ENCODER, "steps": 4}, TOKENIZER]
    run(tmp_path, *phases, output_dir=str(tmp_path / "whole"), save_every=1)
    step = Interleaving.step

    def fails(self, number, batch):
        if number == 2:
            raise OSError("the machine is off")
        return step(self, number, batch)

    monkeypatch.setattr(Interleaving, "step", fails)
    with pytest.raises(RuntimeError, match="the machine is off"):
        run(tmp_path, *phases, save_every=1)
    monkeypatch.setattr(Interleaving, "step", step)
    run(tmp_path, *phases, save_every=1, resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "out")[name], value), name
    assert rows(tmp_path / "out")[-1] == rows(tmp_path / "whole")[-1]


@pytest.mark.parametrize(
    ("phases", "options", "reason"),
    [
        ([TOKENIZER, ENCODER], {}, "would not be used: give that phase start: continue"),
        ([{**TOKENIZER, "start": "continue"}], {}, "features 40 wide, and its teacher's are 16 wide: give it start"),
        ([], {"tokenizer": {"code_dim": 8}}, "tokenizer.code_dim is 8, but that of --tokenizer_from is 4: leave it"),
        ([], {"encoder": {"patch_size": 16}}, "tokenizer.patch_grid is .* they must agree"),
        ([], {"encoder": {"num_mel_bins": 64}}, "tokenizer.patch_grid is .* they must agree"),
        ([], {"processor": {"mean": -4.0}}, "processor.mean is -4.0, but .* give --processor.mean -2.5"),
        ([], {"measure_normalization": True}, "give --measure_normalization false"),
        ([], {"tokenizer_from": "nowhere/at/all"}, "--tokenizer_from nowhere/at/all: no model is there"),
    ],
)
def test_what_does_not_fit_is_refused(phases, options, reason, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ArgumentError, match=reason):
        run(tmp_path, *phases, **options)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    run(tmp_path)
    with pytest.raises(ArgumentError, match="holds a 'bridle': give a folder or Hub id of a BRIDLE tokenizer"):
        run(tmp_path, tokenizer_from=str(tmp_path / "out" / "encoder"), output_dir=str(tmp_path / "other"))


def test_codes_of_kmeans_follow_those_of_the_given_tokenizer(tmp_path):
    """Whose teacher had another width: nothing of it is trained on. What k-means left is none to start from."""
    save_tokenizer(tmp_path / "tokenizer")
    alternate = {"train": "alternate", "steps": 4, "switch_every": 2, "start": "continue"}
    run(tmp_path, ENCODER, alternate, tokenizer={"tokenizer_type": "kmeans"})
    fitted = AutoModel.from_pretrained(tmp_path / "out" / "tokenizer").config
    assert (fitted.tokenizer_type, fitted.num_codebooks, fitted.codebook_size) == ("kmeans", 3, 8)
    with pytest.raises(ArgumentError, match="--tokenizer_from: its codes are of k-means"):
        run(tmp_path, output_dir=str(tmp_path / "again"), tokenizer_from=str(tmp_path / "out" / "tokenizer"))
