"""Pipelines of classification: a sound file, picture or video of any kind in, labels and scores out.

They are what `pipeline("audio-classification")`, image and video give for our models, by remote code too
(`custom_pipelines`), and read as loaders do, in bounded memory. transformers' own for audio wants an ffmpeg binary for
a path, torchaudio for another rate, and mono, and hears the first seconds alone; ours reads with libsndfile or PyAV,
resamples with soxr, and can go through a long recording window by window. Those for pictures and videos decode
whatever they are given, be it gigabytes, and leave videos as they were filmed, not upright. Of a model that classifies
every time step, the one for audio tells the events.

Of what is longer than the model's input, transformers' take the beginning; ours take the middle, as loaders do when a
model is evaluated: so a card's figure is that of the pipeline.
"""

import base64
import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import (
    AudioClassificationPipeline,
    BatchFeature,
    ImageClassificationPipeline,
    VideoClassificationPipeline,
)
from transformers.image_utils import is_pil_image
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .audio_decoding_bridle import read_blocks
from .audio_windows_bridle import (
    array_blocks,
    check_length,
    cut_windows,
    find_events,
    fit_features,
    frame_shift,
    media_of_mapping,
    mono_blocks,
    seconds_per_step,
    stitch_steps,
    whole_or_crop,
)
from .feature_extraction_bridle import num_frames, num_samples
from .pixel_decoding_bridle import open_video, read_image, segment_indices, stride_indices


logger = logging.get_logger(__name__)

URL_TIMEOUT = 60  # seconds
MAX_NAME = 200  # characters of an input that an error tells: it may be a picture in base64

_FUNCTIONS = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda logits: logits}


class _BridlePipeline:
    """What our pipelines share. For a model of another kind, they make `stock`, transformers' own."""

    stock: type

    def __new__(cls, *args, **kwargs):
        model = kwargs["model"] if "model" in kwargs else args[0]
        if model.config.model_type != "bridle":
            return cls.stock(*args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models) -> None:
        """Ours do not stand in transformers' lists of names, and are no others than `__new__` lets pass."""

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        # Of iterators, transformers takes generators alone for several inputs.
        return super().__call__((entry for entry in inputs) if isinstance(inputs, Iterator) else inputs, **kwargs)

    def _sanitize_parameters(self, function_to_apply=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(function_to_apply=function_to_apply, **kwargs)
        if function_to_apply is None:
            # Older releases of transformers put a softmax here, whatever the model's problem is.
            postprocess.pop("function_to_apply", None)
        return preprocess, forward, postprocess

    def _fitting_function(self) -> str:
        """What makes scores of the logits of the model's problem."""
        by_problem = {"regression": "none", "multi_label_classification": "sigmoid"}
        return by_problem.get(self.model.config.problem_type, "softmax")


class BridleAudioClassificationPipeline(_BridlePipeline, ChunkPipeline, AudioClassificationPipeline):
    """
    Audio classification with `BridleForAudioClassification`, or `BridleForAudioFrameClassification`.

    Of a recording longer than the model's input, the middle is classified, as in evaluation, with a warning; or, with
    `return_timeline`, all of it, in windows that overlap: its scores are their mean, each window counting for the
    time that is nearest to its middle. Of a model that classifies every time step, the score of a recording is the
    highest of its steps, and the timeline tells the steps. For a model of another kind, this makes transformers' own
    pipeline.
    """

    stock = AudioClassificationPipeline

    def __init__(self, model, *args, **kwargs):
        # transformers opens a folder of either kind by AutoModelForAudioClassification.
        saved_of_steps = "BridleForAudioFrameClassification" in (model.config.architectures or ())
        if saved_of_steps and hasattr(model, "of_steps"):
            model = model.of_steps()
        self.of_steps = not hasattr(model, "of_steps")
        super().__init__(model, *args, **kwargs)

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
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, return_timeline=None, overlap=None, function_to_apply=None, threshold=None, **kwargs
    ):
        _, _, postprocess = super()._sanitize_parameters(function_to_apply=function_to_apply, **kwargs)
        if "top_k" not in kwargs:
            postprocess.pop("top_k", None)  # transformers' takes all labels here, whatever the pipeline was made with
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
        """The windows of a recording as model input, each with its first and last second; unless `whole`, its middle
        alone, with those from its own beginning."""
        name, media = _named(inputs, "audio")
        try:
            yield from self._windows(media, overlap) if whole else [self._middle(media)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _windows(self, media: Any, overlap: float) -> Iterator[dict[str, Any]]:
        extractor, config = self.feature_extractor, self.model.config
        rate, before = extractor.sampling_rate, None
        source_rate, blocks = _open(media, rate)
        windows = cut_windows(mono_blocks(blocks, source_rate, rate, extractor.downmix), config, rate, overlap)
        for start, waveform in windows:
            if before is not None:
                yield {**before, "is_last": False}
            # The extractor's own length may be another.
            inputs = extractor([waveform], sampling_rate=rate, max_length=config.max_length, return_tensors="pt")
            start = start * frame_shift(rate) / rate
            before = {**self._typed(inputs), "span": (start, start + len(waveform) / rate)}
        yield {**before, "is_last": True}

    def _middle(self, media: Any) -> dict[str, Any]:
        """As loaders read for evaluation."""
        extractor, length = self.feature_extractor, self.model.config.max_length
        rate = extractor.sampling_rate
        source_rate, blocks = _open(media, rate, length)
        waveform = np.concatenate(list(mono_blocks(blocks, source_rate, rate, extractor.downmix)))
        check_length(len(waveform), rate)
        batch = extractor([waveform], sampling_rate=rate, padding=False, truncation=False, return_tensors="pt")
        features = batch["input_values"][0]
        if len(features) > length:
            logger.warning_once(
                f"Of recordings longer than {num_samples(length, rate) / rate:.2f} s, the middle is classified; "
                "`return_timeline=True` goes through all of them."
            )
        inputs = BatchFeature({name: value[None] for name, value in fit_features(features, length).items()})
        seconds = num_samples(int(inputs["attention_mask"].sum()), rate) / rate
        return {**self._typed(inputs), "span": (0.0, seconds), "is_last": True}

    def _typed(self, inputs: BatchFeature) -> BatchFeature:
        return inputs if self.dtype is None else inputs.to(dtype=self.dtype)

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("is_last", "span")}
        return {"logits": self.model(**model_inputs).logits, **kept}

    def postprocess(self, model_outputs, top_k=5, function_to_apply=None, return_timeline=False, threshold=0.5) -> Any:
        logits = torch.cat([output["logits"] for output in model_outputs]).float()
        scores = _FUNCTIONS[function_to_apply or self._fitting_function()](logits)
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
        patch, seconds = config.patch_shape[1], seconds_per_step(config, rate)
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


