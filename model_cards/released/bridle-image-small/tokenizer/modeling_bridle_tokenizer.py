"""Tokenizer model: patches to codes, by a random projection, by an encoder distilled from a teacher, by k-means."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_bridle import BridleTokenizerConfig
from .encoder_bridle import BridleLayer
from .masking_bridle import visible_patches
from .modeling_bridle import BridleModel, BridlePreTrainedModel
from .patching_bridle import (
    BridlePositions,
    check_mask_shape,
    mask_rows,
    parameter_dtype,
    patch_attention_mask,
    patch_grid_of,
    patchify,
    select_input,
    silence_padding,
    take_patches,
)
from .quantization_bridle import (
    BridleResidualQuantizer,
    CodebookStatistics,
    CodebookUsage,
    QuantizerOutput,
    broadcast,
)


@dataclass
class BridleTokenizerOutput(ModelOutput):
    """Output of [`BridleTokenizerModel`].

    Args:
        loss: `cosine_loss + codebook_loss`, where a teacher was given; else `codebook_loss`.
        cosine_loss: mean over real patches of 1 - cos(teacher, estimate).
        codebook_loss: `L_cb` of the residual quantizer.
        codes: (batch, patches, num_codebooks) int64; 0 at padded patches.
        usage: [`CodebookUsage`] of this batch; `counts` (num_codebooks, codebook_size) to sum over many.
        estimate: (batch, patches, teacher_hidden_size), the estimator's output; where a teacher was given.
        statistics: [`CodebookStatistics`] of this batch, in training mode: for [`BridleResidualQuantizer.update`].
        hidden_states, attentions: of the tokenizer's encoder, on request; a random projection has neither.
    """

    loss: torch.FloatTensor | None = None
    cosine_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    usage: CodebookUsage | None = None
    counts: torch.FloatTensor | None = None
    estimate: torch.FloatTensor | None = None
    statistics: CodebookStatistics | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BridleRandomProjection(nn.Module):
    """Patches, normalised one by one, through a frozen random linear map (iteration 0, "cold start")."""

    def __init__(self, config: BridleTokenizerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.positions = BridlePositions(config, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.code_dim, bias=False)
        self.requires_grad_(False)

    # Weights come back from `from_pretrained` with `requires_grad` set: what keeps them frozen is this no_grad.
    @torch.no_grad()
    def forward(self, values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, patches, code_dim); autocast is off, because half precision flips codes."""
        with torch.autocast(device_type=values.device.type, enabled=False):
            embedded = self.embedding(target_patches(values, attention_mask, self.config).to(parameter_dtype(self)))
            if self.config.add_position_to_projection:
                embedded = embedded + self.positions(patch_grid_of(values, self.config)).to(embedded.dtype)
            return self.projection(embedded)


def target_patches(
    values: torch.Tensor, attention_mask: torch.Tensor | None, config: BridleTokenizerConfig
) -> torch.Tensor:
    """Patches as targets, (batch, patches, patch_dim): normalised one by one where the config says so."""
    patches, _ = patchify(silence_padding(values, attention_mask), config)
    return F.layer_norm(patches.float(), patches.shape[-1:], eps=1e-6) if config.normalize_target_patches else patches


