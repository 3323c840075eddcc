"""What frozen features know: pooled features, linear and nearest-neighbour probes, and controls to set beside them.

    Item -> loader -> batch --encoder--> patches' features --POOLINGS--> (items, dim) -- folds --> ProbeResult
                            \\--as it is--> frames of log-mel --POOLINGS--> the control (pixels: not pooled)

A probe says little alone: `run_probes` sets an untrained encoder, a regression on the input itself and the majority
class beside it, under several poolings.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import linalg, sparse
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from bridle_hf.data.batches import SkippedFiles, iterate_eval
from bridle_hf.data.decoding import Item
from bridle_hf.data.labels import Labels
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask
from bridle_hf.probing.metrics import METRIC_NAMES, score


# Features differ in how much regularization suits them (on the notes: log-mel 0.03, encoders 0.3), and one value for
# all would favour some: each fold takes the best of these on a fold that it trains on.
REGULARIZATIONS = (0.03, 0.3)
# The trials need only tell which is better; the last fit stops short of converging, at a second per fold.
TRIAL_ITERATIONS, MAX_ITERATIONS = 25, 100
NUM_NEIGHBORS = 20
RIDGE = 1.0  # for codes: as if each code had been seen once more, with the mean feature


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def _mean(tokens: torch.Tensor, real: torch.Tensor, bands: int) -> torch.Tensor:
    weights = real[:, :, None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)


def _mean_std(tokens: torch.Tensor, real: torch.Tensor, bands: int) -> torch.Tensor:
    mean = _mean(tokens, real, bands)
    variance = _mean((tokens - mean[:, None]).square(), real, bands)
    return torch.cat([mean, variance.sqrt()], dim=1)


def _band_mean(tokens: torch.Tensor, real: torch.Tensor, bands: int) -> torch.Tensor:
    """The mean over time, kept per mel band."""
    tokens, weights = tokens.unflatten(1, (-1, bands)), real.unflatten(1, (-1, bands))[..., None]
    return ((tokens * weights).sum(dim=1) / weights.sum(dim=1)).flatten(1)


# tokens (batch, tokens, dim), real (batch, tokens) of 0 and 1, tokens per time step -> (batch, features)
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "mean": _mean,
    "mean_std": _mean_std,
    "band_mean": _band_mean,
}
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
# components are kept: a regression on hundreds of thousands of numbers would take hours and do no better. Of few items
# fewer components: the last ones are noise, which standardisation makes as loud as the first.
MOST_PIXELS_A_SIDE, MOST_PIXELS, PIXEL_COMPONENTS, ITEMS_PER_COMPONENT = 32, 1024, 256, 10

Features = dict[str, np.ndarray]


def extract_features(encoder: Any, batches: Iterable[dict[str, torch.Tensor]], device: Any) -> Features:
    """Frozen features of a `BridleModel`: its last hidden states, pooled over real patches (not the class token).

    Args:
        encoder: the model; moved to `device`, run in evaluation mode and left in the mode it was in.
        batches: model inputs, with `attention_mask` where there is padding.

    Returns:
        For each pooling that fits the modality: (items, dim) float32.
    """
    return _collect(batches, {"encoder": _encoder_features(encoder, device)})["encoder"]


def input_features(batches: Iterable[dict[str, torch.Tensor]]) -> Features:
    """The control: the input itself, pooled over real frames. For each pooling: (items, dim) float32; pixels: ""."""
    return _collect(batches, {"input": _pool_input})["input"]


def collect_features(
    encoders: dict[str, Any], batches: Iterable[dict[str, torch.Tensor]], device: Any = "cpu", with_input: bool = True
) -> dict[str, Features]:
    """Features of several encoders, by name, in one pass; with those of the input itself (see `INPUT_CONTROLS`)."""
    extractors = {name: _encoder_features(encoder, device) for name, encoder in encoders.items()}
    if with_input:
        modality = next(iter(encoders.values())).config.modality
        control, _ = INPUT_CONTROLS[INPUT_NAMES[modality]]
        extractors[control] = _pool_input
    return _collect(batches, extractors)


def untrained_encoder(encoder: Any, seed: int = 0) -> Any:
    """A `BridleModel` of the same configuration with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(encoder)(encoder.config)


def _collect(
    batches: Iterable[dict[str, torch.Tensor]], extractors: dict[str, Callable[[dict], dict[str, torch.Tensor]]]
) -> dict[str, Features]:
    """One pass over the batches for all extractors: reading is what takes the time."""
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


