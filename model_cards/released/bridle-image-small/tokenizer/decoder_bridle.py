"""Decoder of pretraining: from the encoder's features of visible patches to logits of codes; plain, Swin or cross."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_bridle import BridleConfig
from .encoder_bridle import BridleAttention, BridleLayer, BridleMLP, BridleSwinLayer
from .masking_bridle import visible_patches
from .patching_bridle import BridlePositions, take_patches


class BridleCrossLayer(GradientCheckpointingLayer):
    """Pre-norm layer whose tokens read a context by cross-attention, never each other (CrossMAE, arXiv 2401.14391).

    So what is computed of a token does not depend on which others there are.
    """

    def __init__(self, config: BridleConfig):
        super().__init__()
        width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = BridleAttention(config, width, heads, context_size=config.hidden_size)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = BridleMLP(width, config.decoder_intermediate_size, config.hidden_act, spare_memory=True)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, tokens, decoder hidden).
            context: (batch, read tokens, encoder hidden).
            attention_mask: which of `context` are real, as the attention wants it; `None` where all are.
        """
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, context)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class BridleLayerMix(nn.Module):
    """Learned mixes of several states of the encoder, one for each layer of the decoder, each normalised."""

    def __init__(self, config: BridleConfig):
        super().__init__()
        depth = config.decoder_num_hidden_layers
        self.weight = nn.Parameter(torch.empty(depth, 1 + len(config.decoder_encoder_layers)))
        self.layernorms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(depth)
        )

    def forward(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(batch, tokens, hidden) of each state to the same of each layer of the decoder."""
        mixes = torch.einsum("ls,sbth->lbth", self.weight.to(states[0].dtype), torch.stack(list(states)))
        return [norm(mix) for norm, mix in zip(self.layernorms, mixes)]


class BridleDecoder(nn.Module):
    """From visible patches' features and mask tokens to logits per codebook."""

    def __init__(self, config: BridleConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        if config.decoder_type != "cross":
            self.embed = nn.Linear(config.hidden_size, width, bias=config.modality != "video")
        self.mix = BridleLayerMix(config) if config.decoder_encoder_layers is not None else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = BridlePositions(config, width)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.decoder_num_hidden_layers))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, math.prod(config.target_shape))

    def _layer(self, index: int) -> nn.Module:
        config = self.config
        sizes = (config.decoder_hidden_size, config.decoder_num_attention_heads, config.decoder_intermediate_size)
        if config.decoder_type == "cross":
            return BridleCrossLayer(config)
        if config.decoder_type == "plain":
            return BridleLayer(config, *sizes)
        shift = config.decoder_window_shift if index % 2 else (0, 0)
        return BridleSwinLayer(*sizes, config.hidden_act, config.decoder_window_size, shift)

    def forward(
        self,
        states: Sequence[torch.Tensor],
        bool_masked_pos: torch.Tensor,
        real: torch.Tensor | None,
        grid: tuple[int, ...],
        wanted: tuple[torch.Tensor, torch.Tensor] | None,
        num_visible: int | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states: (batch, [class] + visible patches, hidden) each: those that are mixed, and the encoder's output.
            bool_masked_pos: (batch, patches) bool.
            real: (batch, patches) bool, or `None` where all patches are.
            num_visible: see [`BridleModel.forward`].
            wanted: what to predict, as of `chosen_patches`; `None`: every patch (not of a cross decoder).

        Returns:
            (batch, wanted patches, *config.target_shape); where a row wants fewer than another, what is
            behind its own means nothing.
        """
        visible = ~bool_masked_pos if real is None else ~bool_masked_pos & real
        if self.config.decoder_type == "cross":
            tokens = self._read(states, visible, grid, wanted[0], num_visible)
        else:
            tokens = self._fill_in(self.embed(states[0]), visible, real, grid, num_visible)
            tokens = tokens if wanted is None else take_patches(tokens, wanted[0])
        logits = self.head(self.layernorm(tokens))
        return logits.unflatten(-1, self.config.target_shape)

    def _read(
        self,
        states: Sequence[torch.Tensor],
        visible: torch.Tensor,
        grid: tuple[int, ...],
        indices: torch.Tensor,
        num_visible: int | None,
    ) -> torch.Tensor:
        """The tokens of the patches at `indices`, by cross-attention from each to all that the encoder has given."""
        contexts = [states[0]] * len(self.layers) if self.mix is None else self.mix(states)
        positions = self.positions(grid).to(contexts[0].dtype).expand(len(visible), -1, -1)
        tokens = self.mask_token.to(contexts[0].dtype) + take_patches(positions, indices)
        valid = None
        if num_visible is None:
            _, valid = visible_patches(visible)
            valid = F.pad(valid, (int(self.config.use_class_token), 0), value=True)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=tokens, attention_mask=valid, encoder_hidden_states=contexts[0]
        )
        for layer, context in zip(self.layers, contexts):
            tokens = layer(tokens, context, mask)
        return tokens

    def _fill_in(
        self,
        embedded: torch.Tensor,
        visible: torch.Tensor,
        real: torch.Tensor | None,
        grid: tuple[int, ...],
        num_visible: int | None,
    ) -> torch.Tensor:
        """The tokens of all patches, by layers over the visible ones and mask tokens in the places of the others."""
        first = int(self.config.use_class_token)
        tokens = self._on_grid(embedded[:, first:], visible, num_visible)
        tokens = tokens + self.positions(grid).to(tokens.dtype)
        if self.config.decoder_type == "swin":
            for layer in self.layers:
                tokens = layer(tokens, grid, real)
            return tokens
        # The class token has no position of its own.
        tokens = torch.cat([embedded[:, :first], tokens], dim=1)
        real = None if real is None else F.pad(real, (first, 0), value=True)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=tokens, attention_mask=real)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return tokens[:, first:]

    def _on_grid(self, visible_tokens: torch.Tensor, visible: torch.Tensor, num_visible: int | None) -> torch.Tensor:
        """Visible tokens at their places, mask tokens at all others."""
        indices, valid = visible_patches(visible, num_visible)
        mask_token = self.mask_token.to(visible_tokens.dtype)
        tokens = mask_token.expand(*visible.shape, -1)
        # Where a clip has fewer visible patches than another, its index points at a masked one: leave that as it is.
        visible_tokens = torch.where(valid[:, :, None], visible_tokens, mask_token)
        return tokens.scatter(1, indices[:, :, None].expand_as(visible_tokens), visible_tokens)


__all__ = ["BridleCrossLayer", "BridleDecoder", "BridleLayerMix"]
