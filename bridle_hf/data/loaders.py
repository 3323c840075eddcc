"""Loaders of samples into model input, one a modality: decode, crop or choose frames, augment, normalise.

    read_audio ─► AudioLoader ─► input_values (frames, mel bins), attention_mask (frames,)
    read_image ─► ImageLoader ─► pixel_values (channels, height, width)
    open_video ─► VideoLoader ─► pixel_values_videos (frames, channels, height, width)

Nothing else knows a modality: `make_sample_loader` of modalities.py chooses by its table.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from bridle_hf.audio_windows_bridle import crop_bounds, fit_features, whole_or_crop
from bridle_hf.common.errors import MediaError
from bridle_hf.data.decoding import open_video, read_audio, read_image, resample
from bridle_hf.data.sample import Sample
from bridle_hf.feature_extraction_bridle import num_samples
from bridle_hf.image_processing_bridle import fit_channels
from bridle_hf.pixel_decoding_bridle import segment_indices, stride_indices


# Aspect ratios of random crops, those of He et al. and of everyone since.
CROP_RATIOS = (3 / 4, 4 / 3)
# How much louder or softer than the sample a recording is at most that is laid over it.
MIXTURE_DB = 6.0

# What a loader is: without a random generator it reads for evaluation.
Load = Callable[[Sample, np.random.Generator | None], dict[str, torch.Tensor]]


@contextmanager
def torch_seeded(rng: np.random.Generator) -> Iterator[None]:
    """Lend torch's global generator, seeded from `rng`, to kornia, which draws from no other; then restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        yield


# --- Audio ---


