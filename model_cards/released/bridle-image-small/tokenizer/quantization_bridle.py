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

    Args:
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
class CodebookStatistics(ModelOutput):
    """What [`BridleResidualQuantizer.update`] has to know of vectors that were quantized.

    Args:
        counts: (num_codebooks, codebook_size), how often each code was chosen.
        sums: (num_codebooks, codebook_size, code_dim), sum of what chose it.
        latents: (vectors, code_dim), where the residual chain starts, detached.
        codes: (vectors, num_codebooks) int64.
    """

    counts: torch.FloatTensor | None = None
    sums: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None


@dataclass
class QuantizerOutput(ModelOutput):
    """Output of [`BridleResidualQuantizer`].

    Args:
        quantized: (vectors, code_dim) straight-through sum of the codes.
        codes: (vectors, num_codebooks) int64.
        soft_codes: (vectors, num_codebooks, num_soft_codes) int64, the nearest first; only where `num_soft_codes > 1`.
        loss: codebook loss, a scalar.
        usage: [`CodebookUsage`] of these vectors.
        counts: (num_codebooks, codebook_size), how often each code was chosen.
        statistics: [`CodebookStatistics`] of these vectors, in training mode alone.
    """

    quantized: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    soft_codes: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None
    usage: CodebookUsage | None = None
    counts: torch.FloatTensor | None = None
    statistics: CodebookStatistics | None = None