class BridleEstimator(nn.Module):
    """From quantized latents back to the teacher's features."""

    def __init__(self, config: BridleTokenizerConfig):
        super().__init__()
        self.config = config
        width = config.estimator_hidden_size
        self.embed = nn.Linear(config.code_dim, width, bias=config.modality != "video")
        self.positions = BridlePositions(config, width)
        self.layers = nn.ModuleList(
            BridleLayer(config, width, config.estimator_num_attention_heads, config.estimator_intermediate_size)
            for _ in range(config.estimator_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.teacher_hidden_size)

    def forward(
        self,
        quantized: torch.Tensor,
        grid: tuple[int, ...],
        real: torch.Tensor | None,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, patches, code_dim) -> (batch, patches, teacher_hidden_size), of all patches of the grid or of those
        of `indices` (batch, patches)."""
        hidden_states = self.embed(quantized.to(parameter_dtype(self)))
        positions = self.positions(grid)
        if indices is not None:
            positions = take_patches(positions.expand(len(indices), -1, -1), indices)
        hidden_states = hidden_states + positions.to(hidden_states.dtype)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=real)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.head(self.layernorm(hidden_states))


class BridleStandardization(nn.Module):
    """Features with the mean and the deviation of each number taken out, as they were when it was fitted."""

    def __init__(self, config: BridleTokenizerConfig):
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("deviation", torch.ones(config.hidden_size, dtype=torch.float32))

    def reset(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.deviation)

    @torch.no_grad()
    def fit(self, features: torch.Tensor) -> None:
        """On (vectors, hidden), those of rank 0 for all ranks."""
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(features.std(dim=0, correction=0).clamp(min=1e-6))
        broadcast(self.mean)
        broadcast(self.deviation)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to the same."""
        return (features - self.mean) / self.deviation


class BridleTokenizerModel(BridlePreTrainedModel):
    """Patches to codes, and, while it is trained, codes to the teacher's features (the tokenizer phase)."""

    config_class = BridleTokenizerConfig
    base_model_prefix = "tokenizer"
    # What is not trained has no layers whose activations could be computed anew; see `__init__`.
    supports_gradient_checkpointing = False
    _keep_in_fp32_modules_strict = ["quantizer.codebooks", "quantizer.cluster_size", "quantizer.cluster_sum",
                                     "standardization"]  # fmt: skip

    def __init__(self, config: BridleTokenizerConfig):
        super().__init__(config)
        self.supports_gradient_checkpointing = self.is_trained
        if not self.has_encoder:
            self.random_projection = BridleRandomProjection(config)
        elif not self.is_trained:
            self.encoder, self.standardization = BridleModel(config), BridleStandardization(config)
        else:
            self.encoder = BridleModel(config)
            self.projection = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, config.code_dim),
            )
            self.estimator = BridleEstimator(config)
        self.quantizer = BridleResidualQuantizer(config)
        self.post_init()

    @property
    def is_trained(self) -> bool:
        """Whether it is distilled from a teacher; a random projection or k-means has nothing that is trained."""
        return self.config.tokenizer_type == "self_distilled"

    @property
    def has_encoder(self) -> bool:
        return self.config.tokenizer_type != "random_projection"

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings() if self.has_encoder else self.random_projection.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.has_encoder:
            self.encoder.set_input_embeddings(value)
        else:
            self.random_projection.embedding = value

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        if not self.has_encoder:
            return {"projection": list(self.random_projection.parameters())}
        if not self.is_trained:
            return self.encoder.parameters_by_part()
        return {
            **self.encoder.parameters_by_part(),
            "projection": list(self.projection.parameters()),
            "estimator": list(self.estimator.parameters()),
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BridleResidualQuantizer | BridleStandardization):
            module.reset()

    def latents(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What is quantized, `z`: (batch, patches, code_dim)."""
        return self._encode(inputs, attention_mask)[0]

    def _encode(
        self, inputs: torch.Tensor, attention_mask: torch.Tensor | None, **options
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """`z`, and what the encoder returns, nothing where there is none."""
        if not self.has_encoder:
            return self.random_projection(inputs, attention_mask), BaseModelOutputWithPooling()
        if not self.is_trained:
            # As of a random projection: autocast would flip codes.
            with torch.autocast(device_type=inputs.device.type, enabled=False):
                features = teacher_features(self.encoder, inputs, attention_mask, self.config.teacher_layers)
                return self.standardization(features.float()), BaseModelOutputWithPooling()
        encoded = self.encoder(inputs, attention_mask, **options)
        return self.projection(encoded.last_hidden_state[:, int(self.config.use_class_token) :]), encoded

    @torch.no_grad()
    def encode(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        soft: bool = False,
        **named_input: torch.Tensor,
    ) -> torch.Tensor:
        """Codes of every patch; the codebooks do not move.

        Args:
            inputs: the modality's input by position, or by its name (`input_values`, `pixel_values`,
                `pixel_values_videos`).
            soft: return the `config.num_soft_codes` nearest codes of each level instead of the nearest.

        Returns:
            (batch, patches, num_codebooks) int64, with `soft` (batch, patches, num_codebooks, num_soft_codes).
            Padded patches have code 0.
        """
        values = select_input(self.config, inputs, **named_input)
        # Module by module: a frozen encoder may be in eval mode within a tokenizer that is training.
        modes = {module: module.training for module in self.modules()}
        try:
            self.eval()
            latents = self.latents(values, attention_mask)
            quantized = self.quantizer(latents.flatten(0, 1))
        finally:
            for module, training in modes.items():
                module.training = training
        codes = quantized.soft_codes if soft and self.config.num_soft_codes > 1 else quantized.codes
        codes = codes.unflatten(0, latents.shape[:2])
        if attention_mask is not None:
            real = patch_attention_mask(attention_mask, self.config)
            codes = codes * real.view(*real.shape, *[1] * (codes.dim() - 2))
        return codes[..., None] if soft and self.config.num_soft_codes == 1 else codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Quantized features of codes: (batch, patches, num_codebooks) int64 -> (batch, patches, code_dim)."""
        if codes.shape[-1] != self.config.num_codebooks:
            raise ValueError(
                f"`codes` hold {codes.shape[-1]} codebooks, the tokenizer has {self.config.num_codebooks}"
            )
        return self.quantizer.decode(codes)

    @can_return_tuple
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        teacher_hidden_states: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        num_visible: int | None = None,
        **kwargs,
    ) -> BridleTokenizerOutput:
        """Quantize, estimate the teacher's features, and, in training mode, move the codebooks.

        Args:
            inputs, attention_mask, input_values, pixel_values, pixel_values_videos: as in [`BridleModel.forward`].
            teacher_hidden_states: (batch, patches, teacher_hidden_size), see [`teacher_features`].
            bool_masked_pos, num_visible: (batch, patches) bool, True = left out, and how many are not, as in
                [`BridleModel.forward`]. Codes, estimate and teacher are then of the other patches, in grid order;
                a row that has fewer than another is padded with code 0.

        Raises:
            ValueError: a mask that does not fit the input; a teacher for a random projection, or features that do not
                fit the patches.
        """
        values = select_input(self.config, inputs, input_values, pixel_values, pixel_values_videos)
        quantized, grid, real, indices, encoded = self._quantize(
            values, attention_mask, bool_masked_pos, num_visible, **kwargs
        )
        output = BridleTokenizerOutput(
            loss=quantized.loss,
            codebook_loss=quantized.loss,
            codes=quantized.codes,
            usage=quantized.usage,
            counts=quantized.counts,
            statistics=quantized.statistics,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if teacher_hidden_states is not None:
            self._check_teacher(teacher_hidden_states, quantized.codes)
            output.estimate = self.estimator(quantized.quantized, grid, real, indices)
            output.cosine_loss = self._cosine_loss(output.estimate, teacher_hidden_states, real)
            output.loss = output.cosine_loss + output.codebook_loss
        return output

    def _quantize(
        self,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None = None,
        num_visible: int | None = None,
        **options,
    ) -> tuple[QuantizerOutput, tuple[int, ...], torch.Tensor | None, torch.Tensor | None, BaseModelOutputWithPooling]:
        """The quantizer's output laid out as (batch, patches, ...), the grid, which patches are real, which of the
        grid they are (`None`: all), the encoder's output."""
        grid, indices = patch_grid_of(values, self.config), None
        real = None if attention_mask is None else patch_attention_mask(attention_mask, self.config)
        if bool_masked_pos is not None:
            check_mask_shape("bool_masked_pos", bool_masked_pos, len(values), grid)
            indices, real = visible_patches(mask_rows(~bool_masked_pos.bool(), real), num_visible)
            real = real if num_visible is None else None
            options |= {"bool_masked_pos": bool_masked_pos, "num_visible": num_visible}
        latents, encoded = self._encode(values, attention_mask, **options)
        if indices is not None and not self.is_trained:
            latents = take_patches(latents, indices)  # a random projection is of all patches
        # Padding must neither be counted nor move the codes.
        quantized = self.quantizer(latents.flatten(0, 1) if real is None else latents[real])
        for name in ("quantized", "codes", "soft_codes"):
            rows = quantized.get(name)
            if rows is not None and real is not None:
                quantized[name] = rows.new_zeros(*real.shape, *rows.shape[1:]).masked_scatter(
                    real.view(*real.shape, *[1] * (rows.dim() - 1)), rows
                )
            elif rows is not None:
                quantized[name] = rows.unflatten(0, latents.shape[:2])
        return quantized, grid, real, indices, encoded

    def _check_teacher(self, teacher: torch.Tensor, codes: torch.Tensor) -> None:
        if not self.is_trained:
            kind = self.config.tokenizer_type.replace("_", "-")
            raise ValueError(f"a {kind} tokenizer is not trained: pass no `teacher_hidden_states`")
        expected = (*codes.shape[:2], self.config.teacher_hidden_size)
        if tuple(teacher.shape) != expected:
            raise ValueError(
                f"`teacher_hidden_states` has shape {tuple(teacher.shape)}, expected {expected}: one row per patch, "
                "class token dropped"
            )

    @staticmethod
    def _cosine_loss(estimate: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        distance = 1.0 - F.cosine_similarity(teacher.float(), estimate.float(), dim=-1)
        return distance.mean() if real is None else distance[real].mean()


@torch.no_grad()
def teacher_features(
    encoder: BridleModel,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    layers: list[int] | None = None,
    bool_masked_pos: torch.Tensor | None = None,
    num_visible: int | None = None,
) -> torch.Tensor:
    """The teacher of the tokenizer phase: features of the unmasked input, class token dropped.

    Args:
        layers: indices into the encoder's `hidden_states` (0 is the embedding, -1 the last layer), each standardised
            token by token and averaged; `None` takes the encoder's output as it is (paper).
        bool_masked_pos, num_visible: (batch, patches) bool, True = left out, as in [`BridleModel.forward`]; features
            are then of the other patches.

    Returns:
        (batch, patches, hidden).
    """
    dropout = {"bool_masked_pos": bool_masked_pos, "num_visible": num_visible}
    outputs = encoder(inputs, attention_mask, output_hidden_states=layers is not None, **dropout)
    first = int(encoder.config.use_class_token)
    if layers is None:
        return outputs.last_hidden_state[:, first:]
    states = [outputs.hidden_states[layer][:, first:].float() for layer in layers]
    return sum(F.layer_norm(state, state.shape[-1:]) for state in states) / len(states)


__all__ = ["BridleTokenizerModel", "BridleTokenizerOutput", "target_patches", "teacher_features"]
