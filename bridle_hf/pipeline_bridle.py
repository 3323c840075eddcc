"""Pipeline of audio classification: a sound file of any format, rate, channels and length in, labels and scores out.

transformers' own wants an ffmpeg binary for a path, torchaudio for another rate, and mono; and it hears the first
seconds alone. This one reads with libsndfile or PyAV, resamples with soxr, and can go through a long recording window
by window. It is what `pipeline("audio-classification")` gives for our models, by remote code too (`custom_pipelines`);
of a model that classifies every time step, it tells the events.
"""

import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AudioClassificationPipeline
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .audio_windows_bridle import (
    array_blocks,
    cut_windows,
    find_events,
    frame_shift,
    media_of_mapping,
    mono_blocks,
    read_blocks,
    stitch_steps,
)
from .feature_extraction_bridle import num_frames


logger = logging.get_logger(__name__)

URL_TIMEOUT = 60  # seconds

_FUNCTIONS = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda logits: logits}


class BridleAudioClassificationPipeline(ChunkPipeline, AudioClassificationPipeline):
    """
    Audio classification with `BridleForAudioClassification`, or `BridleForAudioFrameClassification`.

    Of a recording longer than the model's input, the beginning is classified, as in transformers, with a warning; or,
    with `return_timeline`, all of it, in windows that overlap: its scores are their mean, each window counting for the
    time that is nearest to its middle. Of a model that classifies every time step, the score of a recording is the
    highest of its steps, and the timeline tells the steps. For a model of another kind, this makes transformers' own
    pipeline.
    """

    def __new__(cls, *args, **kwargs):
        model = kwargs["model"] if "model" in kwargs else args[0]
        if model.config.model_type != "bridle":
            return AudioClassificationPipeline(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, model, *args, **kwargs):
        # transformers opens a folder of either kind by AutoModelForAudioClassification.
        saved_of_steps = "BridleForAudioFrameClassification" in (model.config.architectures or ())
        if saved_of_steps and hasattr(model, "of_steps"):
            model = model.of_steps()
        self.of_steps = not hasattr(model, "of_steps")
        super().__init__(model, *args, **kwargs)

    def check_model_type(self, supported_models) -> None:
        """Ours do not stand in transformers' lists of names, and are no others than `__new__` lets pass."""

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Classify one recording or several.

        Args:
            inputs: path, URL or bytes of a sound file; an array or tensor (samples,) or (channels, samples) at the
                feature extractor's rate; a mapping with `raw` or `array` and `sampling_rate`, or with `bytes` or
                `path` (a cell of `datasets` with `decode=False`), also under the key `audio`; or a list, generator or
                data set of these.
            top_k (`int`, *optional*, defaults to 5): How many labels; `None`: all.
            function_to_apply (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"none"`; what fits the model's
                `problem_type` if not given.
            return_timeline (`bool`, *optional*, defaults to `False`): Classify all of a long recording, and tell the
                labels of each window, too.
            threshold (`float`, *optional*, defaults to 0.5): Of a model of time steps: the score from which on a label
                is an event.
            overlap (`float`, *optional*, defaults to 0.25): Fraction of a window that the next one shares.
            batch_size (`int`, *optional*): Windows that are run together.

        Returns:
            A list of {"score", "label"}, the highest first; with `return_timeline` {"labels": that list, "timeline":
            [{"start", "end", "labels"}, ...]} with the seconds of each window. Of a model of time steps, with those of
            each step, and "events": [{"start", "end", "label", "score"}, ...], where a label stays over the threshold.

        Raises:
            ValueError: a recording that cannot be read: names it and says why.
        """
        # Of iterators, transformers takes generators alone for several inputs.
        return super().__call__((entry for entry in inputs) if isinstance(inputs, Iterator) else inputs, **kwargs)

    def _sanitize_parameters(
        self, return_timeline=None, overlap=None, function_to_apply=None, threshold=None, **kwargs
    ):
        _, _, postprocess = super()._sanitize_parameters(function_to_apply=function_to_apply, **kwargs)
        if function_to_apply is None:
            # Older releases of transformers put a softmax here, whatever the model's problem is.
            postprocess.pop("function_to_apply", None)
        preprocess = {}
        if return_timeline is not None:
            postprocess["return_timeline"] = preprocess["whole"] = return_timeline
        if overlap is not None:
            if not 0 <= overlap < 1:
                raise ValueError(f"`overlap` is {overlap}: from 0 to under 1")
            preprocess["overlap"] = overlap
        if threshold is not None:
            if not self.of_steps or not return_timeline:
                raise ValueError("`threshold` is of the events of `return_timeline`, with a model of time steps")
            postprocess["threshold"] = threshold
        return preprocess, {}, postprocess

    def preprocess(self, inputs: Any, overlap: float = 0.25, whole: bool = False) -> Iterator[dict[str, Any]]:
        """The windows of a recording as model input, each with its first and last second; the first alone unless
        `whole`."""
        extractor = self.feature_extractor
        rate = extractor.sampling_rate
        name, media = _named(inputs)
        try:
            source_rate, blocks = _open(media, rate)
            windows = cut_windows(
                mono_blocks(blocks, source_rate, rate, extractor.downmix), self.model.config, rate, overlap
            )
            before = None
            for start, waveform in windows:
                if before is not None and not whole:
                    logger.warning_once(
                        f"Of recordings longer than {before['span'][1]:.2f} s, the beginning is classified; "
                        "`return_timeline=True` goes through all of them."
                    )
                    break
                if before is not None:
                    yield {**before, "is_last": False}
                inputs = extractor([waveform], sampling_rate=rate, return_tensors="pt")
                if self.dtype is not None:
                    inputs = inputs.to(dtype=self.dtype)
                start = start * frame_shift(rate) / rate
                before = {**inputs, "span": (start, start + len(waveform) / rate)}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        yield {**before, "is_last": True}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("is_last", "span")}
        return {"logits": self.model(**model_inputs).logits, **kept}

    def postprocess(self, model_outputs, top_k=5, function_to_apply=None, return_timeline=False, threshold=0.5) -> Any:
        if function_to_apply is None:
            by_problem = {"regression": "none", "multi_label_classification": "sigmoid"}
            function_to_apply = by_problem.get(self.model.config.problem_type, "softmax")
        logits = torch.cat([output["logits"] for output in model_outputs]).float()
        scores = _FUNCTIONS[function_to_apply](logits)
        spans = np.array([_span(output["span"]) for output in model_outputs])
        if self.of_steps:
            return self._of_steps(scores, spans, top_k, return_timeline, threshold)
        bounds = [spans[0, 0], *((spans[:-1, 1] + spans[1:, 0]) / 2), spans[-1, 1]]
        weights = torch.tensor(np.diff(bounds), dtype=scores.dtype)
        labels = self._labels((scores * weights[:, None]).sum(dim=0) / weights.sum(), top_k)
        if not return_timeline:
            return labels
        timeline = [
            {"start": start, "end": end, "labels": self._labels(row, top_k)}
            for (start, end), row in zip(spans.tolist(), scores)
        ]
        return {"labels": labels, "timeline": timeline}

    def _of_steps(
        self, scores: torch.Tensor, spans: np.ndarray, top_k: int, return_timeline: bool, threshold: float
    ) -> Any:
        """Of scores (windows, steps, classes)."""
        config, rate = self.model.config, self.feature_extractor.sampling_rate
        patch, seconds = config.patch_shape[1], config.seconds_per_frame
        frames = [num_frames(round(float(end - start) * rate), rate) for start, end in spans]
        windows = [window[: -(-count // patch)] for window, count in zip(scores.numpy(), frames)]
        steps = stitch_steps([round(float(start) * rate / frame_shift(rate)) for start, _ in spans], windows, config)
        labels = self._labels(torch.from_numpy(steps).amax(dim=0), top_k)
        if not return_timeline:
            return labels
        timeline = [
            {"start": number * seconds, "end": (number + 1) * seconds, "labels": self._labels(row, top_k)}
            for number, row in enumerate(torch.from_numpy(steps))
        ]
        events = [
            {"start": onset, "end": offset, "label": config.id2label[number], "score": score}
            for onset, offset, number, score in find_events(steps, seconds, threshold)
        ]
        return {"labels": labels, "timeline": timeline, "events": events}

    def _labels(self, scores: torch.Tensor, top_k: int) -> list[dict[str, Any]]:
        found = scores.topk(top_k)
        names = self.model.config.id2label
        return [{"score": score, "label": names[place]} for score, place in zip(*(part.tolist() for part in found))]


def _span(span: Any) -> tuple[float, float]:
    """Batches make of a pair whatever they make of a sequence."""
    return tuple(float(part) for part in (span[0] if len(span) == 1 else span))


def _named(inputs: Any) -> tuple[str, Any]:
    """How errors call an input, and the input without its wrappings."""
    if isinstance(inputs, Mapping) and isinstance(inputs.get("audio"), Mapping):
        inputs = inputs["audio"]
    if isinstance(inputs, Mapping):
        return inputs.get("path") or "the recording", media_of_mapping(inputs)
    if hasattr(inputs, "get_all_samples"):  # torchcodec's decoder
        samples = inputs.get_all_samples()
        return "the recording", (samples.data, samples.sample_rate)
    if isinstance(inputs, os.PathLike):
        inputs = os.fspath(inputs)
    return inputs if isinstance(inputs, str) else "the recording", inputs


def _open(media: Any, rate: int) -> tuple[float, Iterator[np.ndarray]]:
    """The rate of a recording, and its blocks (samples, channels)."""
    if isinstance(media, str) and media.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(media, timeout=URL_TIMEOUT) as response:
                media = response.read()
        except OSError as error:
            raise ValueError(f"cannot be fetched: {error}") from error
    if isinstance(media, str | bytes):
        return read_blocks(media)
    if isinstance(media, tuple):
        return media[1], array_blocks(media[0])
    if isinstance(media, np.ndarray | torch.Tensor):
        return rate, array_blocks(media)
    raise ValueError(f"is a {type(media).__name__}: give a path, URL, bytes, array or mapping")


__all__ = ["BridleAudioClassificationPipeline"]