class BridleImageClassificationPipeline(_BridlePipeline, ImageClassificationPipeline):
    """
    Image classification with `BridleForImageClassification`, with the arguments and answers of transformers' own.

    Pictures are read as loaders read them: see [`read_image`] for what is refused. For a model of another kind, this
    makes transformers' own pipeline.
    """

    stock = ImageClassificationPipeline

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Classify one picture or several.

        Args:
            inputs: path, URL or bytes of a picture, or the same in base64; a Pillow image; an array or tensor, as the
                image processor takes them; a mapping with `bytes` or `path` (a cell of `datasets` with
                `decode=False`), also under the key `image`; or a list, generator or data set of these.
            top_k (`int`, *optional*, defaults to 5): How many labels.
            function_to_apply (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"none"`; what fits the model's
                `problem_type` if not given.
            timeout (`float`, *optional*, defaults to 60): Seconds that a URL may keep silent.
            batch_size (`int`, *optional*): Pictures that are run together.

        Returns:
            A list of {"score", "label"}, the highest first; of several pictures, one list each.

        Raises:
            ValueError: a picture that cannot be read: names it and says why.
        """
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image: Any, timeout: float | None = None) -> BatchFeature:
        """A picture as model input."""
        if isinstance(image, np.ndarray | torch.Tensor):
            return super().preprocess(image)
        name, media = _named(image, "image")
        try:
            media = _fetched(media, timeout)
            if isinstance(media, str) and not os.path.isfile(media):
                media = _from_base64(media)
            elif not isinstance(media, str | bytes) and not is_pil_image(media):
                raise ValueError(f"is a {type(media).__name__}: give a path, URL, bytes, Pillow image or array")
            pixels = read_image(media, self.model.config.num_channels)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        inputs = self.image_processor([pixels], return_tensors="pt", input_data_format="channels_last")
        return inputs.to(self.dtype)


class BridleVideoClassificationPipeline(_BridlePipeline, VideoClassificationPipeline):
    """
    Video classification with `BridleForVideoClassification`, with the arguments and answers of transformers' own.

    Videos are read as loaders read them, upright and frame by frame: see [`open_video`] for what is refused; of one
    that is too short, the last frame is repeated. Which frames are taken, the model's config says (`frame_sampling`,
    `frame_stride`). For a model of another kind, this makes transformers' own pipeline.
    """

    stock = VideoClassificationPipeline

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Classify one video or several.

        Args:
            inputs: path, URL or bytes of a video; a mapping with `bytes` or `path` (a cell of `datasets` with
                `decode=False`), also under the key `video`; or a list, generator or data set of these.
            top_k (`int`, *optional*, defaults to 5): How many labels.
            function_to_apply (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"none"`; what fits the model's
                `problem_type` if not given.
            num_frames (`int`, *optional*): Frames that the model sees; the config's if not given.
            frame_sampling_rate (`int`, *optional*): Every how many frames around the middle of the video one is
                taken; what the config says if not given.
            batch_size (`int`, *optional*): Videos that are run together.

        Returns:
            A list of {"score", "label"}, the highest first; of several videos, one list each.

        Raises:
            ValueError: a video that cannot be read: names it and says why.
        """
        return super().__call__(inputs, **kwargs)

    def preprocess(
        self, video: Any, num_frames: int | None = None, frame_sampling_rate: int | None = None
    ) -> BatchFeature:
        """Frames of a video as model input."""
        if frame_sampling_rate is not None and frame_sampling_rate < 1:
            raise ValueError(f"`frame_sampling_rate` is {frame_sampling_rate}: at least 1")
        name, media = _named(video, "video")
        try:
            media = _fetched(media)
            if not isinstance(media, str | bytes):
                raise ValueError(f"is a {type(media).__name__}: give a path, URL or bytes")
            with open_video(media) as opened:
                chosen = self._choose(opened.total, num_frames or self.model.config.num_frames, frame_sampling_rate)
                views = opened.read(np.minimum(chosen, opened.total - 1), self._view)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return BatchFeature({"pixel_values": torch.from_numpy(views)[None]}).to(self.dtype)

    def postprocess(self, model_outputs: Any, top_k: int = 5, function_to_apply: str | None = None) -> Any:
        return super().postprocess(model_outputs, top_k, function_to_apply or self._fitting_function())

    def _choose(self, total: int, num_frames: int, stride: int | None) -> np.ndarray:
        config = self.model.config
        if stride is None and config.frame_sampling == "segments":
            return segment_indices(total, num_frames, 0.5)
        return stride_indices(total, num_frames, stride or config.frame_stride, 0.5)

    def _view(self, frame: np.ndarray) -> np.ndarray:
        """(height, width, 3) to (3, height, width) of the model's input."""
        # By remote code, transformers takes our processor for one of videos, else for one of images.
        process = self.image_processor if self.video_processor is None else self.video_processor
        inputs = process([frame], return_tensors="np", input_data_format="channels_last")
        return inputs["pixel_values"].reshape(inputs["pixel_values"].shape[-3:])


_NOUNS = {"audio": "the recording", "image": "the picture", "video": "the video"}


def _named(inputs: Any, modality: str) -> tuple[str, Any]:
    """How errors call an input, and the input without its wrappings."""
    noun = _NOUNS[modality]
    if isinstance(inputs, Mapping) and inputs.get(modality) is not None:
        inputs = inputs[modality]
    if isinstance(inputs, Mapping):
        return inputs.get("path") or noun, media_of_mapping(inputs)
    if hasattr(inputs, "get_all_samples"):  # torchcodec's decoder
        samples = inputs.get_all_samples()
        return noun, (samples.data, samples.sample_rate)
    if isinstance(inputs, os.PathLike):
        inputs = os.fspath(inputs)
    if not isinstance(inputs, str):
        return noun, inputs
    return inputs if len(inputs) <= MAX_NAME else f"{inputs[:MAX_NAME]}...", inputs


def _fetched(media: Any, timeout: float | None = None) -> Any:
    """The bytes behind a URL; anything else as it is."""
    if not isinstance(media, str) or not media.startswith(("http://", "https://")):
        return media
    try:
        with urllib.request.urlopen(media, timeout=timeout or URL_TIMEOUT) as response:
            return response.read()
    except OSError as error:
        raise ValueError(f"cannot be fetched: {error}") from error


def _from_base64(text: str) -> bytes:
    """The picture that a string holds, as transformers takes them, perhaps behind `data:image/png;base64,`."""
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise ValueError("no such file, nor a picture in base64") from error


def _open(media: Any, rate: int, length: int | None = None) -> tuple[float, Iterator[np.ndarray]]:
    """The rate of a recording, and its blocks (samples, channels): all of them, or no more than it takes to cut its
    middle `length` frames out."""

    def crop(samples: int, source_rate: float) -> tuple[int, int]:
        return whole_or_crop(samples, int(num_samples(length, source_rate)))

    media = _fetched(media)
    if isinstance(media, str | bytes):
        return read_blocks(media, None if length is None else crop)
    waveform, source_rate = media if isinstance(media, tuple) else (media, rate)
    if isinstance(media, tuple | np.ndarray | torch.Tensor):
        return source_rate, array_blocks(waveform, None if length is None else lambda count: crop(count, source_rate))
    raise ValueError(f"is a {type(media).__name__}: give a path, URL, bytes, array or mapping")


__all__ = [
    "BridleAudioClassificationPipeline",
    "BridleImageClassificationPipeline",
    "BridleVideoClassificationPipeline",
]
