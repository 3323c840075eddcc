"""Programs: models as functions of named tensors to tuples of tensors, as torch.export and ONNX want them."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bridle_hf.feature_extraction_bridle import (
    MEL_FLOOR,
    PREEMPHASIS,
    BridleFeatureExtractor,
    mel_filter_bank,
    num_samples,
)
from bridle_hf.modeling_bridle_tokenizer import BridleTokenizerModel
from bridle_hf.patching_bridle import INPUT_NAMES


class ModelProgram(nn.Module):
    """A model as a program: what its processor makes in, tensors out.

    Args:
        model: an encoder, a classifier or a tokenizer.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it returns, in their order."""
        if isinstance(self.model, BridleTokenizerModel):
            return ("codes",)
        return ("logits",) if hasattr(self.model, "classifier") else ("last_hidden_state", "pooler_output")

    # Each by its name: torch.export asks for it.
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        inputs = {
            "input_values": input_values,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
        }
        if isinstance(self.model, BridleTokenizerModel):
            return (self.model.encode(**inputs),)
        found = self.model(**inputs)
        return tuple(found[name] for name in self.outputs)

    def example(self, batch: int, frames: int | None = None) -> dict[str, torch.Tensor]:
        """Random inputs: of audio, `frames` or as many as the config has, every second clip half as long."""
        config, random = self.model.config, torch.Generator().manual_seed(batch)
        size = {
            "audio": (frames or config.max_length, config.num_mel_bins),
            "image": (config.num_channels, *config.input_size[1:]),
            "video": (config.num_frames, config.num_channels, *config.input_size[1:]),
        }[config.modality]
        values = {INPUT_NAMES[config.modality]: torch.randn(batch, *size, generator=random)}
        if config.modality != "audio":
            return values
        lengths = torch.full((batch, 1), size[0])
        lengths[1::2] = (size[0] + 1) // 2
        return values | {"attention_mask": (torch.arange(size[0]) < lengths).long()}

    def free_axes(self) -> dict[str, tuple[int, ...]]:
        """By input, the axes that may have any size."""
        modality = self.model.config.modality
        if modality == "audio":
            return {INPUT_NAMES[modality]: (0, 1), "attention_mask": (0, 1)}
        return {INPUT_NAMES[modality]: (0,)}


class WaveformProgram(nn.Module):
    """A model of audio as a program that takes waveforms.

    Args:
        model: an encoder, a classifier or a tokenizer of audio.
        extractor: of the model.
    """

    def __init__(self, model: nn.Module, extractor: BridleFeatureExtractor):
        super().__init__()
        self.log_mel, self.program = LogMel(extractor), ModelProgram(model)
        self.rate = extractor.sampling_rate

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it returns, in their order."""
        return self.program.outputs

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of (batch, samples), clips of one length at the extractor's rate."""
        return self.program(input_values=self.log_mel(waveform))

    def example(self, batch: int, frames: int | None = None) -> dict[str, torch.Tensor]:
        """Noise of `frames` frames, or of as many as the config has."""
        samples = num_samples(frames or self.program.model.config.max_length, self.rate)
        return {"waveform": torch.randn(batch, samples, generator=torch.Generator().manual_seed(batch)) / 10}

    def free_axes(self) -> dict[str, tuple[int, ...]]:
        """By input, the axes that may have any size."""
        return {"waveform": (0, 1)}


class LogMel(nn.Module):
    """Waveform to normalised log-mel, as [`BridleFeatureExtractor`] computes it, by one convolution.

    A frame's mean, pre-emphasis, window and Fourier transform are linear: their product is the kernel.

    Args:
        extractor: whose settings it has.
    """

    def __init__(self, extractor: BridleFeatureExtractor):
        super().__init__()
        rate = extractor.sampling_rate
        length = num_samples(1, rate)
        filters = mel_filter_bank(extractor.num_mel_bins, rate)
        self.shift = num_samples(2, rate) - length
        self.mean, self.scale = (extractor.mean, 2 * extractor.std) if extractor.do_normalize else (0.0, 1.0)
        # In float64, by what each does to unit samples.
        frames = np.eye(length) - 1 / length
        frames[1:] -= PREEMPHASIS * frames[:-1]
        spectra = np.fft.rfft(np.hanning(length)[:, None] * frames, 2 * (len(filters) - 1), axis=0)
        kernel = np.concatenate([spectra.real, spectra.imag]).astype(np.float32)
        self.register_buffer("kernel", torch.from_numpy(kernel[:, None]))
        self.register_buffer("filters", torch.from_numpy(filters))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """(batch, samples) in [-1, 1] to (batch, frames, mel bins)."""
        # A constant is in no frame; taken away first, it costs no digits.
        centred = waveform - waveform.mean(dim=1, keepdim=True)
        real, imaginary = F.conv1d(centred[:, None], self.kernel, stride=self.shift).square().chunk(2, dim=1)
        log_mel = ((real + imaginary).transpose(1, 2) @ self.filters).clamp_min(MEL_FLOOR).log()
        return (log_mel - self.mean) / self.scale
