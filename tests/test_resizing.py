"""Checkpoints of ours at other sizes: `from_pretrained(..., image_size=...)`, `resize`, and where they are used."""

import numpy as np
import pytest
import torch
from helpers.tiny_run import write_recordings
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForAudioClassification, ViTConfig, ViTModel

import bridle_hf
from bridle_hf import (
    BridleForAudioClassification,
    BridleForImageClassification,
    BridleForPreTraining,
    BridleModel,
    BridleTokenizerModel,
)
from bridle_hf.convert_relatives_to_bridle import load_relative
from bridle_hf.patching_bridle import sincos_positions


def with_table(model):
    """As of a converted checkpoint: positions that no formula gives."""
    for name, buffer in model.named_buffers():
        if name.endswith("positions.table"):
            buffer.copy_(torch.randn_like(buffer))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 96])
def test_a_relative_at_another_size_is_the_peer_with_its_own_interpolation(side, tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    peer = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=16)).eval()
    torch.nn.init.normal_(peer.embeddings.position_embeddings)
    peer.save_pretrained(tmp_path / "theirs")
    load_relative(str(tmp_path / "theirs"))[0].save_pretrained(tmp_path / "ours")
    pixels = torch.randn(2, 3, side, side)
    wanted = peer(pixels, interpolate_pos_encoding=True).last_hidden_state
    for loaded in (
        BridleModel.from_pretrained(tmp_path / "ours", image_size=side),
        AutoModel.from_pretrained(tmp_path / "ours", image_size=side),
    ):
        assert loaded.config.image_size == side
        torch.testing.assert_close(loaded.eval()(pixels).last_hidden_state, wanted, atol=1e-4, rtol=0)
        # As a checkpoint of that size, too.
        loaded.save_pretrained(tmp_path / "again")
        again = BridleModel.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(pixels).last_hidden_state, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("modality", "sizes", "grid"),
    [
        ("audio", {"max_length": 48}, (3, 4)),
        ("audio", {"max_length": 160, "num_mel_bins": 32}, (10, 2)),
        ("image", {"image_size": [96, 32]}, (6, 2)),
        ("video", {"image_size": 48, "num_frames": 4}, (2, 6, 6)),
    ],
)
def test_every_table_goes_to_the_grid(modality, sizes, grid, tiny_config, tiny_tokenizer_config, tmp_path):
    """Of encoder, decoder, tokenizer and estimator; cut along time, else by torch's interpolation."""
    for make, config in ((BridleForPreTraining, tiny_config), (BridleTokenizerModel, tiny_tokenizer_config)):
        model = with_table(make(config(modality, position_embedding_type="table")))
        model.save_pretrained(tmp_path / "saved")
        loaded, info = make.from_pretrained(tmp_path / "saved", output_loading_info=True, **sizes)
        assert not info["mismatched_keys"] and not info["missing_keys"]
        before, after = dict(model.named_buffers()), dict(loaded.named_buffers())
        tables = [name for name in before if name.endswith("positions.table")]
        assert len(tables) == 2
        for name in tables:
            table = before[name].unflatten(0, model.config.patch_grid).movedim(-1, 0)[None]
            if sizes == {"max_length": 48}:
                wanted = table[:, :, :3]
            else:
                mode = "trilinear" if modality == "video" else "bicubic"
                wanted = F.interpolate(table, size=grid, mode=mode, align_corners=False)
            torch.testing.assert_close(after[name], wanted[0].flatten(1).T)
        for name, value in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), value)


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "image", "video"])
def test_computed_positions_are_those_of_the_new_size(modality, tiny_config, tmp_path):
    sizes = {"audio": {"max_length": 64}, "image": {"image_size": 32}, "video": {"image_size": 16}}[modality]
    model = BridleModel(tiny_config(modality)).eval()
    model.save_pretrained(tmp_path)
    loaded = BridleModel.from_pretrained(tmp_path, **sizes).eval()
    positions = loaded.embeddings.positions
    assert positions.grid == loaded.config.patch_grid
    assert torch.equal(positions.table, sincos_positions(positions.grid, 48))
    shape = {"audio": (64, 64), "image": (3, 32, 32), "video": (8, 3, 16, 16)}[modality]
    inputs = torch.randn(2, *shape)
    torch.testing.assert_close(loaded(inputs).last_hidden_state, model(inputs).last_hidden_state)


def test_a_loaded_model_is_resized_by_a_call(tiny_config):
    model = with_table(BridleForImageClassification(tiny_config("image", position_embedding_type="table")))
    pixels = torch.randn(2, 3, 96, 96)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(pixels)
    wanted = model.bridle(pixels, interpolate_pos_encoding=True).last_hidden_state
    model.resize(image_size=96)
    torch.testing.assert_close(model.bridle(pixels).last_hidden_state, wanted)
    for sizes, reason in (({"image_size": 90}, "multiple of its patch of 16"), ({"hidden_size": 9}, "are not sizes")):
        with pytest.raises(ValueError, match=reason):
            model.resize(**sizes)
        assert model.config.image_size == 96


@pytest.mark.parametrize("auto_class", [AutoModelForAudioClassification, BridleForAudioClassification])
def test_a_size_that_does_not_fit_is_refused(auto_class, tiny_config, tmp_path):
    BridleForAudioClassification(tiny_config("audio", position_embedding_type="table")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`max_length` is 50"):
        auto_class.from_pretrained(tmp_path, max_length=50)


@pytest.mark.parametrize("length", [32, 64])
def test_fine_tuning_at_another_length_takes_the_table_along(length, tiny_config, tmp_path):
    config = tiny_config("audio", max_length=48, num_mel_bins=32, position_embedding_type="table")
    encoder = with_table(BridleModel(config))
    encoder.save_pretrained(tmp_path / "encoder")
    bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=48).save_pretrained(tmp_path / "encoder")
    data = write_recordings(tmp_path / "data", count=12, labels=True)
    bridle_hf.finetune(
        model=str(tmp_path / "encoder"), data=data, output_dir=str(tmp_path / "out"), max_length=length,
        validation_fraction=0.5, max_steps=1, learning_rate=1e-12, per_device_train_batch_size=4, use_cpu=True,
        report_to=["none"],
    )  # fmt: skip
    found = BridleForAudioClassification.from_pretrained(tmp_path / "out").bridle.embeddings.positions.table
    wanted = encoder.embeddings.positions((length // 16, 2), interpolate=True)[0]
    assert found.shape == (length // 16 * 2, 48)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
