"""One thread, fixed seeds, and models small enough to build in every test."""

import os

import pytest


# Before huggingface_hub reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing waits for a network

import torch


torch.set_num_threads(1)

_ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_INPUTS = {
    "audio": {"modality": "audio", "max_length": 96, "num_mel_bins": 64},  # grid (6, 4)
    "image": {"modality": "image", "image_size": 64, "patch_size": 16},  # grid (4, 4)
    "video": {"modality": "video", "image_size": 32, "patch_size": 8, "num_frames": 8},  # grid (4, 4, 4)
}
_DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
_ESTIMATOR = {"estimator_hidden_size": 32, "estimator_num_hidden_layers": 1, "estimator_num_attention_heads": 4}
_CODES = {"num_codebooks": 3, "codebook_size": 16}
_SHAPES = {"audio": (96, 64), "image": (3, 64, 64), "video": (8, 3, 32, 32)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Builds a tiny `BridleConfig`: `tiny_config("audio", **fields)`."""
    from bridle_hf import BridleConfig

    return lambda modality, **fields: BridleConfig(**{**_ENCODER, **_INPUTS[modality], **_DECODER, **_CODES, **fields})


@pytest.fixture
def tiny_tokenizer_config():
    """Builds a tiny `BridleTokenizerConfig`: `tiny_tokenizer_config("audio", **fields)`."""
    from bridle_hf import BridleTokenizerConfig

    return lambda modality, **fields: BridleTokenizerConfig(
        **{**_ENCODER, **_INPUTS[modality], **_ESTIMATOR, **_CODES, "code_dim": 8, **fields}
    )


@pytest.fixture
def tiny_input():
    """Draws an input of a tiny config: `tiny_input("audio", batch=2)`."""
    return lambda modality, batch=2: torch.randn(batch, *_SHAPES[modality])


@pytest.fixture(params=["audio", "image", "video"])
def modality(request) -> str:
    return request.param
