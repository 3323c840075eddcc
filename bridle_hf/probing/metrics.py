"""Metrics of classifiers: accuracy, top-5 accuracy, or mean average precision where samples carry several labels."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, top_k_accuracy_score


METRIC_NAMES = {"single_label": "accuracy", "multi_label": "mAP"}
TOP5 = "top5_accuracy"  # beside the accuracy where there are more than 5 classes


def mean_average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of each class, averaged over the classes that have a positive.

    Args:
        targets: (samples, classes), 0 or 1.
        scores: (samples, classes), higher = more likely.

    Raises:
        ValueError: no class has a positive.
    """
    present = targets.any(axis=0)
    if not present.any():
        raise ValueError(f"no positive among {len(targets)} samples of {targets.shape[1]} classes: mAP is not defined")
    return float(average_precision_score(targets[:, present], scores[:, present], average="macro"))


def score(targets: np.ndarray, scores: np.ndarray) -> float:
    """Accuracy where `targets` are class numbers (samples,), mAP where they are 0/1 rows (samples, classes)."""
    if targets.ndim == 1:
        return float(accuracy_score(targets, scores.argmax(axis=1)))
    return mean_average_precision(targets, scores)


class ClassificationMetric(evaluate.Metric):
    """`score` as a metric of the library `evaluate`, used directly: `evaluate.load` would fetch code from the Hub.

    `compute(predictions=scores or logits (samples, classes), references=targets)` returns {"accuracy": ...} for the
    configuration "single_label", with {"top5_accuracy": ...} where there are more than 5 classes, and {"mAP": ...} for
    "multi_label".
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRIC_NAMES:
            raise ValueError(f"config_name {self.config_name!r}: choose from {sorted(METRIC_NAMES)}")
        reference = datasets.Value("int64")
        references = reference if self.config_name == "single_label" else datasets.Sequence(reference)
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": references}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        targets, scores = np.asarray(references), np.asarray(predictions)
        found = {METRIC_NAMES[self.config_name]: score(targets, scores)}
        if targets.ndim == 1 and scores.shape[1] > 5:
            found[TOP5] = float(top_k_accuracy_score(targets, scores, k=5, labels=range(scores.shape[1])))
        return found
