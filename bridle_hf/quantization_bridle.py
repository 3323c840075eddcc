"""Residual vector quantization with EMA codebooks (paper, section 3; RQ-VAE, arXiv 2203.01941).

Everything here runs in float32 with autocast disabled: half precision flips codes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_bridle import BridleTokenizerConfig


LAPLACE_SMOOTHING = 1e-5  # vectors that `ema_update="smoothed_count"` adds to every code's count


@dataclass
class CodebookUsage(ModelOutput):
    """What each level of the quantizer did with one set of vectors; every field has shape (num_codebooks,).

    used_fraction: share of the codes chosen at least once.
    perplexity: exp(H) of the distribution of chosen codes.
    normalized_entropy: H / log(codebook_size).
    reseeded: dead codes re-seeded by this step.
    quantization_error: sum ||r_{q+1}||^2 / sum ||r_1||^2, what is left after level q.
    """

    used_fraction: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
    normalized_entropy: torch.FloatTensor | None = None
    reseeded: torch.LongTensor | None = None
    quantization_error: torch.FloatTensor | None = None


@dataclass
class QuantizerOutput(ModelOutput):
    """
    quantized: (vectors, code_dim) straight-through sum of the codes.
    codes: (vectors, num_codebooks) int64.
    soft_codes: (vectors, num_codebooks, num_soft_codes) int64, the nearest first; only where `num_soft_codes > 1`.
    loss: codebook loss, a scalar.
    usage: [`CodebookUsage`] of these vectors.
    counts: (num_codebooks, codebook_size), how often each code was chosen.
    latents: (vectors, code_dim), what was quantized, detached: for [`BridleResidualQuantizer.update`].
    """

    quantized: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    soft_codes: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None
    usage: CodebookUsage | None = None
    counts: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


class BridleResidualQuantizer(nn.Module):
    """A chain of codebooks, each quantizing what the ones before it left over. One codebook is VQ.

    With `independent_codebooks` each quantizes a part of the vectors of its own: its codes are 0 in all others, so
    that sums, residuals and errors mean what they do in the chain.

    In training mode a forward moves the codebooks. A loop that accumulates gradients, or that leaves out steps whose
    gradient is not finite, sets `update_in_forward = False` and calls `update` once per optimizer step.

    Buffers:
        codebooks: (num_codebooks, codebook_size, code_dim).
        cluster_size: (num_codebooks, codebook_size), moving average of how many vectors a code takes per step.
        cluster_sum: (num_codebooks, codebook_size, code_dim), moving average of their sum. Both start at zero, which
            stands for "not seen a step yet", and take the expected count at the first one.
        initialized: whether the codebooks hold anything but random numbers.
    """

    def __init__(self, config: BridleTokenizerConfig):
        super().__init__()
        self.config = config
        self.update_in_forward = True
        shape = (config.num_codebooks, config.codebook_size, config.code_dim)
        self.register_buffer("codebooks", torch.empty(shape))
        self.register_buffer("cluster_size", torch.zeros(shape[:2]))
        self.register_buffer("cluster_sum", torch.zeros(shape))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.reset()

    def reset(self) -> None:
        """Random codes of unit norm, no statistics."""
        init.normal_(self.codebooks)
        codes = torch.stack([self._own_part(q, codebook) for q, codebook in enumerate(self.codebooks)])
        init.copy_(self.codebooks, F.normalize(codes, dim=-1))
        init.zeros_(self.cluster_size)
        init.zeros_(self.cluster_sum)
        init.zeros_(self.initialized)

    def _apply(self, fn, *args, **kwargs):
        """Follow `.to(device)`, but stay in float32 under `.half()`, `.bfloat16()` and `.to(dtype)`."""
        exact = dict(self.named_buffers())
        super()._apply(fn, *args, **kwargs)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize; in training mode, also move the codebooks.

        Args:
            latents: (vectors, code_dim).

        Raises:
            ValueError: No vectors, or the wrong width.
        """
        if latents.dim() != 2 or latents.shape[1] != self.config.code_dim or latents.shape[0] == 0:
            raise ValueError(
                f"`latents` must be (vectors, {self.config.code_dim}) with at least one, got {tuple(latents.shape)}"
            )
        with torch.autocast(device_type=latents.device.type, enabled=False):
            return self._quantize(latents.float(), move=self.training and self.update_in_forward)

    @torch.no_grad()
    def update(self, latents: torch.Tensor) -> torch.Tensor:
        """Move the codebooks as a forward in training mode would; returns how many codes of each level it re-seeded.

        Args:
            latents: (vectors, code_dim), those of all micro batches of this rank.
        """
        with torch.autocast(device_type=latents.device.type, enabled=False):
            return self._quantize(latents.float(), move=True).usage.reseeded

    def _quantize(self, latents: torch.Tensor, move: bool) -> QuantizerOutput:
        raw = latents.detach()
        latents = self._normalized(latents)
        # The reference's RQ moves a level's codes before it takes the residual; all else moves all levels afterwards.
        reference_rq = self.config.ema_update != "count" and self.config.codebook_normalization == "level"
        move_within_chain = move and reference_rq
        residual, loss, levels = latents, 0.0, []
        reseeded = torch.zeros(self.config.num_codebooks, dtype=torch.long, device=latents.device)
        for q in range(self.config.num_codebooks):
            own = self._own_part(q, residual)
            vectors = self._lookup_vectors(own)
            nearest = self._nearest(q, vectors, self.config.num_soft_codes)
            if move_within_chain:
                self._move_codes(q, vectors, nearest[:, 0])
            code = F.embedding(nearest[:, 0], self.codebooks[q])
            loss = loss + self._level_loss(own, code)
            residual = residual - code
            levels.append((vectors, nearest, residual))
        if move:
            for q, (vectors, nearest, _) in enumerate(levels):
                if not move_within_chain:
                    self._move_codes(q, vectors, nearest[:, 0])
                reseeded[q] = self._reseed_dead_codes(q, vectors)
        nearest = torch.stack([level[1] for level in levels], dim=1)
        counts = count_codes(nearest[..., 0], self.config.codebook_size)
        energy = latents.detach().pow(2).sum().clamp(min=torch.finfo(torch.float32).tiny)
        errors = torch.stack([level[2].detach().pow(2).sum() for level in levels]) / energy
        return QuantizerOutput(
            # z + sg(z_hat - z), with z_hat = z - residual.
            quantized=latents - residual.detach(),
            codes=nearest[..., 0],
            soft_codes=nearest if self.config.num_soft_codes > 1 else None,
            loss=loss / self.config.num_codebooks,
            usage=codebook_usage(counts, reseeded=reseeded, quantization_error=errors),
            counts=counts,
            latents=raw,
        )

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum of the codes, (..., num_codebooks) int64 -> (..., code_dim)."""
        levels = zip(self.codebooks, codes.unbind(dim=-1), strict=True)
        return sum(F.embedding(code, codebook) for codebook, code in levels)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor, iterations: int = 20) -> None:
        """Set every codebook by k-means, level after level, on vectors gathered over all ranks.

        The k-means runs on rank 0 and its result is broadcast, so that all ranks hold the same codes.

        Args:
            latents: (vectors of this rank, code_dim); over all ranks at least `32 * codebook_size`.

        Raises:
            ValueError: Too few vectors.
        """
        with torch.autocast(device_type=latents.device.type, enabled=False):
            residual = gather_rows(latents.detach().float())
            if residual.shape[0] < self.vectors_for_initialization:
                raise ValueError(
                    f"k-means of {self.config.codebook_size} codes needs at least {self.vectors_for_initialization} "
                    f"vectors, got {residual.shape[0]}; gather more batches"
                )
            residual = self._normalized(residual)
            for q in range(self.config.num_codebooks):
                vectors = self._lookup_vectors(self._own_part(q, residual))
                if _rank() == 0:
                    codes = kmeans(vectors, self.config.codebook_size, iterations)
                    self.codebooks[q].copy_(F.normalize(codes, dim=-1) if self._unit_codes else codes)
                broadcast(self.codebooks[q])
                residual = residual - F.embedding(self._nearest(q, vectors, 1)[:, 0], self.codebooks[q])
            self.cluster_size.zero_()
            self.cluster_sum.zero_()
            self.initialized.fill_(True)

    @property
    def vectors_for_initialization(self) -> int:
        """Vectors, over all ranks, that `initialize` asks for."""
        return 32 * self.config.codebook_size

    @property
    def _unit_codes(self) -> bool:
        return self.config.unit_norm_codes or self.config.codebook_normalization == "level"

    def _normalized(self, latents: torch.Tensor) -> torch.Tensor:
        """As they enter the chain: of unit norm where the config says so, with independent codebooks part by part."""
        if self.config.codebook_normalization != "input":
            return latents
        parts = self.config.num_codebooks if self.config.independent_codebooks else 1
        return F.normalize(latents.unflatten(-1, (parts, -1)), dim=-1).flatten(-2)

    def _own_part(self, q: int, vectors: torch.Tensor) -> torch.Tensor:
        """What of (vectors, code_dim) codebook `q` quantizes: all, or with independent codebooks 0 but in its part."""
        if not self.config.independent_codebooks:
            return vectors
        width = self.config.code_dim // self.config.num_codebooks
        own = torch.zeros_like(vectors)
        own[:, q * width : (q + 1) * width] = vectors[:, q * width : (q + 1) * width]
        return own

    def _lookup_vectors(self, residual: torch.Tensor) -> torch.Tensor:
        """What the codes of a level are compared with, and moved by."""
        residual = residual.detach()
        return F.normalize(residual, dim=-1) if self.config.codebook_normalization == "level" else residual

    def _nearest(self, q: int, vectors: torch.Tensor, count: int) -> torch.Tensor:
        """(vectors, count) indices of the nearest codes, the nearest first."""
        codebook = self.codebooks[q]
        # ||v||^2 is the same for all codes of a vector and left out.
        distances = torch.addmm(codebook.pow(2).sum(dim=1), vectors, codebook.t(), alpha=-2.0)
        if count == 1:
            return distances.argmin(dim=1, keepdim=True)
        return distances.topk(count, dim=1, largest=False).indices

    def _level_loss(self, residual: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """mse(sg(r), e) + beta * mse(r, sg(e)). Codes are buffers moved by EMA: the first term has no gradient."""
        return F.mse_loss(code, residual.detach()) + self.config.commitment_weight * F.mse_loss(residual, code)

    @torch.no_grad()
    def _move_codes(self, q: int, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """One EMA step of level `q`, the same on all ranks; none where a vector of any rank is not finite."""
        codebook, size, total = self.codebooks[q], self.cluster_size[q], self.cluster_sum[q]
        before = [buffer.clone() for buffer in (codebook, size, total)]
        counts = count_codes(codes[:, None], self.config.codebook_size)[0]
        sums = torch.zeros_like(codebook).index_add_(0, codes, vectors)
        all_reduce(counts)
        all_reduce(sums)
        expected = counts.sum() / self.config.codebook_size
        first_step = size.sum() == 0
        size.copy_(torch.where(first_step, expected, size))
        total.copy_(torch.where(first_step, codebook * expected, total))

        rate = 1.0 - self.config.ema_decay
        size.lerp_(counts, rate)
        total.lerp_(sums, rate)
        if self.config.ema_update == "count":
            # A code that nobody chose for long decays in count and sum alike: the ratio must not become 0 / 0.
            tiny = torch.finfo(torch.float32).tiny
            moved = torch.where(size[:, None] > 1e-6 * expected, total / size[:, None].clamp(min=tiny), codebook)
        elif self.config.ema_update == "smoothed_count":
            smoothed = (size + LAPLACE_SMOOTHING) / (size + LAPLACE_SMOOTHING).sum() * size.sum()
            moved = total / smoothed[:, None]
        else:
            towards = F.normalize(sums / counts[:, None].clamp(min=1.0), dim=-1)
            moved = torch.where(counts[:, None] > 0, codebook.lerp(towards, rate), codebook)
        codebook.copy_(F.normalize(moved, dim=-1) if self.config.unit_norm_codes else moved)
        # Decided on the device: the host need not wait, and the reduced sums are the same on all ranks.
        finite = sums.isfinite().all()
        for buffer, old in zip((codebook, size, total), before):
            buffer.copy_(torch.where(finite, buffer, old))

    @torch.no_grad()
    def _reseed_dead_codes(self, q: int, vectors: torch.Tensor) -> torch.Tensor:
        """Give codes whose moving count fell under the threshold a current vector and fresh statistics.

        The threshold is a fraction of the expected count, so that it does not depend on the batch size. The vectors
        are drawn from those of all ranks, by rank 0. Returns how many codes there were.
        """
        if self.config.dead_code_threshold == 0:
            return torch.zeros((), dtype=torch.long, device=vectors.device)
        codebook, size, total = self.codebooks[q], self.cluster_size[q], self.cluster_sum[q]
        expected = size.sum() / self.config.codebook_size
        seeds = draw_rows(vectors, self.config.codebook_size)
        # A vector that is not finite would stay for good.
        dead = (size < self.config.dead_code_threshold * expected) & seeds.isfinite().all()
        if self._unit_codes:
            seeds = F.normalize(seeds, dim=-1)
        codebook.copy_(torch.where(dead[:, None], seeds, codebook))
        size.copy_(torch.where(dead, expected, size))
        total.copy_(torch.where(dead[:, None], codebook * expected, total))
        return dead.sum()


def count_codes(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code was chosen: (vectors, num_codebooks) int64 -> (num_codebooks, codebook_size) float32."""
    counts = torch.zeros(codes.shape[1], codebook_size, device=codes.device)
    return counts.scatter_add_(1, codes.t(), torch.ones_like(codes.t(), dtype=counts.dtype))


