"""Codebook initialization: k-means on the latents of the first batches of a tokenizer's phase."""

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from bridle_hf import BridleConfig, BridleTokenizerConfig, BridleTokenizerModel
from bridle_hf.common.errors import ArgumentError
from bridle_hf.configuration_bridle import BridleEncoderConfig
from bridle_hf.interleaving.micro_batches import MicroBatch, sample_order
from bridle_hf.quantization_bridle import gather_rows


# More vectors than the k-means asks for make better codes; more than this cost time and memory for little.
KMEANS_VECTORS_PER_CODE = 64


@torch.no_grad()
def initialize_codebooks(
    tokenizer: BridleTokenizerModel,
    batches: Iterable[Iterable[MicroBatch]],
    batches_per_epoch: float,
    is_main_process: bool,
    go_on: bool = False,
) -> None:
    """k-means on the latents of as many of the batches as it takes; the same for any number of processes.

    Features of a k-means tokenizer are standardised by the same vectors first.

    Args:
        batches: batch by batch, the micro batches of this process; they may go on for ever.
        batches_per_epoch: how many batches it takes to see all of the data once.
        go_on: from the codes that there are.

    Raises:
        ArgumentError: all of the data have fewer vectors than there are codes.
    """
    tokenizer.eval()
    codebook_size = tokenizer.config.codebook_size
    wanted = max(tokenizer.quantizer.vectors_for_initialization, KMEANS_VECTORS_PER_CODE * codebook_size)
    gathered: list[torch.Tensor] = []
    for number, batch in enumerate(batches, start=1):
        # Batch by batch, so that rows stand in the order of the data, however many ranks share a batch.
        parts = list(batch)
        rows, order = torch.cat([_latents(tokenizer, part) for part in parts]), sample_order(parts)
        rows = rows if order is None else rows[order]
        gathered.append(gather_rows(rows.float()))
        found = sum(map(len, gathered))
        if found >= wanted:
            break
        if number == math.ceil(batches_per_epoch) and found < codebook_size:
            raise ArgumentError(
                f"tokenizer.codebook_size is {codebook_size}, but all of the data have only {found} patches to learn "
                "codes from: make it smaller, or give more data"
            )
    vectors = torch.cat(gathered)
    vectors = vectors[torch.randperm(len(vectors), device=vectors.device)[:wanted]]
    if tokenizer.config.tokenizer_type == "kmeans":
        tokenizer.standardization.fit(vectors)
        vectors = tokenizer.standardization(vectors)
    # The quantizer gathers, too: all vectors come from rank 0.
    tokenizer.quantizer.initialize(vectors if is_main_process else vectors[:0], go_on=go_on)


def kmeans_config(encoder: BridleConfig, tokenizer: BridleTokenizerConfig) -> BridleTokenizerConfig:
    """That of a k-means tokenizer on the features of `encoder`, with the codebooks of `tokenizer`.

    Raises:
        ValueError: codebooks that do not fit the encoder's width.
    """
    shared = BridleEncoderConfig().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    sizes = {name: value for name, value in encoder.to_dict().items() if name in shared}
    sizes |= {"code_dim": encoder.hidden_size, "teacher_hidden_size": encoder.hidden_size}
    return BridleTokenizerConfig.from_dict(tokenizer.to_dict() | sizes)


def _latents(tokenizer: BridleTokenizerModel, part: MicroBatch) -> torch.Tensor:
    """(real patches, code_dim)."""
    latents, real = tokenizer.latents(part.inputs, part.attention_mask), part.real(tokenizer.config)
    return latents.flatten(0, 1) if real is None else latents[real]
