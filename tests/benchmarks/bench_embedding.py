"""Embedding of one-second files against a loop of extractor and model, one file at a time; in interleaved pairs.

    python tests/benchmarks/bench_embedding.py [--files 2000] [--pairs 3] [--size base|small|tiny] [--threads 2]

The loop is given twice: as whoever knows transformers writes it, `model(**extractor(waveform, sampling_rate=rate,
return_tensors="pt"))`, where the extractor pads to the model's full length ("loop"); and with `padding=False`. All
have as many threads. CPU time is that of the process, all its threads: where a machine is busy, it is the one to
compare; for that, threads must not spin while they wait (the variable OMP_WAIT_POLICY is set to passive).
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path


os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch loads

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
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.pairs):
            rows = {}
            for name, run in ways.items():
                start = time.perf_counter(), time.process_time()
                rows[name] = run()
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print(f"{args.files} files of a second, size {args.size}, {args.threads} threads, medians of {args.pairs}")
    for name, values in seconds.items():
        told = []
        for kind, ours, theirs in zip(("wall", "CPU"), zip(*seconds["embed"]), zip(*values)):
            ratio = statistics.median(their / our for their, our in zip(theirs, ours))
            told.append(f"{kind} {statistics.median(theirs):7.2f} s, {ratio:5.2f} times embed's")
        difference = np.abs(rows[name] - rows["embed"]).max()
        print(f"{name:<22}{'; '.join(told)}; rows differ by {difference:.1e}")


if __name__ == "__main__":
    main()
