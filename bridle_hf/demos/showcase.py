"""Showcase: the models of a folder, and what they tell of one recording, image or video.

`Showcase(folder).look(file)` gives classes, pictures and neighbours; `bridle_hf/demos/page.py` puts them on a page.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForPreTraining, pipeline

from bridle_hf.cards.card import kind_of
from bridle_hf.common.errors import one_line
from bridle_hf.data.modalities import frames_seen, load_processor, load_weights, make_sample_loader, read_config
from bridle_hf.data.sample import Sample
from bridle_hf.embedding.search import Neighbours
from bridle_hf.masking_bridle import make_mask
from bridle_hf.patching_bridle import INPUT_NAMES, patch_grid_of
from bridle_hf.visualization_bridle import (
    plot_codes,
    plot_inputs,
    plot_masked_input,
    plot_predictions,
    plot_timeline,
)


# Where models lie in the output folders of pretraining, of fine-tuning, and of the demo.
PLACES = ("", "encoder", "tokenizer", "classifier", "pretraining/encoder", "pretraining/tokenizer")
NEIGHBOURS = 5


@dataclass
class Findings:
    """What the models tell of a file.

    Args:
        classes: scores by label, the highest first; none without a classifier.
        pictures: matplotlib figures, by what they show: those of `Showcase.pictures` that could be drawn.
        neighbours: rows of the table, the nearest first; none without a table.
        notes: what must be known beside it, in sentences.
    """

    classes: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_models(folder: Path) -> dict[str, Path]:
    """The folders of the models, by kind: "classifier", "encoder", "tokenizer"; of a run's encoder also the tokenizer
    beside it, and the other way round.

    Raises:
        ValueError: there are none, or one that cannot be read or is of another library.
    """
    places = [folder / place for place in PLACES]
    if folder.name in ("encoder", "tokenizer"):
        places += [folder.parent / "encoder", folder.parent / "tokenizer"]
    found: dict[str, Path] = {}
    for place in places:
        if (place / "config.json").is_file():
            config = read_config(place)
            if config.model_type not in ("bridle", "bridle_tokenizer"):
                raise ValueError(f"{place} holds a {config.model_type!r}: give a folder of BRIDLE's models")
            found.setdefault(kind_of(config), place)
    if not found:
        folds = ": give one of its fold_*" if any(folder.glob("fold_*/config.json")) else ""
        raise ValueError(f"{folder} holds no model, and no output folder of a finished run{folds}")
    return found


class Showcase:
    """The models of a folder.

    Args:
        folder: of a saved classifier, encoder or tokenizer, or the output folder of a run.
        embeddings: a table of `bridle embed` to find neighbours in, of level clip.

    Attributes:
        config: of the first model found; its `modality` is that of all.
        paths: the models' folders by kind.
        pictures: what is drawn of a file, in order: "input", "timeline", "mask", "codes", "predictions", "neighbours".
        missing: what is not shown, and why, in sentences.

    Raises:
        ValueError: no model is there, one that cannot be loaded, or a table that cannot be used.
        OSError: the table cannot be read.
    """

    def __init__(self, folder: str, embeddings: str | None = None):
        self.paths = find_models(Path(folder))
        first = next(iter(self.paths.values()))
        self.config = read_config(first)
        self.classify, self.encoder, self.tokenizer, self.neighbours = None, None, None, None
        if path := self.paths.get("classifier"):
            self.classify = _make_pipeline(path, read_config(path).modality)
        if (path := self.paths.get("encoder")) and read_config(path).architectures == ["BridleForPreTraining"]:
            self.encoder = load_weights(AutoModelForPreTraining, str(path), (), dtype=torch.float32).eval()
        if path := self.paths.get("tokenizer"):
            self.tokenizer = load_weights(AutoModel, str(path), (), dtype=torch.float32).eval()
        if embeddings:
            self.neighbours = Neighbours(embeddings)
            modality = self.neighbours.embedder.config.modality
            if modality != self.config.modality:
                raise ValueError(f"{embeddings} is of {modality}, but the models are of {self.config.modality}")
        processor = load_processor(first, self.config)
        self._load = make_sample_loader(self.config, processor)  # of what is long, the middle, as of the pipeline
        self._rate = {"sampling_rate": processor.sampling_rate} if self.config.modality == "audio" else {}
        predicts = self.encoder is not None and self.encoder.config.target == "codes"
        self._predicts = predicts and self.tokenizer is not None
        shown = {
            "input": self.encoder is None,  # else beside its mask
            "timeline": self.classify is not None and self.config.modality == "audio",
            "mask": self.encoder is not None,
            "codes": self.tokenizer is not None,
            "predictions": self._predicts,
            "neighbours": self.neighbours is not None,
        }
        self.pictures = [name for name, is_shown in shown.items() if is_shown]
        self.missing = self._missing()

    def _missing(self) -> list[str]:
        lines = {
            "No classes: no classifier is here.": self.classify is None,
            "No mask: no pretraining model is here, whose encoder saw masked inputs.": self.encoder is None,
            "No codes: no tokenizer is here.": self.tokenizer is None,
            "No neighbours: --embeddings names no table of `bridle embed`.": self.neighbours is None,
        }
        return [line for line, is_missing in lines.items() if is_missing]

    def look(self, file: str | os.PathLike) -> Findings:
        """What the models tell of a file.

        Raises:
            ValueError: the file cannot be read: names it and says why.
        """
        found, file = Findings(), os.fspath(file)
        name = os.path.basename(file)
        try:
            values = self._read(found, file)
            if self.classify is not None:
                self._add_classes(found, file)
            if self.neighbours is not None:
                self._add_neighbours(found, file)
        except ValueError as error:
            reason = str(error).replace(f"{file}: ", "").replace(file, name)
            raise ValueError(f"{name}: {reason}") from error
        self._add_pictures(found, values, name)
        found.pictures = {kind: found.pictures[kind] for kind in self.pictures if kind in found.pictures}
        return found

    def _read(self, found: Findings, file: str) -> torch.Tensor:
        """Model input without its batch dimension; it is noted what part of the file is in it."""
        if self.config.modality == "audio":
            waveform, rate, start = self._load.read_at(Sample(file))
            if start:
                classes = "" if self.classify is None else "; classes are those of all of it"
                end = start + waveform.shape[-1] / rate
                found.notes.append(f"Pictures of the recording show its seconds {start:.2f} to {end:.2f}{classes}.")
            return self._load.features(waveform, rate)[: self.config.max_length]
        if self.config.modality == "video":
            what = "Pictures" if self.classify is None else "Classes and pictures"
            found.notes.append(f"{what} are of {frames_seen(self.config)}.")
        return self._load(Sample(file))[INPUT_NAMES[self.config.modality]]

    def _add_classes(self, found: Findings, file: str) -> None:
        if self.config.modality == "audio":
            heard = self.classify(file, return_timeline=True, top_k=self.classify.model.config.num_labels)
            found.pictures["timeline"] = plot_timeline(heard)
            labels = heard["labels"]
        else:
            labels = self.classify(file)
        found.classes = {entry["label"]: entry["score"] for entry in labels}

    def _add_neighbours(self, found: Findings, file: str) -> None:
        found.neighbours = self.neighbours.find(file, NEIGHBOURS)
        try:
            found.pictures["neighbours"] = self.neighbours.draw(file, found.neighbours)
        except (ValueError, OSError) as error:
            found.notes.append(f"No picture of the neighbours: {error}")

    @torch.no_grad()
    def _add_pictures(self, found: Findings, values: torch.Tensor, name: str) -> None:
        """Of model input without its batch dimension."""
        grid = patch_grid_of(values[None], self.config)
        if self.encoder is None:
            found.pictures["input"] = plot_inputs([values], [name], self.config, "What the model sees", **self._rate)
        else:
            config = self.encoder.config
            hidden = make_mask(config.mask_type, grid, config.mask_ratio, torch.Generator().manual_seed(0))
            found.pictures["mask"] = plot_masked_input(values, hidden, config, **self._rate)
        if self.tokenizer is not None:
            codes = self.tokenizer.encode(values[None])[0]
            found.pictures["codes"] = plot_codes(codes, self.tokenizer.config, grid, **self._rate)
        if self._predicts:
            predicted = self.encoder(values[None], bool_masked_pos=hidden[None]).logits.argmax(dim=-1)[0]
            found.pictures["predictions"] = plot_predictions(codes, predicted, hidden, config, grid, **self._rate)


def _make_pipeline(path: Path, modality: str) -> Any:
    try:
        return pipeline(f"{modality}-classification", model=str(path))
    except Exception as error:  # of whatever library reads its files
        raise ValueError(f"{path}: cannot be loaded: {one_line(error)}") from error
