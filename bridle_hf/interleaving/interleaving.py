"""Interleaving: encoder and tokenizer trained in turns, what each phase of a schedule sets up and its steps do."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bridle_hf import (
    BridleConfig,
    BridleForPreTraining,
    BridleModel,
    BridleTokenizerConfig,
    BridleTokenizerModel,
    teacher_features,
)
from bridle_hf.common.errors import MAX_SKIPPED_IN_A_ROW, NonFiniteError
from bridle_hf.interleaving.code_cache import CodeCache
from bridle_hf.interleaving.codebook_initialization import initialize_codebooks, kmeans_config
from bridle_hf.interleaving.gradients import gradient_norms
from bridle_hf.interleaving.levels import Levels
from bridle_hf.interleaving.micro_batches import MicroBatch, micro_batches, sample_order, shares
from bridle_hf.interleaving.optimizers import adamw
from bridle_hf.interleaving.plateau import Plateau
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.interleaving.sharding import Sharding, gathered_state, sharded_like, whole_model
from bridle_hf.interleaving.teacher import Teacher, mean_by_position
from bridle_hf.masking_bridle import visible_patches
from bridle_hf.modeling_bridle import BridleForPreTrainingOutput, BridlePreTrainedModel
from bridle_hf.modeling_bridle_tokenizer import target_patches
from bridle_hf.patching_bridle import INPUT_NAMES, BridlePositions, mask_rows, take_patches
from bridle_hf.quantization_bridle import CodebookStatistics, count_codes


# What a tokenizer that the run did not train may have of its own.
OF_FIRST_TOKENIZER = ("tokenizer_type", "teacher_hidden_size")
# Batches that the teacher's mean at each position is measured on.
CENTRE_BATCHES = 16


class Interleaving:
    """The two models, their optimizers, and what a step of each phase does.

    Args:
        accelerator: device, precision and processes.
        encoder_config, tokenizer_config: what is built at the start of a phase; `tokenizer_config` is that of the
            self-distilled tokenizer, from which the random projection of iteration 0 follows.
        micro_batch_size, bucket_by_length: how this process's batch is cut into those of a forward, over which the
            gradients are accumulated, see [`micro_batches`].
        compile_layers: compile the layers of both models by `torch.compile`, when they first run.
        shard: each process holds a part of what is trained, see [`Sharding`].
        encoder_from: an encoder of the same sizes, from whose weights every fresh encoder starts; random ones if not
            given.
        encoder_ema: decay of a moving average of the encoder's weights; 0: none. The average is what a phase leaves:
            what is saved, teaches the tokenizer, and is gone on from; it teaches in `joint` and `alternate`, too.
        levels_join_at: masked accuracy of a level of codes at which the next one joins the loss; 0: all are in it.
        tokenizer_from: a tokenizer of the same sizes but for its `teacher_hidden_size`, whose codes are predicted
            until a phase trains a fresh one; a random projection if not given.
        teacher: of the phases before the first that trains an encoder; from then on, and if it is not given, that is
            the encoder.
        code_cache: folder of a [`CodeCache`], which phases with a frozen tokenizer take codes from; its batches have
            the samples' `fingerprint`.

    Raises:
        ValueError: as [`Sharding`].
    """

    def __init__(
        self,
        accelerator: Accelerator,
        schedule: Schedule,
        encoder_config: BridleConfig,
        tokenizer_config: BridleTokenizerConfig,
        seed: int,
        micro_batch_size: int | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-4,
        max_grad_norm: float | None = None,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        shard: bool = False,
        encoder_from: BridleModel | None = None,
        bucket_by_length: bool = True,
        encoder_ema: float = 0.0,
        levels_join_at: float = 0.0,
        tokenizer_from: BridleTokenizerModel | None = None,
        teacher: Teacher | None = None,
        code_cache: Path | None = None,
    ):
        self.accelerator, self.schedule, self.seed = accelerator, schedule, seed
        self.encoder_config, self.tokenizer_config = encoder_config, tokenizer_config
        self.micro_batch_size, self.bucket_by_length = micro_batch_size, bucket_by_length
        self.adam_options = {"betas": tuple(adam_betas), "weight_decay": weight_decay}
        self.max_grad_norm = max_grad_norm or math.inf
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile_layers
        self.sharding = Sharding(accelerator, shard)
        self.encoder_from, self.encoder_ema = encoder_from, encoder_ema
        self.teacher = None if teacher is None else teacher.to(accelerator.device)
        self.code_cache_folder, self.code_cache = code_cache, None
        self.input_name = INPUT_NAMES[encoder_config.modality]
        self.encoder: nn.Module = self._build(BridleForPreTraining, encoder_config, phase=0)
        self.average: BridleForPreTraining | None = None
        self.levels = Levels(accelerator, encoder_config.num_codebooks, levels_join_at)
        self.tokenizer: nn.Module | None = None
        if tokenizer_from is not None:
            config = first_tokenizer_config(tokenizer_config, tokenizer_from.config)
            self.tokenizer = self._build(BridleTokenizerModel, config, phase=0)
            start_from(self.tokenizer, tokenizer_from)
        self.teacher_mean: torch.Tensor | None = None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.skipped_steps = self.skipped_in_a_row = 0
        self.plateau: Plateau | None = None

    # --- Phases ---

    def enter_phase(self, number: int, peek: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Set up phase `number`: fresh models where it asks for them, k-means, optimizers.

        Args:
            peek: gives the batches that the phase is about to see; they are not consumed.
        """
        phase, trains_tokenizer = self.schedule.phases[number], self.schedule.trains_tokenizer(number)
        fresh = phase.start == "fresh"
        self._dismiss_teacher(number)
        self.seed_step(self.schedule.starts[number])
        if self.average is not None:
            self.encoder, self.average = self.whole_models()[0], None
        if self.schedule.fits(self.schedule.starts[number]):
            self.fit_tokenizer(self.schedule.starts[number], peek)
        if phase.trains_encoder and fresh:
            config = self._encoder_config(phase.target or self.encoder_config.target)
            self.encoder = self._build(BridleForPreTraining, config, phase=number)
            self.levels.restart()
            if self.encoder_from is not None:
                start_from(self.encoder.bridle, self.encoder_from)
        if trains_tokenizer and (fresh or not self._is_distilled()):
            self.tokenizer = self._build(BridleTokenizerModel, self._new_tokenizer_config(), phase=number)
            self._initialize_codebooks(peek())
        if trains_tokenizer and self.tokenizer_config.center_teacher:
            self.teacher_mean = self._measure_teacher_mean(peek())
        if self.tokenizer is None:
            config = self.random_projection_config()
            self.tokenizer = self._build(BridleTokenizerModel, config, phase=number)
            self._initialize_codebooks(peek())
        self.prepare(number)

    def fit_tokenizer(self, step: int, peek: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Fit a k-means tokenizer to the encoder as it is before `step`; within a phase, codes keep their numbers."""
        self.seed_step(step)
        encoder, earlier = self.whole_models()
        self.tokenizer = self._build(BridleTokenizerModel, self.kmeans_config(), phase=0).requires_grad_(False)
        self.tokenizer.encoder.load_state_dict(encoder.bridle.state_dict())
        go_on = step not in self.schedule.starts
        if go_on:
            self.tokenizer.quantizer.load_state_dict(earlier.quantizer.state_dict())
        self._initialize_codebooks(peek(), go_on)
        self.tokenizer.quantizer.update_in_forward = False

    def prepare(self, number: int, average: dict[str, torch.Tensor] | None = None) -> None:
        """Freeze what phase `number` does not train, wrap what it does, and give it a new optimizer.

        Args:
            average: that of the encoder's weights, where the phase is gone on with; else it starts as they do.
        """
        phase, trains_tokenizer = self.schedule.phases[number], self.schedule.trains_tokenizer(number)
        self.accelerator.free_memory()
        self.encoder, self.tokenizer = self.whole_models()
        self.optimizers = {}
        self.plateau = Plateau(self.accelerator, self.schedule, number) if phase.until else None
        self.code_cache = self._open_code_cache() if phase.train == "encoder" else None
        # Once per optimizer step, when all micro batches have been seen and the gradient is known to be finite.
        self.tokenizer.quantizer.update_in_forward = False
        self.encoder.requires_grad_(phase.trains_encoder)
        self.tokenizer.requires_grad_(trains_tokenizer)
        if phase.trains_encoder:
            self.encoder.levels_in_loss = self.levels.joined
            if self.encoder_ema:
                whole = self._averaged(self.encoder.state_dict() if average is None else average)
                self.average = self.sharding.lay_out(whole)
            self.encoder, self.optimizers["encoder"] = self._trained(self.encoder)
        if trains_tokenizer:
            self.tokenizer, self.optimizers["tokenizer"] = self._trained(self.tokenizer)

    def _averaged(self, weights: dict[str, torch.Tensor]) -> BridleForPreTraining:
        """A model of the encoder's config with these weights, which nothing trains."""
        average = self._build(BridleForPreTraining, self.encoder.config, phase=0).requires_grad_(False)
        average.load_state_dict(weights)
        return average.eval()

    def _dismiss_teacher(self, number: int) -> None:
        """Free the memory of a given teacher from the first phase on that trains an encoder."""
        if number >= self.schedule.before_encoder:
            self.teacher = None

    def _new_tokenizer_config(self) -> BridleTokenizerConfig:
        """That of a fresh tokenizer, as wide at its end as its teacher."""
        if self.teacher is None:
            return self.tokenizer_config
        return taught_tokenizer_config(self.tokenizer_config, self.teacher)

    def _open_code_cache(self) -> CodeCache | None:
        if self.code_cache_folder is None or self.encoder.config.target != "codes":
            return None
        return CodeCache(self.code_cache_folder, self.tokenizer, self.accelerator.mixed_precision)

    def _encoder_config(self, target: str) -> BridleConfig:
        """That of an encoder which predicts `target`."""
        return BridleConfig.from_dict(self.encoder_config.to_dict() | {"target": target})

    def kmeans_config(self) -> BridleTokenizerConfig:
        """The tokenizer of the phases after the first, where it is fitted."""
        return kmeans_config(self.encoder_config, self.tokenizer_config)

    def random_projection_config(self) -> BridleTokenizerConfig:
        """The tokenizer of iteration 0, of the same codes as the later ones."""
        fields_ = self.tokenizer_config.to_dict() | {"tokenizer_type": "random_projection"}
        return BridleTokenizerConfig.from_dict(fields_)

    @property
    def unwrapped_encoder(self) -> BridleForPreTraining:
        return self.accelerator.unwrap_model(self.encoder)

    @property
    def unwrapped_tokenizer(self) -> BridleTokenizerModel:
        return self.accelerator.unwrap_model(self.tokenizer)

    @property
    def lasting_encoder(self) -> BridleForPreTraining:
        """What a phase leaves of the encoder: the average of its weights, where there is one."""
        return self.unwrapped_encoder if self.average is None else self.average

    def whole_models(self) -> tuple[BridleForPreTraining, BridleTokenizerModel]:
        """Lasting encoder and tokenizer as plain modules, for use beside the training; all processes must call it."""
        encoder, tokenizer = (
            whole_model(model, lambda model=model: self._build(type(model), model.config, phase=0))
            for model in (self.lasting_encoder, self.unwrapped_tokenizer)
        )
        return encoder, tokenizer

    def _is_distilled(self) -> bool:
        return self.tokenizer is not None and self.unwrapped_tokenizer.is_trained

    def _build(self, model_class: type, config: Any, phase: int) -> nn.Module:
        # Weights depend on seed and phase alone, whatever ran before.
        with torch.random.fork_rng(devices=[]):  # they are drawn on the CPU
            torch.manual_seed(_mix(self.seed, phase, 1))
            model = model_class(config)
        if self.gradient_checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile_layers:
            # Layer by layer: those of one kind share what is compiled. A size that changes is left open from then on.
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile()
        return model.to(self.accelerator.device)

    def _trained(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        model.freeze_unseen_biases()
        wrapped = self.sharding.wrap(model)
        return wrapped, adamw(model, lr=0.0, **self.adam_options)

    def _initialize_codebooks(self, batches: Iterable[dict[str, Any]], go_on: bool = False) -> None:
        initialize_codebooks(
            self.unwrapped_tokenizer,
            map(self._micro_batches, batches),
            self.schedule.steps_per_epoch,
            self.accelerator.is_main_process,
            go_on,
        )

    # --- Steps ---

    def seed_step(self, step: int) -> None:
        """Make what is random in a step (dropout, re-seeding) a function of seed and step.

        It is the same in all processes and micro batches, so that what a layer draws once for a whole batch (dropout
        in the position bias of the Swin decoder) does not depend on how the batch is shared out. Nor does stochastic
        depth, see `_place`. Dropout of attention weights does: each micro batch of each process draws the same.
        """
        torch.manual_seed(_mix(self.seed, step, 2))

    def step(self, step: int, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One optimizer step on this process's batch.

        Micro batches and processes share a batch out without changing the result: each patch weighs the same, and the
        codebooks move once, on all of the batch, after the last micro batch.

        Returns:
            Detached metrics under the names of `metrics.jsonl`: scalars, and tensors with one value per codebook;
            `counts` (num_codebooks, codebook_size), how often each code was chosen. The mean over processes, of counts
            the sum, is that of the whole batch. Empty for a skipped step.

        Raises:
            NonFiniteError: the 20th step in a row whose gradient is not finite.
        """
        sides = self.schedule.sides(step)
        self._set_learning_rates(step)
        statistics: list[CodebookStatistics] = []
        parts = list(self._micro_batches(batch))
        weights, sums = shares(parts, self.accelerator)
        trained = [model for model, on in zip((self.encoder, self.tokenizer), sides) if on]
        for part, weight in zip(parts, weights):
            self.seed_step(step)
            self._place(sides, batch, part)
            with self.sharding.synchronized(trained, last=part is parts[-1]):
                loss, metrics = self._losses(step, batch, part, weight, sides, statistics)
                self.accelerator.backward(loss)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norms = self._update(*sides)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row, up to {step}"
            )
        if not norms:
            return {}
        if self.average is not None and sides[0]:
            self._move_average(step)
        if self.levels.join_at and sides[0]:
            sums["encoder/levels"] = sums["encoder/accuracy"].new_tensor(float(self.levels.joined))
            self.levels.update(sums["encoder/accuracy"])
            self.unwrapped_encoder.levels_in_loss = self.levels.joined
        if statistics:
            self.seed_step(step)
            sums["usage/reseeded"] = self.unwrapped_tokenizer.quantizer.update(
                statistics, sample_order(parts, kept=True)
            )
        return sums | norms

    def is_over(self, step: int, metrics: dict[str, torch.Tensor]) -> bool:
        """Whether the phase ends with step `step`, which gave `metrics`; by evidence, the schedule then has it so."""
        number = self.schedule.phase_number(step)
        if self.plateau is not None and self.plateau.update(step + 1, metrics):
            self.schedule.end_phase(number, step + 1)
        return step + 1 == self.schedule.starts[number] + self.schedule.lengths[number]

    def _losses(
        self,
        step: int,
        batch: dict[str, Any],
        part: MicroBatch,
        weights: torch.Tensor,
        sides: tuple[bool, bool],
        statistics: list[CodebookStatistics],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of a micro batch times its weights (see `shares`); adds what moves the codebooks."""
        inputs, attention_mask = part.inputs, part.attention_mask
        loss, metrics, counts = torch.zeros((), device=inputs.device), {}, None
        phase = self.schedule.phases[self.schedule.phase_number(step)]
        with self.accelerator.autocast():
            # First: with gradient checkpointing, the encoder's layers run again in the mode that they are left in.
            teacher = self._teacher(part, **part.dropout) if sides[1] else None
            if sides[0]:
                labels, cached = self._labels(batch, part)
                self.encoder.train()
                masks = {"bool_masked_pos": part.bool_masked_pos, "bool_decoded_pos": part.bool_decoded_pos}
                numbers = {"num_visible": part.num_visible, "num_decoded": part.num_decoded}
                output = self.encoder(inputs, attention_mask, labels=labels, **masks, **numbers)
                metrics |= self._encoder_losses(output, weights)
                loss = loss + metrics["encoder/loss"]
                if cached is not None:
                    metrics |= {"codes/cached": torch.tensor(cached, device=inputs.device)}
                if output.accuracy is not None:
                    metrics |= {"encoder/accuracy": output.accuracy * weights[0]}
                    counts = self._count(labels, part)
            if sides[1]:
                self.tokenizer.train()
                output = self.tokenizer(inputs, attention_mask, teacher_hidden_states=teacher, **part.dropout)
                weight = phase.tokenizer_loss_weight if phase.train == "joint" else 1.0
                loss = loss + output.loss * weights[1] * weight
                metrics |= {
                    "tokenizer/loss": output.loss * weights[1],
                    "tokenizer/cosine_loss": output.cosine_loss * weights[1],
                    "tokenizer/codebook_loss": output.codebook_loss * weights[1],
                    "usage/quantization_error": output.usage.quantization_error * weights[1],
                }
                statistics.append(output.statistics)
                counts = output.counts
        return loss, metrics if counts is None else metrics | {"counts": counts}

    def _encoder_losses(self, output: BridleForPreTrainingOutput, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name of the metric. Hidden and visible patches are means of their own, with shares of their own."""
        if output.visible_loss is None:
            return {"encoder/loss": output.loss * weights[0]}
        added = self.encoder_config.visible_loss_weight * output.visible_loss
        total = (output.loss - added) * weights[0] + added * weights[2]
        return {"encoder/loss": total, "encoder/visible_loss": output.visible_loss * weights[2]}

    @torch.no_grad()
    def _labels(self, batch: dict[str, Any], part: MicroBatch) -> tuple[torch.Tensor, float | None]:
        """What the encoder is to predict of each patch; with a code cache, also the share of the batch's samples that
        are of this part and whose codes were in it."""
        inputs, attention_mask = part.inputs, part.attention_mask
        tokenizer, target = self.unwrapped_tokenizer, self.unwrapped_encoder.config.target
        if target == "patches":
            return target_patches(inputs, attention_mask, self.tokenizer_config), None
        if target == "features":
            return tokenizer.eval().latents(inputs, attention_mask), None
        if self.code_cache is None:
            return tokenizer.encode(inputs, attention_mask, soft=True), None
        indices, fingerprints = (batch[name][part.samples].tolist() for name in ("index", "fingerprint"))
        codes = self.code_cache.read(indices, fingerprints)
        if codes is not None:
            # Of a part that is cut, the grid's first patches.
            codes = codes[:, : part.bool_masked_pos.shape[-1]]
            return codes.to(inputs.device, non_blocking=True), len(indices) / len(batch["index"])
        # One that is missing: all are made, so that the tokenizer sees the same batches as without a cache.
        codes = tokenizer.encode(inputs, attention_mask, soft=True)
        self.code_cache.write(indices, fingerprints, codes)
        return codes, 0.0

    def _teacher(self, part: MicroBatch, **dropout: Any) -> torch.Tensor:
        """(samples, patches, hidden); with [`MicroBatch.dropout`], of the patches that are kept."""
        layers, inputs = self.tokenizer_config.teacher_layers, (part.inputs, part.attention_mask)
        patches = None
        if dropout:
            kept = mask_rows(~part.bool_dropped_pos, part.real(self.encoder_config))
            patches, _ = visible_patches(kept, dropout["num_visible"])
        if self.teacher is None:
            teacher = teacher_features(self.lasting_encoder.bridle.eval(), *inputs, layers, **dropout)
        else:
            teacher = self.teacher(*inputs, layers)
            teacher = teacher if patches is None else take_patches(teacher, patches)
        if self.teacher_mean is None:
            return teacher
        # Row-major order: fewer steps along the first axis are a prefix.
        return teacher - self.teacher_mean[slice(0, teacher.shape[1]) if patches is None else patches].to(teacher)

    def teach(self, encoder: BridleForPreTraining) -> Callable[..., torch.Tensor]:
        """What makes the features that the tokenizer learns, of inputs, attention mask and layers: a given teacher, or
        `encoder`."""
        return self.teacher or functools.partial(teacher_features, encoder.bridle.eval())

    def _measure_teacher_mean(self, batches: Iterable[dict[str, Any]]) -> torch.Tensor:
        """(patches, hidden): the teacher's mean at each position over the batches that the phase begins with."""
        self.teacher_mean, self.encoder = None, self.whole_models()[0]
        batches = itertools.islice(batches, min(CENTRE_BATCHES, math.ceil(self.schedule.steps_per_epoch)))
        features = (
            (self._teacher(part), part.real(self.encoder_config))
            for batch in batches
            for part in self._micro_batches(batch)
        )
        patches, hidden = (
            math.prod(self.encoder_config.patch_grid),
            self.unwrapped_tokenizer.config.teacher_hidden_size,
        )
        return mean_by_position(features, (patches, hidden), self.accelerator)

    def _count(self, codes: torch.Tensor, part: MicroBatch) -> torch.Tensor:
        rows, real = codes[..., 0], part.real(self.encoder_config)
        real = None if real is None else real.flatten()
        return count_codes(rows.flatten(0, 1), self.encoder_config.codebook_size, real)

    def _micro_batches(self, batch: dict[str, Any]) -> Iterator[MicroBatch]:
        # Sharded, a forward is an exchange of weights, which all processes make as often.
        agree = None if self.sharding.mesh is None else self._most_of_processes
        return micro_batches(
            batch, self.encoder_config, self.micro_batch_size, self.accelerator.device, self.bucket_by_length, agree
        )

    def _most_of_processes(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _place(self, sides: tuple[bool, bool], batch: dict[str, Any], part: MicroBatch) -> None:
        """Tell stochastic depth which rows of all processes' batch a micro batch of this process holds.

        A row of the encoder is a mask of a sample, one of the tokenizer a sample.
        """
        own, processes, device = len(batch[self.input_name]), self.accelerator.num_processes, part.inputs.device
        samples = self.accelerator.process_index * own + torch.tensor(part.samples)
        if sides[0]:
            masks = part.masks_per_sample
            rows = (samples[:, None] * masks + torch.arange(masks)).flatten()
            self.unwrapped_encoder.place_in_batch(rows.to(device), own * processes * masks)
        if sides[1]:
            self.unwrapped_tokenizer.place_in_batch(samples.to(device), own * processes)

    def _set_learning_rates(self, step: int) -> None:
        for name, rate in zip(("encoder", "tokenizer"), self.schedule.learning_rates(step)):
            for group in self.optimizers[name].param_groups if name in self.optimizers else ():
                group["lr"] = rate

    def _update(self, train_encoder: bool, train_tokenizer: bool) -> dict[str, torch.Tensor]:
        """Step the optimizers, unless a gradient is not finite: then all ranks skip, since gradients are shared."""
        sides = {"encoder": (self.encoder, train_encoder), "tokenizer": (self.tokenizer, train_tokenizer)}
        trained = {name: model for name, (model, on) in sides.items() if on}
        # A gradient scaler (fp16) is told of the gradients of all sides before it chooses its next scale.
        scaler = self.accelerator.scaler
        if scaler is not None:
            for name in trained:
                scaler.unscale_(self.optimizers[name])
        norms: dict[str, torch.Tensor] = {}
        for name, model in trained.items():
            parts = gathered_state(gradient_norms(self.accelerator.unwrap_model(model), name))
            total = torch.linalg.vector_norm(torch.stack(list(parts.values())))
            nn.utils.clip_grads_with_norm_(model.parameters(), self.max_grad_norm, total)
            norms |= {f"{name}/grad_norm": total, **parts}
        # The one time in a step that the host waits for the device.
        finite = bool(torch.stack([norms[f"{name}/grad_norm"] for name in trained]).isfinite().all())
        for name in trained:
            if finite:
                self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        if scaler is not None:
            scaler.update()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        return norms if finite else {}

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        """Towards the weights; faster at a phase's start, that the weights it began with are soon forgotten."""
        done = step - self.schedule.starts[self.schedule.phase_number(step)]
        rate = 1.0 - min(self.encoder_ema, (1 + done) / (10 + done))
        for averaged, parameter in zip(self.average.parameters(), self.unwrapped_encoder.parameters(), strict=True):
            averaged.lerp_(parameter, rate)

    # --- State ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs beside its arguments and the step number, whole; all processes must call it."""
        scaler = self.accelerator.scaler
        centre = {} if self.teacher_mean is None else {"teacher_mean": self.teacher_mean.cpu()}
        average = {} if self.average is None else {"average": gathered_state(self.average.state_dict())}
        return {
            **average,
            "encoder": gathered_state(self.unwrapped_encoder.state_dict()),
            "tokenizer": gathered_state(self.unwrapped_tokenizer.state_dict()) | centre,
            "optimizers": {
                name: gathered_state(optimizer.state_dict()) for name, optimizer in self.optimizers.items()
            },
            "levels": self.levels.state_dict(),
            "target": self.unwrapped_encoder.config.target,
            **{name: getattr(self.unwrapped_tokenizer.config, name) for name in OF_FIRST_TOKENIZER},
            "gradient_scaler": None if scaler is None else scaler.state_dict(),
            "lengths": list(self.schedule.lengths),
            "plateau": self.plateau and self.plateau.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go back to `state`, saved before optimizer step `step`."""
        self.schedule.lengths = list(state.get("lengths", self.schedule.lengths))
        self.tokenizer = self._build(BridleTokenizerModel, self._saved_tokenizer_config(state), phase=0)
        encoder_config = self._encoder_config(state.get("target", self.encoder_config.target))
        self.encoder = self._build(BridleForPreTraining, encoder_config, phase=0)
        self.encoder.load_state_dict(state["encoder"])
        self.levels.load_state_dict(state.get("levels", self.levels.state_dict()))
        average = state.get("average")
        self.average = None if average is None else self._averaged(average)
        weights = dict(state["tokenizer"])
        centre = weights.pop("teacher_mean", None)
        self.teacher_mean = None if centre is None else centre.to(self.accelerator.device)
        self.tokenizer.load_state_dict(weights)
        # Between phases there is nothing more to load: the next one begins with optimizers of its own.
        if step < self.schedule.total_steps and step not in self.schedule.starts:
            self.average = None
            self._dismiss_teacher(self.schedule.phase_number(step))
            self.prepare(self.schedule.phase_number(step), average)
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(sharded_like(optimizer, state["optimizers"][name]))
            if self.plateau is not None:
                self.plateau.load_state_dict(state["plateau"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]

    def _saved_tokenizer_config(self, state: dict[str, Any]) -> BridleTokenizerConfig:
        if state["tokenizer_type"] == "kmeans":
            return self.kmeans_config()
        fields_ = {name: state[name] for name in OF_FIRST_TOKENIZER if name in state}
        return BridleTokenizerConfig.from_dict(self.tokenizer_config.to_dict() | fields_)


def first_tokenizer_config(config: BridleTokenizerConfig, given: BridleTokenizerConfig) -> BridleTokenizerConfig:
    """That of a `given` tokenizer on the grid of the run, whose own tokenizers are of `config`."""
    return BridleTokenizerConfig.from_dict(
        config.to_dict() | {name: getattr(given, name) for name in OF_FIRST_TOKENIZER}
    )


def taught_tokenizer_config(config: BridleTokenizerConfig, teacher: Teacher) -> BridleTokenizerConfig:
    """That of a tokenizer which estimates the features of a given teacher."""
    return BridleTokenizerConfig.from_dict(config.to_dict() | {"teacher_hidden_size": teacher.hidden_size})


def start_from(model: BridlePreTrainedModel, source: BridlePreTrainedModel) -> None:
    """Give `model` the weights of one of the same sizes; tables of positions go to its grid."""
    weights = source.state_dict()
    for name, positions in source.named_modules():
        if isinstance(positions, BridlePositions) and positions.stored:
            weights[f"{name}.table"] = positions(model.config.patch_grid, interpolate=True)[0]
    model.load_state_dict(weights)


def _mix(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(
        np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1
    )
