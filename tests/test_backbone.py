"""Tests of `BridleBackbone`: against transformers' Dinov2Backbone, within its models, and through AutoBackbone."""

import pytest
import torch
from helpers.fresh_process import run_fresh
from helpers.hub_stand_in import running_hub
from transformers import (
    AutoBackbone,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from bridle_hf import BridleBackbone, BridleConfig, BridleForPreTraining, BridleModel
from bridle_hf.convert_relatives_to_bridle import load_relative


torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 56), (28, 70)])
def test_feature_maps_are_those_of_the_backbone_of_a_relative(size, tmp_path):
    """Of DINOv2's weights as ours, at the config's size and at another."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    peer = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).eval()
    for parameter in peer.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "theirs")
    theirs = Dinov2Backbone.from_pretrained(tmp_path / "theirs", out_indices=[0, 1, 3]).eval()
    load_relative(str(tmp_path / "theirs"))[0].save_pretrained(tmp_path / "ours")
    ours = BridleBackbone.from_pretrained(tmp_path / "ours", out_indices=[0, 1, 3]).eval()
    pixels = torch.randn(2, 3, *size)
    found, wanted = ours(pixels), theirs(pixels)
    assert ours.out_features == theirs.out_features == ["stem", "stage1", "stage3"]
    assert ours.channels == theirs.channels and found.hidden_states is None
    assert [tuple(entry.shape) for entry in found.feature_maps] == [(2, 48, size[0] // 14, size[1] // 14)] * 3
    for entry, other in zip(found.feature_maps, wanted.feature_maps):
        torch.testing.assert_close(entry, other, atol=1e-4, rtol=0)
    assert len(ours(pixels, output_hidden_states=True).hidden_states) == 4


@torch.no_grad()
@pytest.mark.parametrize("table", ["sincos", "table"])
def test_maps_of_a_shorter_recording_are_the_encoders(tiny_config, table):
    """(batch, hidden, time, mel), with positions of the first steps; the last map is the encoder's output."""
    backbone = BridleBackbone(tiny_config("audio", position_embedding_type=table)).eval()
    values, mask = torch.randn(2, 32, 64), torch.ones(2, 32)
    mask[1, 16:] = 0
    (found,) = backbone(values, attention_mask=mask).feature_maps
    tokens = backbone.bridle(values, mask).last_hidden_state[:, 1:]
    assert found.shape[2:] == (2, 4)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens)


def test_segmentation_by_a_model_of_transformers_learns(tiny_config, tmp_path):
    config = tiny_config("image", out_features=["stem", "stage1", "stage2"], num_hidden_layers=2)
    sizes = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": config.hidden_size}
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, num_labels=3, auxiliary_channels=8, auxiliary_loss_weight=0.4, **sizes)
    )
    pixels, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    output = model(pixels, labels=labels)
    assert output.logits.shape == (2, 3, 64, 96)
    output.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Weights of a pretrained encoder in its place.
    BridleForPreTraining(config).save_pretrained(tmp_path / "encoder")
    model.backbone = BridleBackbone.from_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "segmenter")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "segmenter").eval()
    assert isinstance(again.backbone, BridleBackbone) and again.backbone.out_features == config.out_features
    torch.testing.assert_close(again(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.slow
def test_through_the_auto_class_with_the_package_and_by_remote_code(tiny_config, tmp_path):
    """From a Hub: AutoBackbone of transformers takes no folder."""
    model = BridleForPreTraining(tiny_config("image", num_hidden_layers=2)).eval()
    model.save_pretrained(tmp_path / "encoder")
    code = """
        from transformers import AutoBackbone, AutoModel

        if {package}:
            import bridle_hf
        torch.manual_seed(1)
        pixels = torch.randn(2, 3, *{size})
        backbone = AutoBackbone.from_pretrained("org/encoder", trust_remote_code=True, out_indices=[1, 2]).eval()
        backbone.save_pretrained("saved")
        AutoModel.from_pretrained("saved", trust_remote_code=True)
        torch.save((type(backbone).__module__, pixels, backbone(pixels).feature_maps), "maps.pt")
    """
    with running_hub() as hub:
        hub.repos["org/encoder"] = []
        hub.commit("org/encoder", {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()})
        for package in (True, False):
            folder = tmp_path / str(package)
            code_ = code.format(package=package, size=(32, 48))
            run_fresh(code_, folder, package=package, HF_ENDPOINT=hub.endpoint)
            module, pixels, maps = torch.load(folder / "maps.pt")
            assert module.startswith("bridle_hf." if package else "transformers_modules.")
            states = model.bridle(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
            for found, state in zip(maps, states[1:], strict=True):
                wanted = model.bridle.layernorm(state)[:, 1:].transpose(1, 2).unflatten(2, found.shape[2:])
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
            assert BridleBackbone.from_pretrained(folder / "saved").out_indices == [1, 2]
    assert isinstance(AutoBackbone.from_config(model.config), BridleBackbone)


def test_stages_that_are_not_named_are_the_last_layer(tiny_config):
    config = tiny_config("image", num_hidden_layers=2)
    assert config.out_features == ["stage2"] and "out_features" not in config.to_dict()
    deeper = BridleConfig.from_dict({**config.to_dict(), "num_hidden_layers": 3})
    assert deeper.out_indices == [3]
    named = tiny_config("image", num_hidden_layers=2, out_indices=(0, 1))
    assert BridleConfig.from_dict(named.to_dict()).out_features == named.out_features == ["stem", "stage1"]


def test_what_has_no_maps_is_refused(tiny_config):
    with pytest.raises(ValueError, match="BridleBackbone is for images and audio, got a config of video"):
        BridleBackbone(tiny_config("video"))
    with pytest.raises(ValueError, match="subset of stage_names"):
        tiny_config("image", out_features=["stage9"])


def test_an_encoder_of_its_weights(tiny_config, tmp_path):
    backbone = BridleBackbone(tiny_config("image"))
    backbone.save_pretrained(tmp_path)
    encoder, info = BridleModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert all(torch.equal(value, backbone.bridle.state_dict()[name]) for name, value in encoder.state_dict().items())
