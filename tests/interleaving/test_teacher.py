"""Tests of teacher.py: features of transformers' encoders by their own processors, in the order of our patches."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from bridle_hf import BridleFeatureExtractor, BridleModel, make_image_processor
from bridle_hf.interleaving.teacher import Teacher


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE = {**SIZES, "image_size": 64, "patch_size": 16}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
OWN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
# Each with how many tokens stand before its patches.
IMAGES = {
    "vit": (lambda: ViTModel(ViTConfig(**IMAGE)), 1),
    "vit_mae": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**IMAGE, **DECODER)), 1),
    "deit": (lambda: DeiTModel(DeiTConfig(**IMAGE)), 2),
    "dinov2": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**IMAGE, num_register_tokens=3)), 4),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGE)), 1),
}


def save(folder, model, processor=None):
    """With positions and biases that are not zero."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def standardized(tokens):
    return F.layer_norm(tokens, tokens.shape[-1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", IMAGES)
def test_features_of_pictures(kind, tiny_config, tmp_path):
    make, before = IMAGES[kind]
    name = save(tmp_path, make(), ViTImageProcessor(size={"height": 64, "width": 64}, **OWN))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    config = tiny_config("image")
    processor = make_image_processor(config)
    teacher = Teacher(name, config, processor)
    ours, theirs = (entry(picture, return_tensors="pt")["pixel_values"] for entry in (
        processor, ViTImageProcessor.from_pretrained(tmp_path)))  # fmt: skip
    assert not torch.allclose(ours, theirs)
    options = {}
    peer = AutoModel.from_pretrained(tmp_path).eval()
    if kind == "vit_mae":
        peer.config.mask_ratio, options["noise"] = 0.0, torch.arange(16.0)[None]
    outputs = peer(theirs, output_hidden_states=True, **options)
    found = teacher(ours)
    assert found.shape == (1, 16, 32) and teacher.hidden_size == 32 and teacher.tokens.tolist()[0] == before
    torch.testing.assert_close(found, standardized(outputs.last_hidden_state[:, before:]), atol=2e-5, rtol=0)
    states = [standardized(outputs.hidden_states[layer][:, before:]) for layer in (1, -1)]
    torch.testing.assert_close(teacher(ours, None, [1, -1]), sum(states) / 2, atol=2e-5, rtol=0)


@torch.no_grad()
def test_features_of_videos(tiny_config, tmp_path):
    theirs = {**SIZES, "image_size": 32, "patch_size": 8, "num_frames": 8}
    model = VideoMAEForPreTraining(VideoMAEConfig(**theirs, **DECODER))
    name = save(tmp_path, model, VideoMAEImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    config = tiny_config("video")
    teacher = Teacher(name, config, make_image_processor(config, image_mean=[0.0] * 3, image_std=[1.0] * 3))
    pixels = torch.rand(2, 8, 3, 32, 32)
    wanted = AutoModel.from_pretrained(tmp_path).eval()((pixels - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(teacher(pixels), standardized(wanted), atol=2e-5, rtol=0)


@torch.no_grad()
def test_features_of_spectrograms(tiny_config, tmp_path):
    """AST has two tokens before its patches, which go band by band, and pads before it normalises."""
    theirs = {"patch_size": 16, "time_stride": 16, "frequency_stride": 16, "max_length": 96, "num_mel_bins": 64}
    processor = ASTFeatureExtractor(num_mel_bins=64, max_length=96, mean=-4.0, std=4.5)
    name = save(tmp_path, ASTModel(ASTConfig(**SIZES, **theirs)), processor)
    config, extractor = tiny_config("audio"), BridleFeatureExtractor(num_mel_bins=64, max_length=96)
    teacher = Teacher(name, config, extractor)
    extractor.mean, extractor.std = -1.0, 2.0  # measured later
    log_mel, mask = 3.0 * torch.randn(2, 96, 64) - 4.0, torch.ones(2, 96)
    mask[1, 50:] = 0
    log_mel[1, 50:] = 0.0
    inputs = ((log_mel + 1.0) / 4.0).masked_fill(mask[..., None] == 0, 0.0)
    tokens = AutoModel.from_pretrained(tmp_path).eval()((log_mel + 4.0) / 9.0).last_hidden_state[:, 2:]
    wanted = standardized(tokens.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2))
    torch.testing.assert_close(teacher(inputs, mask), wanted, atol=2e-5, rtol=0)
    # Cut to the longest of a part of a batch, with and without a mask.
    torch.testing.assert_close(teacher(inputs[1:, :64], mask[1:, :64]), wanted[1:, : 4 * 4], atol=2e-5, rtol=0)
    alone = teacher(inputs[1:, :48].clone())
    torch.testing.assert_close(alone, teacher(inputs[1:], (torch.arange(96) < 48)[None])[:, : 3 * 4])


@torch.no_grad()
def test_features_of_an_encoder_of_ours(tiny_config, tmp_path):
    config, extractor = tiny_config("audio"), BridleFeatureExtractor(num_mel_bins=64, max_length=96)
    encoder = BridleModel(config).eval()
    encoder.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    inputs, mask = torch.randn(2, 96, 64), torch.ones(2, 96)
    mask[1, 50:] = 0
    wanted = standardized(encoder(inputs, mask).last_hidden_state[:, 1:])
    torch.testing.assert_close(Teacher(str(tmp_path), config, extractor)(inputs, mask), wanted, atol=2e-5, rtol=0)


OTHER_PATCHES = "they are not those of the 16 patches of the run, a grid of \\(4, 4\\) by encoder.patch_size 16"


@pytest.mark.parametrize(
    ("model", "processor", "reason"),
    [
        (lambda: ViTModel(ViTConfig(**{**IMAGE, "patch_size": 8})), ViTImageProcessor(), OTHER_PATCHES),
        (lambda: ViTModel(ViTConfig(**{**IMAGE, "patch_size": 32})), ViTImageProcessor(), OTHER_PATCHES),
        (lambda: ViTMAEForPreTraining(ViTMAEConfig(**{**IMAGE, "patch_size": 8}, **DECODER)), ViTImageProcessor(),
         OTHER_PATCHES),
        (lambda: SwinModel(SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                                      window_size=4)), ViTImageProcessor(), "they are not those"),
        (lambda: ViTModel(ViTConfig(**IMAGE)), None, "has no preprocessor_config.json"),
        (lambda: ViTModel(ViTConfig(**IMAGE)), ViTImageProcessor(rescale_factor=1 / 127.5), "bring pixels to 0..1"),
        (lambda: ViTModel(ViTConfig(**{**IMAGE, "num_channels": 1})), ViTImageProcessor(), "cannot take inputs of"),
        (lambda: VideoMAEForPreTraining(VideoMAEConfig(**IMAGE, **DECODER, num_frames=4)), VideoMAEImageProcessor(),
         "cannot take inputs of"),
        (lambda: ASTModel(ASTConfig(**SIZES, max_length=96, num_mel_bins=64)), ASTFeatureExtractor(),
         "image_mean None"),
    ],
)  # fmt: skip
def test_what_has_other_inputs_or_patches_is_refused_in_one_line(model, processor, reason, tiny_config, tmp_path):
    name = save(tmp_path, model(), processor)
    config = tiny_config("image")
    with pytest.raises(ValueError, match=reason) as caught:
        Teacher(name, config, make_image_processor(config))
    assert str(caught.value).startswith("tokenizer.teacher ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "processor", "reason"),
    [
        ({}, {}, "makes 47 tokens"),  # its own strides of 10, which overlap
        ({"time_stride": 16, "frequency_stride": 16}, {"num_mel_bins": 32}, "has num_mel_bins=32, and the run 64"),
        ({"time_stride": 16, "frequency_stride": 16}, {"sampling_rate": 8000}, "has sampling_rate=8000"),
    ],
)
def test_spectrograms_of_another_kind_are_refused(fields, processor, reason, tiny_config, tmp_path):
    theirs = {**SIZES, "max_length": 96, "num_mel_bins": 64, **fields}
    extractor = ASTFeatureExtractor(**{"num_mel_bins": 64, **processor})
    name = save(tmp_path, ASTModel(ASTConfig(**theirs)), extractor)
    with pytest.raises(ValueError, match=reason):
        Teacher(name, tiny_config("audio"), BridleFeatureExtractor(num_mel_bins=64, max_length=96))


def test_flops_are_those_that_torch_counts(tiny_config, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    name = save(tmp_path, ViTModel(ViTConfig(**IMAGE)), ViTImageProcessor())
    config = tiny_config("image")
    with FlopCounterMode(display=False) as counter:
        AutoModel.from_pretrained(tmp_path).eval()(torch.randn(1, 3, 64, 64))
    teacher = Teacher(name, config, make_image_processor(config))
    # Its pooler is not asked for its opinion, but runs.
    assert teacher.flops == counter.get_total_flops()
