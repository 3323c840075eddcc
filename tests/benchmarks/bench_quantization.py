"""
The residual quantizer, 4 codebooks of 256 codes of 256 numbers, 16,384 vectors, against vector-quantize-pytorch's
`ResidualVQ` and against its own matrix products alone: codes of vectors, and a step of training (forward, backward,
codebooks moved by EMA), as a single forward does it and as the training loop does it, with 4 micro batches.

The codes of both are compared first.
"""

import torch
from harness import race, run
from vector_quantize_pytorch import ResidualVQ

from bridle_hf import BridleTokenizerConfig
from bridle_hf.quantization_bridle import BridleResidualQuantizer


VECTORS, MICRO_BATCHES = 16384, 4


def rows(rounds):
    torch.manual_seed(0)
    vectors = torch.randn(VECTORS, 256)
    ours = BridleResidualQuantizer(BridleTokenizerConfig(codebook_normalization="none"))
    ours.initialize(vectors)
    peer = ResidualVQ(
        dim=256, num_quantizers=4, codebook_size=256, kmeans_init=False, decay=0.99, threshold_ema_dead_code=2,
        commitment_weight=0.25,
    )  # fmt: skip
    for codebook, layer in zip(ours.codebooks, peer.layers):
        layer._codebook.embed.copy_(codebook[None])

    @torch.no_grad()
    def encode():
        return ours.eval()(vectors).codes

    @torch.no_grad()
    def peer_encodes():
        return peer.eval()(vectors[None])[1][0]

    def products():
        for codebook in ours.codebooks:
            torch.mm(vectors, codebook.t())

    assert torch.equal(encode(), peer_encodes())
    size = f"{VECTORS:,} vectors, 4 x 256 codes"
    peers = {"ResidualVQ": peer_encodes, "the matrix products alone": products}
    yield from race(f"codes of {size}", encode, peers, rounds)

    def train():
        ours.train().update_in_forward = True
        latents = vectors.clone().requires_grad_()
        output = ours(latents)
        (output.loss + output.quantized.sum()).backward()

    def train_in_parts():
        ours.train().update_in_forward = False
        statistics = []
        for part in vectors.chunk(MICRO_BATCHES):
            latents = part.clone().requires_grad_()
            output = ours(latents)
            (output.loss + output.quantized.sum()).backward()
            statistics.append(output.statistics)
        ours.update(statistics)

    def peer_trains():
        latents = vectors[None].clone().requires_grad_()
        quantized, _, loss = peer.train()(latents)
        (loss.sum() + quantized.sum()).backward()

    peers = {"ResidualVQ": peer_trains, "the matrix products alone": products}
    yield from race(f"training step of {size}", train, peers, rounds)
    yield from race(f"the same in {MICRO_BATCHES} micro batches", train_in_parts, peers, rounds)


if __name__ == "__main__":
    run(__doc__, [rows], rounds=9)
