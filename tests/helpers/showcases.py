"""Folders with a tiny model of each kind, as pretraining and fine-tuning leave them."""

from pathlib import Path

from helpers.classifiers import CLASSIFIERS
from helpers.pixels import pixel_config
from helpers.sounds import tiny_config

from bridle_hf import (
    BridleFeatureExtractor,
    BridleForPreTraining,
    BridleModel,
    BridleTokenizerConfig,
    BridleTokenizerModel,
    make_image_processor,
)


LABELS = {"audio": ("noise", "tone"), "image": ("bright", "dark"), "video": ("bright", "dark")}
_ESTIMATOR = {"estimator_hidden_size": 16, "estimator_num_hidden_layers": 1, "estimator_num_attention_heads": 2}
_CODES = {"num_codebooks": 2, "codebook_size": 16}
_OF_ENCODERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_mel_bins",
                "max_length", "image_size", "patch_size", "num_channels", "num_frames", "modality")  # fmt: skip


def save_models(folder: Path, modality: str, *kinds: str) -> Path:
    """`folder` with a subfolder for each of `kinds`: "encoder" (pretraining model), "tokenizer", "classifier",
    "bare" (an encoder alone); all but the last two if none is named."""
    make = tiny_config if modality == "audio" else lambda **fields: pixel_config(modality, **fields)
    config = make(**_CODES)
    names = LABELS[modality]
    labelled = make(id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)})
    sizes = {name: getattr(config, name) for name in _OF_ENCODERS}
    makers = {
        "encoder": lambda: BridleForPreTraining(config),
        "tokenizer": lambda: BridleTokenizerModel(
            BridleTokenizerConfig(**sizes, **_ESTIMATOR, **_CODES, code_dim=8, tokenizer_type="self_distilled")
        ),
        "classifier": lambda: CLASSIFIERS[modality](labelled),
        "bare": lambda: BridleModel(config),
    }
    if modality == "audio":
        processor = BridleFeatureExtractor(num_mel_bins=32, max_length=48)
    else:
        processor = make_image_processor(config)
    for kind in kinds or ("encoder", "tokenizer"):
        makers[kind]().save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return folder
