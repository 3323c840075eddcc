"""Encoders of relatives as `BridleModel`: transformers' ViTMAE, ViT, VideoMAE and DINOv2; MAE and AudioMAE.

bridle convert facebook/vit-mae-base OUT

What does not fit is refused: AST and DeiT have two class tokens, DINOv2 with registers has more, BEATs and EAT have
convolutional positions.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from .configuration_bridle import BridleConfig
from .convert_bridle_original_to_hf import IMAGE_STATISTICS, make_original_processor, read_checkpoint
from .image_processing_bridle import make_image_processor
from .modeling_bridle import BridleModel
from .patching_bridle import sincos_positions


# Kinds of transformers' models that fit, each with what its modality is.
KINDS = {"vit_mae": "image", "vit": "image", "dinov2": "image", "videomae": "video"}
_REFUSED = {
    "audio-spectrogram-transformer": "it has two class tokens",
    "deit": "it has two class tokens",
    "dinov2_with_registers": "it has registers beside the class token",
}

# (their name, ours), of transformers' versions and of timm; the first that fits counts.
_NAMES = [
    (r"^(embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.", "embeddings.projection."),
    (r"^(embeddings\.)?cls_token$", "embeddings.cls_token"),
    (r"^(embeddings\.position_embeddings|pos_embed)$", "embeddings.positions.table"),
    (r"^(layernorm|norm)\.", "layernorm."),
    (r"^(encoder\.layer|layers|blocks)\.(\d+)\.", r"layers.\2."),
]
_LAYER_NAMES = [
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attention.q_proj."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attention.k_proj."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attention.v_proj."),
    (r"\.(attention\.attention|attn)\.([qv])_bias$", r".attention.\2_proj.bias"),
    (r"\.(attention\.output\.dense|attention\.o_proj|attn\.proj)\.", ".attention.o_proj."),
    (r"\.(norm1|layernorm_before)\.", ".layernorm_before."),
    (r"\.(norm2|layernorm_after)\.", ".layernorm_after."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.(layer_scale|ls)([12])\.(lambda1|gamma)$", r".scale\2"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
]
# The linear layer before each layer scale, which takes it in.
_SCALED = {".scale1": ".attention.o_proj", ".scale2": ".mlp.fc2"}


def convert_relative(state_dict: dict[str, torch.Tensor], config: BridleConfig) -> tuple[BridleModel, list[str]]:
    """Build our encoder from the weights of a relative.

    Args:
        state_dict: tensors by the names of transformers' base model (`ViTMAEModel`, ...) or of timm's.
        config: with the relative's sizes; its `position_embedding_type` is set by what the weights hold.

    Returns:
        The model, in eval mode, and the names of the tensors that it has no use for.

    Raises:
        ValueError: a tensor is missing, or of another shape; or the positions are those of another grid.
    """
    weights, left = {}, []
    for name, tensor in state_dict.items():
        ours = _our_name(name)
        if ours is None:
            left.append(name)
        else:
            weights[ours] = tensor.float()
    _split_projections(weights)
    _fold_scales(weights)
    _settle_positions(config, weights)
    if "embeddings.projection.weight" in weights:
        weights["embeddings.projection.weight"] = weights["embeddings.projection.weight"].flatten(1)
    model = BridleModel(config)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit BridleModel: {' '.join(str(error).split())}") from error
    return model.eval(), left


def _our_name(name: str) -> str | None:
    for pattern, ours in _NAMES:
        if re.search(pattern, name):
            found = re.sub(pattern, ours, name)
            if not found.startswith("layers."):
                return found
            for layer_pattern, in_layer in _LAYER_NAMES:
                if re.search(layer_pattern, found):
                    return re.sub(layer_pattern, in_layer, found)
    return None


def _split_projections(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".attention.qkv." in name]:
        for part, rows in zip("qkv", weights.pop(name).chunk(3)):
            weights[name.replace(".qkv.", f".{part}_proj.")] = rows


def _fold_scales(weights: dict[str, torch.Tensor]) -> None:
    """A layer's output times a vector is what the linear layer gives whose rows are multiplied by it."""
    for name in [name for name in weights if name.endswith(tuple(_SCALED))]:
        scale = weights.pop(name)
        linear = name[: -len(".scale1")] + _SCALED[name[-len(".scale1") :]]
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] * scale[:, None]
        weights[f"{linear}.bias"] = weights[f"{linear}.bias"] * scale


def _settle_positions(config: BridleConfig, weights: dict[str, torch.Tensor]) -> None:
    """The class token takes its position in; the table is kept where it is not the one that we compute."""
    table = weights.pop("embeddings.positions.table", None)
    if table is None:
        return
    table, patches = table[0], math.prod(config.patch_grid)
    extra = int(config.use_class_token)
    if len(table) != patches + extra:
        raise ValueError(
            f"the weights have {len(table)} positions; a grid of {config.patch_grid} patches has {patches + extra}"
        )
    if extra:
        weights["embeddings.cls_token"] = weights["embeddings.cls_token"] + table[0]
    table = table[extra:]
    if not torch.allclose(table, sincos_positions(config.patch_grid, table.shape[1]), atol=1e-6, rtol=0.0):
        config.position_embedding_type = "table"
        weights["embeddings.positions.table"] = table


