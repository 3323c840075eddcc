"""Embedding of one-second files against a loop of extractor and model, one file at a time; in interleaved pairs.

    python tests/benchmarks/bench_embedding.py [--files 2000] [--pairs 3] [--size base|small|tiny]

The loop is given twice: as the extractor pads by default, to the model's full length, and without padding.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleModel
from bridle_hf.embedding.embedder import Embedder


SIZES = {
    "base": {},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
}


@torch.no_grad()
def by_loop(paths: list[Path], model: BridleModel, extractor: BridleFeatureExtractor, padding) -> np.ndarray:
    rows = []
    for path in paths:
        waveform, rate = soundfile.read(path, dtype="float32")
        inputs = extractor(waveform, sampling_rate=rate, padding=padding, return_tensors="pt")
        rows.append(model(**inputs).pooler_output[0].numpy())
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="small")
    args = parser.parse_args()
    torch.manual_seed(0)
    extractor = BridleFeatureExtractor()
    model = BridleModel(BridleConfig(**SIZES[args.size])).eval()
    embedder = Embedder(model, extractor)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.wav") for number in range(args.files)]
        for path in paths:
            soundfile.write(path, 0.1 * rng.normal(size=16_000), 16_000)
        ways = {
            "embed": lambda: embedder.embed(paths),
            "loop": lambda: by_loop(paths, model, extractor, "max_length"),
            "loop without padding": lambda: by_loop(paths, model, extractor, False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.pairs):
            rows = {}
            for name, run in ways.items():
                start = time.perf_counter()
                rows[name] = run()
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(values, seconds["embed"])]
        difference = np.abs(rows[name] - rows["embed"]).max()
        print(f"{name:<22}{statistics.median(values):8.2f} s, {statistics.median(ratios):6.2f} times embed's, "
              f"rows differ by {difference:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
