"""Read-outs: what a probe may see of an encoder, with a control of the same spatial detail beside each.

    tokens of every layer --pooling--> (samples, layers, dim) -- folds --> convex gate over layers + linear classifier
    patches of the input, their principal components --the same pooling--> (samples, 1, dim) --> the control

A regression on the whole input sees more places than a pooled encoder, and one on its mean fewer: either says little
about the encoder. The control of a read-out is a linear map of the patches, as wide as the encoder and pooled in the
same way: what an encoder gives that looks at no other patch and bends nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bridle_hf.embedding.poolings import POOLINGS, POOLINGS_OF, Pooling, with_deviation
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patch_grid_of, patchify
from bridle_hf.probing.probes import ProbeResult, gated_probe, knn_probe, linear_probe


@dataclass(frozen=True)
class Readout:
    """How features become an answer.

    Args:
        pooling: `mean_std`, or `region_mean_std`: see [`pooling_of`].
        layers: `gate`, a learned convex combination of all; or `last`.
        probe: `linear` or `knn`.
    """

    pooling: str
    layers: str
    probe: str

    @property
    def name(self) -> str:
        return "/".join(asdict(self).values())

    def __call__(self, layers: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
        """Of features (samples, layers, dim) under this read-out's pooling; see `probes.py`."""
        if self.layers == "gate":
            return gated_probe(layers, labels, folds)
        return {"linear": linear_probe, "knn": knn_probe}[self.probe](layers[:, -1], labels, folds)


READOUTS = (
    Readout("region_mean_std", "gate", "linear"),
    Readout("mean_std", "gate", "linear"),
    Readout("mean_std", "last", "linear"),
    Readout("region_mean_std", "last", "knn"),
    Readout("mean_std", "last", "knn"),
)
# The one that counts, fixed before the first reported run: on notes it is the best or near it for a trained encoder,
# an untrained one and the patches alike, in both tasks, so that no source is held back by what its pooling drops.
PRIMARY = READOUTS[0]
POOLINGS_READ = tuple(dict.fromkeys(readout.pooling for readout in READOUTS))

# By pooling: (samples, layers, dim) float32.
LayerFeatures = dict[str, np.ndarray]
# A model's input (its values and, of audio, which patches are real) to the tokens of every layer.
Tokens = Callable[[torch.Tensor, torch.Tensor | None], list[torch.Tensor]]


def collect_layers(
    sources: dict[str, Tokens], config: Any, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, LayerFeatures]:
    """Pooled features of several sources, by name, in one pass over the batches.

    Args:
        sources: [`encoder_tokens`] and [`patch_tokens`], by name.
        config: of an encoder; all sources cut the input into the same patches.
    """
    parts: dict[str, dict[str, list[np.ndarray]]] = {
        name: {pooling: [] for pooling in POOLINGS_READ} for name in sources
    }
    for batch in batches:
        values, mask = batch[INPUT_NAMES[config.modality]], batch.get("attention_mask")
        real, grid = None if mask is None else patch_attention_mask(mask, config), patch_grid_of(values, config)
        for name, tokens_of in sources.items():
            layers = tokens_of(values, mask)
            for pooling in POOLINGS_READ:
                pooled = [pooling_of(pooling, config.modality)(tokens, grid, real) for tokens in layers]
                parts[name][pooling].append(torch.stack(pooled, dim=1).numpy())
    return {
        name: {pooling: np.concatenate(arrays) for pooling, arrays in found.items()} for name, found in parts.items()
    }


def pooling_of(name: str, modality: str) -> Pooling:
    """Regions are what the modality's grid has: mel bands of audio, parts of the picture of images and video."""
    if name in POOLINGS:
        return POOLINGS[name]
    *_, regional = POOLINGS_OF[modality]
    return {"region_mean_std": with_deviation(POOLINGS[regional])}[name]


def encoder_tokens(encoder: Any) -> Tokens:
    """The patches' features at the embedding, after every layer but the last, and at the encoder's output."""
    encoder, first = encoder.eval(), int(encoder.config.use_class_token)

    @torch.no_grad()
    def tokens(values: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        output = encoder(values, mask, output_hidden_states=True)
        return [state[:, first:].float() for state in (*output.hidden_states[:-1], output.last_hidden_state)]

    return tokens


def patch_tokens(config: Any, batches: Iterable[dict[str, torch.Tensor]]) -> Tokens:
    """The control: patches through their principal components, as many as the encoder is wide.

    They are fitted without labels. Patches of fewer numbers are taken as they are.

    Args:
        batches: inputs to fit the components on; read only where there are too many numbers.
    """
    if config.patch_dim <= config.hidden_size:
        return lambda values, mask: [patchify(values, config)[0].float()]
    count, total, moment = 0, torch.zeros(config.patch_dim), torch.zeros(config.patch_dim, config.patch_dim)
    for batch in batches:
        values, mask = batch[INPUT_NAMES[config.modality]], batch.get("attention_mask")
        patches = patchify(values, config)[0].float()
        rows = patches.flatten(0, 1) if mask is None else patches[patch_attention_mask(mask, config)]
        count, total, moment = count + len(rows), total + rows.sum(dim=0), moment + rows.T @ rows
    mean = total / count
    _, vectors = torch.linalg.eigh(moment / count - mean.outer(mean))
    components = vectors[:, -config.hidden_size :]
    return lambda values, mask: [(patchify(values, config)[0].float() - mean) @ components]
