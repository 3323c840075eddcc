"""Augmentation of samples in fine-tuning: views, mixtures, masks; and the target, mixed alike.

    image, video: loader (random crop, flip, rand_augment) ─► erase ─► mixup or cutmix with another sample
    audio:        waveform ─► mixup with another sample ─► roll, gain ─► log-mel ─► spec_augment

Partners are read anew and not taken from the batch: so a sample depends on its draw alone, whatever the number of
processes, and a resumed run sees what an unbroken one would have. A mixed sample costs two reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bridle_hf.common.errors import MediaError
from bridle_hf.data.loaders import AudioLoader, ImageLoader, VideoLoader, mix_waveforms, torch_seeded
from bridle_hf.data.sample import Sample


FULL_LENGTH_FRAMES = 1024  # the length that the widths of SpecAugment's time masks are given for
# RandAugment as timm's "rand-mM-mstd0.5-inc1", the ImageNet recipe of DeiT, MAE and the reference.
RAND_AUGMENT_LAYERS, RAND_AUGMENT_PROBABILITY, RAND_AUGMENT_STD, RAND_AUGMENT_MAX = 2, 0.5, 0.5, 10
# Parts of the picture that random erasing hides, and their aspect ratios (Zhong et al., as timm has them).
ERASED_AREAS, ERASED_RATIOS = (0.02, 1 / 3), (0.3, 3.3)


# --- Loaders ---


class TrainingLoader(ABC):
    """Read a sample for training, perhaps mixed with another one, with its target as `labels`.

    Args:
        load: loader of the modality, of `make_sample_loader`.
        samples: the training samples: what is mixed in.
        targets: target by sample path: class numbers, or rows of 0 and 1 for several labels per sample.
        num_classes: how many there are; with mixing, class numbers become rows of weights.
        args: the `FinetuneArguments`.
    """

    def __init__(
        self, load: Any, samples: Sequence[Sample], targets: dict[str, torch.Tensor], num_classes: int, args: Any
    ):
        self.load, self.samples, self.targets, self.num_classes, self.args = load, samples, targets, num_classes, args
        self.mixed_share = args.mixup_probability + args.cutmix_probability

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        target, loaded = self._target(sample), None
        chance = rng.random() if self.mixed_share else 1.0
        if chance < self.mixed_share:
            other = self.samples[rng.integers(len(self.samples))]
            try:
                loaded, weight = self._mixed(sample, other, chance >= self.args.mixup_probability, rng)
                target = weight * target + (1 - weight) * self._target(other)
            except MediaError as error:
                if error.path != other.path:
                    raise
                # The sample stays unmixed; the other one is reported when its own turn comes.
        loaded = self._single(sample, rng) if loaded is None else loaded
        return {**loaded, "labels": target}

    def _target(self, sample: Sample) -> torch.Tensor:
        target = self.targets[sample.path]
        if self.mixed_share and target.dim() == 0:
            return nn.functional.one_hot(target, self.num_classes).float()
        return target

    @abstractmethod
    def _single(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The sample, not mixed."""

    @abstractmethod
    def _mixed(
        self, sample: Sample, other: Sample, is_cutmix: bool, rng: np.random.Generator
    ) -> tuple[dict[str, torch.Tensor], float]:
        """The sample, and which part of it is `sample`."""


