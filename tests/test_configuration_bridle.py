"""Configurations: the reference's sizes by default, JSON and back, and errors that name the field."""

import inspect
import json
import re

import pytest
from transformers import ViTConfig

from bridle_hf import BridleConfig, BridleForPreTraining, BridleModel, BridleTokenizerConfig, BridleTokenizerModel
from bridle_hf.configuration_bridle import BridleEncoderConfig


# The sizes of the paper and of the reference code.
REFERENCE = {
    "audio": {
        "patch_grid": (64, 8), "patch_dim": 256, "num_channels": 1, "use_class_token": True, "key_bias": True,
        "mask_type": "random", "mask_ratio": 0.8, "decoder_type": "swin", "decoder_num_hidden_layers": 16,
        "decoder_hidden_size": 512, "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048,
        "decoder_window_size": (4, 4), "decoder_window_shift": (2, 0), "max_length": 1024, "num_mel_bins": 128,
    },
    "image": {
        "patch_grid": (14, 14), "patch_dim": 768, "num_channels": 3, "use_class_token": True, "key_bias": True,
        "mask_type": "random", "mask_ratio": 0.8, "decoder_type": "plain", "decoder_num_hidden_layers": 16,
        "decoder_hidden_size": 512, "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048,
    },
    "video": {
        "patch_grid": (8, 14, 14), "patch_dim": 1536, "num_channels": 3, "use_class_token": False, "key_bias": False,
        "mask_type": "tube", "mask_ratio": 0.9, "decoder_type": "plain", "decoder_num_hidden_layers": 4,
        "decoder_hidden_size": 384, "decoder_num_attention_heads": 6, "decoder_intermediate_size": 1536,
    },
}  # fmt: skip
ESTIMATOR = {"audio": (768, 3, 12), "image": (768, 3, 12), "video": (384, 8, 6)}


def test_defaults_are_the_reference_sizes(modality):
    config = BridleConfig(modality=modality)
    assert {name: getattr(config, name) for name in REFERENCE[modality]} == REFERENCE[modality]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.layer_norm_eps, config.hidden_act) == (3072, 1e-6, "gelu")
    assert (config.num_codebooks, config.codebook_size, config.pooling) == (4, 256, "mean")


def test_tokenizer_defaults_are_the_reference_sizes(modality):
    config = BridleTokenizerConfig(modality=modality)
    estimator = (
        config.estimator_hidden_size,
        config.estimator_num_hidden_layers,
        config.estimator_num_attention_heads,
    )
    assert estimator == ESTIMATOR[modality]
    assert config.patch_grid == REFERENCE[modality]["patch_grid"]
    assert (config.code_dim, config.num_codebooks, config.codebook_size) == (256, 4, 256)
    assert (config.codebook_normalization, config.ema_decay, config.commitment_weight) == ("input", 0.99, 0.25)
    assert config.normalize_target_patches and config.teacher_hidden_size == 768


@pytest.mark.parametrize("config_class", [BridleConfig, BridleTokenizerConfig])
def test_json_round_trip(config_class, modality, tmp_path):
    own = (
        {"mask_ratio": 0.5} if config_class is BridleConfig else {"teacher_layers": [-1, -2], "unit_norm_codes": True}
    )
    config = config_class(modality=modality, patch_size=(16, 8), image_size=[64, 32], num_labels=3, **own)
    config.save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    # JSON has no tuples: what was a pair may come back as a list, and nothing else may change.
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
    assert (loaded.patch_grid, loaded.patch_dim, loaded.input_size) == (
        config.patch_grid,
        config.patch_dim,
        config.input_size,
    )
    assert isinstance(loaded.patch_shape, tuple) and isinstance(loaded.patch_grid, tuple)


def test_a_model_from_a_loaded_config_runs(tiny_config, tiny_input, tmp_path):
    tiny_config("audio", decoder_window_size=(4, 2), decoder_window_shift=[2, 1]).save_pretrained(tmp_path)
    model = BridleForPreTraining(BridleConfig.from_pretrained(tmp_path))
    assert model(tiny_input("audio")).logits.shape == (2, 24, 3, 16)


