"""
Milliseconds per 10 s clip of log-mel extraction, on one thread: BridleFeatureExtractor alone and in a batch of 32,
transformers' ASTFeatureExtractor without torchaudio, and kaldi-native-fbank. Run:

    python tests/benchmarks/bench_feature_extraction.py [--repetitions 15]

The contenders take turns within one run, so that a busy machine slows all of them; medians are reported.
"""

import argparse
import statistics
import time
import warnings
from functools import partial

import kaldi_native_fbank
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import ASTFeatureExtractor
from transformers.utils import is_speech_available

from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor


BATCH_SIZE = 32
CLIPS_ALONE = 8  # a turn one by one takes several clips: the first of a turn finds cold caches
SECONDS = 10
SAMPLING_RATE = 16000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's matrix products, which ASTFeatureExtractor uses
    if is_speech_available():
        raise SystemExit("torchaudio is installed: ASTFeatureExtractor would use it. Run this without it.")

    contenders = make_contenders()
    times = {name: [] for name in contenders}
    for extract, _ in contenders.values():
        extract()
    for _ in range(repetitions):
        for name, (extract, num_clips) in contenders.items():
            start = time.perf_counter()
            extract()
            times[name].append((time.perf_counter() - start) * 1000 / num_clips)
    print_table(times)


def make_contenders():
    """name -> (function, number of clips that it extracts)"""
    generator = np.random.default_rng(0)
    clips = list(generator.uniform(-0.5, 0.5, (BATCH_SIZE, SECONDS * SAMPLING_RATE)).astype(np.float32))
    bridle = BridleFeatureExtractor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the narrowest of 128 mel filters are empty
        ast = ASTFeatureExtractor()

    def one_by_one(extract):
        return lambda: [extract(clip) for clip in clips[:CLIPS_ALONE]], CLIPS_ALONE

    def as_batch(extract):
        return lambda: extract(clips), BATCH_SIZE

    bridle_extract = partial(bridle, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    ast_extract = partial(ast, sampling_rate=SAMPLING_RATE, return_tensors="pt")

    return {
        "ASTFeatureExtractor, alone": one_by_one(ast_extract),
        f"ASTFeatureExtractor, batch of {BATCH_SIZE}": as_batch(ast_extract),
        "kaldi-native-fbank, alone": one_by_one(kaldi_fbank),
        "BridleFeatureExtractor, alone": one_by_one(bridle_extract),
        f"BridleFeatureExtractor, batch of {BATCH_SIZE}": as_batch(bridle_extract),
    }


def kaldi_fbank(waveform):
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = 128
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SAMPLING_RATE, waveform - waveform.mean())
    fbank.input_finished()
    return np.stack([fbank.get_frame(frame) for frame in range(fbank.num_frames_ready)])


def print_table(times):
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians[f"BridleFeatureExtractor, batch of {BATCH_SIZE}"]
    print(f"{'':38}{'ms per clip':>12}{'fastest':>10}{'slower than ours in a batch':>30}")
    for name, median in medians.items():
        print(f"{name:38}{median:12.2f}{min(times[name]):10.2f}{median / ours:29.2f}x")


if __name__ == "__main__":
    main()
