"""Checkpoints of the BRIDLE authors' code as `BridleForPreTraining` and `BridleTokenizerModel`.

bridle convert checkpoint.pth OUT --modality audio
"""

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from .configuration_bridle import BridleConfig, BridleTokenizerConfig
from .feature_extraction_bridle import BridleFeatureExtractor
from .image_processing_bridle import make_image_processor
from .modeling_bridle import BridleForPreTraining
from .modeling_bridle_tokenizer import BridleTokenizerModel
from .patching_bridle import sincos_positions


# Names inside a block: plain blocks first, then Swin blocks (which share `attn.proj`, `norm1` and `norm2`).
_BLOCK_NAMES = [
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.meta_mlp\.model\.(\d)\.", r".attention.position_bias.\1."),
    (r"\.attn\.tau$", ".attention.tau"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.model\.0\.", ".mlp.fc1."),
    (r"\.mlp\.model\.2\.", ".mlp.fc2."),
]
# (reference name, our name) of what stands before a block's own names; the first that fits counts.
_MODEL_NAMES = [
    (r"^encoder_decoder\.(encoder\.)?patch_embed\.proj\.", "bridle.embeddings.projection."),
    (r"^encoder_decoder\.(encoder\.)?cls_token$", "bridle.embeddings.cls_token"),
    (r"^encoder_decoder\.pos_embed$", "bridle.embeddings.positions.table"),
    (r"^encoder_decoder\.(encoder\.)?blocks\.", "bridle.layers."),
    (r"^encoder_decoder\.(encoder\.)?norm\.", "bridle.layernorm."),
    (r"^encoder_decoder\.(decoder_embed|encoder_to_decoder)\.", "decoder.embed."),
    (r"^encoder_decoder\.decoder_pos_embed$", "decoder.positions.table"),
    (r"^encoder_decoder\.mask_token$", "decoder.mask_token"),
    (r"^encoder_decoder\.decoder(_|\.)blocks\.", "decoder.layers."),
    (r"^encoder_decoder\.decoder(_|\.)norm\.", "decoder.layernorm."),
    (r"^encoder_decoder\.(decoder_pred|decoder\.head)\.", "decoder.head."),
]
_TOKENIZER_NAMES = [
    (r"^tokenizer\.(encoder\.)?patch_embed\.proj\.", "encoder.embeddings.projection."),
    (r"^tokenizer\.cls_token$", "encoder.embeddings.cls_token"),
    (r"^tokenizer\.pos_embed$", "encoder.embeddings.positions.table"),
    (r"^tokenizer\.(encoder\.)?blocks\.", "encoder.layers."),
    (r"^tokenizer\.(encoder\.)?norm\.", "encoder.layernorm."),
    (r"^tokenizer\.(encoder\.)?quantize_layer\.", "projection."),
    (r"^tokenizer\.(estimator_embed|encoder_to_decoder)\.", "estimator.embed."),
    (r"^tokenizer\.estimator_pos_embed$", "estimator.positions.table"),
    (r"^tokenizer\.(estimator_|decoder\.)blocks\.", "estimator.layers."),
    (r"^tokenizer\.(estimator_|decoder\.)norm\.", "estimator.layernorm."),
    (r"^tokenizer\.(estimator_pred|decoder\.head)\.", "estimator.head."),
]
_COLD_START_NAMES = [
    (r"^tokenizer\.(encoder\.)?patch_embed\.proj\.", "random_projection.embedding."),
    (r"^tokenizer\.pos_embed$", "random_projection.positions.table"),
    (r"^tokenizer\.(encoder\.)?cold_start_encoder\.", "random_projection.projection."),
]
# What is read by name, or not needed: how far k-means went, and averages that the reference keeps and never uses.
_QUANTIZER_NAMES = (
    r"^tokenizer\.quantizer\.(cluster_size|codebooks\.\d+\.(weight|cluster_size_ema|embed_ema|initted)"
    r"|embedding\.(weight|cluster_size|embed_avg|initted))$"
)
# Of values in [0, 1] per channel: ImageNet's, with which the reference trains on images and video.
IMAGE_STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], modality: str, **config_kwargs: Any
) -> tuple[BridleForPreTraining, BridleTokenizerModel]:
    """Build our models from a reference state dict; both come back in eval mode.

    Args:
        state_dict: tensors under the reference's names (`checkpoint["model"]`), with or without the `module.` that
            data-parallel training puts before them.
        modality: `"audio"`, `"image"` or `"video"`.
        config_kwargs: fields of either config that shapes cannot tell: `num_attention_heads`,
            `decoder_num_attention_heads`, `estimator_num_attention_heads` (default: the reference ViT-B's),
            `num_mel_bins` where positions were trained, or for video `image_size` and `num_frames`.
            `tokenizer_type="random_projection"` gives the cold-start tokenizer of the same checkpoint instead of the
            trained one.

    Raises:
        ValueError: a config field that no config has; a tensor that is missing, left over, or of another shape; or
            positions of another grid than the sizes that were given.
    """
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    # Video has its quantizer within its encoder.
    state_dict = {
        name.replace("tokenizer.encoder.quantizer.", "tokenizer.quantizer."): t for name, t in state_dict.items()
    }
    _check_kwargs(config_kwargs)
    sizes = _sizes_from_shapes(state_dict, modality, config_kwargs)
    _check_names(state_dict)
    model_config = BridleConfig(**_fields_of(BridleConfig, {**sizes, **config_kwargs}))
    tokenizer_config = BridleTokenizerConfig(**_fields_of(BridleTokenizerConfig, {**sizes, **config_kwargs}))
    cold_start = tokenizer_config.tokenizer_type == "random_projection"

    model_weights = _renamed(state_dict, _MODEL_NAMES)
    tokenizer_weights = _renamed(state_dict, _COLD_START_NAMES if cold_start else _TOKENIZER_NAMES)
    for config, weights in ((model_config, model_weights), (tokenizer_config, tokenizer_weights)):
        _settle_positions(config, weights)
    tokenizer_weights |= _quantizer_weights(state_dict, tokenizer_config.ema_update)
    model, tokenizer = BridleForPreTraining(model_config), BridleTokenizerModel(tokenizer_config)
    _load(model, model_weights)
    _load(tokenizer, tokenizer_weights)
    return model.eval(), tokenizer.eval()


