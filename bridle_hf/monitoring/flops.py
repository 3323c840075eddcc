"""Floating-point operations of training, from the configs alone, and the peak that a device is held against.

    bridle flops audio_base --samples 1900000

prints what a sample costs in each phase and, under assumed shares of an assumed peak, the GPU hours of the recipe.

Counted are matrix products, a multiplication and an addition as two, forward and backward, for inputs of full length
and as many visible patches as the mask that leaves most: what `torch.utils.flop_counter` counts. Left out, as usual
where a model's FLOPs are held against a peak, is the rest (norms, activations, the k-means of a phase's start, the
position bias of Swin windows, which is computed once for a whole batch) and what gradient checkpointing computes anew.
"""

import logging
import math
import time
from collections import Counter
from typing import Any

import torch

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.configuration_bridle import BridleEncoderConfig
from bridle_hf.interleaving.codebook_initialization import kmeans_config
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.masking_bridle import draw_share, make_mask


logger = logging.getLogger(__name__)

# A backward takes two products for each of the forward: one for the input's gradient, one for the weight's.
FORWARD_AND_BACKWARD = 3
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- One sample ---


def sample_flops(
    encoder: BridleConfig,
    tokenizer: BridleTokenizerConfig,
    sides: tuple[bool, bool],
    visible: int,
    distilled: bool,
    masks_per_sample: int = 1,
    kept: int | None = None,
) -> dict[str, int]:
    """FLOPs of one sample in one optimizer step, by part.

    Args:
        sides: whether encoder and tokenizer are trained (see `Schedule.sides`).
        visible: patches that the mask leaves to the encoder, see `num_visible_patches`.
        masks_per_sample: how often the encoder and its decoder see a sample, each time under another mask.
        kept: patches that the training of a tokenizer sees; `None`: all.
        distilled: codes come from a tokenizer that is distilled, or fitted, not from iteration 0's projection.

    Returns:
        For an encoder step `encoder` and `decoder` (forward and backward) and `codes` (the tokenizer's forward); for a
        tokenizer step `teacher` (forward), `tokenizer` and `estimator` (forward and backward).
    """
    parts: dict[str, int] = {}
    if sides[0]:
        parts["encoder"] = _encoder(encoder, visible, train=True, rows=masks_per_sample)
        parts["decoder"] = FORWARD_AND_BACKWARD * masks_per_sample * _decoder(encoder, visible)
        patches = math.prod(tokenizer.patch_grid)
        if distilled and tokenizer.tokenizer_type == "kmeans":
            codes = kmeans_config(encoder, tokenizer)
            parts["codes"] = _encoder(codes, patches, train=False) + _lookup(codes, patches)
        else:
            parts["codes"] = _latents(tokenizer, patches, distilled, train=False) + _lookup(tokenizer, patches)
    if sides[1]:
        kept = kept or math.prod(encoder.patch_grid)
        parts["teacher"] = _encoder(encoder, kept, train=False)
        # Codes that move within the chain are looked up once more when they do.
        lookups = 2 if tokenizer.moves_codes_within_chain else 1
        parts["tokenizer"] = _latents(tokenizer, kept, distilled=True, train=True) + lookups * _lookup(tokenizer, kept)
        parts["estimator"] = FORWARD_AND_BACKWARD * _estimator(tokenizer, kept)
    return parts


def num_visible_patches(config: BridleConfig, masks: dict[str, float]) -> int:
    """Patches that the encoder sees of a full-length input; with masks of several kinds, the most.

    Args:
        masks: weight by kind of mask, as in a recipe; empty: `config.mask_type`.
    """
    kinds = [kind for kind, weight in masks.items() if weight] or [config.mask_type]
    generator = torch.Generator().manual_seed(0)
    return max(int((~make_mask(kind, config.patch_grid, config.mask_ratio, generator)).sum()) for kind in kinds)


def _encoder(config: BridleEncoderConfig, patches: int, train: bool, rows: int = 1) -> int:
    """The ViT on `rows` choices of so many patches; of several, all patches are embedded once.

    Its first layer's input has no gradient.
    """
    embedded = patches if rows == 1 else math.prod(config.patch_grid)
    embedding = _linear(embedded, config.patch_dim, config.hidden_size)
    tokens = patches + int(config.use_class_token)
    layer = rows * _layer(tokens, config.hidden_size, config.intermediate_size)
    if not train:
        return embedding + config.num_hidden_layers * layer
    return 2 * embedding + FORWARD_AND_BACKWARD * config.num_hidden_layers * layer


