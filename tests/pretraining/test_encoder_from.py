"""Tests of `--encoder_from`: pretraining that goes on from the weights of another encoder."""

import pytest
import torch
from helpers.tiny_run import RECIPE, write_recordings
from safetensors.torch import load_file, save_file

import bridle_hf
from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleForPreTraining, BridleModel
from bridle_hf.common.errors import ArgumentError
from bridle_hf.interleaving.interleaving import start_from


SIZES = {name: value for name, value in RECIPE["encoder"].items() if "decoder" not in name and "code" not in name}


def save_source(folder, **fields):
    torch.manual_seed(5)
    decoder = {name: value for name, value in RECIPE["encoder"].items() if name not in SIZES}
    BridleForPreTraining(BridleConfig(**{**SIZES, **decoder, **fields})).save_pretrained(folder)
    BridleFeatureExtractor(num_mel_bins=32, max_length=48, mean=-2.5, std=1.5).save_pretrained(folder)
    return BridleModel.from_pretrained(folder)


def run(tmp_path, encoder, **options):
    recipe = {**RECIPE, "measure_normalization": False, "encoder": encoder, "steps_scale": 1.0}
    phase = {"train": "encoder", "steps": 1, "learning_rate": 1e-12}
    return bridle_hf.pretrain(
        data=write_recordings(tmp_path / "data"), output_dir=str(tmp_path / "out"), **{**recipe, **options},
        phases=[phase],
    )  # fmt: skip


def decoder_of(encoder):
    return {name: value for name, value in encoder.items() if name not in SIZES}


def test_a_run_starts_from_the_weights(tmp_path):
    """After a step too small to see, on a longer grid; sizes and statistics are those of the source."""
    source = save_source(tmp_path / "source")
    encoder = {**decoder_of(RECIPE["encoder"]), "max_length": 64}
    run(tmp_path, encoder, encoder_from=str(tmp_path / "source"))
    found = BridleModel.from_pretrained(tmp_path / "out" / "encoder")
    assert found.config.max_length == 64 and found.config.num_mel_bins == 32
    for name, value in source.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=0)
    extractor = BridleFeatureExtractor.from_pretrained(tmp_path / "out" / "encoder")
    assert (extractor.mean, extractor.std) == (-2.5, 1.5)


def test_another_size_and_nothing_at_all_are_refused(tmp_path):
    save_source(tmp_path / "source")
    source = str(tmp_path / "source")
    for encoder, given, reason in [
        (
            {**RECIPE["encoder"], "hidden_size": 32},
            source,
            "encoder.hidden_size is 32, but that of --encoder_from is 16",
        ),
        (RECIPE["encoder"], str(tmp_path / "nothing"), "nothing: no model is there"),
    ]:
        with pytest.raises(ArgumentError, match=reason):
            run(tmp_path, encoder, encoder_from=given)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    save_source(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    weights = load_file(path)
    del weights["bridle.layernorm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match="1 weights are missing, as layernorm"):
        run(tmp_path, decoder_of(RECIPE["encoder"]), encoder_from=str(tmp_path / "source"))


@pytest.mark.parametrize("steps", [48, 32, 96])
def test_trained_positions_go_to_another_grid(steps, tmp_path):
    source = save_source(tmp_path / "source", position_embedding_type="table")
    source.embeddings.positions.table.normal_()
    fields = {**source.config.to_dict(), "max_length": steps}
    encoder = BridleModel(BridleConfig.from_dict(fields))
    start_from(encoder, source)
    table, wanted = encoder.embeddings.positions.table, source.embeddings.positions.table
    if steps <= 48:
        assert torch.equal(table, wanted[: len(table)])
    else:
        image = wanted.view(6, 4, -1).permute(2, 0, 1)[None]
        wanted = torch.nn.functional.interpolate(image, size=(12, 4), mode="bicubic")[0].flatten(1).T
        torch.testing.assert_close(table, wanted)


def saved(folder):
    extractor = BridleFeatureExtractor.from_pretrained(folder)
    return extractor.sampling_rate, extractor.do_normalize, extractor.mean, extractor.std


@pytest.mark.parametrize("processor", [{"sampling_rate": 8000, "mean": -2.5, "std": 1.5}, {"do_normalize": False}])
def test_inputs_are_made_as_the_weights_have_seen_them(tmp_path, processor):
    """By the source's rate and normalisation, of an encoder and of a tokenizer to start from."""
    run(tmp_path / "source", RECIPE["encoder"], processor=processor)
    source, encoder = tmp_path / "source" / "out", decoder_of(RECIPE["encoder"])
    for name, options in {
        "encoder": {"encoder": encoder, "encoder_from": str(source / "encoder")},
        "tokenizer": {"encoder": RECIPE["encoder"], "tokenizer_from": str(source / "tokenizer"), "tokenizer": {}},
    }.items():
        run(tmp_path / name, **options)
        for part in ("encoder", "tokenizer"):
            assert saved(tmp_path / name / "out" / part) == saved(source / "encoder")
    with pytest.raises(ArgumentError, match="sampling_rate is 44100, but the codes of --tokenizer_from"):
        run(tmp_path / "other", **options, processor={"sampling_rate": 44100})


def test_what_is_measured_is_told_and_not_named_too(tmp_path, caplog):
    save_source(tmp_path / "source")
    encoder, source = decoder_of(RECIPE["encoder"]), str(tmp_path / "source")
    run(tmp_path, encoder, encoder_from=source, measure_normalization=True)
    assert "not with the mean -2.500 and std 1.500 that the weights of --encoder_from have seen" in caplog.text
    measured = saved(tmp_path / "out" / "encoder")
    run(tmp_path / "plain", RECIPE["encoder"], measure_normalization=True)
    assert measured == saved(tmp_path / "plain" / "out" / "encoder")
    for processor, reason in (
        ({"mean": -2.5}, "processor.mean is named, but measure_normalization measures it"),
        ({"do_normalize": False}, "measure_normalization: inputs are not normalised"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            run(tmp_path / "no", RECIPE["encoder"], measure_normalization=True, processor=processor)
