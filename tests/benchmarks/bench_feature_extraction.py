"""
Log-mel of 10 s clips on one thread, per clip: BridleFeatureExtractor, alone and in a batch of 32, against
transformers' ASTFeatureExtractor without torchaudio, and kaldi-native-fbank, whose values are compared first.
"""

import warnings
from functools import partial

import kaldi_native_fbank
import numpy as np
import torch
from harness import race, run
from threadpoolctl import threadpool_limits
from transformers import ASTFeatureExtractor
from transformers.utils import is_speech_available

from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor


BATCH_SIZE = 32
CLIPS_ALONE = 8  # a turn one by one takes several clips: the first of a turn finds cold caches
SECONDS = 10
SAMPLING_RATE = 16000


def rows(rounds):
    threadpool_limits(1)  # numpy's matrix products, which ASTFeatureExtractor uses
    if is_speech_available():
        raise SystemExit("torchaudio is installed: ASTFeatureExtractor would use it. Run this without it.")
    generator = np.random.default_rng(0)
    clips = list(generator.uniform(-0.5, 0.5, (BATCH_SIZE, SECONDS * SAMPLING_RATE)).astype(np.float32))
    ours = partial(BridleFeatureExtractor(), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    plain = BridleFeatureExtractor(do_normalize=False)(clips[0], sampling_rate=SAMPLING_RATE, return_tensors="pt")
    expected = torch.from_numpy(kaldi_fbank(clips[0]))
    torch.testing.assert_close(plain["input_values"][0, : len(expected)], expected, atol=1e-3, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the narrowest of 128 mel filters are empty
        ast = partial(ASTFeatureExtractor(), sampling_rate=SAMPLING_RATE, return_tensors="pt")

    def alone(extract):
        return lambda: [extract(clip) for clip in clips[:CLIPS_ALONE]]

    peers = {"ASTFeatureExtractor": alone(ast), "kaldi-native-fbank": alone(kaldi_fbank)}
    yield from race("log-mel of 10 s, clip by clip", alone(ours), peers, rounds, scale=CLIPS_ALONE)
    peers = {"ASTFeatureExtractor": lambda: ast(clips), "kaldi-native-fbank": lambda: [*map(kaldi_fbank, clips)]}
    yield from race(
        f"log-mel of 10 s, in a batch of {BATCH_SIZE}", lambda: ours(clips), peers, rounds, scale=BATCH_SIZE
    )


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


if __name__ == "__main__":
    run(__doc__, [rows], rounds=9)
