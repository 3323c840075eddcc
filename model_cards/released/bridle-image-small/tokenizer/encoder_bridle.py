"""Transformer layers: the plain pre-norm layer of encoder, estimator and plain decoder, and the Swin-v2 layer."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_bridle import BridleEncoderConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that returns its weights. (batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def eager_config(config: BridleEncoderConfig) -> BridleEncoderConfig:
    """A config with eager attention, the only one that gives its weights: for calls with `output_attentions`."""
    if config._attn_implementation == "eager":
        return config
    config = copy.copy(config)
    config._attn_implementation = "eager"
    return config


class BridleAttention(nn.Module):
    """Multi-head attention through transformers' attention interface (eager, SDPA, flash, flex).

    Of tokens to themselves, or, with `context_size`, to a context of that width.
    """

    is_causal = False

    def __init__(self, config: BridleEncoderConfig, hidden_size: int, num_heads: int, context_size: int | None = None):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(context_size or hidden_size, hidden_size, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(context_size or hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    @property
    def unseen_bias(self) -> nn.Parameter | None:
        """Shifts all scores of a query alike, which a softmax does not see."""
        return self.k_proj.bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context = hidden_states if context is None else context
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(hidden_states), self.k_proj(context), self.v_proj(context))
        )
        config = eager_config(self.config) if kwargs.get("output_attentions") else self.config
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def made_anew(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, of which the backward keeps `tensors` alone, and makes the rest once more.

    But for what comes last: of a `function` that ends with a linear layer, its product is not computed again.
    """
    return checkpoint(function, *tensors, use_reentrant=False) if torch.is_grad_enabled() else function(*tensors)