def codebook_usage(counts: torch.Tensor, **extra: torch.Tensor) -> CodebookUsage:
    """[`CodebookUsage`] of (num_codebooks, codebook_size) counts, which may be summed over many batches."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    return CodebookUsage(
        used_fraction=(counts > 0).float().mean(dim=1),
        perplexity=entropy.exp(),
        normalized_entropy=entropy / torch.tensor(float(max(counts.shape[1], 2))).log(),
        **extra,
    )


def kmeans(vectors: torch.Tensor, num_clusters: int, iterations: int) -> torch.Tensor:
    """Lloyd's algorithm from randomly drawn vectors; an empty cluster takes the vector that is worst represented.

    Returns:
        (num_clusters, dim) centres.
    """
    centres = vectors[torch.randperm(len(vectors), device=vectors.device)[:num_clusters]].clone()
    for _ in range(iterations):
        distances = torch.addmm(centres.pow(2).sum(dim=1), vectors, centres.t(), alpha=-2.0)
        nearest = distances.min(dim=1)
        counts = torch.bincount(nearest.indices, minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, nearest.indices, vectors)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        empty = torch.nonzero(counts == 0)[:, 0]
        worst = (nearest.values + vectors.pow(2).sum(dim=1)).topk(len(empty)).indices
        centres[empty] = vectors[worst]
    return centres


def draw_rows(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows drawn at random from the rows of all ranks, the same on every rank and for any number of ranks."""
    lengths = torch.zeros(_world_size(), dtype=torch.long, device=vectors.device)
    lengths[_rank()] = vectors.shape[0]
    all_reduce(lengths)
    drawn = (torch.rand(count, device=vectors.device, dtype=torch.float64) * lengths.sum()).long()
    broadcast(drawn)
    own = drawn - lengths[: _rank()].sum()
    mine = (own >= 0) & (own < vectors.shape[0])
    rows = vectors[own.clamp(0, vectors.shape[0] - 1)] * mine[:, None]
    all_reduce(rows)
    return rows


def gather_rows(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, in rank order; ranks may hold different numbers of rows."""
    if _world_size() == 1:
        return vectors
    lengths = torch.zeros(_world_size(), dtype=torch.long, device=vectors.device)
    lengths[_rank()] = vectors.shape[0]
    all_reduce(lengths)
    padded = F.pad(vectors, (0, 0, 0, int(lengths.max()) - vectors.shape[0]))
    parts = [torch.empty_like(padded) for _ in range(_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist())])


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum over ranks, in place; nothing to do in a single process."""
    if _world_size() > 1:
        dist.all_reduce(tensor)


def broadcast(tensor: torch.Tensor) -> None:
    """Copy from rank 0, in place; nothing to do in a single process."""
    if _world_size() > 1:
        dist.broadcast(tensor, src=0)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


__all__ = ["BridleResidualQuantizer", "CodebookUsage", "QuantizerOutput", "codebook_usage", "count_codes", "kmeans"]