def _principal_components(features: np.ndarray) -> np.ndarray:
    """(items, dim) as it is, or of many dimensions the principal components.

    They are fitted on all items, without their labels: if that helps anybody, then the control.
    """
    if features.shape[1] <= MOST_PIXELS:
        return features
    count = max(min(PIXEL_COMPONENTS, len(features) // ITEMS_PER_COMPONENT), 1)
    return PCA(count, svd_solver="randomized", iterated_power=2, random_state=0).fit_transform(features)


def _encoder_features(encoder: Any, device: Any) -> Callable[[dict], dict[str, torch.Tensor]]:
    config = encoder.config
    encoder = encoder.to(device)

    @torch.no_grad()
    def extract(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {INPUT_NAMES[config.modality], "attention_mask"} & batch.keys()
        inputs = {name: batch[name].to(device) for name in names}
        was_training = encoder.training
        encoder.eval()
        try:
            tokens = encoder(**inputs).last_hidden_state[:, int(config.use_class_token) :].float()
        finally:
            encoder.train(was_training)
        mask = inputs.get("attention_mask")
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else patch_attention_mask(mask, config).float()
        bands = config.patch_grid[-1]
        return {name: POOLINGS[name](tokens, real, bands) for name in ENCODER_POOLINGS[config.modality]}

    return extract


def _pool_input(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in INPUT_CONTROLS if name in batch)
    if name != "input_values":
        pixels, (height, width) = batch[name].float().flatten(1, -3), batch[name].shape[-2:]
        size = (min(height, MOST_PIXELS_A_SIDE), min(width, MOST_PIXELS_A_SIDE))
        return {"": torch.nn.functional.adaptive_avg_pool2d(pixels, size).flatten(1)}
    frames = batch[name].float()
    mask = batch.get("attention_mask")
    real = frames.new_ones(frames.shape[:2]) if mask is None else mask.float()
    return {pooling: POOLINGS[pooling](frames, real, 1) for pooling in INPUT_CONTROLS[name][1]}


# ---------------------------------------------------------------------------------------------------------------------
# Probes: `labels` are class numbers (items,), or 0/1 rows (items, classes) for several labels per item; `folds` is the
# fold number of each item. Each fold is tested by a probe fitted on all others.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """`score` is the mean over `per_fold`; `metric` says of what: "accuracy" or "mAP"."""

    metric: str
    score: float
    per_fold: tuple[float, ...]


def linear_probe(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    """Logistic regression on standardised features; one classifier per class where items carry several labels.

    The regularization is chosen for each fold, on one of the folds that it trains on.
    """

    def scores(train: np.ndarray, train_labels: np.ndarray, train_folds: np.ndarray, test: np.ndarray) -> np.ndarray:
        # Of a single training fold, every fourth item.
        several = train_folds.min() != train_folds.max()
        inner = train_folds == train_folds[0] if several else np.arange(len(train)) % 4 == 0
        found = {}
        for strength in REGULARIZATIONS:
            fitted = _fit_and_score(train[~inner], train_labels[~inner], train[inner], strength, TRIAL_ITERATIONS)
            found[strength] = score(train_labels[inner], fitted)
        return _fit_and_score(train, train_labels, test, max(found, key=found.get), MAX_ITERATIONS)

    return _cross_validate(scores, features, labels, folds)


def _fit_and_score(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, strength: float, iterations: int
) -> np.ndarray:
    """(test items, classes) scores of a logistic regression with regularization C = `strength`."""
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
    """Vote of the nearest training items by cosine of standardised features, each vote weighted by its similarity."""

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
) -> ProbeResult:
    """`scores(training features, their labels, their folds, test features)` gives (test items, classes)."""
    features, labels, folds = np.asarray(features, dtype=np.float32), np.asarray(labels), np.asarray(folds)
    if not len(features) == len(labels) == len(folds):
        raise ValueError(
            f"{len(features)} features, {len(labels)} labels and {len(folds)} folds: one of each per item"
        )
    if len(np.unique(folds)) < 2:
        raise ValueError("all items are in one fold: a probe needs at least 2")
    results = []
    for fold in np.unique(folds):
        test = folds == fold
        scaler = StandardScaler().fit(features[~test])
        train_features, test_features = scaler.transform(features[~test]), scaler.transform(features[test])
        found = scores(train_features, labels[~test], folds[~test], test_features)
        results.append(score(labels[test], found))
    metric = METRIC_NAMES["single_label" if labels.ndim == 1 else "multi_label"]
    return ProbeResult(metric, float(np.mean(results)), tuple(results))


def run_probes(
    encoder: Any,
    items: Sequence[Item],
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
        items: what to probe on; each labelled.
        load: the modality's loader, called without a random generator.
        labels: the classes of `items`.
        folds: fold number of each item, as from `assign_folds`.
        ledger: where files go that cannot be read; the probe is over the others.
        controls: also probe an untrained encoder (of `seed`) and the input itself, and the majority class.
        name: what the rows call the encoder.

    Returns:
        One row per features and pooling: {"features": `name` | "untrained encoder" | "log-mel regression" |
        "majority", "pooling": name or "", "metric": "accuracy" or "mAP", "linear": score, "linear_folds": [...],
        "knn": score, "knn_folds": [...]}; the scores are means over folds.
    """
    targets = labels.encode(items).numpy()
    encoders = {name: encoder}
    if controls:
        encoders["untrained encoder"] = untrained_encoder(encoder, seed)
    kept: list[int] = []

    def batches() -> Iterable[dict[str, torch.Tensor]]:
        for indices, batch in iterate_eval(items, load, batch_size, ledger, num_workers):
            kept.extend(indices)
            yield batch

    collected = collect_features(encoders, batches(), device, with_input=controls)
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
    return {
        "features": name,
        "pooling": pooling,
        "metric": linear.metric,
        "linear": linear.score,
        "linear_folds": list(linear.per_fold),
        "knn": knn.score,
        "knn_folds": list(knn.per_fold),
    }


def format_probes(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `run_probes` as a table to print, scores in percent."""
    lines = [f"{'features':<20} {'pooling':<10} {'linear ' + rows[0]['metric']:>16} {'kNN':>6}   linear, fold by fold"]
    for row in rows:
        per_fold = " ".join(f"{100 * value:5.1f}" for value in row["linear_folds"])
        values = f"{100 * row['linear']:16.1f} {100 * row['knn']:6.1f}"
        lines.append(f"{row['features']:<20} {row['pooling']:<10} {values}   {per_fold}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What the codes keep of the teacher
# ---------------------------------------------------------------------------------------------------------------------


def codes_explained_variance(
    codes: np.ndarray, teacher: np.ndarray, real: np.ndarray | None = None, ridge: float = RIDGE
) -> list[float]:
    """Share of the teacher's variance that a linear map of the one-hot codes explains (R^2).

    Fitted on the clips of even number, measured on the others. 1 - the squared error over the squared distance from
    the mean, both summed over all dimensions; below 0 where the codes mislead.

    Args:
        codes: (clips, patches, codebooks), integers from 0.
        teacher: (clips, patches, dim), the teacher's features.
        real: (clips, patches), which patches are not padding; all if absent.
        ridge: penalty, in patches.

    Returns:
        The share for the codes of level 1, of levels 1 and 2, and so on; the last is that of all levels.

    Raises:
        ValueError: shapes that do not fit, or fewer than 2 clips.
    """
    codes, teacher = np.asarray(codes), np.asarray(teacher, dtype=np.float64)
    real = np.ones(codes.shape[:2], dtype=bool) if real is None else np.asarray(real, dtype=bool)
    if len(codes) < 2 or not codes.shape[:2] == teacher.shape[:2] == real.shape:
        raise ValueError(
            f"codes {codes.shape}, teacher {teacher.shape} and real {real.shape} must share (clips, patches), with at "
            "least 2 clips"
        )
    codebook_size = int(codes.max()) + 1
    (fit_codes, fit_teacher), (test_codes, test_teacher) = [
        (_one_hot_codes(codes[half][real[half]], codebook_size), teacher[half][real[half]])
        for half in (slice(0, None, 2), slice(1, None, 2))
    ]
    mean = fit_teacher.mean(axis=0)
    # The penalty draws the weights to 0, and so a code never seen to the mean: no intercept is needed beside it.
    gram = (fit_codes.T @ fit_codes).toarray() + ridge * np.eye(fit_codes.shape[1])
    moment = fit_codes.T @ (fit_teacher - mean)
    total = np.square(test_teacher - test_teacher.mean(axis=0)).sum()
    shares = []
    for size in range(codebook_size, gram.shape[0] + 1, codebook_size):
        weights = linalg.solve(gram[:size, :size], moment[:size], assume_a="pos")
        error = np.square(test_teacher - mean - test_codes[:, :size] @ weights).sum()
        shares.append(float(1.0 - error / total))
    return shares


def _one_hot_codes(codes: np.ndarray, codebook_size: int) -> sparse.csr_matrix:
    """(patches, codebooks) -> (patches, codebooks * codebook_size) of 0 and 1."""
    patches, levels = codes.shape
    columns = codes + codebook_size * np.arange(levels)
    starts = np.arange(patches + 1) * levels
    return sparse.csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(patches, levels * codebook_size))
