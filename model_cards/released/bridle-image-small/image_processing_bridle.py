"""Pictures and videos of any kind into a model's input, where transformers' own processors cannot do it.

Colour images are read by `ViTImageProcessor`. It knows 3 channels alone; [`BridleImageProcessor`] serves models of any
other number. Videos are read by [`BridleVideoProcessor`], with Pillow: transformers' classes for them need
torchvision, but for one that belongs to VideoMAE. [`make_image_processor`] chooses.
"""

import math

import numpy as np
import torch
from transformers import ViTImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, make_nested_list_of_images
from transformers.utils import logging

from .configuration_bridle import BridleEncoderConfig


try:
    from PIL import Image, ImageOps
except ImportError:  # without Pillow there are no images, but the package must import for audio
    Image = ImageOps = None

logger = logging.get_logger(__name__)

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R 601, as Pillow's mode L
PIXELS_PER_BLOCK = 2**20  # that are weighted to grey at a time

# Pictures beyond either are refused. Resized until its shorter edge fits, a thin one would take gigabytes, and so
# would a few kilobytes of PNG that are hundreds of millions of pixels: processing takes up to 18 bytes of each.
MAX_ASPECT_RATIO = 32
MAX_PIXELS = 25_000_000
_ORIENTATION = 0x0112  # of EXIF


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise a ValueError if a picture of that size, in pixels, would take too much memory."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"is {width} x {height} pixels, longer than {MAX_ASPECT_RATIO} times its shorter edge: cut it to pieces"
        )
    if height * width > max_pixels:
        raise ValueError(f"is {width} x {height} pixels, more than {max_pixels / 1e6:.1f} million: make it smaller")


def image_to_array(image: "Image.Image", num_channels: int = 3) -> np.ndarray:
    """A Pillow image, upright (EXIF), as (height, width, num_channels) uint8.

    The pixels are those that transformers' `load_image` gives, and so its pipelines: converted to RGB by Pillow,
    which drops an alpha channel, whatever colour lies under it. Grey is made of RGB as in [`fit_channels`]. Two and
    four channels are the image's own, alpha included.

    Raises:
        ValueError: more than 8 bits a channel, of which Pillow would clip all values over 255; channels that do not
            fit; or a size that [`check_size`] refuses.
    """
    # OpenJPEG holds four bytes of every number beside Pillow's.
    check_size(image.height, image.width, MAX_PIXELS // (2 if image.format == "JPEG2000" else 1))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(
            f"has pixels of mode {image.mode}, which transformers' `load_image` clips at 255: save it with 8 bits"
        )
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("LA", "RGBA") and len(image.mode) == num_channels:
        return np.array(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    # One colour that is marked as transparent outlives this; the processors of colour images then lay it on white.
    marked = image.info.get("transparency") is not None
    return fit_channels(convert_to_rgb(image, return_numpy=True) if marked else np.array(image), num_channels)


def fit_channels(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    """(height, width, channels) with `num_channels`: grey is repeated for colour, colour is weighted to grey.

    Where 1 or 3 channels are asked for, the fourth, alpha, is dropped.

    Raises:
        ValueError: any other change of the number of channels.
    """
    channels = pixels.shape[-1]
    if channels == num_channels:
        return pixels
    if (channels, num_channels) == (1, 3):
        return pixels.repeat(3, axis=-1)
    if (channels, num_channels) == (4, 3):
        return pixels[..., :3]
    if channels in (3, 4) and num_channels == 1:
        blocks = np.array_split(pixels[..., :3], math.ceil(pixels.size / PIXELS_PER_BLOCK) or 1)
        return np.concatenate([_luma(block) for block in blocks])
    raise ValueError(f"has {channels} channels where {num_channels} are expected")


def _luma(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ np.asarray(LUMA)
    return (np.rint(grey) if np.issubdtype(pixels.dtype, np.integer) else grey).astype(pixels.dtype)[..., None]


class BridleImageProcessor(PilBackend):
    r"""
    Images for models of any number of channels: resized so that the shorter edge fits, cropped to the middle, scaled
    to [0, 1] and normalised.

    All arguments are those of [`ViTImageProcessor`]; the number of channels is the length of `image_mean`. Images may
    be Pillow images (see [`image_to_array`]), or arrays and tensors (height, width), (height, width, channels) or
    (channels, height, width), with values in 0..255, floats rounded; grey and colour are converted as in
    [`fit_channels`]. Of values in 0..1, give `do_rescale=False`.
    Other values, sizes that [`check_size`] refuses and channels that do not fit raise a ValueError.

    Returns `pixel_values` (batch, channels, height, width).
    """

    _auto_class = "AutoImageProcessor"  # saving copies this file beside the settings, for `trust_remote_code=True`
    resample = 2  # bilinear, in Pillow's numbering
    image_mean = (0.5,)
    image_std = (0.5,)
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        """As in transformers, but the settings of a feature extractor are refused: they share a file name.

        `AutoProcessor` tries image processors first, and goes on to feature extractors where one raises.
        """
        if "feature_extractor_type" in image_processor_dict:
            raise ValueError(
                f"these are the settings of {image_processor_dict['feature_extractor_type']}, not of an image "
                "processor: load them with AutoFeatureExtractor, or with AutoProcessor"
            )
        return super().from_dict(image_processor_dict, **kwargs)

    def _prepare_images_structure(self, images, expected_ndims=3):
        # The base class takes a bare (height, width) array for a batch, and fails.
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 2:
            images = images[None]
        elif isinstance(images, list | tuple):
            images = [image[None] if getattr(image, "ndim", None) == 2 else image for image in images]
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, image_mean=None, do_rescale=None, **kwargs
    ):
        """One image as (channels, height, width), uint8 but for what is not to be rescaled."""
        num_channels = len(image_mean)
        if Image is not None and isinstance(image, Image.Image):
            pixels = image_to_array(image, num_channels)
        else:
            pixels = np.asarray(image)
            layout = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4, num_channels))
            if ChannelDimension(layout) == ChannelDimension.FIRST:
                pixels = np.moveaxis(pixels, 0, -1)
            check_size(*pixels.shape[:2])
            if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:  # nor NaN
                raise ValueError(f"an image holds values of {pixels.min()} to {pixels.max()}: give 0 to 255")
            pixels = fit_channels(pixels, num_channels)
            if do_rescale and np.issubdtype(pixels.dtype, np.floating):
                if pixels.size and pixels.max() <= 1:
                    logger.warning_once(
                        "An image of floats holds no value over 1, where 0 to 255 are expected: where it is scaled to "
                        "[0, 1] already, give `do_rescale=False`."
                    )
                pixels = np.rint(pixels).astype(np.uint8)  # Pillow takes no fractions
        return np.moveaxis(pixels, -1, 0)

    def resize(self, image, size, resample=None, **kwargs):
        """Resize (channels, height, width), one channel after the other: Pillow takes 1, 3 or 4 at a time."""
        return np.concatenate([super(BridleImageProcessor, self).resize(c[None], size, resample) for c in image])