def _decoder(config: BridleConfig, visible: int) -> int:
    """The head is on hidden patches alone, and so is all of a cross decoder, on the share of them that is decoded; on
    visible ones, too, where they are in the loss."""
    width, depth, read = config.decoder_hidden_size, config.decoder_num_hidden_layers, visible + config.use_class_token
    patches = math.prod(config.patch_grid)
    decoded = max(1, round((patches - visible) * config.decoded_ratio))
    decoded += visible if config.visible_loss_weight else 0
    head = _linear(decoded, width, math.prod(config.target_shape))
    if config.decoder_type == "cross":
        states = 1 + len(config.decoder_encoder_layers or ())
        mixes = depth * _linear(read, states, config.hidden_size) if states > 1 else 0
        return mixes + depth * _cross_layer(config, decoded, read) + head
    if config.decoder_type == "swin":
        layer = _swin_layer(config)
    else:
        layer = _layer(patches + config.use_class_token, width, config.decoder_intermediate_size)
    return _linear(read, config.hidden_size, width) + depth * layer + head


def _latents(config: BridleTokenizerConfig, patches: int, distilled: bool, train: bool) -> int:
    """From patches to what is quantized."""
    width = config.hidden_size
    if not distilled:
        return _linear(patches, config.patch_dim, width) + _linear(patches, width, config.code_dim)
    projection = _linear(patches, width, width) + _linear(patches, width, config.code_dim)
    return _encoder(config, patches, train) + (FORWARD_AND_BACKWARD if train else 1) * projection


def _lookup(config: BridleTokenizerConfig, patches: int) -> int:
    return config.num_codebooks * _linear(patches, config.code_dim, config.codebook_size)


def _estimator(config: BridleTokenizerConfig, patches: int) -> int:
    width = config.estimator_hidden_size
    layer = _layer(patches, width, config.estimator_intermediate_size)
    ends = _linear(patches, config.code_dim, width) + _linear(patches, width, config.teacher_hidden_size)
    return config.estimator_num_hidden_layers * layer + ends


def _layer(tokens: int, width: int, intermediate: int) -> int:
    """Query, key, value and output; scores and their sum over values; the two of the MLP."""
    return 4 * _linear(tokens, width, width) + 4 * tokens * tokens * width + 2 * _linear(tokens, width, intermediate)


def _cross_layer(config: BridleConfig, tokens: int, read: int) -> int:
    """As `_layer`, but keys and values are those of `read` tokens of the encoder."""
    width = config.decoder_hidden_size
    products = 2 * _linear(tokens, width, width) + 2 * _linear(read, config.hidden_size, width)
    return products + 4 * tokens * read * width + 2 * _linear(tokens, width, config.decoder_intermediate_size)


def _swin_layer(config: BridleConfig) -> int:
    """As `_layer`, but attention is within windows, which the grid is padded to."""
    width, window = config.decoder_hidden_size, config.decoder_window_size
    padded = math.prod(size + -size % side for size, side in zip(config.patch_grid, window))
    attention = 4 * _linear(padded, width, width) + 4 * padded * math.prod(window) * width
    return attention + 2 * _linear(math.prod(config.patch_grid), width, config.decoder_intermediate_size)


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


# --- A schedule ---