def roll_and_gain(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift (channels, samples) circularly by a uniform offset, multiply by Beta(10, 10) + 0.5."""
    offset = rng.integers(waveform.shape[-1])
    gain = np.float32(rng.beta(10, 10) + 0.5)
    return np.roll(waveform, offset, axis=-1) * gain


def mix_waveforms(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """`weight` parts of `first` and the rest of `second` (samples,), each without its mean; as long as `first`."""
    fitted = np.zeros_like(first)
    fitted[: len(second)] = second[: len(first)] - second.mean()
    return np.float32(weight) * (first - first.mean()) + np.float32(1 - weight) * fitted


class AudioLoader:
    """Read an audio sample into model input: decode, crop, augment, log-mel, pad.

    Called as `loader(sample, rng)` for training: a longer recording is cropped at random and, with `augment`, rolled
    and scaled. Called as `loader(sample)` for evaluation: the crop is the middle one and nothing is augmented. Returns
    `input_values` (max_frames, num_mel_bins) float32 and `attention_mask` (max_frames,) in frames.

    Args:
        feature_extractor: a `BridleFeatureExtractor`; it averages channels, and says to which rate they are resampled.
        max_frames: length that every sample is padded or cropped to, in frames of 10 ms.
        augment: roll and gain in training.
        cache_bytes: memory, per process that loads, for recordings of up to twice `max_frames`: decoded waveforms
            where they will be augmented, else finished features. What doesn't fit is read anew each time. 0: no cache.

    Raises:
        MediaError: by a call: see `read_audio`.
        ValueError: by a call: what the feature extractor refuses, such as a clip under one frame.
    """

    def __init__(self, feature_extractor: Any, max_frames: int, augment: bool = False, cache_bytes: int = 0):
        self.feature_extractor = feature_extractor
        self.max_frames = max_frames
        self.augment = augment
        self._free_bytes = cache_bytes
        self._cache: dict[tuple[str, str], Any] = {}

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        if self.augment and rng is not None:
            waveform, rate = self.read(sample, rng)
            return self.fit(self.features(roll_and_gain(waveform, rng), rate))
        key = ("features", sample.path)
        if key in self._cache:
            return self.fit(self._cache[key], rng)
        waveform, rate, _, is_whole = self._decode(sample, rng)
        features = self.features(waveform, rate)
        if is_whole:
            self._keep(key, features, features.nbytes)
        return self.fit(features, rng)

    def read(self, sample: Sample, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
        """Waveform (channels, samples) of at most `max_frames` frames, and its rate."""
        return self.read_at(sample, rng)[:2]

    def read_at(self, sample: Sample, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int, float]:
        """[`read`], and at which second of the recording the waveform begins."""
        key, first = ("waveform", sample.path), 0
        if key not in self._cache:
            waveform, rate, first, is_whole = self._decode(sample, rng)
            if is_whole:
                self._keep(key, (waveform, rate), waveform.nbytes)
        else:
            waveform, rate = self._cache[key]
        start, count = crop_bounds(waveform.shape[-1], num_samples(self.max_frames, rate), rng)
        return waveform[:, start : start + count], rate, (first + start) / rate

    def mixed(
        self,
        sample: Sample,
        other: Sample,
        mix: Callable[[np.ndarray, np.ndarray], np.ndarray],
        rng: np.random.Generator,
    ) -> dict[str, torch.Tensor]:
        """Model input of what `mix` makes of two waveforms (samples,) of one rate, for training."""
        (first, rate), (second, second_rate) = self.read(sample, rng), self.read(other, rng)
        first, second = first.mean(axis=0), second.mean(axis=0)
        if second_rate != rate:
            second = resample(second, second_rate, rate)
        mixed = mix(first, second)[None]
        return self.fit(self.features(roll_and_gain(mixed, rng) if self.augment else mixed, rate))

    def features(self, waveform: np.ndarray, sampling_rate: int) -> torch.Tensor:
        """Normalised log-mel (frames, num_mel_bins) of one waveform (channels, samples), as many frames as it has."""
        rate = self.feature_extractor.sampling_rate
        if sampling_rate != rate:
            if self.feature_extractor.downmix:
                waveform = waveform.mean(axis=0, keepdims=True)  # first, as the extractor does
            waveform, sampling_rate = resample(waveform, sampling_rate, rate), rate
        batch = self.feature_extractor(
            [waveform if len(waveform) > 1 else waveform[0]],
            sampling_rate=sampling_rate,
            padding=False,
            truncation=False,
            return_tensors="pt",
        )
        return batch["input_values"][0]

    def _decode(self, sample: Sample, rng: np.random.Generator | None) -> tuple[np.ndarray, int, int, bool]:
        """(waveform, rate, first sample, whole): all of a recording that the cache would take, a crop of a longer
        one."""
        first, is_whole = 0, True

        def crop(samples: int, rate: int) -> tuple[int, int]:
            nonlocal first, is_whole
            first, count = whole_or_crop(samples, num_samples(self.max_frames, rate), rng)
            is_whole = count == samples
            return first, count

        waveform, rate = read_audio(sample.media(), sample.path, crop)
        return waveform, rate, first, is_whole

    def fit(self, features: torch.Tensor, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """Model input of (frames, num_mel_bins): cropped, see `read`, or padded to `max_frames`."""
        return fit_features(features, self.max_frames, rng)

    def _keep(self, key: tuple[str, str], value: Any, size: int) -> None:
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._cache[key] = value


class MixtureLoader:
    """An `AudioLoader` that lays another recording over a share of the samples, for training (SSLAM).

    Whether, which one, and how loud follow from the generator of the sample: from seed and position in the run. The
    sum is as long as the sample.

    Args:
        samples: what is laid over.
        share: of the samples that are mixtures.
    """

    def __init__(self, load: AudioLoader, samples: Sequence[Sample], share: float):
        self.load, self.samples, self.share = load, samples, share

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if rng.random() >= self.share:
            return self.load(sample, rng)
        other = self.samples[rng.integers(len(self.samples))]
        gain = 10 ** (rng.uniform(-MIXTURE_DB, MIXTURE_DB) / 20)
        weight = 1 / (1 + gain)
        try:
            return self.load.mixed(sample, other, lambda *pair: mix_waveforms(*pair, weight) / np.float32(weight), rng)
        except MediaError as error:
            if error.path != other.path:
                raise
            # The sample stays as it is; the other one is reported when its own turn comes.
            return self.load(sample, rng)


# --- Images and video ---


class _PixelLoader:
    """What the loaders of images and of video share: the random crop, normalisation and the cache.

    `distort`, if set, changes what was cropped for training: (frames, channels, height, width) uint8 and a random
    generator to the same.
    """

    def __init__(self, image_processor: Any, augment: bool, cache_bytes: int, min_crop: float, flip: bool):
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop is {min_crop}: expected a part of the area, over 0 and at most 1")
        self.image_processor = image_processor
        self.augment = augment
        self.distort: Callable[[torch.Tensor, np.random.Generator], torch.Tensor] | None = None
        self.flip = flip
        size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
        self.size = (size["height"], size["width"])
        self.num_channels = len(image_processor.image_mean)
        self._free_bytes = cache_bytes
        self._cache: dict[str, np.ndarray] = {}
        self._random_crop = None
        if augment:
            try:
                from kornia.augmentation import RandomResizedCrop
            except ImportError as error:
                raise ValueError("augmenting images and video needs kornia: pip install kornia") from error
            self._random_crop = RandomResizedCrop(self.size, scale=(min_crop, 1.0), ratio=CROP_RATIOS)

    def _viewer(self, rng: np.random.Generator | None) -> Callable[[np.ndarray], np.ndarray]:
        """What makes of each frame (height, width, channels) uint8 its view (channels, *size), of all frames alike."""
        return partial(self._crop_and_flip, rng, {}) if self._is_random(rng) else self._middle

    def _finish(self, views: torch.Tensor, rng: np.random.Generator | None) -> torch.Tensor:
        """Views (frames, channels, *size) to model input, float32."""
        if not self._is_random(rng):
            return views
        return self._normalize(views if self.distort is None else self.distort(views, rng))

    def _is_random(self, rng: np.random.Generator | None) -> bool:
        return self.augment and rng is not None

    def _middle(self, frame: np.ndarray) -> np.ndarray:
        """The middle crop, float32."""
        if frame.shape[:2] == self.size:  # nothing to resize or crop: twenty times as fast, and the same
            return self._normalize(torch.from_numpy(frame).permute(2, 0, 1)).numpy()
        return self._process(frame)

    def _crop_and_flip(self, rng: np.random.Generator, chosen: dict[str, Any], frame: np.ndarray) -> np.ndarray:
        """A random crop, perhaps mirrored, uint8; the first frame's is `chosen` for those that follow."""
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
        if not chosen:
            with torch_seeded(rng):
                corners = self._random_crop.forward_parameters(pixels.shape)["src"][0]
            (left, top), (right, bottom) = corners[0].int().tolist(), corners[2].int().tolist()
            chosen["crop"] = (..., slice(top, bottom + 1), slice(left, right + 1))
            chosen["flip"] = self.flip and rng.random() < 0.5
        # Cut here: kornia would resize without antialiasing, in float32, at ten times the cost.
        view = torch.nn.functional.interpolate(pixels[chosen["crop"]], self.size, mode="bilinear", antialias=True)[0]
        return (view.flip(-1) if chosen["flip"] else view).numpy()

    def _process(self, frame: np.ndarray, **options: Any) -> np.ndarray:
        """What the processor makes of a frame."""
        batch = self.image_processor([frame], return_tensors="np", input_data_format="channels_last", **options)
        return batch["pixel_values"].reshape(self.num_channels, *batch["pixel_values"].shape[-2:])

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.image_processor
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        if processor.do_rescale:
            pixels = pixels * processor.rescale_factor
        if processor.do_normalize:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))
            pixels = (pixels - mean) / std
        return pixels

    def _keep(self, key: str, pixels: np.ndarray) -> None:
        if pixels.nbytes <= self._free_bytes:
            self._free_bytes -= pixels.nbytes
            self._cache[key] = pixels