class BridleVideoProcessor(BridleImageProcessor):
    r"""
    Videos frame by frame, each as [`BridleImageProcessor`] does an image; the settings are those of
    `VideoMAEImageProcessor`, which it reads, too.

    Takes one video, a path or URL, a list of frames or an array (frames, height, width, channels) or (frames,
    channels, height, width), or several, as a list or an array. Returns `pixel_values` (batch, frames, channels,
    height, width).
    """

    _read = ("BridleVideoProcessor", "VideoMAEImageProcessor", "VideoMAEImageProcessorFast")
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        """As in [`BridleImageProcessor`]; settings of images are refused, too."""
        kind = image_processor_dict.get("image_processor_type")
        if kind is not None and kind not in cls._read:
            raise ValueError(f"these are the settings of {kind}, not of a video processor")
        return super().from_dict(image_processor_dict, **kwargs)

    def _prepare_images_structure(self, images, expected_ndims=3):
        if getattr(images, "ndim", None) == 5:
            images = list(images)
        return make_nested_list_of_images(images, expected_ndims=expected_ndims)

    def preprocess(self, videos, num_frames=None, do_sample_frames=None, **kwargs) -> BatchFeature:
        """Videos as `pixel_values`.

        Of one by its path or URL, the first `num_frames` frames are read with PyAV, as transformers' pipeline does
        where it reads them itself; where it does not, it gives `num_frames` and `do_sample_frames`.
        """
        if isinstance(videos, str) != (num_frames is not None):
            raise ValueError("`num_frames` is for a video by its path or URL, which needs it")
        if isinstance(videos, str):
            from transformers.video_utils import load_video

            videos, _ = load_video(videos, backend="pyav", sample_indices_fn=lambda *_, **__: np.arange(num_frames))
        return super().preprocess(videos, **kwargs)

    def _preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        videos = [super(BridleVideoProcessor, self)._preprocess(frames, return_tensors=None, **kwargs)
                  for frames in images]  # fmt: skip
        return BatchFeature({"pixel_values": [video["pixel_values"] for video in videos]}, tensor_type=return_tensors)

    def resize(self, image, size, resample=None, **kwargs):
        """Resize (channels, height, width); three channels together, which Pillow takes."""
        if len(image) == 3:
            return super(BridleImageProcessor, self).resize(image, size, resample)
        return super().resize(image, size, resample)


def make_image_processor(
    config: BridleEncoderConfig,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
) -> PilBackend:
    """The processor of an image or video model: shorter edge to the longer of `config.image_size`, middle crop.

    No picture is resized to more than `MAX_ASPECT_RATIO` times the shorter edge, so that no shape takes more memory:
    of a thinner one, which loaders and [`BridleImageProcessor`] refuse, a part of the crop stays black.

    Args:
        config: of the encoder or the tokenizer; `image_size` and `num_channels` are what counts.
        image_mean, image_std: per channel, of values in [0, 1]; 0.5 if not given, as ViT has them.

    Returns:
        For images `ViTImageProcessor`, or [`BridleImageProcessor`] where there are not 3 channels; for video
        [`BridleVideoProcessor`]. Without torchvision, the first is transformers' class on top of Pillow, saved under
        the same name.

    Raises:
        ValueError: the config is for audio; `image_mean` or `image_std` does not have one number per channel.
    """
    if config.modality == "audio":
        raise ValueError("the config is for audio: use BridleFeatureExtractor")
    image_mean = [0.5] * config.num_channels if image_mean is None else list(image_mean)
    image_std = [0.5] * config.num_channels if image_std is None else list(image_std)
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != config.num_channels:
            raise ValueError(f"`{name}` is {values}: give {config.num_channels} numbers, one per channel")
    height, width = config.input_size[1:]
    settings = {
        "size": {"shortest_edge": max(height, width), "longest_edge": MAX_ASPECT_RATIO * max(height, width)},
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "image_mean": image_mean,
        "image_std": image_std,
    }
    if config.modality == "video":
        return BridleVideoProcessor(**settings)
    if config.num_channels == 3:
        return ViTImageProcessorPil(**settings, do_convert_rgb=True)
    return BridleImageProcessor(**settings)


__all__ = [
    "BridleImageProcessor",
    "BridleVideoProcessor",
    "check_size",
    "fit_channels",
    "image_to_array",
    "make_image_processor",
]
