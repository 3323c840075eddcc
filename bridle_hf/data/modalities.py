"""Modalities: the table of what each brings to the data, and what makes loaders and processors by it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor

from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleVideoProcessor, make_image_processor
from bridle_hf.common.arguments import check_name
from bridle_hf.common.errors import one_line
from bridle_hf.data.loaders import AudioLoader, ImageLoader, VideoLoader
from bridle_hf.patching_bridle import patch_grid_of


@dataclass(frozen=True)
class Modality:
    """What a modality brings."""

    extensions: tuple[str, ...]  # of the files to look for
    loader: type  # reads a sample into model input
    sizes: Mapping[str, str]  # arguments of the loader that the model decides, and as what it has them
    auto_processor: type  # opens a saved processor
    kept: Mapping[str, str] = field(default_factory=dict)  # options of the loader that the model keeps, and as what


MODALITIES = {
    "audio": Modality(
        (
            ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
            ".m4a", ".m4b", ".aac", ".wma", ".amr", ".mka", ".weba", ".ac3", ".wv", ".tta", ".ape",
        ),
        AudioLoader,
        {"max_frames": "max_length"},
        AutoFeatureExtractor,
    ),
    "image": Modality(
        (
            ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
            ".avif", ".mpo", ".tga",
        ),
        ImageLoader,
        {},
        AutoImageProcessor,
    ),
    "video": Modality(
        (
            ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv",
            ".3gp", ".ogv",
        ),
        VideoLoader,
        {"num_frames": "num_frames"},
        BridleVideoProcessor,  # of older folders, too, which name VideoMAE's
        {"stride": "frame_stride", "sampling": "frame_sampling"},
    ),
}  # fmt: skip


def make_sample_loader(
    config: BridleConfig,
    processor: Any,
    options: Mapping[str, Any] | None = None,
    augment: bool = False,
    cache_bytes: int = 0,
) -> AudioLoader | ImageLoader | VideoLoader:
    """The loader that reads samples into a model's input.

    Args:
        config: of the model; gives the modality and the sizes.
        processor: of the model.
        options: further arguments of the modality's loader by name, as {"stride": 2, "flip": False}; audio has none.
            What the model keeps of them is taken from its config where they do not name it.
        augment: random views in training.
        cache_bytes: memory for decoded inputs, per process that loads.

    Raises:
        ValueError: an option that the loader does not have, or of a wrong type or value.
    """
    modality = MODALITIES[config.modality]
    options = options or {}
    check_options(config.modality, options)
    of_model = {name: getattr(config, kept) for name, kept in {**modality.sizes, **modality.kept}.items()}
    options = of_model | _settled(options)
    return modality.loader(processor, **options, augment=augment, cache_bytes=cache_bytes)


def check_options(modality: str, options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for options that the loader of a modality does not have, or of a wrong type."""
    loader, sizes = MODALITIES[modality].loader, MODALITIES[modality].sizes
    _, *parameters = inspect.signature(loader).parameters.values()  # the first is the processor
    given = {*sizes, "augment", "cache_bytes"}
    defaults = {entry.name: entry.default for entry in parameters if entry.name not in given}
    for name, value in options.items():
        check_name("loader", name, defaults)
        default = defaults[name]
        kinds = int | float if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"loader.{name} is {value!r}: expected a value like {default!r}")


def _settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """A stride that is named asks for frames by it, however a model has taken them before."""
    return {"sampling": "stride", **options} if "stride" in options else dict(options)