class ImageLoader(_PixelLoader):
    """Read an image sample into model input: decode, crop, flip, resize, normalise.

    Called as `loader(sample, rng)` for training: with `augment`, a random crop is resized to the model's size and half
    of the time flipped. Called as `loader(sample)` for evaluation, or without `augment`: what the processor does, the
    middle crop. Returns `pixel_values` (channels, height, width) float32.

    Args:
        image_processor: of the model, see `make_image_processor`: gives size, channels and normalisation.
        augment: random crop and flip in training (needs kornia).
        cache_bytes: memory, per process that loads, for decoded images; what doesn't fit is read anew each time.
        min_crop: smallest part of the area that a random crop keeps.
        flip: mirror half of the samples in training; leave it off where left and right differ, as for digits.

    Raises:
        MediaError: by a call: see `read_image`.
    """

    def __init__(
        self,
        image_processor: Any,
        augment: bool = False,
        cache_bytes: int = 0,
        min_crop: float = 0.2,
        flip: bool = True,
    ):
        super().__init__(image_processor, augment, cache_bytes, min_crop, flip)

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        view = torch.from_numpy(self._viewer(rng)(self.read(sample)))
        return {"pixel_values": self._finish(view[None], rng)[0]}

    def read(self, sample: Sample) -> np.ndarray:
        """(height, width, channels) uint8."""
        pixels = self._cache.get(sample.path)
        if pixels is None:
            pixels = read_image(sample.media(), sample.path, self.num_channels)
            self._keep(sample.path, pixels)
        return pixels


