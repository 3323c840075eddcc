"""Read-outs: what a probe may see of an encoder, with a control of the same spatial detail beside each.

    tokens of every layer --pooling--> (samples, layers, dim) -- folds --> convex gate over layers + linear classifier
    patches of the input, their principal components --the same pooling--> (samples, 1, dim) --> the control

A regression on the whole input sees more places than a pooled encoder, and one on its mean fewer: either says little
about the encoder. The control of a read-out is a linear map of the patches, as wide as the encoder and pooled in the
same way: what an encoder gives that looks at no other patch and bends nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.labels import Labels
from bridle_hf.data.sample import Sample, spread
from bridle_hf.embedding.poolings import POOLINGS, POOLINGS_OF, Pooling, with_deviation
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patch_grid_of, patchify
from bridle_hf.probing.features import untrained_encoder
from bridle_hf.probing.probes import (
    ProbeResult,
    attentive_probe,
    gated_probe,
    knn_probe,
    linear_probe,
    linear_row,
)


ATTENTIVE = "attentive"
# That the principal components of the control are fitted on.
PCA_SAMPLES = 1000


@dataclass(frozen=True)
class Readout:
    """How features become an answer.

    Args:
        pooling: `mean_std`, or `region_mean_std`: see [`pooling_of`]; or `attentive`, of the last layer.
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
        """Of features under this read-out's pooling, see `LayerFeatures` and `probes.py`."""
        if self.pooling == ATTENTIVE:
            return attentive_probe(layers, labels, folds)
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
# By name, those that are read where they are asked for: tokens of all patches are much to keep.
ON_REQUEST = {"gate": PRIMARY, "attentive": Readout(ATTENTIVE, "last", "linear")}

# By pooling: (samples, layers, dim) float32; of `attentive` (samples, patches, dim), NaN where a patch is padding.
LayerFeatures = dict[str, np.ndarray]
# A model's input (its values and, of audio, which patches are real) to the tokens of every layer.
Tokens = Callable[[torch.Tensor, torch.Tensor | None], list[torch.Tensor]]


def collect_layers(
    sources: dict[str, Tokens],
    config: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    readouts: Sequence[Readout] = READOUTS,
) -> dict[str, LayerFeatures]:
    """Features of several sources, by name, under the poolings of the read-outs, in one pass over the batches.

    Args:
        sources: [`encoder_tokens`] and [`patch_tokens`], by name.
        config: of an encoder; all sources cut the input into the same patches.
    """
    poolings = dict.fromkeys(readout.pooling for readout in readouts)
    parts: dict[str, dict[str, list[np.ndarray]]] = {name: {pooling: [] for pooling in poolings} for name in sources}
    for batch in batches:
        values, mask = batch[INPUT_NAMES[config.modality]], batch.get("attention_mask")
        real, grid = None if mask is None else patch_attention_mask(mask, config), patch_grid_of(values, config)
        for name, tokens_of in sources.items():
            layers = tokens_of(values, mask)
            for pooling in poolings:
                if pooling == ATTENTIVE:
                    tokens = layers[-1] if real is None else layers[-1].masked_fill(~real[..., None], torch.nan)
                    parts[name][pooling].append(tokens.numpy())
                    continue
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


def run_readouts(
    names: Sequence[str],
    encoder: Any,
    samples: Sequence[Sample],
    load: Callable,
    labels: Labels,
    folds: np.ndarray,
    ledger: SkippedFiles,
    controls: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    name: str = "encoder",
) -> list[dict[str, Any]]:
    """Read-outs of a frozen encoder `ON_REQUEST`, with the controls beside them.

    Args:
        names: of the read-outs.
        encoder, samples, load, labels, folds, ledger, batch_size, num_workers, seed, name: as in [`run_probes`].
        controls: also read out an untrained encoder (of `seed`) and the patches, see [`patch_tokens`].

    Returns:
        Rows as of [`run_probes`], without nearest neighbours.
    """
    kept: list[int] = []

    def batches(of: Sequence[Sample]) -> Iterable[dict[str, torch.Tensor]]:
        kept.clear()
        for indices, batch in iterate_eval(of, load, batch_size, ledger, num_workers):
            kept.extend(indices)
            yield batch

    sources = {name: encoder_tokens(encoder)}
    if controls:
        sources["untrained encoder"] = encoder_tokens(untrained_encoder(encoder, seed).to(encoder.device))
        sources["patches"] = patch_tokens(encoder.config, batches(spread(samples, PCA_SAMPLES)))
    readouts = [ON_REQUEST[readout] for readout in names]
    collected = collect_layers(sources, encoder.config, batches(samples), readouts)
    targets, folds = labels.encode(samples).numpy()[kept], np.asarray(folds)[kept]
    return [
        linear_row(source, f"{readout.pooling}/{readout.layers}", readout(layers[readout.pooling], targets, folds))
        for source, layers in collected.items()
        for readout in readouts
    ]


def encoder_tokens(encoder: Any) -> Tokens:
    """The patches' features at the embedding, after every layer but the last, and at the encoder's output."""
    encoder, first = encoder.eval(), int(encoder.config.use_class_token)

    @torch.no_grad()
    def tokens(values: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        mask = None if mask is None else mask.to(encoder.device)
        output = encoder(values.to(encoder.device), mask, output_hidden_states=True)
        return [state[:, first:].float().cpu() for state in (*output.hidden_states[:-1], output.last_hidden_state)]

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