class BridleResidualQuantizer(nn.Module):
    """A chain of codebooks, each quantizing what the ones before it left over. One codebook is VQ.

    With `independent_codebooks` each quantizes a part of the vectors of its own: its codes are 0 in all others, so
    that sums, residuals and errors mean what they do in the chain.

    In training mode a forward moves the codebooks. A loop that accumulates gradients, or that leaves out steps whose
    gradient is not finite, sets `update_in_forward = False` and calls `update` once per optimizer step, with
    the `statistics` that the forwards took on the way.

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
        exact = {"dtype": torch.float32}  # also where a model is made in another
        self.register_buffer("codebooks", torch.empty(shape, **exact))
        self.register_buffer("cluster_size", torch.zeros(shape[:2], **exact))
        self.register_buffer("cluster_sum", torch.zeros(shape, **exact))
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
            ValueError: no vectors, or the wrong width.
        """
        if latents.dim() != 2 or latents.shape[1] != self.config.code_dim or latents.shape[0] == 0:
            raise ValueError(
                f"`latents` must be (vectors, {self.config.code_dim}) with at least one, got {tuple(latents.shape)}"
            )
        with torch.autocast(device_type=latents.device.type, enabled=False):
            latents = self._normalized(latents.float())
            return self._quantize(latents, move=self.training and self.update_in_forward)

    @torch.no_grad()
    def update(self, statistics: list[CodebookStatistics], order: torch.Tensor | None = None) -> torch.Tensor:
        """Move the codebooks as a forward in training mode would; returns how many codes of each level it re-seeded.

        Args:
            statistics: those of all micro batches of this rank; the codebooks have not moved since.
            order: (vectors,) int64, in which order one forward would have had their vectors, if in another: by their
                places those are drawn that re-seed.
        """
        order = slice(None) if order is None else order
        latents = torch.cat([part.latents for part in statistics])[order]
        with torch.autocast(device_type=latents.device.type, enabled=False):
            if self.config.moves_codes_within_chain:
                # What a vector leaves over then depends on all vectors: they are quantized once more, together.
                return self._quantize(latents, move=True).usage.reseeded
            whole = CodebookStatistics(
                counts=sum(part.counts for part in statistics),
                sums=sum(part.sums for part in statistics),
                latents=latents,
                codes=torch.cat([part.codes for part in statistics])[order],
            )
            return self._update(whole)

    def _update(self, statistics: CodebookStatistics) -> torch.Tensor:
        # Drawn first: what a vector leaves over is a matter of the codes that it met.
        seeds = self._draw_seeds(statistics) if self.config.dead_code_threshold else None
        if not self.config.moves_codes_within_chain:
            self._move_codes(slice(None), statistics.counts, statistics.sums)
        return torch.zeros_like(statistics.codes[0]) if seeds is None else self._reseed_dead_codes(seeds)

    def _quantize(self, latents: torch.Tensor, move: bool) -> QuantizerOutput:
        config, start = self.config, latents.detach()
        within_chain = move and config.moves_codes_within_chain
        chain = self._chain(start, self.training or move, latents.requires_grad, within_chain)
        codes = chain.nearest[..., 0]
        counts = count_codes(codes, config.codebook_size)
        statistics, reseeded = None, torch.zeros(config.num_codebooks, dtype=torch.long, device=latents.device)
        if chain.sums is not None:
            statistics = CodebookStatistics(counts=counts, sums=chain.sums, latents=start, codes=codes)
        if move:
            reseeded = self._update(statistics)
        # mean_q [mse(sg(r_q), e_q) + beta * mse(r_q, sg(e_q))], where r_q - e_q is what level q leaves over. Codes are
        # buffers, moved by EMA: the first term has no gradient.
        loss = (1.0 + config.commitment_weight) * chain.left_energy.mean() / latents.numel()
        if chain.left_sum is not None:
            gradient = chain.left_sum * (2.0 * config.commitment_weight / config.num_codebooks / latents.numel())
            linear = torch.dot(latents.flatten(), gradient.flatten())
            loss = loss + (linear - linear.detach())
        tiny = torch.finfo(torch.float32).tiny
        errors = chain.residual_energy / _energy(start).clamp(min=tiny)
        return QuantizerOutput(
            # z + sg(z_hat - z), with z_hat = z - residual.
            quantized=latents - chain.residual,
            codes=codes,
            soft_codes=chain.nearest if config.num_soft_codes > 1 else None,
            loss=loss,
            usage=codebook_usage(counts, reseeded=reseeded, quantization_error=errors),
            counts=counts,
            statistics=statistics,
        )

    @torch.no_grad()
    def _chain(self, start: torch.Tensor, sum_up: bool, gradient: bool, move: bool) -> "_Chain":
        """Quantize level after level; sum up what chose each code, and what the gradient is made of."""
        nearest = []
        chain = _Chain(
            residual=start.clone(),
            left_sum=torch.zeros_like(start) if gradient else None,
            left_energy=start.new_zeros(self.config.num_codebooks),
            residual_energy=start.new_zeros(self.config.num_codebooks),
            sums=torch.zeros_like(self.codebooks) if sum_up else None,
        )
        for q in range(self.config.num_codebooks):
            vectors = self._lookup_vectors(self._own_part(q, chain.residual))
            nearest.append(self._nearest(q, vectors, self.config.num_soft_codes))
            codes = nearest[q][:, 0]
            if sum_up:
                chain.sums[q].index_add_(0, codes, vectors)
            if move:
                level = slice(q, q + 1)
                self._move_codes(level, count_codes(codes[:, None], self.config.codebook_size), chain.sums[level])
            chain.residual -= F.embedding(codes, self.codebooks[q])
            left = self._own_part(q, chain.residual)
            if gradient:
                chain.left_sum += left
            chain.left_energy[q], chain.residual_energy[q] = _energy(left), _energy(chain.residual)
        chain.nearest = torch.stack(nearest, dim=1)
        return chain

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum of the codes, (..., num_codebooks) int64 -> (..., code_dim)."""
        levels = zip(self.codebooks, codes.unbind(dim=-1), strict=True)
        return sum(F.embedding(code, codebook) for codebook, code in levels)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor, iterations: int = 20, go_on: bool = False) -> None:
        """Set every codebook by k-means, level after level, on vectors gathered over all ranks.

        The k-means runs on rank 0 and its result is broadcast, so that all ranks hold the same codes.

        Args:
            latents: (vectors of this rank, code_dim); over all ranks at least `32 * codebook_size`.
            go_on: from the codes that there are, so that they keep their numbers; else from vectors drawn at random.

        Raises:
            ValueError: too few vectors.
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
                    start = self.codebooks[q] if go_on else None
                    codes = kmeans(vectors, self.config.codebook_size, iterations, start)
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

    @torch.no_grad()
    def _move_codes(self, levels: slice, counts: torch.Tensor, sums: torch.Tensor) -> None:
        """One EMA step of some levels, the same on all ranks; none of a level where a vector of any is not finite.

        Args:
            counts, sums: (levels, codebook_size[, code_dim]) of this rank's vectors.
        """
        codebook, size, total = (buffer[levels] for buffer in (self.codebooks, self.cluster_size, self.cluster_sum))
        counts, sums = counts.clone(), sums.clone()
        all_reduce(counts)
        all_reduce(sums)
        expected = counts.sum(dim=1, keepdim=True) / self.config.codebook_size
        first_step = size.sum(dim=1, keepdim=True) == 0
        new_size = torch.where(first_step, expected, size)
        new_total = torch.where(first_step[..., None], codebook * expected[..., None], total)

        rate = 1.0 - self.config.ema_decay
        new_size.lerp_(counts, rate)
        new_total.lerp_(sums, rate)
        if self.config.ema_update == "count":
            # A code that nobody chose for long decays in count and sum alike: the ratio must not become 0 / 0.
            means = new_total / new_size[..., None].clamp(min=torch.finfo(torch.float32).tiny)
            moved = torch.where((new_size > 1e-6 * expected)[..., None], means, codebook)
        elif self.config.ema_update == "smoothed_count":
            smoothed = new_size + LAPLACE_SMOOTHING
            smoothed *= new_size.sum(dim=1, keepdim=True) / smoothed.sum(dim=1, keepdim=True)
            moved = new_total / smoothed[..., None]
        else:
            towards = F.normalize(sums / counts[..., None].clamp(min=1.0), dim=-1)
            moved = torch.where(counts[..., None] > 0, codebook.lerp(towards, rate), codebook)
        if self.config.unit_norm_codes:
            moved = F.normalize(moved, dim=-1)
        # Decided on the device: the host need not wait, and the reduced sums are the same on all ranks.
        finite = sums.isfinite().all(dim=2).all(dim=1)[:, None]
        size.copy_(torch.where(finite, new_size, size))
        for buffer, new in ((codebook, moved), (total, new_total)):
            buffer.copy_(torch.where(finite[..., None], new, buffer))

    @torch.no_grad()
    def _draw_seeds(self, statistics: CodebookStatistics) -> torch.Tensor:
        """(num_codebooks, codebook_size, code_dim): vectors of all ranks, as each level meets them; rank 0 draws."""
        levels, size = self.config.num_codebooks, self.config.codebook_size
        own, mine = draw_rows(len(statistics.latents), (levels, size), statistics.latents.device)
        residuals, codes = statistics.latents[own], statistics.codes[own]
        seeds = torch.empty_like(self.codebooks)
        for q in range(levels):
            seeds[q] = self._lookup_vectors(self._own_part(q, residuals[q])) * mine[q, :, None]
            residuals[q + 1 :] -= F.embedding(codes[q + 1 :, :, q], self.codebooks[q])
        all_reduce(seeds)
        return seeds

    @torch.no_grad()
    def _reseed_dead_codes(self, seeds: torch.Tensor) -> torch.Tensor:
        """Give codes whose moving count fell under the threshold a current vector and fresh statistics.

        The threshold is a fraction of the expected count, so that it does not depend on the batch size. Returns how
        many codes of each level there were.
        """
        codebook, size, total = self.codebooks, self.cluster_size, self.cluster_sum
        expected = size.sum(dim=1, keepdim=True) / self.config.codebook_size
        # A vector that is not finite would stay for good.
        finite = seeds.isfinite().all(dim=2).all(dim=1, keepdim=True)
        dead = (size < self.config.dead_code_threshold * expected) & finite
        if self._unit_codes:
            seeds = F.normalize(seeds, dim=-1)
        codebook.copy_(torch.where(dead[..., None], seeds, codebook))
        size.copy_(torch.where(dead, expected, size))
        total.copy_(torch.where(dead[..., None], codebook * expected[..., None], total))
        return dead.sum(dim=1)