def kept_options(modality: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a model's config that keep what `make_sample_loader` is told by `options`, so that whatever reads for
    the model later reads as its training did.

    Raises:
        ValueError: see [`check_options`].
    """
    check_options(modality, options)
    options = _settled(options)
    return {kept: options[name] for name, kept in MODALITIES[modality].kept.items() if name in options}


def frames_seen(config: BridleConfig) -> str:
    """What a video model sees of a video, in words."""
    if config.frame_sampling == "segments":
        return f"one frame of each of {config.num_frames} equal parts of a video"
    return f"{config.num_frames} frames around the middle of a video, {config.frame_stride} apart"


def make_processor(config: BridleConfig, fields: Mapping[str, Any] | None = None) -> Any:
    """The processor of a new model.

    Args:
        config: of the encoder.
        fields: arguments of `BridleFeatureExtractor` (audio) or of `make_image_processor` (image, video) by name.

    Raises:
        ValueError: an unknown field, a wrong value, or sizes other than the model's.
    """
    fields, is_audio = fields or {}, config.modality == "audio"
    make = BridleFeatureExtractor if is_audio else make_image_processor
    for name, value in fields.items():
        check_name("processor", name, set(inspect.signature(make).parameters) - {"config", "kwargs"})
        numbers = [value] if is_audio else value
        if not isinstance(numbers, list) or not all(isinstance(number, int | float) for number in numbers):
            expected = "a number, true or false" if is_audio else "a list of numbers, one per channel"
            raise ValueError(f"processor.{name} is {value!r}: expected {expected}")
    if not is_audio:
        return make_image_processor(config, **fields)
    sizes = {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}
    if any(fields.get(name, size) != size for name, size in sizes.items()):
        raise ValueError("processor: num_mel_bins and max_length must be those of the encoder")
    return BridleFeatureExtractor(**{**sizes, **fields})


def load_config(model: str, argument: str = "--model", kind: str = "encoder") -> Any:
    """Configuration of a saved BRIDLE encoder or classifier, or, if that is the `kind`, of a tokenizer; errors call it
    by the `argument` that named it.

    Raises:
        ValueError: none is there, none that can be read, or one of another kind of model.
    """
    config = read_config(model, argument)
    if config.model_type != {"encoder": "bridle", "tokenizer": "bridle_tokenizer"}[kind]:
        raise ValueError(
            f"{argument} {model} holds a {config.model_type!r}: give a folder or Hub id of a BRIDLE {kind}"
        )
    return config


def read_config(model: str | Path, argument: str = "") -> Any:
    """Configuration of a saved model of any kind; errors call it by the `argument` that named it, if one did.

    Raises:
        ValueError: none is there, or none that can be read.
    """
    with _refused(f"{argument} {model}: no model is there, or none that can be read".lstrip()):
        return AutoConfig.from_pretrained(model)


def load_weights(
    auto_class: Any, model: str, unneeded: tuple[str, ...] = ("classifier.", "fc_norm."), **options: Any
) -> Any:
    """A saved model, all of whose weights are there but perhaps those of a classifier's head.

    Args:
        auto_class: of transformers, that opens it.
        unneeded: how the names of weights begin that may be missing.
        options: of its `from_pretrained`.

    Raises:
        ValueError: weights are missing, broken, or do not fit the config.
    """
    with _refused(f"{model}: its weights cannot be loaded"):
        loaded, found = auto_class.from_pretrained(model, output_loading_info=True, **options)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(unneeded)):
        raise ValueError(f"{model}: {len(missing)} weights are missing, as {missing[0]}: it is not whole")
    return loaded


def pixel_statistics(settings: Mapping[str, Any], channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels of pixels in 0..1, that a saved processor of pictures normalises with.

    Raises:
        ValueError: it does something else; the message lacks whose it is.
    """
    if not settings.get("do_rescale", True) or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError("has a processor that does not bring pixels to 0..1, as ours does")
    mean, std = [0.0] * channels, [1.0] * channels
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if not mean or not std or len(mean) != channels or len(std) != channels:
        raise ValueError(f"has a processor with image_mean {mean} and image_std {std}, for {channels} channels")
    return mean, std


def load_processor(folder: str | Path, config: BridleConfig) -> Any:
    """The processor saved beside a model, in a folder or on the Hub.

    Raises:
        ValueError: none is there, none that can be read, or one that does not fit the model.
    """
    with _refused(f"{folder}: its processor cannot be loaded"):
        processor = MODALITIES[config.modality].auto_processor.from_pretrained(folder)
    with _refused(f"{folder}: its processor does not fit the model"):
        _check_fits(processor, config)
    return processor


def _check_fits(processor: Any, config: BridleConfig) -> None:
    fitting = type(make_processor(config)).__name__
    # Transformers names one class, by what it computes with, with "Pil" behind it or without.
    if type(processor).__name__.removesuffix("Pil") != fitting.removesuffix("Pil"):
        raise ValueError(f"it is a {type(processor).__name__}, not a {fitting}")
    if config.modality == "audio":
        shape = (config.max_length, processor.num_mel_bins)
    else:
        size = processor.crop_size if processor.do_center_crop else processor.size
        if not size["height"] or not size["width"]:
            raise ValueError(f"it gives pictures of no fixed height and width: {dict(size)}")
        frames = (config.num_frames,) if config.modality == "video" else ()
        shape = (*frames, len(processor.image_mean), size["height"], size["width"])
    patch_grid_of(torch.empty(1, *shape, device="meta"), config)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever goes wrong in reading what others saved, as one ValueError: each library raises errors of its own."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error