def test_pairs_are_time_by_mel_and_height_by_width():
    assert BridleConfig(modality="audio", patch_size=(32, 16)).patch_grid == (32, 8)
    assert BridleConfig(modality="image", image_size=(32, 64), patch_size=(16, 8)).patch_grid == (2, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modality": "text"}, "modality"),
        ({"hidden_size": 50}, "hidden_size.*num_attention_heads"),
        ({"hidden_size": 30, "num_attention_heads": 3}, "hidden_size.*multiple of 4"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": (16, 16, 16)}, "patch_size"),
        ({"max_length": 1000}, "max_length.*1000.*16"),
        ({"num_mel_bins": 100}, "num_mel_bins"),
        ({"modality": "image", "image_size": 230}, "image_size"),
        ({"modality": "video", "num_frames": 15}, "num_frames"),
        ({"num_channels": 2}, "num_channels"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_type": "stripes"}, "mask_type.*stripes.*mel_band"),
        ({"mask_type": "tube"}, "mask_type"),
        ({"decoder_hidden_size": 30, "decoder_num_attention_heads": 3}, "decoder_hidden_size"),
        ({"decoder_num_attention_heads": 7}, "decoder_num_attention_heads"),
        ({"modality": "video", "decoder_type": "swin"}, "decoder_type"),
        ({"decoder_type": "cross", "decoded_ratio": 0.0}, "decoded_ratio"),
        ({"decoder_type": "cross", "decoded_ratio": 1.1}, "decoded_ratio"),
        ({"decoder_type": "cross", "decoder_encoder_layers": []}, "decoder_encoder_layers"),
        ({"decoder_type": "cross", "decoder_encoder_layers": [13]}, "decoder_encoder_layers.*0.*12"),
        ({"decoded_ratio": 0.5}, "decoded_ratio.*cross"),
        ({"decoder_encoder_layers": [3]}, "decoder_encoder_layers.*cross"),
        ({"modality": "video", "pooling": "cls"}, "pooling"),
        ({"num_codebooks": 0}, "num_codebooks"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"codebook_loss_weights": [1.0]}, "codebook_loss_weights"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"patch_dropout": (0.2, 1.0)}, "patch_dropout"),
        ({"patch_dropout": [0.2]}, "patch_dropout"),
        ({"decoder_window_shift": (1, 0, 0)}, "decoder_window_shift"),
        ({"hidden_act": "gulp"}, "hidden_act.*gulp"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers.*1..1000"),
        ({"decoder_num_hidden_layers": 10**9}, "decoder_num_hidden_layers"),
        ({"decoder_num_attention_heads": 0}, "decoder_num_attention_heads"),
        ({"decoder_window_size": (0, 4)}, "decoder_window_size"),
        ({"intermediate_size": 10**9}, "intermediate_size"),
        ({"codebook_size": 10**9}, "codebook_size"),
        ({"max_length": 16 * 2**30}, "max_length"),
        ({"modality": "image", "image_size": 2**20}, "patches"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        BridleConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_type": "text"}, "tokenizer_type"),
        ({"codebook_normalization": "batch"}, "codebook_normalization"),
        ({"estimator_hidden_size": 100}, "estimator_hidden_size"),
        ({"num_codebooks": 0}, "num_codebooks"),
        ({"code_dim": 0}, "code_dim"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"dead_code_threshold": 1.0}, "dead_code_threshold"),
        ({"commitment_weight": float("nan")}, "commitment_weight"),
        ({"num_soft_codes": 0}, "num_soft_codes"),
        ({"estimator_num_hidden_layers": 0}, "estimator_num_hidden_layers"),
        ({"codebook_size": 10**9}, "codebook_size"),
        ({"num_soft_codes": 257}, "num_soft_codes"),
    ],
)
def test_a_wrong_field_of_the_tokenizer_is_named(fields, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        BridleTokenizerConfig(**fields)


@pytest.mark.parametrize("config_class", [BridleEncoderConfig, BridleConfig, BridleTokenizerConfig])
def test_every_field_is_documented_with_its_default(config_class):
    """In transformers' own form, so that its documentation tools read it."""
    own = inspect.get_annotations(config_class)
    assert len(own) > 10
    for name in own:
        default = getattr(config_class, name)
        plain = isinstance(default, int | float) and not isinstance(default, bool)
        value = str(default) if plain else f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
        found = re.search(
            rf"^        {name} \(.*, \*optional\*, defaults to (.*)\):\n            \S", config_class.__doc__, re.M
        )
        assert found and found[1] == value, name


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(BridleTokenizerModel, BridleConfig), (BridleModel, BridleTokenizerConfig), (BridleModel, ViTConfig)],
)
def test_a_model_of_another_kind_is_refused(model_class, config_class, tmp_path):
    """transformers reads another model's config as far as it fits, and gives random weights."""
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"type '{config_class.model_type}'.*{model_class.config_class.__name__}"):
        model_class.from_pretrained(tmp_path)