class AudioTrainingLoader(TrainingLoader):
    """Recordings: waveform mixup, log-mel, SpecAugment. Arguments as of `TrainingLoader`."""

    load: AudioLoader

    def _single(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return self._masked(self.load(sample, rng), rng)

    def _mixed(
        self, sample: Sample, other: Sample, is_cutmix: bool, rng: np.random.Generator
    ) -> tuple[dict[str, torch.Tensor], float]:
        weight = float(rng.beta(self.args.mixup_alpha, self.args.mixup_alpha))
        mixed = self.load.mixed(sample, other, partial(mix_waveforms, weight=weight), rng)
        return self._masked(mixed, rng), weight

    def _masked(self, loaded: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        mel_mask, time_mask = self.args.mel_mask, self.args.time_mask
        if mel_mask or time_mask:
            real = int(loaded["attention_mask"].sum())
            loaded["input_values"] = spec_augment(loaded["input_values"], real, mel_mask, time_mask, rng)
        return loaded


class PixelTrainingLoader(TrainingLoader):
    """Images and clips: RandAugment, random erasing, mixup and cutmix. Arguments as of `TrainingLoader`.

    All frames of a clip are changed alike.
    """

    load: ImageLoader | VideoLoader

    def __init__(self, load: ImageLoader | VideoLoader, *args: Any):
        super().__init__(load, *args)
        if self.args.rand_augment:
            mean = torch.tensor(load.image_processor.image_mean)
            load.distort = partial(rand_augment, magnitude=self.args.rand_augment, fill=mean)

    def _single(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        loaded = self.load(sample, rng)
        if self.args.random_erasing and rng.random() < self.args.random_erasing:
            ((name, values),) = loaded.items()
            loaded = {name: erase(values, rng)}
        return loaded

    def _mixed(
        self, sample: Sample, other: Sample, is_cutmix: bool, rng: np.random.Generator
    ) -> tuple[dict[str, torch.Tensor], float]:
        ((name, first),), ((_, second),) = self._single(sample, rng).items(), self._single(other, rng).items()
        if is_cutmix:
            mixed, weight = cutmix(first, second, rng.random(), rng)
        else:
            weight = float(rng.beta(self.args.mixup_alpha, self.args.mixup_alpha))
            mixed = weight * first + (1 - weight) * second
        return {name: mixed}, weight


TRAINING_LOADERS = {"audio": AudioTrainingLoader, "image": PixelTrainingLoader, "video": PixelTrainingLoader}


# --- Audio ---


def spec_augment(
    values: torch.Tensor, num_real: int, mel_mask: int, time_mask: int, rng: np.random.Generator
) -> torch.Tensor:
    """Set one stripe of mel bins and one of frames to 0, the mean of the data (SpecAugment); on a copy.

    Args:
        values: (frames, mel bins), normalised.
        num_real: frames that are not padding; the stripe of frames lies among them.
        mel_mask: the widest stripe of mel bins.
        time_mask: the widest stripe of frames for a clip of 1024 frames, in proportion for a shorter one.
    """
    values = values.clone()
    widest = round(time_mask * min(num_real, FULL_LENGTH_FRAMES) / FULL_LENGTH_FRAMES)
    for axis, size, most in ((0, num_real, widest), (1, values.shape[1], mel_mask)):
        width = int(rng.integers(most + 1))
        values.narrow(axis, int(rng.integers(size - width + 1)), width).zero_()
    return values


# --- Images and video: (..., channels, height, width) ---


def cutmix(
    first: torch.Tensor, second: torch.Tensor, weight: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """`first` with a box of `second` in it; and the share that is left of `first`: `weight`, or more at the border."""
    height, width = first.shape[-2:]
    spans = []
    for size in (height, width):
        half, centre = size * (1 - weight) ** 0.5 / 2, rng.random() * size
        spans.append((max(round(centre - half), 0), min(round(centre + half), size)))
    (top, bottom), (left, right) = spans
    mixed = first.clone()
    mixed[..., top:bottom, left:right] = second[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def erase(values: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random rectangle of (..., channels, height, width), the same for all frames, set to 0, the mean of the data.

    timm fills it with noise; kornia with one value.
    """
    from kornia.augmentation import RandomErasing

    with torch_seeded(rng):
        erased = RandomErasing(ERASED_AREAS, ERASED_RATIOS, same_on_batch=True, p=1.0)(values)
    return erased.reshape(values.shape)


def rand_augment(pixels: torch.Tensor, rng: np.random.Generator, magnitude: float, fill: torch.Tensor) -> torch.Tensor:
    """RandAugment with the operations and strengths of timm's "rand-mM-mstd0.5-inc1", computed by kornia.

    Two operations are drawn, with repetition; each is left out half of the time, or has a strength from a normal
    distribution around M. kornia's own `RandAugment` has no strength that varies, no sign for colour, contrast,
    brightness and sharpness, and weaker shifts. What is left of the difference to timm: interpolation is always
    bilinear, and geometry is computed in floating point.

    Args:
        pixels: (frames, channels, height, width) uint8; all frames are changed alike.
        rng: of the sample.
        magnitude: M, 0 to 10.
        fill: (channels,) in [0, 1], for what comes in from outside the picture.

    Returns:
        As `pixels`.
    """
    values = pixels.float() / 255
    for _ in range(RAND_AUGMENT_LAYERS):
        apply = OPERATIONS[rng.integers(len(OPERATIONS))]
        level = np.clip(rng.normal(magnitude, RAND_AUGMENT_STD), 0, RAND_AUGMENT_MAX) / RAND_AUGMENT_MAX
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < RAND_AUGMENT_PROBABILITY:
            values = apply(values, float(level), sign, fill.view(-1, 1, 1)).clamp(0, 1)
    return (values * 255).round().to(torch.uint8)


def _auto_contrast(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import normalize_min_max

    flat = values.amax(dim=(-2, -1), keepdim=True) == values.amin(dim=(-2, -1), keepdim=True)
    return torch.where(flat, values, normalize_min_max(values))


def _equalize(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import equalize

    return equalize(values)


def _invert(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    return 1 - values


def _posterize(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import posterize

    return posterize(values, 4 - int(4 * level))


def _solarize(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 1 - level, values, 1 - values)


def _solarize_add(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0.5, values + level * 110 / 255, values)


def _color(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    if values.shape[-3] != 3:
        return values  # grey has no colour to strengthen
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(values, 1 + sign * 0.9 * level)


def _contrast(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(values, 1 + sign * 0.9 * level)


def _brightness(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    return values * (1 + sign * 0.9 * level)


def _sharpness(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import sharpness

    return sharpness(values, 1 + sign * 0.9 * level)


def _rotate(values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.geometry.transform import rotate

    return rotate(values - fill, torch.tensor([30.0 * sign * level])) + fill


def _shear(axis: int, values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.geometry.transform import shear

    amount = torch.zeros(1, 2)
    amount[0, axis] = 0.3 * sign * level
    return shear(values - fill, amount) + fill


def _translate(axis: int, values: torch.Tensor, level: float, sign: int, fill: torch.Tensor) -> torch.Tensor:
    from kornia.geometry.transform import translate

    amount = torch.zeros(1, 2)
    amount[0, axis] = 0.45 * sign * level * values.shape[-1 - axis]
    return translate(values - fill, amount) + fill


# Each takes (frames, channels, height, width) in [0, 1], the level in [0, 1], a sign and what to fill with.
OPERATIONS = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _color,
    _contrast,
    _brightness,
    _sharpness,
    partial(_shear, 0),
    partial(_shear, 1),
    partial(_translate, 0),
    partial(_translate, 1),
)
