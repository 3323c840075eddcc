"""Waveform in, normalised log-mel frames out: the audio front end of BRIDLE (arXiv 2502.02118)."""

import math
from collections.abc import Iterable
from functools import lru_cache
from numbers import Number, Real

import numpy as np
import torch
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import PaddingStrategy, TensorType

from .configuration_bridle import FRAME_SHIFT_MS


FRAME_LENGTH_MS = 25
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0  # Hz
MEL_FLOOR = float(np.finfo(np.float32).eps)
# Samples beyond this are refused; even integers of 32 bits that were taken for floats stay below. From 1e16 on, the
# power spectrum would overflow, and long before, one such sample would hide all others in the clip's mean.
MAX_AMPLITUDE = 2.0**31

# 4 MB of intermediates: smaller blocks pay more for setting up the FFT, larger ones miss the cache.
FRAMES_PER_BLOCK = 512
MELS_PER_BAND = 16
RESAMPLING_MARGIN = 0.25  # seconds kept beyond the cut, so that the resampler's filter never sees it


class BridleFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel spectrograms of audio clips, normalised and padded in frames.

    Each clip becomes the Kaldi filter bank of the reference (see [`log_mel_spectrogram`]), then
    `(log_mel - mean) / (2 * std)`. Padding frames are added after that: they carry `padding_value`, by default 0.0,
    which is the mean of the data and not silence, and their `attention_mask` is 0.

    Args:
        feature_size (`int`, *optional*, defaults to `num_mel_bins`):
            Size of a frame as the base class's `pad` calls it; any value but `num_mel_bins` is refused.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Rate in Hz at which the features are computed; clips of any other rate are resampled to it (needs `soxr`).
        num_mel_bins (`int`, *optional*, defaults to 128):
            Number of mel bins.
        max_length (`int`, *optional*, defaults to 1024):
            Number of frames (10 ms each) to pad and truncate to.
        padding_value (`float`, *optional*, defaults to 0.0):
            Value of the padding frames, in normalised units.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to normalise with `mean` and `std`.
        mean (`float`, *optional*, defaults to -4.4446096):
            Mean of the log-mel values; the default is AudioSet's. [`~BridleFeatureExtractor.measure_normalization`]
            measures it on other data.
        std (`float`, *optional*, defaults to 3.3216383):
            Standard deviation of the log-mel values; the default is AudioSet's.
        return_attention_mask (`bool`, *optional*, defaults to `True`):
            Whether calls return `attention_mask` unless told otherwise.
        downmix (`bool`, *optional*, defaults to `True`):
            Whether clips of several channels are averaged to mono; `False` refuses them.

    Raises:
        ValueError: if `feature_size` is not `num_mel_bins`, if a size, rate or `std` is not positive, or if
            `padding_side` is not `"right"`.
    """

    _auto_class = "AutoFeatureExtractor"  # saving copies this file beside the settings, for `trust_remote_code=True`
    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int | None = None,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.4446096,
        std: float = 3.3216383,
        return_attention_mask: bool = True,
        downmix: bool = True,
        **kwargs,
    ):
        feature_size = num_mel_bins if feature_size is None else feature_size
        if feature_size != num_mel_bins:
            raise ValueError(
                f"`feature_size` is {feature_size} but `num_mel_bins` is {num_mel_bins}: make them equal."
            )
        for name, value in [("num_mel_bins", num_mel_bins), ("max_length", max_length), ("std", std)]:
            if value <= 0:
                raise ValueError(f"`{name}` is {value}: it must be positive.")
        if sampling_rate <= 2 * LOWEST_FREQUENCY or sampling_rate != int(sampling_rate):
            raise ValueError(f"`sampling_rate` is {sampling_rate}: give a whole number of Hz, e.g. 16000.")
        super().__init__(
            feature_size=feature_size,
            sampling_rate=int(sampling_rate),
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        if self.padding_side != "right":
            raise ValueError(f"`padding_side` is {self.padding_side!r}: only 'right' is supported.")
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.do_normalize = do_normalize
        self.mean = mean
        self.std = std
        self.downmix = downmix

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict, **kwargs):
        """As in transformers, but the settings of an image or video processor are refused: they share a file name."""
        for kind in ("image_processor_type", "video_processor_type"):
            if kind in feature_extractor_dict:
                raise ValueError(
                    f"these are the settings of {feature_extractor_dict[kind]}, not of a feature extractor of audio: "
                    "load them with AutoImageProcessor, or with AutoProcessor"
                )
        return super().from_dict(feature_extractor_dict, **kwargs)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: float | None = None,
        padding: bool | str | PaddingStrategy = "max_length",
        truncation: bool = True,
        max_length: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """
        Turn one clip, or a batch of clips of any lengths, into model input.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor` or `list`):
                A one-dimensional array, tensor or list of numbers is one mono clip. A batch is a list of clips, a
                (batch, samples) array of mono clips, or a (batch, channels, samples) array. A clip inside a list may
                be (channels, samples). Channels are averaged unless `downmix=False`. Floating-point samples are taken
                as they are, in [-1, 1]; int16 is divided by 2^15, int32 by 2^31, uint8 (8-bit WAV) is centred at 128
                and divided by 128.
            sampling_rate (`float`):
                Rate of `raw_speech` in Hz, one for the whole batch. Required.
            padding (`bool`, `str` or [`~utils.PaddingStrategy`], *optional*, defaults to `"max_length"`):
                `True` or `"longest"`: to the longest clip of the batch. `"max_length"`: to `max_length` frames, or to
                the longest clip where `truncation=False` leaves a longer one. `False` or `"do_not_pad"`: none.
            truncation (`bool`, *optional*, defaults to `True`):
                Whether to keep only the first `max_length` frames of a clip.
            max_length (`int`, *optional*, defaults to `self.max_length`):
                Length in frames for `padding` and `truncation`.
            return_attention_mask (`bool`, *optional*, defaults to `self.return_attention_mask`):
                Whether to return `attention_mask`.
            return_tensors (`str` or [`~utils.TensorType`], *optional*):
                `"pt"` or `"np"`: one tensor per key. Without it, a list with one `np.ndarray` per clip.

        Returns:
            [`BatchFeature`] with `input_values` (batch, frames, num_mel_bins), float32, and `attention_mask`
            (batch, frames), int64, 1 for real frames and 0 for padding.

        Raises:
            ValueError: if `sampling_rate` is missing or not positive, or a clip is empty, shorter than one 25 ms
                frame, not numeric, not finite, of the wrong dimensions, or with samples over 2^31 (the message names
                the clip); if `padding` or `max_length` is not one of the above.
            ImportError: if a clip has to be resampled and `soxr` is not installed.
        """
        max_length = self.max_length if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"`max_length` is {max_length}: give the number of frames, 1 or more.")
        padding = self._get_padding_strategies(padding, max_length)
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask

        waveforms = self._prepare_waveforms(raw_speech, sampling_rate, max_length if truncation else None)
        lengths = np.array([num_frames(len(waveform), self.sampling_rate) for waveform in waveforms])
        longest = max(max_length, lengths.max()) if padding == PaddingStrategy.MAX_LENGTH else lengths.max()

        features = torch.empty(len(waveforms), longest, self.num_mel_bins)
        # One clip at a time: the intermediates of one clip fit in cache, those of a batch do not.
        for clip_features, length, waveform in zip(features, lengths, waveforms):
            self._extract(waveform, out=clip_features[:length])
            clip_features[length:] = self.padding_value

        outputs = {"input_values": features.numpy()}
        if return_attention_mask:
            outputs["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        if padding == PaddingStrategy.DO_NOT_PAD:
            outputs = {key: [row[:length] for row, length in zip(rows, lengths)] for key, rows in outputs.items()}
        elif return_tensors is None:
            outputs = {key: list(rows) for key, rows in outputs.items()}
        return BatchFeature(outputs, tensor_type=return_tensors)

    def measure_normalization(
        self, waveforms: Iterable[tuple[np.ndarray | torch.Tensor | list, float]]
    ) -> tuple[float, float]:
        """
        Measure `mean` and `std` of the log-mel values of a data set, over every mel bin of every frame of the whole
        clips, without padding. The clips are read once, one at a time; the extractor is left as it is.

        Args:
            waveforms (iterable of `(waveform, sampling_rate)`):
                Mono (samples) or (channels, samples) clips, as `__call__` takes them, with their rates in Hz.

        Returns:
            `tuple[float, float]`: the mean and the standard deviation, to be set as `mean` and `std`.

        Raises:
            ValueError: if there is no clip, if all values are equal (silence only), or for a clip that `__call__`
                would refuse.
        """
        count, total, total_of_squares = 0, 0.0, 0.0
        for index, (waveform, sampling_rate) in enumerate(waveforms):
            waveform = self._prepare_waveform(waveform, sampling_rate, None, where=f"`waveforms`, clip {index}")
            log_mel = log_mel_spectrogram(waveform, self.num_mel_bins, self.sampling_rate).double()
            count += log_mel.numel()
            total += log_mel.sum().item()
            total_of_squares += log_mel.square().sum().item()
        if count == 0:
            raise ValueError("`waveforms` holds no clip: mean and std need at least one.")
        mean = total / count
        variance = total_of_squares / count - mean**2
        if variance < 1e-9:
            raise ValueError("`waveforms` hold silence only: std would be 0. Check how they were read.")
        return mean, math.sqrt(variance)

    def _prepare_waveforms(self, raw_speech, sampling_rate, max_length: int | None) -> list[torch.Tensor]:
        return [
            self._prepare_waveform(clip, sampling_rate, max_length, where=f"`raw_speech`, clip {index}")
            for index, clip in enumerate(_as_clips(raw_speech))
        ]

    def _prepare_waveform(self, clip, sampling_rate, max_length: int | None, where: str) -> torch.Tensor:
        """One clip of any accepted kind -> (samples,) float32 at `self.sampling_rate`, at most `max_length` frames."""
        self._check_sampling_rate(sampling_rate)
        waveform = self._to_mono(to_float(clip, where), where)
        if not np.isfinite(waveform).all():
            bad = int(np.flatnonzero(~np.isfinite(waveform))[0])
            raise ValueError(f"{where} is NaN or infinite at sample {bad}: repair it or leave the clip out.")
        loudest = int(np.abs(waveform).argmax())
        if abs(waveform[loudest]) > MAX_AMPLITUDE:
            raise ValueError(
                f"{where} is {waveform[loudest]:.3g} at sample {loudest}, over the bound of {MAX_AMPLITUDE:.3g}:"
                " scale it to [-1, 1] or leave the clip out."
            )

        cut = None if max_length is None else num_samples(max_length, self.sampling_rate)
        if sampling_rate != self.sampling_rate:
            if cut is not None:
                waveform = waveform[: math.ceil((cut / self.sampling_rate + RESAMPLING_MARGIN) * sampling_rate)]
            waveform = _resample(waveform, sampling_rate, self.sampling_rate)
        if num_frames(len(waveform), self.sampling_rate) < 1:
            raise ValueError(
                f"{where} has {len(waveform)} samples at {self.sampling_rate} Hz, but one frame of"
                f" {FRAME_LENGTH_MS} ms takes {num_samples(1, self.sampling_rate)}: leave the clip out or pad it with"
                " zeros."
            )
        # torch warns about arrays it must not write to, and takes no negative strides
        return torch.from_numpy(np.require(waveform[:cut], requirements=["C", "W"]))

    def _check_sampling_rate(self, sampling_rate) -> None:
        if sampling_rate is None:
            raise ValueError(
                f"`sampling_rate` is missing: pass the rate of the audio in Hz to `{self.__class__.__name__}()`, e.g."
                f" `sampling_rate={self.sampling_rate}`. Guessing it would result in silent errors that might be hard"
                " to debug."
            )
        if not isinstance(sampling_rate, Real) or not 0 < sampling_rate < math.inf:
            raise ValueError(f"`sampling_rate` is {sampling_rate!r}: give one positive rate in Hz, e.g. 16000.")

    def _to_mono(self, waveform: np.ndarray, where: str) -> np.ndarray:
        """(samples,) or (channels, samples) -> (samples,), the mean of the channels."""
        check_channels(waveform, where)
        if waveform.ndim == 1:
            return waveform
        if len(waveform) > 1 and not self.downmix:
            raise ValueError(
                f"{where} has {len(waveform)} channels and `downmix` is False: pass one channel, or set `downmix=True`"
                " to average them."
            )
        return waveform.mean(axis=0)

    def _extract(self, waveform: torch.Tensor, out: torch.Tensor) -> None:
        log_mel_spectrogram(waveform, self.num_mel_bins, self.sampling_rate, out=out)
        if self.do_normalize:
            out.sub_(self.mean).div_(2 * self.std)


def num_samples(frames: int, sampling_rate: int) -> int:
    """Samples at `sampling_rate` Hz that `frames` frames span."""
    frame_length, frame_shift, _ = _frame_sizes(sampling_rate)
    return (frames - 1) * frame_shift + frame_length


def num_frames(samples: int, sampling_rate: int) -> int:
    """Whole frames in `samples` samples at `sampling_rate` Hz (Kaldi's `snip_edges`); 0 if there is not even one."""
    frame_length, frame_shift, _ = _frame_sizes(sampling_rate)
    return max(0, 1 + (samples - frame_length) // frame_shift)


def log_mel_spectrogram(
    waveform: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = 16000, out: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Log-mel filter bank of one clip, as Kaldi's `fbank` computes it with a Hann window, no dither and no energy.

    The clip minus its mean; frames of 25 ms every 10 ms, snipped at the edges; each minus its own mean, pre-emphasised
    (0.97), windowed; power spectrum of the frame padded to a power of two; triangles in HTK mel from 20 Hz to Nyquist;
    natural log, floored at float32's epsilon.

    Args:
        waveform: (samples,), float32 in [-1, 1], at least one frame long.
        num_mel_bins: number of mel bins.
        sampling_rate: rate of `waveform` in Hz.
        out: (frames, num_mel_bins), float32, written to if given.

    Returns:
        (frames, num_mel_bins), float32.
    """
    frame_length, frame_shift, fft_length = _frame_sizes(sampling_rate)
    window = _hann_window(frame_length)
    # Each frame loses its own mean below, so a clip cut by truncation may as well lose the mean of what is left of it.
    waveform = waveform - waveform.mean()
    # Of the whole clip at once: frames overlap. A frame's first sample is then another than Kaldi's, but the window is
    # 0 there. Kaldi rounds the product: `alpha=` would not, and doubles the difference in bins near the floor.
    emphasized = torch.zeros_like(waveform)
    torch.sub(waveform[1:], waveform[:-1] * PREEMPHASIS, out=emphasized[1:])
    means = waveform.unfold(0, frame_length, frame_shift).mean(dim=1, keepdim=True) * (1 - PREEMPHASIS)
    frames = emphasized.unfold(0, frame_length, frame_shift)
    if out is None:
        out = torch.empty(len(frames), num_mel_bins)

    padded = torch.zeros(min(len(frames), FRAMES_PER_BLOCK), fft_length)
    for block, mean, log_mel in zip(*(tensor.split(FRAMES_PER_BLOCK) for tensor in (frames, means, out))):
        windowed = padded[: len(block), :frame_length]
        torch.sub(block, mean, out=windowed).mul_(window)
        squares = torch.view_as_real(torch.fft.rfft(padded[: len(block)])).square_()
        power = squares[..., 0] + squares[..., 1]
        for bins, mels, weights in _mel_bands(num_mel_bins, sampling_rate):
            torch.mm(power[:, bins], weights, out=log_mel[:, mels])
        log_mel.clamp_min_(MEL_FLOOR).log_()
    return out


def mel_filter_bank(num_mel_bins: int, sampling_rate: int) -> np.ndarray:
    """
    Kaldi's mel filters: triangles that are linear in HTK mel, `1127 ln(1 + f / 700)`, between 20 Hz and Nyquist.

    Returns:
        (fft_length / 2 + 1, num_mel_bins), float32. The narrowest filters may fall between two FFT bins and be zero.
    """
    fft_length = _frame_sizes(sampling_rate)[-1]
    # float32 throughout, as in Kaldi: its rounding shows in the fifth digit of the log
    frequencies = np.arange(fft_length // 2 + 1, dtype=np.float32) * np.float32(sampling_rate / fft_length)
    mels = _hertz_to_mel(frequencies)[:, None]
    lowest, highest = _hertz_to_mel(np.array([LOWEST_FREQUENCY, sampling_rate / 2], dtype=np.float32))
    edges = lowest + np.arange(num_mel_bins + 2, dtype=np.float32) * (
        (highest - lowest) / np.float32(num_mel_bins + 1)
    )
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)
    weights = np.maximum(np.minimum(rising, falling), 0)
    weights[-1] = 0  # Kaldi leaves the Nyquist bin out
    return weights


def mel_bin_edges(num_mel_bins: int, sampling_rate: int) -> np.ndarray:
    """Where mel bins meet, in Hz: (num_mel_bins + 1,), halfway in mel between the centres of neighbours."""
    lowest, highest = _hertz_to_mel(np.array([LOWEST_FREQUENCY, sampling_rate / 2]))
    edges = lowest + (np.arange(num_mel_bins + 1) + 0.5) * (highest - lowest) / (num_mel_bins + 1)
    return 700 * np.expm1(edges / 1127)


def _hertz_to_mel(frequencies: np.ndarray) -> np.ndarray:
    return np.float32(1127) * np.log(1 + frequencies / np.float32(700))


# What follows is cached outside the extractor, so that the extractor holds settings only: it pickles small, saves no
# arrays to JSON, and a changed attribute takes effect.


@lru_cache
def _mel_bands(num_mel_bins: int, sampling_rate: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """Mel filters in bands of neighbours, each with only the FFT bins it needs: a quarter of the multiplications."""
    filters = mel_filter_bank(num_mel_bins, sampling_rate)
    bands = []
    for first in range(0, num_mel_bins, MELS_PER_BAND):
        mels = slice(first, min(first + MELS_PER_BAND, num_mel_bins))
        used = np.flatnonzero(filters[:, mels].any(axis=1))
        bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
        bands.append((bins, mels, torch.from_numpy(filters[bins, mels].copy())))
    return bands


@lru_cache
def _hann_window(frame_length: int) -> torch.Tensor:
    """Kaldi's `hanning` window: symmetric, zero at both ends."""
    return torch.from_numpy(np.hanning(frame_length).astype(np.float32))


@lru_cache
def _frame_sizes(sampling_rate: int) -> tuple[int, int, int]:
    """Frame length, frame shift and FFT length in samples."""
    frame_length = sampling_rate * FRAME_LENGTH_MS // 1000
    return frame_length, sampling_rate * FRAME_SHIFT_MS // 1000, 2 ** math.ceil(math.log2(frame_length))


def _as_clips(raw_speech) -> list:
    """Split what the user passed into clips: (samples,) or (channels, samples) each."""
    if isinstance(raw_speech, (list, tuple)):
        if len(raw_speech) == 0:
            raise ValueError("`raw_speech` is empty: pass at least one clip.")
        one_clip = isinstance(raw_speech[0], Number) or getattr(raw_speech[0], "ndim", None) == 0
        return [raw_speech] if one_clip else list(raw_speech)
    if not isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"`raw_speech` is of type {type(raw_speech).__name__}: pass the samples as an array, tensor or list (files"
            " are read by `transformers.audio_utils.load_audio`)."
        )
    if raw_speech.ndim not in (1, 2, 3):
        raise ValueError(
            f"`raw_speech` has shape {tuple(raw_speech.shape)}: pass one clip as (samples,), or a batch as"
            " (batch, samples) or (batch, channels, samples)."
        )
    if len(raw_speech) == 0:
        raise ValueError(f"`raw_speech` is empty (shape {tuple(raw_speech.shape)}): pass at least one clip.")
    return [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)


def to_float(clip, where: str) -> np.ndarray:
    """Samples of any accepted type as float32, integers scaled to [-1, 1]."""
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu()
        clip = clip.float() if clip.is_floating_point() else clip  # numpy has no bfloat16
    try:
        samples = np.asarray(clip)
    except ValueError as error:
        raise ValueError(
            f"{where} cannot be read as an array ({error}): give all channels the same length."
        ) from error
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype.kind == "i" and samples.dtype.itemsize in (2, 4):
        return samples.astype(np.float32) / 2.0 ** (8 * samples.dtype.itemsize - 1)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    raise ValueError(
        f"{where} has samples of type {samples.dtype}: pass floats in [-1, 1], or int16, int32 or uint8, whose full"
        " scale is known."
    )


def check_channels(waveform: np.ndarray, where: str) -> None:
    """Raise a `ValueError` for what is no clip of (samples,) or (channels, samples), or an empty one."""
    if waveform.ndim not in (1, 2):
        raise ValueError(
            f"{where} has shape {waveform.shape}: a clip is (samples,) or (channels, samples), a batch of them a"
            " list of clips, (batch, samples) or (batch, channels, samples)."
        )
    if waveform.size == 0:
        raise ValueError(f"{where} is empty (shape {waveform.shape}): leave the clip out.")
    if waveform.ndim == 2 and len(waveform) > waveform.shape[1]:
        channels, samples = waveform.shape
        raise ValueError(f"{where} has {channels} channels of {samples} samples: transpose (samples, channels).")


def _resample(waveform: np.ndarray, source_rate: float, target_rate: int) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            f"Resampling `raw_speech` from {source_rate} to {target_rate} Hz needs soxr: `pip install soxr`, or pass"
            f" audio of {target_rate} Hz."
        ) from error
    return soxr.resample(waveform, source_rate, target_rate)


__all__ = ["BridleFeatureExtractor"]
