"""What a released encoder is measured by: tasks on sets that it was not trained on, beside its controls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModel

from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.finding import find_samples
from bridle_hf.data.modalities import load_config, load_processor, load_weights, make_sample_loader
from bridle_hf.data.sample import Sample, spread
from bridle_hf.demos.data import make_digits, make_moving_digits, render_notes
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.probing.features import INPUT_CONTROLS, collect_features, untrained_encoder
from bridle_hf.probing.probes import linear_probe
from bridle_hf.probing.readouts import PCA_SAMPLES, PRIMARY, collect_layers, encoder_tokens, patch_tokens
from bridle_hf.sets.creatures import make_creatures
from bridle_hf.sets.pictures import make_emoji, make_fashion
from bridle_hf.sets.speech import make_keywords, make_spoken
from bridle_hf.study.run import answers
from bridle_hf.study.sets import Task


BATCH_SIZE = 128


@dataclass(frozen=True)
class Measured:
    """A task that frozen features are asked.

    Args:
        make: its data's folder, made once, below a folder for caches.
        loader: options of the modality's loader.
        most: samples, spread evenly over all, where there are more.
    """

    make: Callable[[str | None], str]
    task: Task
    loader: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None


# Of each modality the first is the headline: its data needs nothing fetched but what the demos need.
MEASURED: dict[str, dict[str, Measured]] = {
    "audio": {
        "notes: instrument (112), octaves held out": Measured(render_notes, Task(folds=4)),
        "notes: pitch class (12), instruments held out": Measured(
            render_notes, Task("pitch_class", "program", folds=4)
        ),
        "keywords: word (35), voices held out": Measured(make_keywords, Task(folds=4)),
        "spoken: language (9), what is said held out": Measured(make_spoken, Task(folds=4)),
    },
    "image": {
        "digits: digit (10)": Measured(make_digits, Task()),
        "emoji: category (9)": Measured(make_emoji, Task(folds=5)),
        "fashion: kind (10)": Measured(make_fashion, Task(folds=5), most=5000),
    },
    "video": {
        "moving digits: direction (8), digit images held out": Measured(
            make_moving_digits, Task(folds=5), {"stride": 1}
        ),
        "creatures: action (6), creatures held out": Measured(make_creatures, Task(folds=5), {"stride": 1}),
        "creatures: direction (8), creatures held out": Measured(
            make_creatures, Task("direction", folds=5), {"stride": 1}
        ),
    },
}


def measure(
    folder: Path, measured: Measured, cache_dir: str | None, skipped: Path, controls: bool = True
) -> dict[str, float]:
    """Accuracy of a frozen encoder under the primary read-out, as `encoder`, and of its controls by their names.

    Args:
        folder: of the encoder and its processor.
        skipped: file for the names of samples that cannot be read.
        controls: an untrained encoder and the principal components of the patches under the same read-out, and a
            regression on the input itself.

    Raises:
        ValueError: no encoder is there. RuntimeError: the data cannot be fetched.
    """
    config = load_config(str(folder))
    encoder = load_weights(AutoModel, str(folder))
    load = make_sample_loader(config, load_processor(folder, config), measured.loader)
    data = measured.make(cache_dir)
    samples = find_samples(data, config.modality)
    samples = spread(samples, measured.most or len(samples))
    ledger, kept = SkippedFiles(skipped, len(samples)), []

    def batches(samples: Sequence[Sample]) -> Iterable[dict[str, Any]]:
        for indices, batch in iterate_eval(samples, load, BATCH_SIZE, ledger):
            kept.extend(samples[index].path for index in indices)
            yield batch

    sources = {"encoder": encoder_tokens(encoder)}
    if controls:
        sources["untrained"] = encoder_tokens(untrained_encoder(encoder))
        sources["patches"] = patch_tokens(config, batches(spread(samples, PCA_SAMPLES)))
        kept.clear()
    collected = collect_layers(sources, config, batches(samples))
    labels, folds, _ = answers(data, config.modality, measured.task, kept)
    found = {name: PRIMARY(layers[PRIMARY.pooling], labels, folds) for name, layers in collected.items()}
    if controls:
        regression, _ = INPUT_CONTROLS[INPUT_NAMES[config.modality]]
        inputs = collect_features({"encoder": encoder}, batches(samples))[regression]
        found[regression] = linear_probe(inputs["mean_std" if "mean_std" in inputs else ""], labels, folds)
    return {name: round(result.score, 4) for name, result in found.items()}
