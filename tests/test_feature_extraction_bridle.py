"""BridleFeatureExtractor against kaldi-native-fbank, against its own promises, and as transformers uses it."""

import copy
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import hypothesis.extra.numpy as hnp
import kaldi_native_fbank
import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, AudioClassificationPipeline

from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor, log_mel_spectrogram, mel_filter_bank


RATE = 16000
TIME = np.arange(2 * RATE) / RATE
EXTRACTOR = BridleFeatureExtractor()


def noise(samples=RATE, scale=0.1, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def sine(frequency, rate=RATE, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def kaldi_fbank(waveform, num_mel_bins=128, rate=RATE):
    """The oracle: (frames, num_mel_bins), not normalised."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = num_mel_bins
    options.use_energy = False
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(rate, waveform - waveform.mean())
    fbank.input_finished()
    return np.stack([fbank.get_frame(frame) for frame in range(fbank.num_frames_ready)])


def render_notes():
    """Ten notes of the demo's instruments (DATA.md, "notes"), one after the other."""
    tinysoundfont = pytest.importorskip("tinysoundfont")
    if (pretty_midi := importlib.util.find_spec("pretty_midi")) is None:
        pytest.skip("pretty_midi is not installed")
    synthesizer = tinysoundfont.Synth(samplerate=RATE)
    soundfont = synthesizer.sfload(str(Path(pretty_midi.origin).parent / "TimGM6mb.sf2"))
    notes = []
    for program, pitch in zip(range(0, 110, 11), range(36, 84, 5), strict=True):
        synthesizer.program_select(0, soundfont, 0, program)
        synthesizer.noteon(0, pitch, 100)
        stereo = np.frombuffer(bytes(synthesizer.generate(RATE)), dtype=np.float32).reshape(-1, 2)
        synthesizer.noteoff(0, pitch)
        notes.append(stereo.mean(axis=1))
    return np.concatenate(notes)


SIGNALS = {
    "noise": lambda: noise(2 * RATE),
    "quiet noise": lambda: noise(2 * RATE, scale=1e-4),
    "notes": render_notes,
    "sine + DC": lambda: (0.5 * np.sin(2 * np.pi * 440 * TIME) + 0.3).astype(np.float32),
    "DC": lambda: np.full(2 * RATE, 0.3, dtype=np.float32),
    "silence": lambda: np.zeros(2 * RATE, dtype=np.float32),
}


# Log-mel against Kaldi


@pytest.mark.parametrize("signal", SIGNALS)
def test_log_mel_equals_kaldi(signal):
    waveform = SIGNALS[signal]()
    ours = log_mel_spectrogram(torch.from_numpy(waveform)).numpy()
    error = np.abs(ours - kaldi_fbank(waveform))
    assert error.max() < 2e-3
    assert error.mean() < 2e-5


def test_beside_a_loud_tone_only_bins_near_the_floor_differ():
    # There float32 leaves few digits, to Kaldi as well: computed in float64, they differ from Kaldi's as much.
    waveform = (0.9 * np.sin(2 * np.pi * 1500 * TIME**2)).astype(np.float32)
    expected = kaldi_fbank(waveform)
    error = np.abs(log_mel_spectrogram(torch.from_numpy(waveform)).numpy() - expected)
    assert error[expected > np.log(1e-4)].max() < 2e-3
    assert error.max() < 0.1


@pytest.mark.parametrize("num_mel_bins, rate", [(40, 16000), (64, 8000), (100, 22050)])
def test_log_mel_equals_kaldi_at_other_sizes(num_mel_bins, rate):
    ours = log_mel_spectrogram(torch.from_numpy(noise()), num_mel_bins, rate).numpy()
    np.testing.assert_allclose(ours, kaldi_fbank(noise(), num_mel_bins, rate), atol=2e-3)


def librosa_mels(num_mel_bins, rate):
    return {"sr": rate, "n_mels": num_mel_bins, "fmin": 20, "fmax": rate / 2, "htk": True, "norm": None}


@pytest.mark.filterwarnings("ignore:Empty filters")
@pytest.mark.parametrize("num_mel_bins, rate, fft_length", [(128, 16000, 512), (40, 16000, 512), (64, 8000, 256)])
def test_mel_filters_equal_librosa(num_mel_bins, rate, fft_length):
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(n_fft=fft_length, **librosa_mels(num_mel_bins, rate)).T
    ours = mel_filter_bank(num_mel_bins, rate)
    np.testing.assert_array_equal(ours[:-1] > 0, expected[:-1] > 0)
    # librosa's triangles are linear in Hz, Kaldi's in mel.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.01)


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_log_mel_equals_librosa():
    librosa = pytest.importorskip("librosa")
    waveform = noise()
    centred = waveform - waveform.mean()
    emphasized = np.append(0, centred[1:] - 0.97 * centred[:-1]).astype(np.float32)
    # 56 zeros: librosa puts the window of 400 samples into the middle of its frame of 512.
    framing = {"n_fft": 512, "win_length": 400, "hop_length": 160, "window": np.hanning(400), "center": False}
    power = librosa.feature.melspectrogram(y=np.pad(emphasized, 56), **framing, **librosa_mels(128, RATE)).T
    ours = log_mel_spectrogram(torch.from_numpy(waveform)).numpy()
    assert ours.shape == power.shape
    # The lowest bins hold what each frame's mean, which only Kaldi takes away, leaks into them.
    heard = (power > 1e-5) & (np.arange(128) > 10)
    assert heard.mean() > 0.8
    assert np.abs(ours - np.log(np.maximum(power, 1e-30)))[heard].mean() < 0.01


def test_log_mel_of_many_blocks_equals_kaldi():
    waveform = noise(25 * RATE)
    np.testing.assert_allclose(log_mel_spectrogram(torch.from_numpy(waveform)), kaldi_fbank(waveform), atol=2e-3)


def test_log_mel_stays_float32_under_autocast():
    waveform = torch.from_numpy(noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_mel_spectrogram(waveform)
    assert torch.equal(inside, log_mel_spectrogram(waveform))


def test_normalization_and_defaults():
    output = EXTRACTOR(noise(), sampling_rate=RATE, return_tensors="np")
    assert output["input_values"].shape == (1, 1024, 128) and output["input_values"].dtype == np.float32
    assert output["attention_mask"].shape == (1, 1024) and output["attention_mask"].dtype == np.int64
    expected = (kaldi_fbank(noise()) + 4.4446096) / (2 * 3.3216383)
    np.testing.assert_allclose(output["input_values"][0, :98], expected, atol=1e-3)
    assert not output["input_values"][0, 98:].any()
    assert output["attention_mask"][0].tolist() == [1] * 98 + [0] * (1024 - 98)
    raw = BridleFeatureExtractor(do_normalize=False)(noise(), sampling_rate=RATE, return_tensors="np")
    np.testing.assert_allclose(raw["input_values"][0, :98], kaldi_fbank(noise()), atol=2e-3)


# Kinds of input


@pytest.mark.parametrize(
    "make",
    [
        lambda clip: clip,
        lambda clip: clip.astype(np.float64),
        lambda clip: clip.tolist(),
        lambda clip: tuple(clip.tolist()),
        lambda clip: torch.from_numpy(clip),
        lambda clip: torch.from_numpy(clip).double().requires_grad_(),
        lambda clip: clip[::-1][::-1],
        lambda clip: np.frombuffer(clip.tobytes(), dtype=np.float32),  # read-only
        lambda clip: clip.astype(">f4"),
        lambda clip: [clip],
        lambda clip: [clip.tolist()],
        lambda clip: (torch.from_numpy(clip),),
        lambda clip: clip[None],
        lambda clip: clip[None, None],
        lambda clip: torch.from_numpy(clip)[None],
        lambda clip: [clip[None]],
        lambda clip: [[clip.tolist()]],
        lambda clip: np.stack([clip + 0.1, clip - 0.1])[None],
        lambda clip: [torch.from_numpy(np.stack([clip, clip]))],
        lambda clip: [np.float32(sample) for sample in clip],
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_input_gives_the_same(make):
    expected = EXTRACTOR(noise(4000), sampling_rate=RATE, padding=False, return_tensors="pt")["input_values"]
    output = EXTRACTOR(make(noise(4000)), sampling_rate=RATE, padding=False, return_tensors="pt")["input_values"]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_half_precision_tensors():
    clip = torch.from_numpy(noise(4000)).bfloat16()
    output, expected = (EXTRACTOR(c, sampling_rate=RATE, return_tensors="pt") for c in (clip, clip.float()))
    assert torch.equal(output["input_values"], expected["input_values"])


def test_2d_is_a_batch_and_3d_a_batch_of_channels():
    pair = np.stack([noise(seed=1), noise(seed=2)])
    assert len(EXTRACTOR(pair, sampling_rate=RATE)["input_values"]) == 2
    assert len(EXTRACTOR(pair[None], sampling_rate=RATE)["input_values"]) == 1
    assert len(EXTRACTOR([pair, pair[0]], sampling_rate=RATE)["input_values"]) == 2


def test_input_is_left_unchanged():
    clip = noise() + 0.2
    before = clip.copy()
    EXTRACTOR(clip, sampling_rate=RATE)
    np.testing.assert_array_equal(clip, before)


samples_of = st.integers(400, 6000)
few = settings(max_examples=15, deadline=None)


@few
@given(lengths=st.lists(samples_of, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_ragged_batch_equals_each_clip_alone(lengths, seed):
    clips = [noise(length, seed=seed + i) for i, length in enumerate(lengths)]
    batch = EXTRACTOR(clips, sampling_rate=RATE, padding=True, return_tensors="np")
    for clip, values, mask in zip(clips, batch["input_values"], batch["attention_mask"], strict=True):
        alone = EXTRACTOR(clip, sampling_rate=RATE, padding=False)["input_values"][0]
        np.testing.assert_array_equal(values[: len(alone)], alone)
        assert mask.tolist() == [1] * len(alone) + [0] * (len(mask) - len(alone))
        assert not values[len(alone) :].any()


@few
@given(samples=hnp.arrays(np.int16, samples_of))
def test_integers_equal_floats(samples):
    kinds = [samples, samples / 32768, samples.astype(np.int32) * 2**16]
    values = [EXTRACTOR(kind, sampling_rate=RATE, padding=False)["input_values"][0] for kind in kinds]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])


def test_uint8_is_centred():
    clip = np.random.default_rng(0).integers(0, 256, 4000)
    output = EXTRACTOR(clip.astype(np.uint8), sampling_rate=RATE)["input_values"][0]
    np.testing.assert_array_equal(output, EXTRACTOR((clip - 128) / 128, sampling_rate=RATE)["input_values"][0])


@few
@given(gain=st.floats(0.5, 8), seed=st.integers(0, 99))
def test_gain_shifts_the_log(gain, seed):
    quiet, loud = (
        log_mel_spectrogram(torch.from_numpy(noise(3000, seed=seed) * np.float32(factor))) for factor in (1, gain)
    )
    audible = quiet > np.log(1e-5)
    torch.testing.assert_close(
        (loud - quiet)[audible], torch.full_like(quiet, 2 * np.log(gain))[audible], atol=5e-3, rtol=0
    )


@few
@given(channels=st.integers(1, 4), samples=samples_of)
def test_channels_are_averaged(channels, samples):
    clip = np.stack([noise(samples, seed=channel) for channel in range(channels)])
    output = EXTRACTOR([clip], sampling_rate=RATE)["input_values"][0]
    np.testing.assert_allclose(output, EXTRACTOR(clip.mean(axis=0), sampling_rate=RATE)["input_values"][0], atol=1e-5)


# Resampling


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44100.0])
def test_resampling_keeps_the_peak_of_a_sine(rate):
    native, resampled = (
        EXTRACTOR(sine(1000, r), sampling_rate=r, padding=False)["input_values"][0] for r in (RATE, rate)
    )
    assert abs(len(native) - len(resampled)) <= 1
    assert (native[10:80].argmax(axis=1) == resampled[10:80].argmax(axis=1)).all()
    np.testing.assert_allclose(native[10:80].max(axis=1), resampled[10:80].max(axis=1), atol=0.01)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_truncation_before_resampling_is_not_heard(rate):
    clip = noise(3 * rate)
    cut = EXTRACTOR(clip, sampling_rate=rate, max_length=100, return_tensors="np")["input_values"][0]
    whole = soxr.resample(clip, rate, RATE)
    np.testing.assert_allclose(cut, EXTRACTOR(whole, sampling_rate=RATE, max_length=100)["input_values"][0], atol=1e-3)


def test_missing_soxr_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match="pip install soxr"):
        EXTRACTOR(noise(), sampling_rate=8000)


# Padding and truncation


def frames_of(**kwargs):
    clips = [noise(RATE), noise(RATE // 2)]
    return [len(values) for values in EXTRACTOR(clips, sampling_rate=RATE, **kwargs)["input_values"]]


@pytest.mark.parametrize(
    "kwargs, frames",
    [
        ({}, [1024, 1024]),
        ({"padding": "max_length", "max_length": 200}, [200, 200]),
        ({"padding": "max_length", "max_length": 60}, [60, 60]),
        ({"padding": "max_length", "max_length": 60, "truncation": False}, [98, 98]),
        ({"padding": True}, [98, 98]),
        ({"padding": "longest"}, [98, 98]),
        ({"padding": "longest", "max_length": 60}, [60, 60]),
        ({"padding": "longest", "max_length": 60, "truncation": False}, [98, 98]),
        ({"padding": False}, [98, 48]),
        ({"padding": "do_not_pad", "max_length": 60}, [60, 48]),
        ({"padding": "do_not_pad", "max_length": 60, "truncation": False}, [98, 48]),
    ],
)
def test_padding_and_truncation_in_frames(kwargs, frames):
    assert frames_of(**kwargs) == frames


def test_truncated_frames_are_the_first_of_the_whole():
    whole, cut = (EXTRACTOR(noise(), sampling_rate=RATE, max_length=n)["input_values"][0] for n in (98, 50))
    np.testing.assert_allclose(cut, whole[:50], atol=1e-4)


def test_padding_value_and_mask_can_be_chosen():
    extractor = BridleFeatureExtractor(padding_value=-1.0, return_attention_mask=False)
    output = extractor(noise(), sampling_rate=RATE, return_tensors="np")
    assert list(output) == ["input_values"] and (output["input_values"][0, 98:] == -1).all()
    assert "attention_mask" in extractor(noise(), sampling_rate=RATE, return_attention_mask=True)


def test_base_class_pads_our_output():
    ragged = EXTRACTOR([noise(RATE), noise(RATE // 2)], sampling_rate=RATE, padding=False)
    padded = EXTRACTOR.pad(ragged, padding=True, return_tensors="pt")
    expected = EXTRACTOR([noise(RATE), noise(RATE // 2)], sampling_rate=RATE, padding=True, return_tensors="pt")
    assert torch.equal(padded["input_values"], expected["input_values"])
    assert torch.equal(padded["attention_mask"], expected["attention_mask"])


# Measuring the normalisation


def test_measured_normalization_standardizes():
    clips = [(noise(RATE), RATE), (noise(44100, 0.01, seed=1), 44100), (np.stack([noise(5000), noise(5000)]), RATE)]
    mean, std = EXTRACTOR.measure_normalization(iter(clips))
    measured = BridleFeatureExtractor(mean=mean, std=std)
    values = np.concatenate(
        [measured(clip[None], sampling_rate=rate, padding=False)["input_values"][0] for clip, rate in clips[:2]]
        + [measured([clips[2][0]], sampling_rate=RATE, padding=False)["input_values"][0]]
    )
    assert abs(values.mean()) < 1e-4 and abs(values.std() - 0.5) < 1e-4


@pytest.mark.parametrize("clips, message", [([], "no clip"), ([(np.zeros(RATE), RATE)], "silence")])
def test_measuring_needs_sound(clips, message):
    with pytest.raises(ValueError, match=message):
        EXTRACTOR.measure_normalization(clips)


def test_measuring_names_the_clip():
    with pytest.raises(ValueError, match="`waveforms`, clip 1 is empty"):
        EXTRACTOR.measure_normalization([(noise(), RATE), ([], RATE)])


# As transformers uses it


def test_save_and_load(tmp_path):
    extractor = BridleFeatureExtractor(num_mel_bins=64, max_length=512, mean=-6.6, std=5.4, downmix=False)
    extractor(noise(), sampling_rate=RATE)
    extractor.save_pretrained(tmp_path)
    loaded = BridleFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    settings_saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not any(isinstance(value, list) for value in settings_saved.values())
    assert (loaded.num_mel_bins, loaded.feature_size, loaded.max_length, loaded.downmix) == (64, 64, 512, False)
    assert BridleFeatureExtractor.from_pretrained(tmp_path, max_length=100).max_length == 100


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_attribute_names_are_those_of_ast():
    assert set(ASTFeatureExtractor().to_dict()) <= set(EXTRACTOR.to_dict())
    assert EXTRACTOR.model_input_names == ["input_values", "attention_mask"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_copies_work(clone):
    values = clone(EXTRACTOR)(noise(), sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert torch.equal(values, EXTRACTOR(noise(), sampling_rate=RATE, return_tensors="pt")["input_values"])
    assert len(pickle.dumps(EXTRACTOR)) < 2000


def test_changed_attributes_take_effect():
    extractor = BridleFeatureExtractor()
    extractor.num_mel_bins, extractor.max_length, extractor.sampling_rate = 40, 50, 8000
    assert extractor(noise(), sampling_rate=8000, return_tensors="pt")["input_values"].shape == (1, 50, 40)


def test_audio_classification_pipeline():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ASTForAudioClassification(ASTConfig(**sizes, max_length=64, num_mel_bins=32)).eval()
    extractor = BridleFeatureExtractor(num_mel_bins=32, max_length=64, return_attention_mask=False)
    classify = AudioClassificationPipeline(model=model, feature_extractor=extractor, device="cpu")
    for clip in (noise(), {"raw": noise(), "sampling_rate": RATE}, {"array": noise(), "sampling_rate": RATE}):
        assert {answer["label"] for answer in classify(clip)} == {"LABEL_0", "LABEL_1"}


def test_mel_filters_are_triangles_between_20_hz_and_nyquist():
    filters = mel_filter_bank(128, RATE)
    assert filters.shape == (257, 128) and filters.dtype == np.float32
    assert filters.min() == 0 and filters.max() <= 1
    assert not filters[0].any() and not filters[256].any()
    assert (np.diff(filters.argmax(axis=0)[filters.any(axis=0)]) >= 0).all()


# Bad input: the message names the argument, the clip and the remedy


@pytest.mark.parametrize(
    "raw_speech, message",
    [
        ([], "`raw_speech` is empty.*at least one clip"),
        (np.zeros((0, RATE)), r"`raw_speech` is empty \(shape \(0, 16000\)\)"),
        (np.zeros(0), "`raw_speech` is empty"),
        ([noise(), []], "clip 1 is empty.*leave the clip out"),
        ([noise(), np.zeros((2, 0))], "clip 1 is empty"),
        ([noise(), noise(399)], "clip 1 has 399 samples at 16000 Hz.*takes 400.*leave the clip out or pad"),
        ([noise(), noise(), np.array([0.1, np.nan] * 400)], "clip 2 is NaN or infinite at sample 1: repair"),
        (np.full(800, np.inf), "`raw_speech`, clip 0 is NaN or infinite at sample 0"),
        (np.array([0.1] * 799 + [-1e19]), r"clip 0 is -1e\+19 at sample 799, over the bound of 2.15e\+09: scale it"),
        (np.float32(1), r"`raw_speech` is of type float32"),
        (np.array(1.0), r"has shape \(\): pass one clip as \(samples,\)"),
        (np.zeros((1, 1, 1, 800)), r"has shape \(1, 1, 1, 800\)"),
        ([noise(), np.zeros((1, 2, 800))], r"clip 1 has shape \(1, 2, 800\).*\(channels, samples\)"),
        ([np.zeros((800, 2))], r"clip 0 has 800 channels of 2 samples: transpose"),
        ("clip.wav", "`raw_speech` is of type str.*load_audio"),
        (None, "`raw_speech` is of type NoneType"),
        ({"array": noise()}, "`raw_speech` is of type dict"),
        (["clip.wav"], "clip 0 has samples of type <U8: pass floats"),
        ([noise(), None], "clip 1 has samples of type object"),
        ([noise(), np.zeros(800, dtype=np.int64)], "clip 1 has samples of type int64.*int16, int32 or uint8"),
        (np.zeros(800, dtype=np.complex64), "clip 0 has samples of type complex64"),
        (torch.zeros(800, dtype=torch.bool), "clip 0 has samples of type bool"),
        ([[[0.1, 0.2], [0.3]]], "clip 0 cannot be read as an array.*same length"),
    ],
)
def test_bad_clips(raw_speech, message):
    with pytest.raises(ValueError, match=message):
        EXTRACTOR(raw_speech, sampling_rate=RATE)


def test_a_frame_after_resampling_is_what_counts():
    with pytest.raises(ValueError, match=r"clip 0 has .* samples at 16000 Hz"):
        EXTRACTOR(noise(1000), sampling_rate=48000)
    assert EXTRACTOR(noise(200), sampling_rate=8000)["attention_mask"][0].sum() == 1


@pytest.mark.parametrize(
    "sampling_rate, message",
    [
        (None, "`sampling_rate` is missing: pass the rate.*`BridleFeatureExtractor.*sampling_rate=16000"),
        (0, "`sampling_rate` is 0: give one positive rate"),
        (-16000, "`sampling_rate` is -16000"),
        (float("nan"), "`sampling_rate` is nan"),
        ("16000", "`sampling_rate` is '16000'"),
        ([16000], r"`sampling_rate` is \[16000\]"),
    ],
)
def test_bad_sampling_rate(sampling_rate, message):
    with pytest.raises(ValueError, match=message):
        EXTRACTOR(noise(), sampling_rate=sampling_rate)


def test_downmix_can_be_refused():
    extractor = BridleFeatureExtractor(downmix=False)
    with pytest.raises(ValueError, match=r"clip 1 has 2 channels and `downmix` is False.*`downmix=True`"):
        extractor([noise(), np.stack([noise(), noise()])], sampling_rate=RATE)
    assert len(extractor(noise()[None, None], sampling_rate=RATE)["input_values"]) == 1


@pytest.mark.parametrize("kwargs", [{"max_length": 0}, {"padding": "left"}, {"padding": "max"}])
def test_bad_call_arguments(kwargs):
    with pytest.raises(ValueError):
        EXTRACTOR(noise(), sampling_rate=RATE, **kwargs)


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"feature_size": 1}, "feature_size"),
        ({"num_mel_bins": 0}, "num_mel_bins"),
        ({"max_length": -1}, "max_length"),
        ({"std": 0.0}, "std"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"sampling_rate": 44100.5}, "sampling_rate"),
        ({"padding_side": "left"}, "padding_side"),
    ],
)
def test_bad_settings(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BridleFeatureExtractor(**kwargs)
