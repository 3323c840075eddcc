"""Evaluation of a run's models at the end of a phase: how well the tokenizer codes, what a probe reads, pictures."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bridle_hf import BridleForPreTraining, BridleTokenizerModel
from bridle_hf.common.files import write_figure
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import Sample
from bridle_hf.data.folds import assign_folds
from bridle_hf.data.labels import Labels
from bridle_hf.data.sample import spread
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patch_grid_of
from bridle_hf.probing.explained_variance import codes_explained_variance
from bridle_hf.probing.features import check_finite
from bridle_hf.probing.probes import run_probes
from bridle_hf.quantization_bridle import codebook_usage
from bridle_hf.visualization_bridle import plot_codes, plot_masked_input, plot_predictions


logger = logging.getLogger(__name__)

# A linear map from 1,024 one-hot codes is settled by this many clips, and the teacher's features fit into memory.
CLIPS_FOR_VARIANCE = 400
PROBE_POOLING = "mean_std"


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: BridleTokenizerModel, teach: Callable[..., torch.Tensor], batches: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """How a tokenizer, not moving, codes `batches`.

    Args:
        teach: makes the features that the codes are held against, of inputs, attention mask and layers.
        batches: of model inputs, with the names of their `files`.

    Returns:
        Lists with one number per level: the fields of `CodebookUsage`, and `explained_variance`, the share of the
        teacher's variance that a linear map of the codes up to that level explains; and `clips`, how many there were.

    Raises:
        NonFiniteError: the teacher's features are not: names the files.
    """
    tokenizer = tokenizer.eval()
    counts: torch.Tensor | float = 0.0
    errors, codes, teachers, reals, clips = [], [], [], [], 0
    for batch in batches:
        inputs, mask = _inputs(batch, tokenizer)
        output = tokenizer(inputs, mask)
        counts = counts + output.counts
        errors.append(output.usage.quantization_error * len(inputs))
        if clips < CLIPS_FOR_VARIANCE:
            layers = tokenizer.config.teacher_layers
            teachers.append(teach(inputs, mask, layers).float().cpu())
            check_finite(teachers[-1], batch["files"], "the teacher's features")
            codes.append(output.codes.cpu())
            real = torch.ones(output.codes.shape[:2]) if mask is None else patch_attention_mask(mask, tokenizer.config)
            reals.append(real.bool().cpu())
        clips += len(inputs)
    usage = codebook_usage(counts)
    measured = {name: usage[name].tolist() for name in ("used_fraction", "perplexity", "normalized_entropy")}
    measured["quantization_error"] = (torch.stack(errors).sum(dim=0) / clips).tolist()
    parts = (torch.cat(tensors).numpy()[:CLIPS_FOR_VARIANCE] for tensors in (codes, teachers, reals))
    return {**measured, "explained_variance": codes_explained_variance(*parts), "clips": clips}


def probe_accuracies(
    encoder: BridleForPreTraining, samples: Sequence[Sample], load: Any, ledger: SkippedFiles, device: Any, seed: int
) -> dict[str, float]:
    """Linear and kNN accuracy of the frozen encoder and of its controls, named as in metrics.jsonl."""
    folds = assign_folds(samples)
    rows = run_probes(encoder.bridle, samples, load, Labels(samples), folds, ledger, device=device, seed=seed)
    found: dict[str, float] = {}
    for row in rows:
        prefix = "" if row["features"] == "encoder" else f"{row['features'].replace(' ', '_')}_"
        if row["pooling"] in (PROBE_POOLING, ""):
            found |= {f"probe/{prefix}linear": row["linear"], f"probe/{prefix}knn": row["knn"]}
    return found


@torch.no_grad()
def draw_example(
    encoder: BridleForPreTraining,
    tokenizer: BridleTokenizerModel,
    processor: Any,
    loaded: dict[str, Any],
    folder: Path,
    name: str,
) -> None:
    """Pictures of one sample in `folder`: its mask, its codes, predicted against true codes; `name` is the phase.

    An encoder that predicts something else than codes has no picture of its predictions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder, tokenizer = encoder.eval(), tokenizer.eval()
    batch = {key: value[None] for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    inputs, mask = _inputs(batch, tokenizer)
    hidden = batch["bool_masked_pos"].flatten(0, -2)[:1].to(inputs.device)  # of several masks, the first
    codes = tokenizer.encode(inputs, mask)
    config, grid = encoder.config, patch_grid_of(inputs, encoder.config)
    rate = {"sampling_rate": processor.sampling_rate} if config.modality == "audio" else {}
    pictures = {
        "masked_input": plot_masked_input(inputs[0], hidden[0], config, **rate),
        "codes": plot_codes(codes[0], config, grid, title=f"Codes of one input after {name}", **rate),
    }
    if config.target == "codes":
        predicted = encoder(inputs, mask, bool_masked_pos=hidden).logits.argmax(dim=-1)
        title = f"After {name}"
        pictures["predictions"] = plot_predictions(
            codes[0], predicted[0], hidden[0], config, grid, title=title, **rate
        )
    for kind, figure in pictures.items():
        write_figure(folder / f"{kind}_{re.sub(r'[^a-z0-9]+', '_', name).strip('_')}.png", figure)


def probe_samples(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most `most` labelled samples, spread evenly over all; none if there are no labels or a single one."""
    chosen = spread([sample for sample in samples if sample.label is not None or sample.labels], most)
    return chosen if len({sample.label or sample.labels for sample in chosen}) > 1 else []


def check_probes(samples: Sequence[Sample], most: int, tell: bool = False) -> None:
    """Raise a `ValueError` if the labels, folds or groups of `samples` are such that they cannot be probed on.

    With `tell`, log the classes, or that there are none to probe.
    """
    if chosen := probe_samples(samples, most):
        labels = Labels(chosen)
        assign_folds(chosen)
        if tell:
            labels.log({"probes": chosen})
    elif tell:
        logger.warning("no probes: the samples have no labels, or all the same one")


def _inputs(batch: dict[str, Any], model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = batch.get("attention_mask")
    mask = None if mask is None or bool(mask.all()) else mask.to(model.device)
    return batch[INPUT_NAMES[model.config.modality]].to(model.device), mask
