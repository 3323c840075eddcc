"""Probes of frozen features, linear and nearest-neighbour, with the controls to set beside them.

    Sample -> loader -> batch --encoder--> patches' features --pooling--> (samples, dim) -- folds --> ProbeResult
                            \\--as it is--> frames of log-mel --pooling--> the control (pixels: not pooled)

A probe says little alone: `run_probes` sets an untrained encoder, a regression on the input itself and the majority
class beside it, under several poolings.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.labels import Labels
from bridle_hf.data.sample import Sample
from bridle_hf.probing.features import check_finite, collect_features, untrained_encoder
from bridle_hf.probing.metrics import METRIC_NAMES, score


# Features differ in how much regularization suits them (on the notes: log-mel 0.03, encoders 0.3), and one value for
# all would favour some: each fold takes the best of these on a fold that it trains on.
REGULARIZATIONS = (0.03, 0.3)
# The trials need only tell which is better; the last fit stops short of converging, at a second per fold.
TRIAL_ITERATIONS, MAX_ITERATIONS = 25, 100
# The gate over a few layers settles long before the classifier that is trained with it.
GATE_ITERATIONS = 20
# Of attentive pooling: what looks where, each for a part of the numbers of a patch.
QUERIES, ATTENTION_ITERATIONS = 4, 50
NUM_NEIGHBORS = 20


# --- Probes ---
# `labels` are class numbers (samples,), or 0/1 rows (samples, classes) for several labels per sample; `folds` is the
# fold number of each sample. Each fold is tested by a probe fitted on all others; what has -1 is never tested.


@dataclass(frozen=True)
class ProbeResult:
    """`score` is the mean over `per_fold`, `deviation` its sample standard deviation; `metric` says of what:
    "accuracy" or "mAP".

    `correct` (samples,) says of which samples the label was found; `None` where samples carry several.
    """

    metric: str
    score: float
    per_fold: tuple[float, ...]
    correct: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def deviation(self) -> float:
        return float(np.std(self.per_fold, ddof=1))


def linear_probe(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    """Logistic regression on standardised features; one classifier per class where samples carry several labels.

    The regularization is chosen for each fold, on one of the folds that it trains on.
    """
    return _cross_validate(_linear_scores, features, labels, folds)


def gated_probe(layers: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    """[`linear_probe`] on a convex combination of the layers, whose weights each fold learns first.

    Which layer serves a task best differs from encoder to encoder; a probe of the last alone reorders them.

    Args:
        layers: (samples, layers, dim); each number is standardised.
    """
    count = layers.shape[1]

    def scores(train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray) -> np.ndarray:
        train, test = (part.reshape(len(part), count, -1).swapaxes(0, 1) for part in (train, test))
        gate = _learned_gate(train, train_labels)
        combined = [np.tensordot(gate, part, axes=1) for part in (train, test)]
        scaler = StandardScaler().fit(combined[0])
        return _linear_scores(scaler.transform(combined[0]), train_labels, train_folds, scaler.transform(combined[1]))

    return _cross_validate(scores, layers.reshape(len(layers), -1), labels, folds)


def _linear_scores(
    train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray
) -> np.ndarray:
    # Of a single training fold, every fourth sample.
    several = train_folds.min() != train_folds.max()
    inner = train_folds == train_folds[0] if several else np.arange(len(train)) % 4 == 0
    found = {}
    for strength in REGULARIZATIONS:
        fitted = _fit_and_score(train[~inner], train_labels[~inner], train[inner], strength, TRIAL_ITERATIONS)
        found[strength] = score(train_labels[inner], fitted)
    return _fit_and_score(train, train_labels, test, max(found, key=found.get), MAX_ITERATIONS)


def _learned_gate(layers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(layers,) weights of a convex combination, trained with a linear classifier on (layers, samples, dim)."""
    if len(layers) == 1:
        return np.ones(1, dtype=np.float32)
    # A layout in which their combination is one product of a vector and a matrix.
    values = torch.from_numpy(np.ascontiguousarray(layers))

    def combined(gate: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(gate.softmax(dim=0), values, dims=1)

    gate = _learned_beside_classifier(torch.zeros(len(values)), combined, labels, values.shape[2], GATE_ITERATIONS)
    return gate.softmax(dim=0).numpy()


def _learned_beside_classifier(
    start: torch.Tensor,
    pooled: Callable[[torch.Tensor], torch.Tensor],
    labels: np.ndarray,
    dim: int,
    iterations: int,
) -> torch.Tensor:
    """What `pooled` makes features (samples, dim) of, trained from `start` with a linear classifier on these."""
    targets = torch.from_numpy(labels)
    single = targets.dim() == 1
    classes = int(targets.max()) + 1 if single else targets.shape[1]
    learned = start.clone().requires_grad_()
    weight = torch.zeros(dim, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([learned, weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = pooled(learned) @ weight + bias
        value = F.cross_entropy(logits, targets) if single else F.binary_cross_entropy_with_logits(logits, targets)
        # As scikit-learn has it: C times the sum over samples, plus half the squared norm.
        value = value + weight.square().sum() / (2 * REGULARIZATIONS[0] * len(targets))
        value.backward()
        return value

    optimizer.step(loss)
    return learned.detach()


def attentive_probe(tokens: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    """[`linear_probe`] on what learned queries attend to among the patches, which each fold learns first.

    A mean says little of what is in a few patches alone. Each query pools its part of a patch's numbers, by a softmax
    of its products with the patches.

    Args:
        tokens: (samples, patches, dim); NaN where a patch is padding.
    """
    _, count, dim = tokens.shape

    def scores(train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray) -> np.ndarray:
        train, test = (torch.from_numpy(part.reshape(len(part), count, dim)) for part in (train, test))
        queries = _learned_beside_classifier(
            torch.zeros(min(QUERIES, dim), dim), _attention(train), train_labels, dim, ATTENTION_ITERATIONS
        )
        attended = [_attention(part)(queries).numpy() for part in (train, test)]
        scaler = StandardScaler().fit(attended[0])
        return _linear_scores(scaler.transform(attended[0]), train_labels, train_folds, scaler.transform(attended[1]))

    return _cross_validate(scores, tokens.reshape(len(tokens), -1), labels, folds, width=dim)


def _attention(tokens: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Queries (queries, dim) to (samples, dim), what they find in (samples, patches, dim), of which NaN is padding."""
    padding = tokens[..., 0].isnan()
    values = tokens.masked_fill(padding[..., None], 0.0)
    dim = values.shape[2]

    def attended(queries: torch.Tensor) -> torch.Tensor:
        found = (values @ queries.T / dim**0.5).masked_fill(padding[..., None], -torch.inf)
        parts = torch.tensor_split(values, len(queries), dim=2)
        weights = found.softmax(dim=1).unbind(dim=2)
        return torch.cat([torch.einsum("np,npd->nd", *pair) for pair in zip(weights, parts)], dim=1)

    return attended


def _fit_and_score(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, strength: float, iterations: int
) -> np.ndarray:
    """(test samples, classes) scores of a logistic regression with regularization C = `strength`."""
    model = LogisticRegression(C=strength, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # MAX_ITERATIONS was chosen short of it
        if train_labels.ndim == 1:
            present = np.unique(train_labels)
            found = np.full((len(test), present.max() + 1), -1.0)  # a class that is absent is never chosen
            found[:, present] = model.fit(train, train_labels).predict_proba(test) if len(present) > 1 else 1.0
            return found
        found = np.zeros((len(test), train_labels.shape[1]))
        for number, target in enumerate(train_labels.T):
            if target.min() != target.max():  # else there is nothing to learn from
                found[:, number] = model.fit(train, target).decision_function(test)
        return found


def knn_probe(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, num_neighbors: int = NUM_NEIGHBORS
) -> ProbeResult:
    """Vote of the nearest training samples by cosine of standardised features, each vote weighted by its
    similarity."""

    def scores(train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray) -> np.ndarray:
        neighbors = NearestNeighbors(n_neighbors=min(num_neighbors, len(train)), metric="cosine").fit(train)
        distances, indices = neighbors.kneighbors(test)
        similarities = 1.0 - distances / 2.0  # from 0, opposite, to 1
        return np.einsum("nk,nkc->nc", similarities, _one_hot(train_labels)[indices])

    return _cross_validate(scores, features, labels, folds)


def majority(labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    """What the frequencies of the classes in the training folds alone achieve."""

    def scores(train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray) -> np.ndarray:
        frequencies = _one_hot(train_labels).mean(axis=0)
        return np.broadcast_to(frequencies, (len(test), len(frequencies)))

    return _cross_validate(scores, np.zeros((len(labels), 1)), labels, folds)


def _one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(labels.max() + 1, dtype=np.float32)[labels] if labels.ndim == 1 else labels


def _cross_validate(
    scores: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    width: int | None = None,
) -> ProbeResult:
    """`scores(training features, their labels, their folds, test features)` gives (test samples, classes).

    Args:
        width: how many numbers are standardised, each over all that stand so many apart; all of them if not given.
    """
    features, labels, folds = np.asarray(features, dtype=np.float32), np.asarray(labels), np.asarray(folds)
    if not len(features) == len(labels) == len(folds):
        raise ValueError(
            f"{len(features)} features, {len(labels)} labels and {len(folds)} folds: one of each per sample"
        )
    tested = [fold for fold in np.unique(folds) if fold >= 0]
    if len(tested) < 2:
        raise ValueError("all samples are in one fold: a probe needs at least 2")
    results, correct = [], np.zeros(len(labels), dtype=bool)
    for fold in tested:
        test = folds == fold
        train_features, test_features = features[~test], features[test]
        scaler = StandardScaler().fit(train_features.reshape(-1, width or features.shape[1]))
        train_features, test_features = (
            scaler.transform(part.reshape(-1, scaler.n_features_in_)).reshape(part.shape)
            for part in (train_features, test_features)
        )
        found = scores(train_features, labels[~test], folds[~test], test_features)
        results.append(score(labels[test], found))
        if labels.ndim == 1:
            correct[test] = found.argmax(axis=1) == labels[test]
    metric = METRIC_NAMES["single_label" if labels.ndim == 1 else "multi_label"]
    return ProbeResult(metric, float(np.mean(results)), tuple(results), correct if labels.ndim == 1 else None)


def run_probes(
    encoder: Any,
    samples: Sequence[Sample],
    load: Callable,
    labels: Labels,
    folds: np.ndarray,
    ledger: SkippedFiles,
    controls: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    device: Any = "cpu",
    seed: int = 0,
    name: str = "encoder",
) -> list[dict[str, Any]]:
    """Linear and nearest-neighbour probes of a frozen encoder under every pooling, with the controls beside them.

    Args:
        encoder: a `BridleModel`.
        samples: what to probe on; each labelled.
        load: the modality's loader, called without a random generator.
        labels: the classes of `samples`.
        folds: fold number of each sample, as from `assign_folds`.
        ledger: where files go that cannot be read; the probe is over the others.
        controls: also probe an untrained encoder (of `seed`) and the input itself, and the majority class.
        name: what the rows call the encoder.

    Returns:
        One row per features and pooling: {"features": `name` | "untrained encoder" | "log-mel regression" |
        "majority", "pooling": name or "", "metric": "accuracy" or "mAP", "linear": score,
        "linear_deviation": ..., "linear_folds": [...], "knn": score, "knn_deviation": ..., "knn_folds": [...]}; the
        scores are means over folds, with the sample standard deviation.

    Raises:
        NonFiniteError: features are not: names the files.
    """
    targets = labels.encode(samples).numpy()
    encoders = {name: encoder}
    if controls:
        encoders["untrained encoder"] = untrained_encoder(encoder, seed)
    kept: list[int] = []

    def batches() -> Iterable[dict[str, torch.Tensor]]:
        for indices, batch in iterate_eval(samples, load, batch_size, ledger, num_workers):
            kept.extend(indices)
            yield batch

    collected = collect_features(encoders, batches(), device, with_input=controls)
    files = [samples[index].path for index in kept]
    for source, poolings in collected.items():
        for features in poolings.values():
            check_finite(features, files, f"the features of {source}")
    targets, folds = targets[kept], np.asarray(folds)[kept]
    rows = [
        _row(source, pooling, linear_probe(features, targets, folds), knn_probe(features, targets, folds))
        for source, poolings in collected.items()
        for pooling, features in poolings.items()
    ]
    if controls:
        most_frequent = majority(targets, folds)
        rows.append(_row("majority", "", most_frequent, most_frequent))
    return rows


def _row(name: str, pooling: str, linear: ProbeResult, knn: ProbeResult) -> dict[str, Any]:
    return linear_row(name, pooling, linear) | {
        "knn": knn.score,
        "knn_deviation": knn.deviation,
        "knn_folds": list(knn.per_fold),
    }


def linear_row(name: str, pooling: str, linear: ProbeResult) -> dict[str, Any]:
    """A row of `run_probes` without nearest neighbours."""
    return {
        "features": name,
        "pooling": pooling,
        "metric": linear.metric,
        "linear": linear.score,
        "linear_deviation": linear.deviation,
        "linear_folds": list(linear.per_fold),
    }


def format_probes(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `run_probes` and `run_readouts` as a table to print, scores and their deviation over folds in
    percent."""
    title = f"linear {rows[0]['metric']}"
    width = max(10, *(len(row["pooling"]) for row in rows))
    lines = [f"{'features':<20} {'pooling':<{width}} {title:>16} {'+-':>5} {'kNN':>6}   linear, fold by fold"]
    for row in rows:
        per_fold = " ".join(f"{100 * value:5.1f}" for value in row["linear_folds"])
        knn = f"{100 * row['knn']:6.1f}" if "knn" in row else f"{'':6}"
        values = f"{100 * row['linear']:16.1f} {100 * row['linear_deviation']:5.1f} {knn}"
        lines.append(f"{row['features']:<20} {row['pooling']:<{width}} {values}   {per_fold}")
    return "\n".join(lines)