class BridleMLP(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        spare_memory: compute the activation again in the backward in place of keeping it: of a wide input that is a
            quarter of a layer's memory, for one to two hundredths of its time.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, spare_memory: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[activation]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.spare_memory = spare_memory

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        return made_anew(self._second, hidden_states) if self.spare_memory else self._second(hidden_states)

    def _second(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(hidden_states))


class BridleDropPath(nn.Module):
    """Drops a residual branch for a whole sample while training (stochastic depth).

    `rows` (indices, of): which rows of a larger batch the next one holds, and how many that has. What is drawn is that
    of the larger one, so that a sample's fate does not depend on how it is cut; `None`: the batch is the whole.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.rows: tuple[torch.Tensor, int] | None = None

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        rows, of = self.rows or (slice(None), branch.shape[0])
        draws = torch.rand(of, device=branch.device)[rows]
        keep = (draws >= self.rate).view(-1, *[1] * (branch.dim() - 1))
        return branch * keep.to(branch.dtype) / (1.0 - self.rate)


class BridleLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(
        self,
        config: BridleEncoderConfig,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = BridleAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = BridleMLP(hidden_size, intermediate_size, config.hidden_act)
        self.drop_path = BridleDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class _UnitVectors(torch.autograd.Function):
    """`F.normalize` along the last axis, which keeps its result for the backward and not its input, too."""

    @staticmethod
    def forward(ctx, vectors: torch.Tensor) -> torch.Tensor:
        # Padding may be all zeros, and float16 rounds the default eps of `F.normalize` to zero.
        norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-6)
        unit = vectors / norms
        ctx.save_for_backward(unit, norms)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        unit, norms = ctx.saved_tensors
        return (gradient - unit * (gradient * unit).sum(dim=-1, keepdim=True)) / norms


class BridleSwinAttention(nn.Module):
    """Cosine attention within windows, with a log-spaced continuous position bias (Swin v2, arXiv 2111.09883).

    The bias rules out transformers' attention interface, and, because it is learned, torch's fused kernels while it is
    trained. So it is written out, with as little kept for the backward as it takes.
    """

    def __init__(self, hidden_size: int, num_heads: int, window: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        # Temperature of each head; the attention is divided by it.
        self.tau = nn.Parameter(torch.ones(num_heads))
        self.position_bias = nn.Sequential(nn.Linear(2, 384), nn.ReLU(), nn.Dropout(0.125), nn.Linear(384, num_heads))

    @property
    def unseen_bias(self) -> nn.Parameter:
        """Shifts all scores of a head alike, which a softmax does not see."""
        return self.position_bias[-1].bias

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            windows: (batch, windows, tokens of a window, hidden).
            mask: additive, broadcastable to (batch, windows, 1, tokens, tokens), or `None`.
        """
        batch, count, tokens, _ = windows.shape
        qkv = self.qkv(windows).view(batch * count, tokens, 3, self.num_heads, -1)
        # Copied one by one, so that the product of the projection can be freed.
        query, key, value = (part.contiguous() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return made_anew(partial(self._attend, windows.shape, mask), query, key, value, self._bias())

    def _attend(
        self,
        shape: torch.Size,
        mask: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        scores = _UnitVectors.apply(query) @ _UnitVectors.apply(key).transpose(2, 3)
        scores = scores / self.tau.clamp(min=0.01).to(scores.dtype)[:, None, None]
        bias = bias.to(scores.dtype)
        bias = bias if mask is None else bias + mask.to(scores.dtype)
        weights = (scores.unflatten(0, shape[:2]) + bias).flatten(0, 1).softmax(dim=-1)
        output = weights.to(value.dtype) @ value
        return self.o_proj(output.transpose(1, 2).reshape(shape))

    def _bias(self) -> torch.Tensor:
        """(heads, tokens, tokens), a function of the log-spaced offset between two tokens."""
        device, tokens = self.tau.device, self.window[0] * self.window[1]
        rows, columns = torch.meshgrid(*(torch.arange(size, device=device) for size in self.window), indexing="ij")
        positions = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
        offsets = (positions[:, None] - positions[None]).to(self.tau.dtype)
        offsets = offsets.sign() * offsets.abs().log1p()
        return self.position_bias(offsets.view(-1, 2)).t().reshape(self.num_heads, tokens, tokens)


class BridleSwinLayer(GradientCheckpointingLayer):
    """Post-norm layer whose attention is confined to windows of the (time, mel) or (height, width) grid.

    Its norms have the names of `transformers`' Swinv2Layer: there, too, `layernorm_before` comes after the attention,
    before the MLP.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str,
        window: tuple[int, int],
        shift: tuple[int, int],
    ):
        super().__init__()
        self.window, self.shift = tuple(window), tuple(shift)
        self.attention = BridleSwinAttention(hidden_size, num_heads, self.window)
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = BridleMLP(hidden_size, intermediate_size, activation, spare_memory=True)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, patches, hidden), row-major over `grid`.
            real: (batch, patches) bool, or `None` where all patches are.
        """
        windows = self._to_windows(hidden_states, grid)
        attended = self._from_windows(self.attention(windows, self._mask(grid, real, windows)), grid)
        hidden_states = hidden_states + self.layernorm_before(attended)
        return hidden_states + self.layernorm_after(self.mlp(hidden_states))

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(size + -size % window for size, window in zip(grid, self.window))

    def _to_windows(self, tensor: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, patches, dim) -> (batch, windows, tokens of a window, dim), shifted, padded to whole windows."""
        rows, columns = self._padded(grid)
        tensor = tensor.view(tensor.shape[0], *grid, -1)
        tensor = F.pad(tensor, (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
        if any(self.shift):
            tensor = tensor.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        height, width = self.window
        tensor = tensor.view(tensor.shape[0], rows // height, height, columns // width, width, -1)
        return tensor.transpose(2, 3).reshape(tensor.shape[0], -1, height * width, tensor.shape[-1])

    def _from_windows(self, windows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        rows, columns = self._padded(grid)
        height, width = self.window
        tensor = windows.view(windows.shape[0], rows // height, columns // width, height, width, -1)
        tensor = tensor.transpose(2, 3).reshape(windows.shape[0], rows, columns, -1)
        if any(self.shift):
            tensor = tensor.roll(self.shift, dims=(1, 2))
        return tensor[:, : grid[0], : grid[1]].reshape(windows.shape[0], grid[0] * grid[1], -1)

    def _mask(self, grid: tuple[int, int], real: torch.Tensor | None, windows: torch.Tensor) -> torch.Tensor | None:
        """-1e4 between tokens that the cyclic shift brought together, and towards tokens that are not real."""
        rows, columns = self._padded(grid)
        if not any(self.shift) and real is None and (rows, columns) == tuple(grid):
            return None
        # Tokens that were neighbours before the roll share a number; padding has the number 0. The shift is kept where
        # one window spans the grid, so that a short clip is decoded alone as it is in a batch with longer ones.
        device = windows.device
        region_rows = (torch.arange(grid[0], device=device) < self.shift[0]).long()
        region_columns = (torch.arange(grid[1], device=device) < self.shift[1]).long()
        regions = (1 + 2 * region_rows[:, None] + region_columns).flatten()[None, :, None]
        if real is not None:
            regions = torch.where(real[:, :, None], regions, 0)
        regions = self._to_windows(regions, grid)[..., 0]
        allowed = (regions[:, :, :, None] == regions[:, :, None, :]) & (regions[:, :, None, :] > 0)
        # Not the reference's -100, of which a `tau` near its floor of 0.01 lets something through.
        return torch.where(allowed, 0.0, -1e4)[:, :, None]


__all__ = ["BridleAttention", "BridleLayer", "BridleMLP", "BridleSwinAttention", "BridleSwinLayer"]
