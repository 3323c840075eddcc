"""Pooled features of frozen encoders, and of the input itself as a control."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

from bridle_hf.common.errors import NonFiniteError
from bridle_hf.common.length_buckets import in_batch_order, parts_by_length
from bridle_hf.embedding.poolings import POOLINGS
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patch_grid_of


# Those of `bridle probe`. Regions of a large picture are too many numbers to come unasked.
ENCODER_POOLINGS = {
    "audio": ("mean", "mean_std", "band_mean"),
    "image": ("mean", "mean_std"),
    "video": ("mean", "mean_std"),
}


# The regression that every probe is set beside: its name, and how the model's input of that name is pooled. Pixels
# mean something where they stand, and are taken as they are.
INPUT_CONTROLS = {
    "input_values": ("log-mel regression", ("mean", "mean_std")),
    "pixel_values": ("pixel regression", ()),
    "pixel_values_videos": ("frame regression", ()),
}


# Pixels of larger pictures than this are averaged first, and of more numbers in all than this, 256 principal
# components are kept: a regression on hundreds of thousands of numbers would take hours and do no better. Of few
# samples fewer components: the last ones are noise, which standardisation makes as loud as the first.
MOST_PIXELS_A_SIDE, MOST_PIXELS, PIXEL_COMPONENTS, SAMPLES_PER_COMPONENT = 32, 1024, 256, 10


Features = dict[str, np.ndarray]


def collect_features(
    encoders: dict[str, Any], batches: Iterable[dict[str, torch.Tensor]], device: Any = "cpu", with_input: bool = True
) -> dict[str, Features]:
    """Frozen features of several encoders, in one pass; with those of the input itself (see `INPUT_CONTROLS`).

    Args:
        encoders: a `BridleModel` by name; moved to `device`, run in evaluation mode and left in the mode it was in.
        batches: model inputs, with `attention_mask` where there is padding.

    Returns:
        By name, for each pooling that fits the modality: (samples, dim) float32, the last hidden states pooled over
        real patches, not the class token; of the input its real frames pooled, of pixels the pixels, as pooling "".
    """
    extractors = {name: _encoder_features(encoder, device) for name, encoder in encoders.items()}
    if with_input:
        modality = next(iter(encoders.values())).config.modality
        control, _ = INPUT_CONTROLS[INPUT_NAMES[modality]]
        extractors[control] = _pool_input
    # One pass over the batches for all: reading is what takes the time.
    parts: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in extractors}
    for batch in batches:
        for name, extract in extractors.items():
            for pooling, features in extract(batch).items():
                parts[name].setdefault(pooling, []).append(features.float().cpu().numpy())
    return {
        name: {
            # Of pixels, which alone are not pooled; an encoder's features stay what they are.
            pooling: np.concatenate(arrays) if pooling else _principal_components(np.concatenate(arrays))
            for pooling, arrays in poolings.items()
        }
        for name, poolings in parts.items()
    }


def check_finite(features: Any, files: Sequence[str], what: str) -> None:
    """Raise a `NonFiniteError` that names the files whose features, rows of an array or tensor, are not finite."""
    bad = ~np.isfinite(np.asarray(features)).reshape(len(files), -1).all(axis=1)
    if bad.any():
        names = ", ".join(files[row] for row in np.flatnonzero(bad))
        raise NonFiniteError(f"{what} are not finite for {names}: the model has diverged; lower its learning rate")


def untrained_encoder(encoder: Any, seed: int = 0) -> Any:
    """A `BridleModel` of the same configuration with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(encoder)(encoder.config)


def _principal_components(features: np.ndarray) -> np.ndarray:
    """(samples, dim) as it is, or of many dimensions the principal components.

    They are fitted on all samples, without their labels: if that helps anybody, then the control.
    """
    if features.shape[1] <= MOST_PIXELS:
        return features
    count = max(min(PIXEL_COMPONENTS, len(features) // SAMPLES_PER_COMPONENT), 1)
    return PCA(count, svd_solver="randomized", iterated_power=2, random_state=0).fit_transform(features)


def _encoder_features(encoder: Any, device: Any) -> Callable[[dict], dict[str, torch.Tensor]]:
    config = encoder.config
    encoder = encoder.to(device)

    def pooled(inputs: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        tokens = encoder(inputs, mask).last_hidden_state[:, int(config.use_class_token) :].float()
        real, grid = None if mask is None else patch_attention_mask(mask, config), patch_grid_of(inputs, config)
        return {name: POOLINGS[name](tokens, grid, real) for name in ENCODER_POOLINGS[config.modality]}

    @torch.no_grad()
    def extract(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = INPUT_NAMES[config.modality], "attention_mask"
        inputs, mask = (batch[name].to(device) if name in batch else None for name in names)
        was_training = encoder.training
        encoder.eval()
        try:
            parts = [(places, pooled(*part)) for places, *part in parts_by_length(inputs, mask, config)]
        finally:
            encoder.train(was_training)
        places, found = zip(*parts)
        return {name: in_batch_order(places, [part[name] for part in found]) for name in found[0]}

    return extract


def _pool_input(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in INPUT_CONTROLS if name in batch)
    if name != "input_values":
        pixels, (height, width) = batch[name].float().flatten(1, -3), batch[name].shape[-2:]
        size = (min(height, MOST_PIXELS_A_SIDE), min(width, MOST_PIXELS_A_SIDE))
        return {"": torch.nn.functional.adaptive_avg_pool2d(pixels, size).flatten(1)}
    frames, mask = batch[name].float(), batch.get("attention_mask")
    real = None if mask is None else mask.bool()
    return {pooling: POOLINGS[pooling](frames, frames.shape[1:2], real) for pooling in INPUT_CONTROLS[name][1]}
