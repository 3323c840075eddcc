"""Encoder and tokenizer trained in turns: what each phase of a schedule sets up, and what its steps do."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bridle_hf import (
    BridleConfig,
    BridleForPreTraining,
    BridleTokenizerConfig,
    BridleTokenizerModel,
    teacher_hidden_states,
)
from bridle_hf.common.errors import MAX_SKIPPED_IN_A_ROW, NonFiniteError
from bridle_hf.encoder_bridle import BridleDropPath
from bridle_hf.interleaving.gradients import gradient_norms
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.interleaving.sharding import gathered_state, sharded, sharded_like
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask
from bridle_hf.quantization_bridle import count_codes, gather_rows


# More vectors than the k-means asks for make better codes; more than this cost time and memory for little.
KMEANS_VECTORS_PER_CODE = 64


class Interleaving:
    """The two models, their optimizers, and what a step of each phase does.

    Args:
        accelerator: Device, precision and processes.
        encoder_config, tokenizer_config: What is built at the start of a phase; `tokenizer_config` is that of the
            self-distilled tokenizer, from which the random projection of iteration 0 follows.
        micro_batch_size: Samples of this process per forward; the gradients of a batch are accumulated over them.
        shard: Each process holds a part of what is trained, of its gradients and of its optimizer (FSDP2). What is
            frozen, and the codebooks, are whole in each.

    Raises:
        ValueError: `shard` with fp16, whose gradient scaler would see another part in each process.
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
        shard: bool = False,
    ):
        if shard and accelerator.mixed_precision == "fp16":
            raise ValueError("--mixed_precision is fp16: models that are sharded (FSDP) are trained in bf16 or no")
        self.accelerator, self.schedule, self.seed = accelerator, schedule, seed
        self.encoder_config, self.tokenizer_config = encoder_config, tokenizer_config
        self.micro_batch_size = micro_batch_size
        self.adam_options = {"betas": tuple(adam_betas), "weight_decay": weight_decay}
        self.max_grad_norm = max_grad_norm or math.inf
        self.gradient_checkpointing = gradient_checkpointing
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,)) if shard else None
        self.input_name = INPUT_NAMES[encoder_config.modality]
        self.encoder: nn.Module = self._build(BridleForPreTraining, encoder_config, phase=0)
        self.tokenizer: nn.Module | None = None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.skipped_steps = self.skipped_in_a_row = 0

    # -- phases -------------------------------------------------------------------------------------------------------

    def enter_phase(self, number: int, peek: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Set up phase `number`: fresh models where it asks for them, k-means, optimizers.

        Args:
            peek: Gives the batches that the phase is about to see; they are not consumed.
        """
        phase = self.schedule.phases[number]
        fresh = phase.start == "fresh"
        self.seed_step(self.schedule.starts[number])
        if phase.trains_encoder and fresh:
            self.encoder = self._build(BridleForPreTraining, self.encoder_config, phase=number)
        if phase.trains_tokenizer and (fresh or not self._is_distilled()):
            self.tokenizer = self._build(BridleTokenizerModel, self.tokenizer_config, phase=number)
            self._initialize_codebooks(peek())
        elif self.tokenizer is None:
            config = self.random_projection_config()
            self.tokenizer = self._build(BridleTokenizerModel, config, phase=number)
            self._initialize_codebooks(peek())
        self.prepare(number)

    def prepare(self, number: int) -> None:
        """Freeze what phase `number` does not train, wrap what it does, and give it a new optimizer."""
        phase = self.schedule.phases[number]
        self.accelerator.free_memory()
        self.encoder, self.tokenizer = self.whole_models()
        self.optimizers = {}
        # Once per optimizer step, when all micro batches have been seen and the gradient is known to be finite.
        self.tokenizer.quantizer.update_in_forward = False
        self.encoder.requires_grad_(phase.trains_encoder)
        self.tokenizer.requires_grad_(phase.trains_tokenizer)
        if phase.trains_encoder:
            self.encoder, self.optimizers["encoder"] = self._trained(self.encoder)
        if phase.trains_tokenizer:
            self.tokenizer, self.optimizers["tokenizer"] = self._trained(self.tokenizer)

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

    def whole_models(self) -> tuple[BridleForPreTraining, BridleTokenizerModel]:
        """Encoder and tokenizer as plain modules, for use beside the training; all processes must call it."""
        return self._whole_model(self.unwrapped_encoder), self._whole_model(self.unwrapped_tokenizer)

    def _whole_model(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return model
        whole = self._build(type(model), model.config, phase=0)
        whole.load_state_dict(gathered_state(model.state_dict()))
        return whole

    def _is_distilled(self) -> bool:
        return self.tokenizer is not None and self.unwrapped_tokenizer.config.tokenizer_type == "self_distilled"

    def _build(self, model_class: type, config: Any, phase: int) -> nn.Module:
        # Weights depend on seed and phase alone, whatever ran before.
        with torch.random.fork_rng(devices=[]):  # they are drawn on the CPU
            torch.manual_seed(_mix(self.seed, phase, 1))
            model = model_class(config)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.accelerator.device)

    def _trained(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        for name, parameter in model.named_parameters():
            # A softmax does not see these: their gradient is rounding noise, of which Adam would make full steps.
            if name.endswith(("k_proj.bias", "position_bias.3.bias")):
                parameter.requires_grad_(False)
        wrapped = self.accelerator.prepare(model) if self.mesh is None else sharded(model, self.mesh)
        # Decay on matrices alone: not on biases, norms, tokens.
        decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() == 2]
        others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() != 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return wrapped, torch.optim.AdamW(groups, lr=0.0, **self.adam_options)

    @torch.no_grad()
    def _initialize_codebooks(self, batches: Iterable[dict[str, Any]]) -> None:
        """k-means on the latents of as many of the batches as it takes; the same for any number of processes."""
        tokenizer = self.unwrapped_tokenizer.eval()
        codebook_size = tokenizer.config.codebook_size
        wanted = max(tokenizer.quantizer.vectors_for_initialization, KMEANS_VECTORS_PER_CODE * codebook_size)
        gathered: list[torch.Tensor] = []
        for batch in batches:
            rows = []
            for inputs, attention_mask, _ in self._micro_batches(batch):
                latent = tokenizer.latents(inputs, attention_mask)
                real = None if attention_mask is None else patch_attention_mask(attention_mask, tokenizer.config)
                rows.append(latent.flatten(0, 1) if real is None else latent[real])
            # Batch by batch, so that rows stand in the order of the data, however many ranks share a batch.
            gathered.append(gather_rows(torch.cat(rows).float()))
            if sum(map(len, gathered)) >= wanted:
                break
        vectors = torch.cat(gathered)
        vectors = vectors[torch.randperm(len(vectors), device=vectors.device)[:wanted]]
        # The quantizer gathers, too: all vectors come from rank 0.
        tokenizer.quantizer.initialize(vectors if self.accelerator.is_main_process else vectors[:0])

    # -- steps --------------------------------------------------------------------------------------------------------

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
            NonFiniteError: The 20th step in a row whose gradient is not finite.
        """
        sides = self.schedule.sides(step)
        self._set_learning_rates(step)
        sums: dict[str, torch.Tensor] = {}
        latents: list[torch.Tensor] = []
        micro_batches = list(self._micro_batches(batch))
        shares = self._shares(micro_batches)
        trained = [model for model, on in zip((self.encoder, self.tokenizer), sides) if on]
        for number, micro_batch in enumerate(micro_batches):
            self.seed_step(step)
            self._place(trained, batch, number)
            with self._synchronized(trained, last=number + 1 == len(micro_batches)):
                loss, metrics = self._losses(step, micro_batch, shares[number], sides, latents)
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
        if latents:
            self.seed_step(step)
            sums["usage/reseeded"] = self.unwrapped_tokenizer.quantizer.update(torch.cat(latents))
        return sums | norms

    def _shares(self, micro_batches: list[tuple]) -> torch.Tensor:
        """(micro batches, 2): what each holds of the hidden and of the real patches of all processes' batch.

        Times the number of processes, because gradients are averaged over them.
        """
        counts = []
        for _, attention_mask, bool_masked_pos in micro_batches:
            real = torch.ones_like(bool_masked_pos, dtype=torch.bool)
            if attention_mask is not None:
                real = patch_attention_mask(attention_mask, self.encoder_config)
            counts.append(torch.stack([(bool_masked_pos.bool() & real).sum(), real.sum()]))
        counts = torch.stack(counts).float()
        return counts * self.accelerator.num_processes / self.accelerator.reduce(counts.sum(dim=0), "sum")

    def _losses(
        self,
        step: int,
        micro_batch: tuple,
        shares: torch.Tensor,
        sides: tuple[bool, bool],
        latents: list[torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of a micro batch times its shares; what the tokenizer quantized is added to `latents`."""
        inputs, attention_mask, bool_masked_pos = micro_batch
        loss, metrics, counts = torch.zeros((), device=inputs.device), {}, None
        phase = self.schedule.phases[self.schedule.phase_number(step)]
        with self.accelerator.autocast():
            # First: with gradient checkpointing, the encoder's layers run again in the mode that they are left in.
            teacher = self._teacher(inputs, attention_mask) if sides[1] else None
            if sides[0]:
                codes = self.unwrapped_tokenizer.encode(inputs, attention_mask, soft=True)
                self.encoder.train()
                output = self.encoder(inputs, attention_mask, bool_masked_pos=bool_masked_pos, labels=codes)
                loss = loss + output.loss * shares[0]
                metrics |= {"encoder/loss": output.loss * shares[0], "encoder/accuracy": output.accuracy * shares[0]}
                counts = self._count(codes, attention_mask)
            if sides[1]:
                self.tokenizer.train()
                output = self.tokenizer(inputs, attention_mask, teacher_hidden_states=teacher)
                weight = phase.tokenizer_loss_weight if phase.train == "joint" else 1.0
                loss = loss + output.loss * shares[1] * weight
                metrics |= {
                    "tokenizer/loss": output.loss * shares[1],
                    "tokenizer/cosine_loss": output.cosine_loss * shares[1],
                    "tokenizer/codebook_loss": output.codebook_loss * shares[1],
                    "usage/quantization_error": output.usage.quantization_error * shares[1],
                }
                latents.append(output.latents)
                counts = output.counts
        return loss, metrics | {"counts": counts}

    def _teacher(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        encoder = self.unwrapped_encoder.bridle.eval()
        return teacher_hidden_states(encoder, inputs, attention_mask, self.tokenizer_config.teacher_layers)

    def _count(self, codes: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        rows = codes[..., 0].flatten(0, 1)
        if attention_mask is not None:
            rows = rows[patch_attention_mask(attention_mask, self.encoder_config).flatten()]
        return count_codes(rows, self.encoder_config.codebook_size)

    def _micro_batches(self, batch: dict[str, Any]) -> Iterable[tuple]:
        """(inputs, attention_mask, bool_masked_pos) on the device; a mask that marks no padding becomes `None`."""
        inputs, attention_mask = batch[self.input_name], batch.get("attention_mask")
        # Decided on the CPU, where the batch still is, and alike in every micro batch.
        padded = attention_mask is not None and not bool(attention_mask.all())
        size = self.micro_batch_size or len(inputs)
        for start in range(0, len(inputs), size):
            tensors = (inputs, attention_mask if padded else None, batch["bool_masked_pos"])
            yield tuple(
                None if tensor is None else tensor[start : start + size].to(self.accelerator.device, non_blocking=True)
                for tensor in tensors
            )

    def _place(self, trained: list[nn.Module], batch: dict[str, Any], number: int) -> None:
        """Tell stochastic depth which samples of all processes' batch micro batch `number` of this process holds."""
        own = len(batch[self.input_name])
        first = self.accelerator.process_index * own + number * (self.micro_batch_size or own)
        for model in trained:
            for module in model.modules():
                if isinstance(module, BridleDropPath):
                    module.rows = first, own * self.accelerator.num_processes

    def _synchronized(self, trained: list[nn.Module], last: bool) -> Any:
        """Exchange gradients in the last micro batch alone; sharded, a process has no room for whole gradients."""
        stack = contextlib.ExitStack()
        if not last and self.mesh is None:
            for model in trained:
                stack.enter_context(self.accelerator.no_sync(model))
        return stack

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
            parts = gathered_state(gradient_norms(model, name))
            total = torch.linalg.vector_norm(torch.stack(list(parts.values())))
            nn.utils.clip_grads_with_norm_(model.parameters(), self.max_grad_norm, total)
            norms |= {f"{name}/grad_norm": total, **parts}
        finite = all(bool(torch.isfinite(norms[f"{name}/grad_norm"])) for name in trained)
        for name in trained:
            if finite:
                self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        if scaler is not None:
            scaler.update()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        return norms if finite else {}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs beside its arguments and the step number, whole; all processes must call it."""
        scaler = self.accelerator.scaler
        return {
            "encoder": gathered_state(self.unwrapped_encoder.state_dict()),
            "tokenizer": gathered_state(self.unwrapped_tokenizer.state_dict()),
            "optimizers": {
                name: gathered_state(optimizer.state_dict()) for name, optimizer in self.optimizers.items()
            },
            "tokenizer_type": self.unwrapped_tokenizer.config.tokenizer_type,
            "gradient_scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go back to `state`, saved before optimizer step `step`."""
        distilled = state["tokenizer_type"] == "self_distilled"
        config = self.tokenizer_config if distilled else self.random_projection_config()
        self.tokenizer = self._build(BridleTokenizerModel, config, phase=0)
        self.unwrapped_encoder.load_state_dict(state["encoder"])
        self.tokenizer.load_state_dict(state["tokenizer"])
        # Between phases there is nothing more to load: the next one begins with optimizers of its own.
        if step < self.schedule.total_steps and step not in self.schedule.starts:
            self.prepare(self.schedule.phase_number(step))
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(sharded_like(optimizer, state["optimizers"][name]))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def _mix(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(
        np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1
    )
