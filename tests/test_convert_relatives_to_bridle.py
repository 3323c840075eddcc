"""Tests of convert_relatives_to_bridle.py: hidden states on random weights of the peers' own classes."""

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from bridle_hf import BridleModel
from bridle_hf.commands import main
from bridle_hf.convert_relatives_to_bridle import config_of, config_of_weights, convert_relative, load_relative
from bridle_hf.embedding.embedder import Embedder
from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor
from bridle_hf.patching_bridle import sincos_positions


SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
MLP = {"intermediate_size": 80}


def randomize(model):
    for parameter in model.eval().parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def peer(name):
    return randomize({
        "vit": lambda: ViTModel(ViTConfig(**SIZES, **MLP)),
        "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**SIZES, **MLP, qkv_bias=False)),
        "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**SIZES, **MLP, mask_ratio=0.0)),
        "vit_mae_pretraining": lambda: ViTMAEForPreTraining(
            ViTMAEConfig(**SIZES, **MLP, decoder_hidden_size=32, decoder_num_hidden_layers=1, mask_ratio=0.0)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**{**SIZES, "patch_size": 14, "image_size": 56}, mlp_ratio=2)),
        "videomae": lambda: VideoMAEModel(VideoMAEConfig(**SIZES, **MLP, num_frames=4)),
        "videomae_pretraining": lambda: VideoMAEForPreTraining(
            VideoMAEConfig(**SIZES, **MLP, num_frames=4, use_mean_pooling=False, decoder_num_attention_heads=4,
                           decoder_hidden_size=32)),
        "videomae_without_bias": lambda: VideoMAEModel(VideoMAEConfig(**SIZES, **MLP, num_frames=4, qv_bias=False)),
    }[name]())  # fmt: skip


def base_of(model):
    return getattr(model, model.base_model_prefix, model)


@torch.no_grad()
def hidden_states(model, inputs, **options):
    """Of ViTMAE in the patches' own order, which it shuffles."""
    if isinstance(model, ViTMAEModel):
        noise = torch.arange(1024.0)[: (inputs.shape[-1] // 16) * (inputs.shape[-2] // 16)].expand(len(inputs), -1)
        options["noise"] = noise
    return model(inputs, **options).last_hidden_state


@pytest.mark.parametrize("name", ["vit", "vit_classifier", "vit_mae", "vit_mae_pretraining", "dinov2", "videomae",
                                  "videomae_pretraining", "videomae_without_bias"])  # fmt: skip
def test_hidden_states_are_the_peers(name, tmp_path):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, left, processor = load_relative(str(tmp_path / "theirs"))
    size = ours.config.image_size[0] if isinstance(ours.config.image_size, list | tuple) else ours.config.image_size
    shape = (2, 4, 3, size, size) if name.startswith("videomae") else (2, 3, size, size)
    inputs = torch.randn(shape)
    with torch.no_grad():
        found = ours(inputs).last_hidden_state
    torch.testing.assert_close(found, hidden_states(base_of(theirs), inputs), atol=2e-5, rtol=0)
    # As a saved model of ours, too.
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "ours").eval()(inputs).last_hidden_state
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)
    assert set(left) <= {"pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"}
    assert processor.crop_size["height"] == size


@pytest.mark.parametrize("name", ["vit", "vit_mae", "dinov2"])
@pytest.mark.parametrize("side", [2, 6])
def test_another_grid_by_the_peers_interpolation(name, side, tmp_path):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path)
    ours, _, _ = load_relative(str(tmp_path))
    patch = ours.config.patch_shape[1]
    inputs = torch.randn(2, 3, side * patch, (side + 1) * patch)
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}  # DINOv2 always does
    with torch.no_grad():
        found = ours(inputs, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, hidden_states(theirs, inputs, **options), atol=1e-4, rtol=0)
    if name != "vit_mae" or ours.config.position_embedding_type == "table":
        with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
            ours(inputs)


