"""Teacher of another kind: an encoder of transformers whose features the first tokenizer is distilled from."""

import inspect
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.utils import cached_file

from bridle_hf import BridleConfig
from bridle_hf.common.errors import one_line
from bridle_hf.configuration_bridle import check_layers
from bridle_hf.data.modalities import load_weights, pixel_statistics, read_config
from bridle_hf.patching_bridle import patch_grid_of


# Extractors of log-mel spectrograms that are ours but for mean and deviation.
_KALDI_LOG_MEL = ("ASTFeatureExtractor", "BridleFeatureExtractor")
_SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json")


class Teacher(nn.Module):
    """An encoder that transformers loads, on the inputs and the patches of the run.

    Inputs are normalised anew, from what the run's processor does to what the teacher's does. Which of its tokens
    stands for which patch is found by trying: tokens before the patches (class, distillation, registers) are left out.

    Args:
        name: folder or Hub id.
        config: of the run's encoder, whose modality and grid the teacher must share.
        processor: of the run.

    Attributes:
        hidden_size: width of its features.
        flops: of one sample.

    Raises:
        ValueError: it cannot be loaded, has no processor, or has other inputs or other patches.
    """

    def __init__(self, name: str, config: BridleConfig, processor: Any):
        super().__init__()
        self.name, self.config, self.processor = name, config, processor
        self.model_type = read_config(name, "tokenizer.teacher").model_type
        self.offset, self.scale = self._statistics()
        self.model = load_weights(AutoModel, name, unneeded=("pooler.",), dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        if hasattr(self.model.config, "mask_ratio"):
            self.model.config.mask_ratio = 0.0  # MAE hides patches whenever it runs
        self.options = {}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True
        self.register_buffer("tokens", self._find_patches(), persistent=False)

    @torch.no_grad()
    def forward(
        self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None, layers: list[int] | None = None
    ) -> torch.Tensor:
        """Features of every patch, standardised token by token: (batch, patches, hidden).

        Args:
            inputs, attention_mask: of the run, as those of [`BridleModel`]; recordings may be cut to fewer steps.
            layers: indices into the teacher's `hidden_states`, averaged; `None`: its output.
        """
        tokens = self.tokens[: math.prod(patch_grid_of(inputs, self.config))]
        if self.config.modality == "audio" and inputs.shape[1] < self.config.max_length:
            # It knows full-length inputs; their first steps are a prefix of the patches.
            missing = self.config.max_length - inputs.shape[1]
            if attention_mask is None:
                attention_mask = torch.ones(inputs.shape[:2], device=inputs.device)
            inputs, attention_mask = F.pad(inputs, (0, 0, 0, missing)), F.pad(attention_mask, (0, missing))
        outputs = self._run(self._renormalized(inputs, attention_mask), attention_mask, layers is not None)
        states = [outputs.last_hidden_state] if layers is None else [outputs.hidden_states[layer] for layer in layers]
        states = [state[:, tokens].float() for state in states]
        return sum(F.layer_norm(state, state.shape[-1:]) for state in states) / len(states)

    def check_layers(self, layers: list[int] | None) -> None:
        """Raise a `ValueError` unless it has these layers."""
        if layers is not None:
            check_layers(f"tokenizer.teacher_layers, of {self.name},", layers, self.depth)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What its processor takes off an input and divides it by, channel by channel."""
        files = (cached_file(self.name, file, _raise_exceptions_for_missing_entries=False) for file in _SETTINGS)
        found = next((file for file in files if file is not None), None)
        if found is None:
            raise self._refused(f"has no {_SETTINGS[0]}, which says how its inputs are normalised")
        settings = json.loads(Path(found).read_text(encoding="utf-8"))
        if self.config.modality == "audio":
            return self._statistics_of_audio(settings)
        try:
            mean, std = pixel_statistics(settings, self.config.num_channels)
        except ValueError as error:
            raise self._refused(str(error)) from error
        return torch.tensor(mean), torch.tensor(std)

    def _statistics_of_audio(self, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        kind = settings.get("feature_extractor_type")
        if kind not in _KALDI_LOG_MEL:
            raise self._refused(f"takes the inputs of a {kind}, and not log-mel spectrograms as ours")
        for name, ours in (("num_mel_bins", self.config.num_mel_bins),
                           ("sampling_rate", self.processor.sampling_rate)):  # fmt: skip
            if settings.get(name) != ours:
                raise self._refused(f"has {name}={settings.get(name)}, and the run {ours}")
        if not settings.get("do_normalize", True):
            return torch.zeros(()), torch.ones(())
        return torch.tensor(settings["mean"]), torch.tensor(2.0 * settings["std"])

    def _renormalized(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The run's inputs as the teacher's processor would have made them."""
        if self.config.modality == "audio":
            # The processor's numbers at this moment: they may have been measured after the teacher was loaded.
            ours = (0.0, 1.0) if not self.processor.do_normalize else (self.processor.mean, 2.0 * self.processor.std)
        else:
            ours = self.processor.image_mean, self.processor.image_std
        shape = (-1, 1, 1) if self.config.modality != "audio" else ()
        mean, std, offset, scale = (
            torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device).reshape(shape)
            for value in (*ours, self.offset, self.scale)
        )
        values = (inputs * std + mean - offset) / scale
        if attention_mask is None or self.model_type == "bridle":
            return values
        # AST pads a spectrogram with zeros, and normalises it then.
        return values.where(attention_mask.bool()[:, :, None], -offset / scale)

    def _run(self, values: torch.Tensor, attention_mask: torch.Tensor | None, all_states: bool) -> Any:
        options = {self.model.main_input_name: values, "output_hidden_states": all_states, **self.options}
        if self.model_type == "bridle" and attention_mask is not None:
            options["attention_mask"] = attention_mask
        if self.model_type == "vit_mae":
            # It shuffles them, too, by noise.
            patches = (values.shape[-2] // self.model.config.patch_size) * (
                values.shape[-1] // self.model.config.patch_size
            )
            options["noise"] = torch.arange(float(patches), device=values.device).expand(len(values), -1)
        return self.model(**options)

    @torch.no_grad()
    def _find_patches(self) -> torch.Tensor:
        """(patches,) int64, the token of each patch of the run, in row-major order.

        From which tokens of the embedding change where a patch does: the first, those beside it, and the last.
        """
        grid = self.config.patch_grid
        origin, last = [0] * len(grid), [size - 1 for size in grid]
        beside = [[int(axis == other) for other in range(len(grid))] for axis in range(len(grid)) if grid[axis] > 1]
        places = [origin, *beside, last]
        inputs = torch.randn(1, *self._input_shape(), generator=torch.Generator().manual_seed(0))
        inputs = inputs.repeat(1 + len(places), *[1] * (inputs.dim() - 1))
        for values, place in zip(inputs[1:], places):
            values[self._region(place)] += 1.0
        try:
            with FlopCounterMode(display=False) as counter:
                outputs = self._run(inputs, None, True)
            states, output = outputs.hidden_states, outputs.last_hidden_state
            changes = (states[0][1:] - states[0][:1]).abs().amax(dim=-1) > 1e-6
        except Exception as error:  # each model raises errors of its own
            raise self._refused(f"cannot take inputs of {tuple(inputs.shape[1:])}: {one_line(error)}") from error
        self.flops = counter.get_total_flops() // len(inputs)
        self.hidden_size, self.depth = output.shape[-1], len(states) - 1
        patches = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, len(grid))
        if bool((changes.sum(dim=1) == 1).all()) and {state.shape[1] for state in (*states, output)} == {
            len(changes[0])
        }:
            first, *ones, end = changes.int().argmax(dim=1).tolist()
            steps = torch.zeros(len(grid), dtype=torch.int64)
            steps[[axis for axis in range(len(grid)) if grid[axis] > 1]] = (
                torch.tensor(ones, dtype=torch.int64) - first
            )
            tokens = first + (patches * steps).sum(dim=1)
            in_range = int(tokens.min()) >= 0 and int(tokens.max()) < len(changes[0])
            if in_range and len(tokens.unique()) == len(tokens) and int(tokens[-1]) == end:
                return tokens
        raise self._refused(
            f"makes {output.shape[1]} tokens of an input of {tuple(inputs.shape[1:])}, and they are not those of the "
            f"{len(patches)} patches of the run, a grid of {grid} by encoder.patch_size {self.config.patch_size}"
        )

    def _input_shape(self) -> tuple[int, ...]:
        frames, height, width = self.config.input_size
        channels = () if self.config.modality == "audio" else (self.config.num_channels,)
        return (*((frames,) if self.config.modality == "video" else ()), *channels, height, width)

    def _region(self, place: list[int]) -> tuple[slice, ...]:
        """Where the patch at this place of the grid lies in one input."""
        shape = self.config.patch_shape if self.config.modality == "video" else self.config.patch_shape[1:]
        *time, rows, columns = (slice(index * size, (index + 1) * size) for index, size in zip(place, shape))
        return (*time, *([] if self.config.modality == "audio" else [slice(None)]), rows, columns)

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"tokenizer.teacher {self.name} {why}")


def mean_by_position(
    features: Iterable[tuple[torch.Tensor, torch.Tensor | None]], shape: tuple[int, int], accelerator: Accelerator
) -> torch.Tensor:
    """A teacher's mean at each position, the same for any number of processes and micro batches.

    Args:
        features: (samples, patches, hidden), and which patches are real, (samples, patches), or None for all of them.
        shape: (patches, hidden) of a whole input; shorter ones are a prefix of it (patches are row-major).
        accelerator: of the run; all processes must call it.

    Returns:
        (patches, hidden) float64; 0 where no input had a patch.
    """
    total = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)
    count = torch.zeros(shape[0], 1, dtype=torch.float64, device=accelerator.device)
    for teacher, real in features:
        weights = teacher.new_ones(teacher.shape[:2]) if real is None else real
        patches = teacher.shape[1]
        total[:patches] += (teacher * weights[:, :, None]).sum(dim=0)
        count[:patches] += weights.sum(dim=0)[:, None]
    total, count = (accelerator.reduce(value, "sum") for value in (total, count))
    return total / count.clamp(min=1)
