"""
Embeddings of one-second files by `Embedder`, per file, against a loop of extractor and model, one file at a time: as
whoever knows transformers writes it, `model(**extractor(waveform, sampling_rate=rate, return_tensors="pt"))`, where
the extractor pads to the model's full length; and with `padding=False`. The embeddings are compared first.

The model has 6 layers, 384 wide. `FILES=100 ... --threads 2 --rounds 20` takes turns of 100 files.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from harness import race, run

from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleModel
from bridle_hf.embedding.embedder import Embedder


FILES = int(os.environ.get("FILES", "16"))  # of a turn
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}


def rows(rounds):
    torch.manual_seed(0)
    extractor, rng = BridleFeatureExtractor(), np.random.default_rng(0)
    model = BridleModel(BridleConfig(**SIZES)).eval()
    embedder = Embedder(model, extractor)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.wav") for number in range(FILES)]
        for path in paths:
            soundfile.write(path, 0.1 * rng.normal(size=16_000), 16_000)

        @torch.no_grad()
        def loop(padding):
            found = []
            for path in paths:
                waveform, rate = soundfile.read(path, dtype="float32")
                inputs = extractor(waveform, sampling_rate=rate, padding=padding, return_tensors="pt")
                found.append(model(**inputs).pooler_output[0].numpy())
            return np.stack(found)

        peers = {"a loop of extractor and model": partial(loop, "max_length"),
                 "a loop with `padding=False`": partial(loop, False)}  # fmt: skip
        for peer in peers.values():
            np.testing.assert_allclose(embedder.embed(paths), peer(), atol=1e-5)
        what = "embedding of a one-second file, 6 layers"
        yield from race(what, lambda: embedder.embed(paths), peers, rounds, scale=FILES)


if __name__ == "__main__":
    run(__doc__, [rows], rounds=5)