def _sizes_from_shapes(state_dict: dict[str, torch.Tensor], modality: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every config field that the shapes of the tensors tell, and the reference's fixed choices."""
    nested = "encoder." if modality == "video" else ""
    estimator = "tokenizer.decoder." if modality == "video" else "tokenizer.estimator_"
    decoder = "encoder_decoder.decoder." if modality == "video" else "encoder_decoder.decoder_"

    def tensor(name: str) -> torch.Tensor:
        if name not in state_dict:
            raise ValueError(f"`{name}` is missing: this is not a {modality} checkpoint of the reference code")
        return state_dict[name]

    patch_weight = tensor(f"encoder_decoder.{nested}patch_embed.proj.weight")
    codebooks = _codebooks(state_dict)
    sizes = {
        "modality": modality,
        "hidden_size": patch_weight.shape[0],
        "num_channels": patch_weight.shape[1],
        "patch_size": list(patch_weight.shape[-2:]),
        "num_hidden_layers": _count(state_dict, f"encoder_decoder.{nested}blocks."),
        "intermediate_size": tensor(f"encoder_decoder.{nested}blocks.0.mlp.fc1.weight").shape[0],
        "decoder_hidden_size": tensor("encoder_decoder.mask_token").shape[-1],
        "decoder_num_hidden_layers": _count(state_dict, f"{decoder}blocks."),
        "estimator_num_hidden_layers": _count(state_dict, f"{estimator}blocks."),
        "estimator_hidden_size": tensor(f"{estimator}norm.weight").shape[0],
        "teacher_hidden_size": patch_weight.shape[0],
        "code_dim": codebooks.shape[2],
        "num_codebooks": codebooks.shape[0],
        "codebook_size": codebooks.shape[1],
        "dead_code_threshold": 0.0,
        "normalize_target_patches": False,
        "add_position_to_projection": True,
    }
    if "tokenizer.quantizer.embedding.weight" in state_dict:
        sizes |= {"codebook_normalization": "input", "unit_norm_codes": True, "ema_update": "direction"}
    else:
        ema_update = "smoothed_count" if modality == "video" else "direction"
        sizes |= {"codebook_normalization": "level", "ema_update": ema_update}
    if modality == "video":
        sizes["tubelet_size"] = patch_weight.shape[2]
    else:
        table = tensor("encoder_decoder.pos_embed")[0, 1:]
        swin = f"{decoder}blocks.0.attn.tau" in state_dict
        sizes["decoder_type"] = "swin" if swin else "plain"
        if modality == "audio":
            mel_bins = _mel_bins(table, sizes["patch_size"][1], given.get("num_mel_bins"))
            sizes |= {"max_length": len(table) * math.prod(sizes["patch_size"]) // mel_bins, "num_mel_bins": mel_bins}
        else:
            # The reference takes square images alone.
            sizes["image_size"] = [math.isqrt(len(table)) * size for size in sizes["patch_size"]]
    return sizes


def _mel_bins(table: torch.Tensor, patch: int, given: int | None) -> int:
    """Mel bins that positions (patches, dim) span. The reference makes its table for (mel, time), not (time, mel)."""
    rows = [rows for rows in range(1, len(table) + 1) if len(table) % rows == 0]
    found = [n for n in rows if _is_sincos(table, (n, len(table) // n))]
    if not found and given is None:
        raise ValueError(
            "the positions of this checkpoint were trained and do not tell its mel bins: give `num_mel_bins`"
        )
    if found and given not in (None, found[0] * patch):
        raise ValueError(
            f"`num_mel_bins` is {given}, but `encoder_decoder.pos_embed` is of {found[0] * patch} mel bins and "
            f"{len(table) // found[0]} patches in time"
        )
    return found[0] * patch if given is None else given


def _count(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state_dict if name.startswith(prefix))


def _codebooks(state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    """(num_codebooks, codebook_size, code_dim); the last row of each RQ codebook is padding."""
    if "tokenizer.quantizer.embedding.weight" in state_dict:
        return state_dict["tokenizer.quantizer.embedding.weight"][None]
    return torch.stack([weight[:-1] for weight in _levels(state_dict, "weight")])


def _levels(state_dict: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    pattern = re.compile(rf"^tokenizer\.quantizer\.codebooks\.(\d+)\.{name}$")
    found = {int(match[1]): tensor for key, tensor in state_dict.items() if (match := pattern.match(key))}
    if not found:
        raise ValueError("the checkpoint has no `tokenizer.quantizer` codebooks: this is not a reference checkpoint")
    return [found[level] for level in sorted(found)]


def _quantizer_weights(state_dict: dict[str, torch.Tensor], ema_update: str) -> dict[str, torch.Tensor]:
    codebooks = _codebooks(state_dict)
    if "tokenizer.quantizer.cluster_size" in state_dict:
        cluster_size = state_dict["tokenizer.quantizer.cluster_size"][None]
    else:
        cluster_size = torch.stack(_levels(state_dict, "cluster_size_ema"))
    # Where the reference moves its codes directly, a sum that agrees with them is all that there is to know.
    direct = ema_update == "direction"
    cluster_sum = codebooks * cluster_size[:, :, None] if direct else torch.stack(_levels(state_dict, "embed_ema"))
    return {
        "quantizer.codebooks": codebooks,
        "quantizer.cluster_size": cluster_size,
        "quantizer.cluster_sum": cluster_sum,
        "quantizer.initialized": torch.tensor(True),
    }


def _check_kwargs(config_kwargs: dict[str, Any]) -> None:
    known = set(BridleConfig().to_dict()) | set(BridleTokenizerConfig().to_dict())
    unknown = sorted(set(config_kwargs) - known)
    if unknown:
        raise ValueError(f"{unknown} are fields of neither BridleConfig nor BridleTokenizerConfig")


def _check_names(state_dict: dict[str, torch.Tensor]) -> None:
    known = [pattern for pattern, _ in (*_MODEL_NAMES, *_TOKENIZER_NAMES, *_COLD_START_NAMES)] + [_QUANTIZER_NAMES]
    unknown = [name for name in state_dict if not any(re.search(pattern, name) for pattern in known)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"the checkpoint has tensors that the reference has not: {', '.join(unknown[:5])}{more}")


def _fields_of(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    known = config_class().to_dict()
    return {name: value for name, value in values.items() if name in known}


def _renamed(state_dict: dict[str, torch.Tensor], names: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    weights = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in names:
            if re.search(pattern, key):
                name = re.sub(pattern, replacement, key)
                for block_pattern, block_replacement in _BLOCK_NAMES:
                    name = re.sub(block_pattern, block_replacement, name)
                swin = re.sub(r"\.attn\..*", ".attn.tau", key) in state_dict
                weights |= _split(name, tensor, swin)
                break
    return weights


def _split(name: str, tensor: torch.Tensor, swin: bool) -> dict[str, torch.Tensor]:
    """A tensor of the reference as ours: fused projections of plain blocks come apart, convolutions become linear."""
    if ".attn.qkv." in name and swin:
        return {name.replace(".attn.", ".attention."): tensor}
    if ".attn.qkv." in name:
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3))
        return {name.replace(".attn.qkv.", f".attention.{part}."): rows for part, rows in parts}
    if match := re.search(r"\.attn\.(q|v)_bias$", name):
        return {name.replace(match[0], f".attention.{match[1]}_proj.bias"): tensor}
    if name.endswith((".projection.weight", ".embedding.weight")) and tensor.dim() > 3:
        return {name: tensor.flatten(1)}
    return {name: tensor}


def _settle_positions(config: BridleConfig | BridleTokenizerConfig, weights: dict[str, torch.Tensor]) -> None:
    """Keep the checkpoint's position tables only where they are not the ones that we compute."""
    tables = {name: weights.pop(name)[0] for name in list(weights) if name.endswith("positions.table")}
    patches = math.prod(config.patch_grid)
    for name, table in tables.items():
        extra = table[: len(table) - patches]
        if len(table) < patches or extra.any():
            size = "num_mel_bins" if config.modality == "audio" else "image_size"
            raise ValueError(f"`{name}` does not fit a grid of {config.patch_grid} patches: give `{size}`")
    tables = {name: table[len(table) - patches :] for name, table in tables.items()}
    if not all(_is_sincos(table, config.patch_grid) for table in tables.values()):
        config.position_embedding_type = "table"
        weights |= tables


def _is_sincos(table: torch.Tensor, grid: tuple[int, ...]) -> bool:
    """Whether (patches, dim) are the positions that we compute, as far as the precision of `table` goes."""
    tolerance = max(1e-6, torch.finfo(table.dtype).eps)
    return torch.allclose(table.float(), sincos_positions(grid, table.shape[1]), atol=tolerance, rtol=0.0)


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {error}") from error


def convert_checkpoint(
    checkpoint: str | Path | dict[str, torch.Tensor], output_dir: str | Path, modality: str, **config_kwargs: Any
) -> None:
    """Write OUT/encoder and OUT/tokenizer, with their processor, from a file that the authors' code saved.

    Args:
        checkpoint: what `torch.save` wrote of `{"model": state_dict, ...}`, or of the state dict alone; or, where it
            was read already, what [`read_checkpoint`] returned.
        config_kwargs: `num_attention_heads` and the like, which shapes cannot tell; see [`convert_state_dict`].

    Raises:
        ValueError: the file is not such a checkpoint. OSError: It cannot be read.
    """
    saved = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    models = convert_state_dict(saved, modality=modality, **config_kwargs)
    for name, model in zip(("encoder", "tokenizer"), models):
        model.save_pretrained(Path(output_dir) / name)
        make_original_processor(model.config).save_pretrained(Path(output_dir) / name)


def read_checkpoint(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a file that `torch.save` wrote, of `{"model": state_dict, ...}` or of the state dict alone.

    Raises:
        ValueError: the file holds none. OSError: It cannot be read.
    """
    try:
        # The authors save the arguments of their run beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint} is not a file of weights that torch.save wrote") from error
    saved = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(saved, dict):
        raise ValueError(f"{checkpoint} does not hold a state dict, nor one under the name 'model'")
    return saved


def holds_original(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether these are names of the authors' code, which alone has a tokenizer beside the encoder."""
    return any("encoder_decoder." in name or "tokenizer." in name for name in state_dict)


def make_original_processor(config: BridleConfig | BridleTokenizerConfig) -> Any:
    """The processor of a converted model: AudioSet's statistics for audio, ImageNet's for images and video."""
    if config.modality == "audio":
        return BridleFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    return make_image_processor(config, **(IMAGE_STATISTICS if config.num_channels == 3 else {}))


__all__ = ["convert_checkpoint", "convert_state_dict", "holds_original", "read_checkpoint"]

if __name__ == "__main__":
    raise SystemExit("error: write `bridle convert CHECKPOINT OUT --modality audio`")
