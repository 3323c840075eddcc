"""Tests of embedding/embedder.py and windows.py, against the models themselves, one input and one window at a time."""

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers.extreme_files import VIDEOS
from helpers.fresh_process import run_fresh
from helpers.pixels import pixel_config, save_pixel_encoder
from helpers.sounds import RATE, save_encoder, tiny_config, write_tone
from helpers.videos import write_video
from PIL import Image
from safetensors.torch import load_file, save_file

from bridle_hf import BridleFeatureExtractor, BridleModel, make_image_processor, pixel_decoding_bridle
from bridle_hf.common.errors import MediaError
from bridle_hf.embedding import hear
from bridle_hf.embedding.embedder import Embedder


EXTRACTOR = BridleFeatureExtractor(num_mel_bins=32, max_length=48)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def embedder():
    torch.manual_seed(0)
    return Embedder(BridleModel(tiny_config()), EXTRACTOR)


@torch.no_grad()
def tokens_of(embedder, waveform) -> torch.Tensor:
    """(steps, bands, dim) of a waveform at 16 kHz that fits into one window."""
    inputs = EXTRACTOR(waveform, sampling_rate=RATE, padding=False, return_tensors="pt")
    return embedder.model(**inputs).last_hidden_state[0, 1:].unflatten(0, (-1, 2))


def noise(rng, seconds: float, channels: int = 1) -> np.ndarray:
    return (0.1 * rng.normal(size=(channels, int(seconds * RATE)))).astype(np.float32)