def timm_names(model: BridleModel, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of a model of ours as AudioMAE's code names and shapes them, position table included."""
    config, weights = model.config, {}
    names = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
             "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("layers.", "blocks.").replace("layernorm.", "norm.").replace("embeddings.cls", "cls")
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            own = name.replace("blocks.", "layers.")
            rows = [model.state_dict()[own.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace("attention.q_proj", "attn.qkv"), torch.cat(rows)
        if name == "embeddings.projection.weight":
            value = value.view(config.hidden_size, config.num_channels, *config.patch_shape[1:])
        weights[name.replace("embeddings.projection", "patch_embed.proj")] = value
    weights["pos_embed"] = torch.cat([torch.zeros(1, table.shape[1]), table])[None]
    return {**weights, "mask_token": torch.zeros(1, 1, 8), "decoder_pred.weight": torch.zeros(3, 8)}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("modality", ["audio", "image"])
def test_weights_by_timms_names(modality, learned, tiny_config):
    fields = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": [16, 16]}
    model = randomize(BridleModel(tiny_config(modality, **fields)))
    table = sincos_positions(model.config.patch_grid, 128)
    if learned:
        table = torch.randn_like(table)
        model.embeddings.positions.table.copy_(table)
    weights = timm_names(model, table)
    config = config_of_weights(weights, **({"num_mel_bins": 64} if modality == "audio" else {}))
    ours, left = convert_relative(weights, config)
    assert left == ["mask_token", "decoder_pred.weight"]
    assert config.modality == modality and config.patch_grid == model.config.patch_grid
    assert config.position_embedding_type == ("table" if learned else "sincos")
    inputs = torch.randn(2, *((96, 64) if modality == "audio" else (3, 64, 64)))
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs)[0], model(inputs)[0], atol=2e-5, rtol=0)


def test_the_command(tmp_path, capsys):
    peer("vit_mae_pretraining").save_pretrained(tmp_path / "theirs")
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "theirs")
    main("convert", [str(tmp_path / "theirs"), str(tmp_path / "out")])
    assert str(tmp_path / "out" / "encoder") in capsys.readouterr().out
    assert (tmp_path / "out" / "encoder" / "README.md").is_file()
    embedder = Embedder.from_pretrained(str(tmp_path / "out" / "encoder"))
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    values = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    theirs = ViTMAEModel.from_pretrained(tmp_path / "theirs", mask_ratio=0.0).eval()
    wanted = hidden_states(theirs, torch.from_numpy(values.transpose(2, 0, 1)[None]).float())[0, 1:].mean(dim=0)
    np.testing.assert_allclose(embedder.embed(pixels), wanted, atol=1e-4)


def test_a_file_of_timms_names(tmp_path, capsys, tiny_config):
    model = randomize(BridleModel(tiny_config("audio", hidden_size=64, num_attention_heads=1)))
    weights = timm_names(model, sincos_positions(model.config.patch_grid, 64))
    torch.save({"model": weights}, tmp_path / "audiomae.pth")
    main("convert", [str(tmp_path / "audiomae.pth"), str(tmp_path / "out"), "--num_mel_bins", "64"])
    assert "left: mask_token, decoder_pred.weight" in capsys.readouterr().out
    converted = BridleModel.from_pretrained(tmp_path / "out" / "encoder").eval()
    extractor = BridleFeatureExtractor.from_pretrained(tmp_path / "out" / "encoder")
    assert (extractor.num_mel_bins, extractor.max_length) == (64, 96)
    inputs = torch.randn(1, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(converted(inputs)[0], model(inputs)[0], atol=2e-5, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    ASTConfig(hidden_size=16).save_pretrained(tmp_path / "ast")
    Dinov2Config(**SIZES, use_swiglu_ffn=True).save_pretrained(tmp_path / "swiglu")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for wrong, reason in [
        ("ast", "'audio-spectrogram-transformer', which does not fit: it has two class tokens"),
        ("swiglu", "SwiGLU"),
        ("other.pth", "not weights by timm's names"),
        ("text.pth", "not a file of weights"),
        ("nothing", "nothing"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main("convert", [str(tmp_path / wrong), str(tmp_path / "out")])
        assert ended.value.code == 2 and reason in capsys.readouterr().err
    weights = peer("vit").state_dict()
    weights.pop("layers.1.mlp.fc1.bias", weights.pop("encoder.layer.1.intermediate.dense.bias", None))
    with pytest.raises(ValueError, match=r"do not fit BridleModel: .*layers\.1\.mlp\.fc1\.bias"):
        convert_relative(weights, config_of(ViTConfig(**SIZES, **MLP)))