class ScheduleFlops:
    """FLOPs per sample over the steps of a schedule.

    Args:
        masks, masks_per_sample, tokenizer_patch_dropout: as in a recipe.
        first_tokenizer: that of the phases before one trains another; the random projection if not given.
        teacher_flops: of one sample, by a teacher of the phases before the first that trains an encoder, which
            `first_tokenizer` then learns from; that is the encoder if not given.
    """

    def __init__(
        self,
        schedule: Schedule,
        encoder: BridleConfig,
        tokenizer: BridleTokenizerConfig,
        masks: dict[str, float],
        masks_per_sample: int = 1,
        tokenizer_patch_dropout: float = 0.0,
        first_tokenizer: BridleTokenizerConfig | None = None,
        teacher_flops: int | None = None,
    ):
        self.masks_per_sample, self.first_tokenizer = masks_per_sample, first_tokenizer
        self.teacher_flops = teacher_flops
        self.schedule, self.configs, self.visible = schedule, (encoder, tokenizer), num_visible_patches(encoder, masks)
        self.patches = math.prod(encoder.patch_grid)
        self.kept = int(draw_share(torch.ones(1, self.patches, dtype=torch.bool), 1 - tokenizer_patch_dropout).sum())
        self.of_phases = [self._mean(number) for number in range(len(schedule.phases))]

    def share(self, patches: float) -> float:
        """Of what an input of full length takes, what one of so many patches does; attention counted as linear."""
        return patches / self.patches

    def parts(self, number: int, sides: tuple[bool, bool]) -> dict[str, int]:
        """[`sample_flops`] of a step of phase `number` that trains `sides`."""
        (encoder, tokenizer), distilled = self.configs, self.schedule.iteration(number) > 0
        taught = self.teacher_flops is not None and number < self.schedule.before_encoder
        if self.first_tokenizer is not None and (taught or not distilled):
            tokenizer, distilled = self.first_tokenizer, self.first_tokenizer.tokenizer_type == "self_distilled"
        parts = sample_flops(encoder, tokenizer, sides, self.visible, distilled, self.masks_per_sample, self.kept)
        return parts | {"teacher": self.teacher_flops} if taught else parts

    def codes(self, number: int) -> int:
        """FLOPs that a sample of phase `number`, which trains an encoder, does not take if its codes are cached."""
        return self.parts(number, (True, False))["codes"]

    def of_step(self, step: int) -> int:
        """FLOPs of one sample at optimizer step `step` (from 0)."""
        return sum(self.parts(self.schedule.phase_number(step), self.schedule.sides(step)).values())

    def left(self, step: int) -> float:
        """FLOPs of one sample per step, summed over the steps from `step` to the end of the schedule."""
        schedule, total = self.schedule, 0.0
        for start, length, mean in zip(schedule.starts, schedule.lengths, self.of_phases):
            total += mean * (length - min(max(step - start, 0), length))
        return total

    def shares(self, number: int) -> dict[tuple[bool, bool], float]:
        """What the steps of a phase train, and the share of its steps that do."""
        schedule = self.schedule
        start, length = schedule.starts[number], schedule.lengths[number]
        if schedule.phases[number].train in ("encoder", "tokenizer"):
            return {schedule.sides(start): 1.0}
        counts = Counter(schedule.sides(step) for step in range(start, start + length))
        return {sides: count / length for sides, count in counts.items()}

    def lines(self, batch_size: int) -> list[str]:
        """What a sample costs in each phase, to be printed."""
        views = f", {self.masks_per_sample} masks per sample" if self.masks_per_sample > 1 else ""
        lines = [f"FLOPs per sample (10^9), {self.visible} of {self.patches} patches visible{views}"]
        for number, phase in enumerate(self.schedule.phases):
            mean, steps = self.of_phases[number], self.schedule.lengths[number]
            name = f"phase {number}: {phase.train} {self.schedule.iteration(number)}"
            total = f"{mean * steps * batch_size:.3g} FLOPs in {steps:,} steps of {batch_size} samples"
            lines.append(f"  {name}: {_giga(mean)} per sample, {total}")
            for sides, share in self.shares(number).items():
                parts = self.parts(number, sides)
                text = ", ".join(f"{part} {_giga(value)}" for part, value in parts.items())
                view = f"; {_giga(sum(parts.values()) / self.masks_per_sample)} per masked view" if sides[0] else ""
                lines.append(f"    {share:.0%} of the steps: {text}{view}")
        return lines

    def _mean(self, number: int) -> float:
        return sum(share * sum(self.parts(number, sides).values()) for sides, share in self.shares(number).items())


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.4g}"


# --- The peak ---


def find_peak(given_tflops: float | None, device: torch.device, precision: str) -> dict[str, Any]:
    """What one process could do at most, as in run.json: `tflops`, and its `source`, given or measured."""
    if given_tflops is not None:
        return {"tflops": given_tflops, "source": "given"}
    size, dtype = 8192 if device.type == "cuda" else 512, PRECISIONS[precision]
    found = measure_peak(device, size, dtype) / 1e12
    name = str(dtype).removeprefix("torch.")
    return {"tflops": float(f"{found:.4g}"), "source": f"measured: product of two {name} matrices {size} x {size}"}


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Log a warning where autocast to `precision` multiplies matrices slower than float32: on CPUs without bf16."""
    if precision == "no" or device.type != "cpu":
        return
    exact, half = (measure_peak(device, 512, dtype, seconds=0.02) for dtype in (torch.float32, PRECISIONS[precision]))
    if half < exact:
        logger.warning(
            "%s: this CPU multiplies matrices %.1f times slower in it than in float32; without it, steps are faster",
            precision,
            exact / half,
        )


def measure_peak(device: torch.device, size: int, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of the products of two square matrices that fit into `seconds` (at least three)."""
    # Of its own: a run's random numbers must not depend on what was measured before.
    generator = torch.Generator(device).manual_seed(0)
    matrices = [torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)]
    fastest, count, started = math.inf, 0, time.perf_counter()
    while count < 3 or time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        torch.mm(*matrices)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        fastest, count = min(fastest, time.perf_counter() - begin), count + 1
    return 2 * size**3 / fastest