def test_clips_of_unlike_length_as_one_at_a_time(embedder, rng):
    clips = [noise(rng, seconds) for seconds in rng.uniform(0.03, 0.48, size=60)]
    found = embedder.embed([(clip, RATE) for clip in clips])
    assert found.shape == (60, 16) and found.dtype == np.float32
    for clip, row in zip(clips, found):
        np.testing.assert_allclose(row, tokens_of(embedder, clip).mean(dim=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(embedder.embed((clips[7], RATE)), found[7], atol=1e-5)


def by_hand(embedder, waveform, starts) -> torch.Tensor:
    """(steps, bands, dim) of a longer waveform from windows of 48 frames that start at these frames."""
    ends = [*(start + 48 for start in starts[:-1]), 1 + (len(waveform) - 400) // 160]
    pieces = [waveform[160 * start : 160 * (end - 1) + 400] for start, end in zip(starts, ends)]
    tokens = [tokens_of(embedder, piece) for piece in pieces]
    middles = [(start // 16 + end // 16) // 2 for start, end in zip(starts[1:], ends)]
    own = zip([0, *middles], [*middles, None], starts)
    return torch.cat([t[a - s // 16 : None if b is None else b - s // 16] for t, (a, b, s) in zip(tokens, own)])


@pytest.mark.parametrize(
    ("overlap", "starts"), [(1 / 3, [0, 32, 64, 96, 112]), (0, [0, 48, 96, 112]), (2 / 3, range(0, 113, 16))]
)
def test_long_recordings_are_stitched(overlap, starts, rng):
    embedder = Embedder(BridleModel(tiny_config()), EXTRACTOR, overlap=overlap)
    waveform = noise(rng, (159 * 160 + 400) / RATE)[0]  # 159 frames or so, ten steps
    expected = by_hand(embedder, waveform, list(starts))
    frames = embedder.embed((waveform, RATE), level="frame")
    assert len(expected) == 10
    np.testing.assert_allclose(frames.values, expected.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(frames.times, 0.0875 + 0.16 * np.arange(10), atol=1e-9)
    patches = embedder.embed((waveform, RATE), level="patch")
    np.testing.assert_allclose(patches.values, expected.flatten(0, 1), atol=1e-5)
    np.testing.assert_allclose(patches.times, frames.times.repeat(2))
    np.testing.assert_array_equal(patches.positions, np.tile([[0], [1]], (10, 1)))
    mean, deviation = expected.mean(dim=(0, 1)), expected.flatten(0, 1).std(dim=0, correction=0)
    np.testing.assert_allclose(embedder.embed((waveform, RATE)), mean, atol=1e-5)
    np.testing.assert_allclose(
        embedder.embed((waveform, RATE), pooling="mean_std"), torch.cat([mean, deviation]), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.embed((waveform, RATE), pooling="band_mean"), expected.mean(dim=0).flatten(), atol=1e-5
    )


def test_layers(embedder, rng):
    clip = noise(rng, 0.4)
    inputs = EXTRACTOR(clip, sampling_rate=RATE, padding=False, return_tensors="pt")
    with torch.no_grad():
        outputs = embedder.model(**inputs, output_hidden_states=True)
    states = torch.stack([*outputs.hidden_states[:-1], outputs.last_hidden_state])[:, 0, 1:]
    for layers, expected in [
        (0, states[0].mean(dim=0)),
        ([1, -1], torch.cat([states[1], states[2]], dim=1).mean(dim=0)),
        ("mean", states[1:].mean(dim=(0, 1))),
        ("all", states.mean(dim=1)),
    ]:
        found = embedder.embed((clip, RATE), layers=layers)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.shape == embedder.shape("clip", layers)
    frames = embedder.embed((clip, RATE), level="frame", layers="all", pooling="mean_std").values
    assert frames.shape == (3, *embedder.shape("frame", "all", "mean_std")) == (3, 3, 32)
    patches = embedder.embed((clip, RATE), level="patch", layers="all").values
    np.testing.assert_allclose(patches, states.transpose(0, 1), atol=1e-5)


def test_every_kind_of_input(embedder, tmp_path):
    path = write_tone(tmp_path / "a.flac", 0.7, 44100, channels=2)
    waveform, rate = soundfile.read(path, dtype="float32")
    expected = embedder.embed(path)
    kinds = [
        tmp_path / "a.flac",
        (tmp_path / "a.flac").read_bytes(),
        (waveform.T, rate),
        (torch.from_numpy(waveform.T), rate),
        {"array": waveform.T, "sampling_rate": rate, "path": None},
        {"raw": waveform.T, "sampling_rate": rate},
        {"bytes": None, "path": path},
        {"bytes": (tmp_path / "a.flac").read_bytes(), "path": "elsewhere.flac"},
    ]
    for kind in kinds:
        np.testing.assert_allclose(embedder.embed(kind), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(iter(kinds)), [expected] * len(kinds), atol=1e-5)
    np.testing.assert_allclose(embedder.embed([waveform.T] * 2, sampling_rate=rate), [expected] * 2, atol=1e-5)
    assert embedder.embed([]).shape == (0, 16) and embedder.embed([], level="frame") == []


def test_what_cannot_be_embedded_moves_no_row(embedder, tmp_path, rng, caplog):
    (tmp_path / "broken.wav").write_text("no sound")
    good = [(noise(rng, seconds), RATE) for seconds in (0.3, 1.7, 0.1)]
    bad = [str(tmp_path / "broken.wav"), (noise(rng, 0.01), RATE), {"array": noise(rng, 1)}, None, good[0][0], b"",
           (np.full(RATE, np.nan), RATE), str(tmp_path / "missing.wav")]  # fmt: skip
    inputs = [bad[0], good[0], *bad[1:4], good[1], good[2], *bad[4:]]
    rows = embedder.embed(iter(inputs), errors="skip")
    kept = [1, 5, 6]
    np.testing.assert_allclose(rows[kept], embedder.embed(good), atol=1e-5)
    assert np.isnan(np.delete(rows, kept, axis=0)).all()
    assert len(caplog.messages) == len(bad) and "broken.wav: cannot be decoded" in caplog.messages[0]
    assert "input 2: has 160 samples" in caplog.messages[1]
    frames = embedder.embed(inputs, level="frame", errors="skip")
    assert [index for index, entry in enumerate(frames) if entry is not None] == kept
    with pytest.raises(MediaError, match=r"broken\.wav: cannot be decoded"):
        embedder.embed(inputs)


def test_a_model_that_is_broken_gives_no_numbers(embedder, rng):
    embedder.model.layernorm.weight.data[0] = torch.nan
    with pytest.raises(MediaError, match="input 0: its embedding is not finite"):
        embedder.embed((noise(rng, 0.3), RATE))


def test_wrong_arguments_are_refused_before_anything_is_read(embedder, tmp_path):
    for options, reason in [
        ({"level": "word"}, "level 'word': clip, patch or frame"),
        ({"pooling": "max"}, "pooling 'max' of level 'clip': mean, mean_std, band_mean"),
        ({"pooling": "mean", "level": "patch"}, "patches are not pooled"),
        ({"layers": 3}, "layers 3"),
        ({"errors": "ignore"}, "errors 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=reason):
            embedder.embed(str(tmp_path / "missing.wav"), **options)
    with pytest.raises(ValueError, match="overlap 1"):
        Embedder(embedder.model, EXTRACTOR, overlap=1)


def test_batches_hold_little_padding(rng):
    """Counted at the model: of 400 clips from 0.03 to 1.9 s in any order, under 5% of the tokens are padding."""
    embedder = Embedder(BridleModel(tiny_config(max_length=192)), EXTRACTOR)
    clips = [(noise(rng, seconds), RATE) for seconds in rng.uniform(0.03, 1.9, size=400)]
    real, with_padding = [], []

    def count(module, args, inputs):
        lengths = inputs["attention_mask"].sum(dim=1) if "attention_mask" in inputs else None
        count, frames, _ = inputs["input_values"].shape
        steps = -(-frames // 16)
        real.append(count * steps if lengths is None else int((-(lengths // -16)).sum()))
        with_padding.append(count * steps)

    embedder.model.register_forward_pre_hook(count, with_kwargs=True)
    embedder.embed(clips)
    assert sum(real) > 0.95 * sum(with_padding) and len(real) < 150


def test_from_pretrained(tmp_path, rng):
    folder = save_encoder(tmp_path / "model")
    clip = (noise(rng, 0.4), RATE)
    half = Embedder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, batch_size=2)
    whole = Embedder.from_pretrained(folder)
    assert half.model.dtype == torch.bfloat16 and not whole.model.training
    assert half.embed(clip).dtype == np.float32
    np.testing.assert_allclose(half.embed(clip), whole.embed(clip), atol=0.1)
    with pytest.raises(ValueError, match="no model is there"):
        Embedder.from_pretrained(str(tmp_path))


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    folder = save_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bridle.layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, as layernorm"):
        Embedder.from_pretrained(folder)


def test_encode_as_sentence_transformers_does(embedder, rng):
    clips = [(noise(rng, seconds), RATE) for seconds in (0.2, 0.4, 0.9)]
    wanted = embedder.embed(clips)
    np.testing.assert_array_equal(embedder.encode(clips, batch_size=1, show_progress_bar=False), wanted)
    assert embedder.batch_size == 4
    unit = embedder.encode(clips, normalize_embeddings=True, convert_to_tensor=True)
    np.testing.assert_allclose(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    rows = embedder.encode(clips, convert_to_numpy=False)
    assert isinstance(rows, list) and all(isinstance(row, torch.Tensor) and row.shape == (16,) for row in rows)
    assert embedder.encode(clips[0]).shape == (16,)


def test_hear(tmp_path, rng):
    """The API's own words: https://hearbenchmark.com/hear-api.html."""
    model = hear.load_model(save_encoder(tmp_path / "model"))
    assert isinstance(model, torch.nn.Module) and model.sample_rate == RATE
    audio = torch.from_numpy(noise(rng, 1.3, 2)).float()
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (2, model.scene_embedding_size) and scenes.dtype == torch.float32
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, timestamps.shape[1], model.timestamp_embedding_size) and timestamps.shape == (2, 8)
    np.testing.assert_allclose(timestamps[1], 87.5 + 160 * np.arange(8), atol=1e-3)  # milliseconds
    np.testing.assert_allclose(embeddings.mean(dim=1), scenes, atol=1e-5)
    for number in range(2):
        np.testing.assert_allclose(scenes[number], model.embedder.embed((audio[number], RATE)), atol=1e-5)
    with pytest.raises(ValueError, match="audio has shape"):
        hear.get_scene_embeddings(audio[0], model)
    with pytest.raises(ValueError, match="HEAR is for audio"):
        hear.load_model(save_pixel_encoder(tmp_path / "image", "image"))


# --- images and videos ---


def test_images(rng, tmp_path):
    config = pixel_config("image", num_channels=3)
    processor = make_image_processor(config)
    embedder = Embedder(BridleModel(config), processor)
    pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with torch.no_grad():
        tokens = embedder.model(**processor(Image.fromarray(pixels), return_tensors="pt")).last_hidden_state[0, 1:]
    kinds = [str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), pixels, Image.fromarray(pixels)]
    for kind in kinds:
        np.testing.assert_allclose(embedder.embed(kind), tokens.mean(dim=0), atol=1e-5)
    patches = embedder.embed(pixels, level="patch")
    np.testing.assert_allclose(patches.values, tokens, atol=1e-5)
    assert patches.times is None and patches.positions[-1].tolist() == [size - 1 for size in config.patch_grid]
    with pytest.raises(ValueError, match="level 'frame': clip, patch"):
        embedder.embed(pixels, level="frame")


def test_windows_of_a_video_with_one_key_frame_decode_it_once(rng, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "60", "sc_threshold": "0"})
    with av.open(path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    config = pixel_config("video")
    embedder = Embedder(BridleModel(config), make_image_processor(config), stride=2, overlap=0.5)
    wanted = embedder.embed((frames, 10), level="patch")
    decoded, following = [], pixel_decoding_bridle._Video._next
    monkeypatch.setattr(pixel_decoding_bridle._Video, "_next", lambda video: decoded.append(1) or following(video))
    found = embedder.embed(path, level="patch")
    assert len(decoded) <= 61  # its frames, and the end
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    np.testing.assert_allclose(found.times, wanted.times)


@pytest.mark.parametrize("name", ["endless_tag.mkv", "fast.avi", "slow.avi"])
def test_a_video_that_claims_no_end_is_refused(name, tmp_path):
    """To go through all of it would take for ever."""
    VIDEOS[name](tmp_path / name)
    config = pixel_config("video")
    embedder = Embedder(BridleModel(config), make_image_processor(config))
    with pytest.raises(MediaError, match=r"claims \d+ frames in \d+ bytes"):
        embedder.embed(str(tmp_path / name))


@torch.no_grad()
def test_videos(rng, tmp_path):
    config = pixel_config("video")
    processor = make_image_processor(config)
    embedder = Embedder(BridleModel(config), processor, overlap=0.5, stride=2)
    video = rng.integers(256, size=(19, 32, 32, 3), dtype=np.uint8)
    frames = embedder.embed((video, 10), level="frame")
    kept = Embedder(BridleModel(pixel_config("video", frame_stride=2)), processor)
    assert kept.stride == 2 and Embedder(embedder.model, processor).stride == 4
    # Every second frame of 19 is ten, and one repeated to fill the last tubelet.
    seen = np.minimum(2 * np.arange(10), 18)
    starts, tokens = range(0, 7, 2), []
    for start in starts:
        pixels = processor(list(video[seen[start : start + config.num_frames]]), return_tensors="pt")["pixel_values"]
        tokens.append(embedder.model(pixel_values_videos=pixels.reshape(1, config.num_frames, 3, 32, 32))[0][0])
    per_window = [entry.unflatten(0, config.patch_grid).mean(dim=(1, 2)) for entry in tokens]
    assert config.patch_grid[0] == 2 and config.num_frames == 4
    expected = torch.stack([*(window[0] for window in per_window), per_window[-1][1]])
    assert frames.times.tolist() == pytest.approx([0.1, 0.5, 0.9, 1.3, 1.7])
    np.testing.assert_allclose(frames.values, expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed((video, 10)), expected.mean(dim=0), atol=1e-5)
    path = write_video(tmp_path / "a.mp4", num_frames=30, rate=10)
    found = embedder.embed([path, (tmp_path / "a.mp4").read_bytes()], level="patch")
    np.testing.assert_array_equal(found[0].values, found[1].values)
    assert found[0].times[-1] == pytest.approx((28 + 29) / 2 / 10)  # the last one fills the tubelet


# --- an hour ---

HOUR = """
    import resource
    import soundfile
    import bridle_hf
    import numpy as np
    import soxr
    from bridle_hf.embedding.embedder import Embedder

    torch.manual_seed(0)
    config = bridle_hf.BridleConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
    extractor = bridle_hf.BridleFeatureExtractor()
    embedder = Embedder(bridle_hf.BridleModel(config), extractor)
    rng, rate = np.random.default_rng(0), 44_100
    for name, seconds in [("short", 10), ("long", 3600)]:
        with soundfile.SoundFile(f"{name}.wav", "w", rate, 2) as file:
            for _ in range(seconds):
                file.write(0.1 * rng.normal(size=(rate, 2)).cumsum(axis=0) / 30)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    embedder.embed("short.wav")
    before = peak()
    frames = embedder.embed("long.wav", level="frame")
    clip = embedder.embed("long.wav")
    print(peak() - before)

    # By hand: one window after the other, each read, resampled and cut by itself from an exact place of the file.
    assert abs(frames.times - (0.0875 + 0.16 * np.arange(len(frames.times)))).max() < 0.5 / 16_000
    assert len(frames.times) == 22500 == -(-(1 + (3600 * 16_000 - 400) // 160) // 16)
    np.testing.assert_allclose(clip, frames.values.astype(np.float64).mean(axis=0), atol=1e-5)
    with soundfile.SoundFile("long.wav") as file:
        for start, own in [(0, (0, 56)), (48 * 16 * 200, (48 * 200 + 8, 48 * 201 + 8)), (22436 * 16, (22458, 22500))]:
            margin = 16_000 if start else 0
            file.seek((start * 160 - margin) * rate // 16_000)
            samples = file.read((160 * 1024 + 240 + margin + 16_000) * rate // 16_000, dtype="float32").mean(axis=1)
            waveform = soxr.resample(samples, rate, 16_000)[margin:][: 160 * 1023 + 400]
            inputs = extractor(waveform, sampling_rate=16_000, padding=False, return_tensors="pt")
            with torch.no_grad():
                tokens = embedder.model(**inputs).last_hidden_state[0, 1:].unflatten(0, (-1, 8)).mean(dim=1)
            first, last = own
            wanted = tokens[first - start // 16 : last - start // 16]
            found = frames.values[first:last][: len(wanted)]
            print(start, abs(found[:-2] - wanted[: len(found) - 2].numpy()).max())
"""


@pytest.mark.slow
def test_an_hour_takes_little_more_memory_than_ten_seconds(tmp_path):
    more, *differences = run_fresh(HOUR, tmp_path, package=True).splitlines()
    assert float(more) < 300
    assert all(float(line.split()[1]) < 1e-4 for line in differences), differences