def load_relative(name: str) -> tuple[BridleModel, list[str], Any]:
    """Our encoder from a folder or Hub id of transformers.

    Returns:
        Model and left names, see [`convert_relative`], and a processor with the relative's statistics.

    Raises:
        ValueError: a kind of model that does not fit, or weights that do not. OSError: nothing is there.
    """
    theirs = AutoConfig.from_pretrained(name)
    if theirs.model_type not in KINDS:
        why = _REFUSED.get(theirs.model_type, f"those that do: {', '.join(KINDS)}, and weights by timm's names")
        raise ValueError(f"{name} is a model of type '{theirs.model_type}', which does not fit: {why}")
    config = config_of(theirs)
    model, left = convert_relative(AutoModel.from_pretrained(name).state_dict(), config)
    return model, left, make_image_processor(model.config, **_statistics(name))


def convert_relative_checkpoint(
    checkpoint: str | Path | dict[str, torch.Tensor], output_dir: str | Path, **fields: Any
) -> list[str]:
    """Write OUT/encoder, with its processor, from a relative.

    Args:
        checkpoint: folder or Hub id of transformers; a file of weights by timm's names, or, where it was read already,
            what `read_checkpoint` returned.
        fields: of weights by timm's names, see [`config_of_weights`].

    Returns:
        The names of the tensors that were left.

    Raises:
        ValueError: it does not fit. OSError: it cannot be read.
    """
    if isinstance(checkpoint, dict) or Path(checkpoint).is_file():
        weights = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
        config = config_of_weights(weights, **fields)
        model, left = convert_relative(weights, config)
        processor = make_original_processor(config)
    elif fields:
        raise ValueError(f"{sorted(fields)}: {checkpoint} has a config, which tells them; leave them out")
    else:
        model, left, processor = load_relative(str(checkpoint))
    model.save_pretrained(Path(output_dir) / "encoder")
    processor.save_pretrained(Path(output_dir) / "encoder")
    return left


def config_of(theirs: Any) -> BridleConfig:
    """Our config of a relative's.

    Raises:
        ValueError: a choice that we do not have.
    """
    if getattr(theirs, "use_swiglu_ffn", False):
        raise ValueError("the model has SwiGLU layers, which do not fit")
    fields = {name: getattr(theirs, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "initializer_range",
        "layer_norm_eps", "image_size", "patch_size", "num_channels",
    )}  # fmt: skip
    fields["intermediate_size"] = getattr(theirs, "intermediate_size", None) or theirs.hidden_size * theirs.mlp_ratio
    modality = KINDS[theirs.model_type]
    if modality == "video":
        fields |= {"num_frames": theirs.num_frames, "tubelet_size": theirs.tubelet_size}
        # Without a final norm, the relative's classifiers have one behind their mean.
        fields |= {"qkv_bias": theirs.qv_bias, "final_layernorm": not theirs.use_mean_pooling}
    else:
        fields["qkv_bias"] = theirs.qkv_bias
    return BridleConfig(modality=modality, **fields)


def config_of_weights(state_dict: dict[str, torch.Tensor], modality: str | None = None, **fields: Any) -> BridleConfig:
    """Our config of weights by timm's names, as of MAE and AudioMAE, read from their shapes.

    Args:
        modality: one channel is taken for audio, and three for images, if not given.
        fields: of `BridleConfig`, which shapes cannot tell: `num_attention_heads` (default: 64 channels each),
            `num_mel_bins` (default: 128).

    Raises:
        ValueError: not such weights.
    """
    try:
        patch, positions = state_dict["patch_embed.proj.weight"], state_dict["pos_embed"].shape[1] - 1
        layers = 1 + max(int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name)))
        width = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not weights by timm's names: {error} is missing") from error
    if patch.dim() != 4:
        raise ValueError("weights of video by timm's names do not tell their grid: convert transformers' VideoMAE")
    size = list(patch.shape[-2:])
    modality = modality or ("audio" if patch.shape[1] == 1 else "image")
    found: dict[str, Any] = {
        "hidden_size": patch.shape[0],
        "patch_size": size,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "num_attention_heads": max(patch.shape[0] // 64, 1),
    }
    if modality == "audio":
        bins = fields.get("num_mel_bins", 128)
        found |= {"num_mel_bins": bins, "max_length": positions * math.prod(size) // bins}
    else:
        found |= {"num_channels": patch.shape[1], "image_size": [math.isqrt(positions) * side for side in size]}
    return BridleConfig(modality=modality, **{**found, **fields})


def _statistics(name: str) -> dict[str, list[float]]:
    """Mean and deviation of the relative's processor; ImageNet's, where none is saved with it."""
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return IMAGE_STATISTICS
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    return {key: settings[key] for key in ("image_mean", "image_std") if key in settings}


__all__ = ["config_of", "config_of_weights", "convert_relative", "convert_relative_checkpoint", "load_relative"]