@dataclass
class _Chain:
    """What the residual chain makes of vectors, see [`BridleResidualQuantizer._chain`].

    Args:
        residual: (vectors, code_dim), what the last level left over.
        left_sum: (vectors, code_dim), sum over the levels of what each left over of what it quantized, or `None`.
        left_energy, residual_energy: (num_codebooks,), sum of the squares of that, and of the residual then.
        sums: (num_codebooks, codebook_size, code_dim), sum of what chose each code, or `None`.
        nearest: (vectors, num_codebooks, num_soft_codes) int64, of a chain that is through.
    """

    residual: torch.Tensor
    left_sum: torch.Tensor | None
    left_energy: torch.Tensor
    residual_energy: torch.Tensor
    sums: torch.Tensor | None
    nearest: torch.Tensor | None = None


def _energy(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares."""
    return torch.dot(tensor.flatten(), tensor.flatten())


def count_codes(codes: torch.Tensor, codebook_size: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """How often each code was chosen: (vectors, num_codebooks) int64 -> (num_codebooks, codebook_size) float32.

    Args:
        real: (vectors,) bool, the vectors that count; `None`: all.
    """
    counts = torch.zeros(codes.shape[1], codebook_size, device=codes.device)
    weights = torch.ones_like(codes, dtype=counts.dtype) if real is None else real.float()[:, None].expand_as(codes)
    return counts.scatter_add_(1, codes.t(), weights.t())


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


def kmeans(
    vectors: torch.Tensor, num_clusters: int, iterations: int, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Lloyd's algorithm from randomly drawn vectors, or from the centres `start`; an empty cluster takes the vector
    that is worst represented.

    Returns:
        (num_clusters, dim) centres.
    """
    if start is None:
        start = vectors[torch.randperm(len(vectors), device=vectors.device)[:num_clusters]]
    centres = start.clone()
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


def draw_rows(length: int, shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows drawn at random from those of all ranks, the same on every rank and for any number of ranks.

    Args:
        length: how many rows this rank has.

    Returns:
        Two tensors of `shape`: each drawn row's number among those of this rank, and whether it is one of them.
    """
    lengths = torch.zeros(_world_size(), dtype=torch.long, device=device)
    lengths[_rank()] = length
    all_reduce(lengths)
    drawn = (torch.rand(shape, device=device, dtype=torch.float64) * lengths.sum()).long()
    broadcast(drawn)
    own = drawn - lengths[: _rank()].sum()
    return own.clamp(0, length - 1), (own >= 0) & (own < length)


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