class VideoLoader(_PixelLoader):
    """Read a video sample into model input: choose a clip, decode its frames, crop, flip, resize, normalise.

    Called as `loader(sample, rng)` for training: the clip lies at random in the video and, with `augment`, one random
    crop and flip is taken of all its frames. Called as `loader(sample)` for evaluation: the middle clip, the middle
    crop. Returns `pixel_values_videos` (num_frames, channels, height, width) float32.

    Args:
        image_processor: of the model, see `make_image_processor`: gives size, channels and normalisation.
        num_frames: frames of a clip.
        stride: frames of the video from one frame of the clip to the next.
        sampling: "stride", or "segments": one frame of each of `num_frames` equal parts of the whole video, `stride`
            being ignored. [`make_sample_loader`] takes both from the model's config.
        short: what to do with a video that has fewer frames than a clip needs: "repeat" its last, or "skip" it as a
            bad file.
        augment: random crop and flip in training (needs kornia).
        cache_bytes: memory, per process that loads, for decoded videos of up to twice a clip's length; what doesn't
            fit
            is read anew each time.
        min_crop: smallest part of the area that a random crop keeps.
        flip: mirror half of the samples in training; leave it off where left and right differ.

    Raises:
        ValueError: `num_frames` or `stride` below 1, an unknown `sampling` or `short`.

    Raises:
        MediaError: by a call: see `read_video`; or a video too short, with `short="skip"`.
    """

    def __init__(
        self,
        image_processor: Any,
        num_frames: int = 16,
        stride: int = 4,
        sampling: Literal["stride", "segments"] = "stride",
        short: Literal["repeat", "skip"] = "repeat",
        augment: bool = False,
        cache_bytes: int = 0,
        min_crop: float = 0.5,
        flip: bool = True,
    ):
        if num_frames < 1 or stride < 1:
            raise ValueError(f"num_frames {num_frames} and stride {stride} must be positive")
        if sampling not in ("stride", "segments") or short not in ("repeat", "skip"):
            raise ValueError(f"sampling {sampling!r}: stride or segments; short {short!r}: repeat or skip")
        super().__init__(image_processor, augment, cache_bytes, min_crop, flip)
        self.num_frames, self.stride, self.sampling, self.short = num_frames, stride, sampling, short

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        views = self._read(sample, self._viewer(rng), lambda total: self._choose(total, sample, rng))
        return {"pixel_values_videos": self._finish(torch.from_numpy(views), rng)}

    def views(self, sample: Sample, num_clips: int = 5, num_crops: int = 3) -> torch.Tensor:
        """Views for multi-view evaluation: average the model's answers over them.

        Clips spread evenly over the video, crops over the longer side of the picture.

        Returns:
            (num_clips * num_crops, num_frames, channels, height, width) float32, the crops of a clip in a row.
        """
        height, width = self.size

        def crops(frame: np.ndarray) -> np.ndarray:
            pixels = self._process(frame, do_center_crop=False)
            corners = (
                [round((size - wanted) * offset) for size, wanted in zip(pixels.shape[-2:], self.size)]
                for offset in _spread(num_crops)
            )
            return np.stack([pixels[:, top : top + height, left : left + width] for top, left in corners])

        def clips(total: int) -> np.ndarray:
            # In one go: of a video with few key frames, each clip is a long way from the one before it.
            return np.stack([self._choose(total, sample, position=position) for position in _spread(num_clips)])

        return torch.from_numpy(self._read(sample, crops, clips)).transpose(1, 2).flatten(0, 1)

    def _read(
        self, sample: Sample, view: Callable[[np.ndarray], np.ndarray], choose: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        """Views of the frames that `choose` makes of their number, (*shape of the choice, ...)."""
        frames = self._cache.get(sample.path)
        if frames is None:
            with open_video(sample.media(), sample.path) as video:
                if not self._fits(video):
                    chosen = choose(video.total)
                    return video.read(chosen, lambda frame: view(fit_channels(frame, self.num_channels)))
                frames = fit_channels(video.read(np.arange(video.total)), self.num_channels)
            self._keep(sample.path, frames)
        chosen = choose(len(frames))
        views = np.stack([view(frames[index]) for index in chosen.flat])
        return views.reshape(*chosen.shape, *views.shape[1:])

    def _fits(self, video: Any) -> bool:
        """Whether all frames of a video may be held: it is short, and the cache has room for it."""
        size = video.total * video.height * video.width * 3
        return video.total <= 2 * ((self.num_frames - 1) * self.stride + 1) and size <= self._free_bytes

    def _choose(
        self, total: int, sample: Sample, rng: np.random.Generator | None = None, position: float = 0.5
    ) -> np.ndarray:
        """Indices of a clip's frames: at random, or at `position` in [0, 1] without `rng`."""
        if self.sampling == "stride":
            position = position if rng is None else rng.random()
            indices = stride_indices(total, self.num_frames, self.stride, position)
        else:
            indices = segment_indices(total, self.num_frames, position if rng is None else rng.random(self.num_frames))
        needed = indices[-1] + 1 if self.sampling == "stride" else self.num_frames
        if needed > total and self.short == "skip":
            raise MediaError(sample.path, f"has {total} frames where a clip needs {needed}")
        return np.minimum(indices, total - 1)


def _spread(count: int) -> Sequence[float]:
    """`count` positions from 0 to 1; a single one in the middle."""
    return [0.5] if count == 1 else np.linspace(0, 1, count)


# --- The table, and what makes loaders and processors by it ---
