"""Fine-tuning with few labels (1%, 10%, 100%): one recipe for a pretrained encoder and for one from scratch."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bridle_hf import (
    BridleForAudioClassification,
    BridleForImageClassification,
    BridleForVideoClassification,
)
from bridle_hf.common.arguments import check_ranges
from bridle_hf.common.errors import NonFiniteError
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.sample import Sample
from bridle_hf.interleaving.optimizers import adamw
from bridle_hf.patching_bridle import INPUT_NAMES


CLASSIFIERS = {
    "audio": BridleForAudioClassification,
    "image": BridleForImageClassification,
    "video": BridleForVideoClassification,
}


@dataclass(frozen=True)
class FewLabels:
    """How an encoder is fine-tuned: all of its weights, by AdamW, with a linear warm-up and a cosine.

    Args:
        shares: of the labels; a run for each.
        steps: of each run, however few the labels.
        batch_size: samples per step; all of them, where there are fewer.
        warmup: share of the steps.
    """

    shares: Sequence[float] = (0.01, 0.1, 1.0)
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1

    def __post_init__(self):
        check_ranges(self, {"steps": (1, 1e9), "batch_size": (1, 1e9), "learning_rate": (0, 1), "warmup": (0, 1)})
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are {list(self.shares)}: expected numbers over 0 and up to 1")


def draw_labelled(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which samples keep their label: indices of `share` of each class, at least one, in order.

    What a smaller share draws with the same seed, a larger one has, too.

    Args:
        labels: (samples,) class numbers.
    """
    rng, drawn = np.random.default_rng([seed, 1]), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        drawn.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(drawn))


def finetune_with(
    encoder: Any,
    samples: Sequence[Sample],
    labels: np.ndarray,
    labelled: np.ndarray,
    load: Callable,
    recipe: FewLabels,
    seed: int,
) -> nn.Module:
    """A classifier of all classes of `labels`, fine-tuned from an encoder, which stays as it is.

    Args:
        encoder: a `BridleModel`; one that is not trained makes it a run from scratch.
        labels: (samples,) class numbers.
        labelled: indices of the samples to train on.
        load: the modality's loader; called with a random generator.
        seed: of the head, the order and the views; the same for any encoder.

    Raises:
        NonFiniteError: the loss is not finite: names the step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(encoder.config)
        config.num_labels = int(labels.max()) + 1
        model = CLASSIFIERS[config.modality](config)
        model.bridle.load_state_dict(encoder.state_dict())
        model = model.to(encoder.device).train()
        optimizer = adamw(model, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        warmup = max(1, round(recipe.warmup * recipe.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / recipe.steps)),
        )
        for step, batch in zip(range(recipe.steps), _batches(labelled, recipe.batch_size, seed)):
            loaded = [load(samples[index], np.random.default_rng([seed, step, index])) for index in batch]
            inputs = {name: torch.stack([one[name] for one in loaded]).to(encoder.device) for name in loaded[0]}
            targets = torch.from_numpy(labels[batch]).to(encoder.device)
            loss = model(inputs[INPUT_NAMES[config.modality]], inputs.get("attention_mask"), targets).loss
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss of fine-tuning is not finite at step {step}; lower its learning rate")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def _batches(labelled: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless, epoch after epoch, each in an order of its own; a batch may span two."""
    rng, size = np.random.default_rng([seed, 2]), min(batch_size, len(labelled))
    stream = itertools.chain.from_iterable(rng.permutation(labelled) for _ in itertools.count())
    while True:
        yield np.array(list(itertools.islice(stream, size)))


@torch.no_grad()
def classify(model: nn.Module, samples: Sequence[Sample], load: Callable, ledger: SkippedFiles) -> np.ndarray:
    """(samples,) the class of each that a classifier finds; -1 of what cannot be read."""
    found = np.full(len(samples), -1)
    for indices, batch in iterate_eval(samples, load, 128, ledger):
        inputs = {name: values.to(model.device) for name, values in batch.items()}
        logits = model(inputs[INPUT_NAMES[model.config.modality]], inputs.get("attention_mask")).logits
        found[indices] = logits.argmax(dim=1).cpu().numpy()
    return found
