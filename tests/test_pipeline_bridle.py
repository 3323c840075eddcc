"""Tests of pipeline_bridle.py: files of every format and form, long or vast ones, transformers' own, remote code."""

import base64
import io
import json
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from helpers.extreme_files import png
from helpers.fresh_process import run_fresh
from helpers.sound_files import write_m4a
from helpers.videos import write_video
from PIL import Image
from transformers import (
    AudioClassificationPipeline,
    ImageClassificationPipeline,
    VideoClassificationPipeline,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

import bridle_hf
from bridle_hf.audio_windows_bridle import patch_times
from bridle_hf.data.modalities import make_sample_loader
from bridle_hf.data.sample import Sample


RATE = 16000
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_length": 96, "num_mel_bins": 32}  # fmt: skip
LABELS = {"id2label": {0: "flute", 1: "oboe", 2: "horn"}, "label2id": {"flute": 0, "oboe": 1, "horn": 2}}


def save_classifier(folder: Path, **fields) -> str:
    torch.manual_seed(0)
    config = bridle_hf.BridleConfig(**SIZES, **LABELS, **fields)
    model = bridle_hf.BridleForAudioClassification(config)
    model.classifier.weight.data *= 5
    model.save_pretrained(folder)
    bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=96).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline("audio-classification", model=folder)


def sound(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """(samples, channels): a tone that rises and falls, all below 3.5 kHz, each channel louder than the last."""
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.15 * np.sin(2 * np.pi * (600 * time + 300 * np.sin(3 * time))) + 0.05 * np.sin(2 * np.pi * 2500 * time)
    return tone[:, None] * np.linspace(0.5, 1, channels)


def assert_near(found, wanted, atol: float = 1e-3) -> None:
    assert [entry["label"] for entry in found] == [entry["label"] for entry in wanted]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in wanted], atol=atol)


FORMATS = [("wav", 8000, 1), ("wav", 192_000, 6), ("wav", 44_100, 2), ("flac", 22_050, 1), ("flac", 96_000, 3),
           ("ogg", 48_000, 2), ("ogg", 8000, 1), ("mp3", 44_100, 2), ("mp3", 32_000, 1), ("m4a", 44_100, 2),
           ("m4a", 48_000, 1), ("m4a", 96_000, 6)]  # fmt: skip


def write(path: Path, rate: int, channels: int) -> str:
    if path.suffix == ".m4a":
        return str(write_m4a(path, sound(0.9, rate, channels).T, rate))
    soundfile.write(path, sound(0.9, rate, channels), rate)
    return str(path)


def as_array(path: str) -> np.ndarray:
    """A file as the mono array at 16 kHz that it holds, by ways that are not ours."""
    if path.endswith("m4a"):
        import av

        with av.open(path) as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
            samples, rate = np.concatenate(frames, axis=1).T, container.streams.audio[0].rate
    else:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, RATE)


@pytest.mark.parametrize(("suffix", "rate", "channels"), FORMATS)
def test_a_file_is_what_its_array_is(classify, tmp_path, suffix, rate, channels):
    path = write(tmp_path / f"a.{suffix}", rate, channels)
    wanted = classify(as_array(path))
    for form in (path, Path(path), Path(path).read_bytes(), {"path": path, "bytes": None},
                 {"path": "lost.wav", "bytes": Path(path).read_bytes()}, {"audio": {"path": path}}):  # fmt: skip
        assert_near(classify(form), wanted, 1e-4)


def test_arrays_as_transformers_takes_them(classify, folder):
    """The stock class on the same model, where it can: mono at the extractor's rate, up to the model's length."""
    stock = AudioClassificationPipeline(
        model=classify.model, feature_extractor=classify.feature_extractor, task="audio-classification"
    )
    clip = sound(0.7)[:, 0].astype(np.float32)
    wanted = stock(clip)
    stereo = sound(0.7, 44_100, 2).T
    for form in (clip, torch.from_numpy(clip), clip[None], {"raw": clip, "sampling_rate": RATE},
                 {"array": clip, "sampling_rate": RATE, "path": None}):  # fmt: skip
        assert_near(classify(form), wanted, 1e-6)
    assert_near(
        classify({"raw": stereo, "sampling_rate": 44_100}), classify(soxr.resample(stereo.mean(0), 44_100, RATE))
    )
    assert len(classify(clip, top_k=2)) == 2 and len(classify(clip, top_k=None)) == 3
    assert len(pipeline("audio-classification", model=folder, top_k=1)(clip)) == 1
    assert type(classify) is bridle_hf.BridleAudioClassificationPipeline


@torch.no_grad()
@pytest.mark.parametrize("of_steps", [False, True])
def test_whole_windows_are_heard_whatever_the_extractor_s_length(folder, folder_of_steps, of_steps):
    """An extractor that cuts at 32 frames, beside one that fits the model."""
    folder = folder_of_steps if of_steps else folder
    short = bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=32)
    long = sound(2.5)[:, 0].astype(np.float32)
    wanted = pipeline("audio-classification", model=folder)(long, return_timeline=True)
    found = pipeline("audio-classification", model=folder, feature_extractor=short)(long, return_timeline=True)
    assert found == wanted


def test_an_unknown_number_of_labels_is_five_by_default(tmp_path):
    torch.manual_seed(0)
    model = bridle_hf.BridleForAudioClassification(bridle_hf.BridleConfig(**SIZES, num_labels=7))
    model.save_pretrained(tmp_path)
    bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=96).save_pretrained(tmp_path)
    classify, clip = pipeline("audio-classification", model=str(tmp_path)), sound(0.7)[:, 0]
    assert [len(classify(clip, **options)) for options in ({}, {"top_k": None}, {"top_k": 2})] == [5, 7, 2]


@contextmanager
def served(folder: Path):
    """The address of a server that gives the files of a folder."""
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_url(classify, tmp_path):
    path = write(tmp_path / "a.flac", 22_050, 1)
    with served(tmp_path) as address:
        assert_near(classify(f"{address}/a.flac"), classify(path), 1e-6)
        with pytest.raises(ValueError, match=r"b\.flac: cannot be fetched: .*404"):
            classify(f"{address}/b.flac")


def test_rows_of_datasets(classify, tmp_path):
    from datasets import Audio, Dataset

    paths = [write(tmp_path / f"{index}.wav", rate, 2) for index, rate in enumerate((8000, 44_100))]
    rows = Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(decode=False))
    for found, path in zip(classify(list(rows)), paths):
        assert_near(found, classify(path), 1e-6)


def test_long_recordings_go_by_windows(classify):
    clip = sound(5)[:, 0].astype(np.float32)
    found = classify(clip, return_timeline=True, top_k=None, overlap=0.5)
    timeline = found["timeline"]
    starts = [window["start"] for window in timeline]
    # Windows of 96 frames (975 ms) every 48; the last ends with the recording, on a whole patch.
    np.testing.assert_allclose(starts, [*(0.48 * np.arange(9)), 4.16])
    total = {"flute": 0.0, "oboe": 0.0, "horn": 0.0}
    bounds = [0, *[(before["end"] + after["start"]) / 2 for before, after in pairwise(timeline)], 5]
    for window, first, last in zip(timeline, bounds, bounds[1:]):
        piece = clip[round(RATE * window["start"]) : round(RATE * window["end"])]
        assert_near(window["labels"], classify(piece, top_k=None), 1e-5)
        for entry in window["labels"]:
            total[entry["label"]] += entry["score"] * (last - first) / 5
    for entry in found["labels"]:
        assert entry["score"] == pytest.approx(total[entry["label"]], abs=1e-5)
    with pytest.raises(ValueError, match="`overlap` is 1"):
        classify(clip, overlap=1)


@pytest.mark.parametrize("seconds", [1.0, 1.47, 5])  # of 0.965 that the model takes
@pytest.mark.parametrize(("suffix", "rate"), [("wav", RATE), ("flac", 44_100), ("mp3", 22_050), ("m4a", 48_000)])
def test_of_long_recordings_the_part_that_evaluation_hears(classify, tmp_path, suffix, rate, seconds):
    path, samples = tmp_path / f"long.{suffix}", sound(seconds, rate, 2)
    samples[:: round(0.07 * rate)] = 0.9  # clicks, which lie in other frames if these begin a little later
    if suffix == "m4a":
        write_m4a(path, samples.T, rate)
    else:
        soundfile.write(path, samples, rate)
    inputs = make_sample_loader(classify.model.config, classify.feature_extractor)(Sample(str(path)))
    with torch.no_grad():
        scores = classify.model(inputs["input_values"][None], inputs["attention_mask"][None]).logits.softmax(-1)[0]
    for form in (path, path.read_bytes()):
        found = {entry["label"]: entry["score"] for entry in classify(form, top_k=None)}
        np.testing.assert_allclose([found[name] for name in LABELS["label2id"]], scores, atol=1e-5)
    if suffix == "flac":
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
        for kind in (int, float, np.int64):
            assert_near(classify({"array": samples.T, "sampling_rate": kind(rate)}), classify(path), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lists_and_generators_in_batches(classify, batch_size):
    clips = [sound(seconds)[:, 0].astype(np.float32) for seconds in (0.3, 2.5, 0.9, 3.1, 0.5)]
    alone = [classify(clip, return_timeline=True) for clip in clips]
    for together in (classify(clips, batch_size=batch_size, return_timeline=True),
                     list(classify(iter(clips), batch_size=batch_size, return_timeline=True))):  # fmt: skip
        for found, wanted in zip(together, alone, strict=True):
            assert_near(found["labels"], wanted["labels"], 1e-5)
            assert [(w["start"], w["end"]) for w in found["timeline"]] == [
                (w["start"], w["end"]) for w in wanted["timeline"]
            ]


def test_several_labels_take_a_sigmoid(tmp_path):
    folder = save_classifier(tmp_path / "model", problem_type="multi_label_classification")
    classify = pipeline("audio-classification", model=folder)
    clip = sound(0.9)[:, 0].astype(np.float32)
    inputs = classify.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        wanted = classify.model(**inputs).logits[0].sigmoid().sort(descending=True).values
    np.testing.assert_allclose([entry["score"] for entry in classify(clip)], wanted, atol=1e-5)
    raw = [entry["score"] for entry in classify(clip, function_to_apply="none")]
    np.testing.assert_allclose(torch.tensor(raw).sigmoid(), wanted, atol=1e-5)


def test_what_cannot_be_read_is_named(classify, tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    soundfile.write(tmp_path / "b.wav", np.zeros(100), RATE)
    for wrong, reason in [
        (str(tmp_path / "a.wav"), r"a\.wav: cannot be decoded"),
        (str(tmp_path / "b.wav"), r"b\.wav: has 100 samples"),
        (str(tmp_path / "c.wav"), r"c\.wav: no such file"),
        (b"no sound", "the recording: cannot be decoded"),
        ({"array": np.zeros(RATE)}, "give `raw` and `sampling_rate`"),
        ({"raw": np.full(RATE, np.nan), "sampling_rate": 8000}, "NaN"),
        (5, "is a int"),
    ]:
        with pytest.raises(ValueError, match=reason):
            classify(wrong)


def test_other_models_keep_their_pipeline(tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    config = ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64)
    classify = pipeline(
        "audio-classification", model=ASTForAudioClassification(config), feature_extractor=ASTFeatureExtractor()
    )
    assert type(classify) is AudioClassificationPipeline


BY_REMOTE_CODE = """
    import json
    import sys
    from pathlib import Path
    from transformers import pipeline

    classify = pipeline("audio-classification", model=sys.argv[1] if len(sys.argv) > 1 else "model",
                        trust_remote_code=True)
    assert type(classify).__name__ == "BridleAudioClassificationPipeline", type(classify)
    assert "bridle_hf" not in {name for name, module in sys.modules.items() if module}
    print(json.dumps([classify(str(path)) for path in sorted(Path("sounds").iterdir())]))
    classify.model.save_pretrained("again")
    classify.feature_extractor.save_pretrained("again")
"""


def test_by_remote_code(folder, classify, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "sounds").mkdir()
    for index, (suffix, rate, channels) in enumerate(FORMATS):
        write(tmp_path / "sounds" / f"{index:02d}.{suffix}", rate, channels)
    found = json.loads(run_fresh(BY_REMOTE_CODE, tmp_path, package=False).splitlines()[-1])
    for answer, path in zip(found, sorted((tmp_path / "sounds").iterdir()), strict=True):
        assert_near(answer, classify(as_array(str(path))))
    # What was loaded by remote code and saved again carries it, too, and the package reads it.
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {path.name for path in (tmp_path / "model").iterdir()}
    assert_near(pipeline("audio-classification", model=str(tmp_path / "again"))(str(path)), answer, 1e-5)


def test_an_encoder_names_no_pipeline(folder, tmp_path):
    encoder = bridle_hf.BridleModel.from_pretrained(folder)
    encoder.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert "custom_pipelines" in (Path(folder) / "config.json").read_text()


# --- pictures and videos ---

STOCK = {"image": ImageClassificationPipeline, "video": VideoClassificationPipeline}


@pytest.fixture(scope="module", params=STOCK)
def pixels(request, tmp_path_factory):
    """Modality, files of it, our pipeline for a model, and transformers' own for the same."""
    modality, folder = request.param, tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_frames": 4, "frame_stride": 1, "num_labels": 7}
    config = bridle_hf.BridleConfig(**{**SIZES, **sizes}, modality=modality)
    model = getattr(bridle_hf, f"BridleFor{modality.title()}Classification")(config).eval()
    for parameter in model.parameters():  # so that pictures tell, in a model that has learned nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    process = bridle_hf.make_image_processor(config)
    stock = STOCK[modality](model=model, image_processor=process, task=f"{modality}-classification")
    classify = pipeline(f"{modality}-classification", model=model, image_processor=process)
    files = []
    for index, size in enumerate([(64, 48), (48, 80), (90, 90)]):
        path = folder / f"{index}.{'png' if modality == 'image' else 'mp4'}"
        if modality == "image":
            noise = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        else:
            write_video(path, 4, size)  # of more, transformers' own takes the beginning
        files.append(str(path))
    return modality, files, classify, stock


def test_pictures_and_videos_as_transformers_takes_them(pixels):
    modality, files, classify, stock = pixels
    assert type(classify) is getattr(bridle_hf, f"Bridle{modality.title()}ClassificationPipeline")
    options = [
        {},
        {"top_k": 2},
        {"top_k": 99},
        *({"function_to_apply": name} for name in ("softmax", "sigmoid", "none")),
    ]
    for path in files:
        for kwargs in options:
            assert_near(classify(path, **kwargs), stock(path, **kwargs), 1e-5)
    wanted = [stock(path) for path in files]
    for together in (classify(files), classify(files, batch_size=2), list(classify(iter(files), batch_size=3)),
                     list(classify(path for path in files))):  # fmt: skip
        for found, expected in zip(together, wanted, strict=True):
            assert_near(found, expected, 1e-5)
    with served(Path(files[0]).parent) as address:
        assert_near(classify(f"{address}/{Path(files[0]).name}"), wanted[0], 1e-5)
        with pytest.raises(ValueError, match=r"9: cannot be fetched: .*404"):
            classify(f"{address}/9")


def test_pictures_and_videos_in_every_form(pixels):
    modality, files, classify, stock = pixels
    content = Path(files[0]).read_bytes()
    forms = [Path(files[0]), content, {"path": files[0], "bytes": None}, {modality: {"bytes": content, "path": None}}]
    if modality == "image":
        image, text = Image.open(files[0]), base64.encodebytes(content).decode()
        array = np.asarray(image)
        forms += [
            image,
            array,
            torch.from_numpy(array.copy()),
            text,
            f"data:image/png;base64,{text}",
            {"image": image},
        ]
        for form in (image, array, text, f"data:image/png;base64,{text}"):
            assert_near(stock(form), stock(files[0]), 1e-6)
    for form in forms:
        assert_near(classify(form), stock(files[0]), 1e-5)


def test_pictures_and_videos_of_several_labels(pixels, monkeypatch):
    _, files, classify, stock = pixels
    monkeypatch.setattr(classify.model.config, "problem_type", "multi_label_classification")
    found = classify(files[0])
    # Of videos, older releases take a softmax unless told.
    assert_near(found, stock(files[0], function_to_apply="sigmoid"), 1e-5)
    assert_near(found, classify(files[0], function_to_apply="sigmoid"), 1e-6)


def test_pictures_and_videos_that_cannot_be_read_are_named(pixels, tmp_path):
    modality, files, classify, _ = pixels
    noun = {"image": "the picture", "video": "the video"}[modality]
    (tmp_path / "a.bin").write_text("nothing")
    whole = files[0] if modality == "image" else write_video(tmp_path / "whole.mp4", 20, (64, 48))
    content = Path(whole).read_bytes()
    for wrong, reason in [
        (str(tmp_path / "a.bin"), r"a\.bin: cannot be decoded"),
        (str(tmp_path / "b.bin"), r"b\.bin: no such file"),
        (b"nothing", f"{noun}: cannot be decoded"),
        (content[: len(content) // 2], f"{noun}: (cannot be decoded|is truncated)"),
        ({"path": "c.bin", "bytes": b"nothing"}, r"c\.bin: cannot be decoded"),
        ({"size": 3}, "give `raw` and `sampling_rate`, `bytes` or `path`"),
        (5, f"{noun}: is a int"),
    ]:
        with pytest.raises(ValueError, match=reason):
            classify(wrong)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size, reason", [((13000, 13000), "more than 25.0 million"), ((1, 20000), "longer than 32")])
@pytest.mark.parametrize("pixels", ["image"], indirect=True)
def test_vast_pictures_are_refused_before_they_are_decoded(pixels, monkeypatch, tmp_path, size, reason):
    _, _, classify, _ = pixels
    (tmp_path / "a.png").write_bytes(png(*size))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was decoded"))
    for form in (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png")):
        with pytest.raises(ValueError, match=f"is {size[0]} x {size[1]} pixels, {reason}"):
            classify(form)


@pytest.mark.parametrize("pixels", ["video"], indirect=True)
def test_videos_come_upright_and_short_ones_repeat_their_last_frame(pixels, tmp_path):
    _, _, classify, _ = pixels

    def frames_of(path: str) -> np.ndarray:
        with av.open(path) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    def answer(frames: np.ndarray) -> list[dict]:
        with torch.no_grad():
            logits = classify.model(**classify.image_processor(list(frames), return_tensors="pt")).logits
        return classify.postprocess(type(classify.model).output_class(logits=logits))

    upright, short = write_video(tmp_path / "upright.mp4", 8), write_video(tmp_path / "short.mp4", 3)
    turned = write_video(tmp_path / "turned.mp4", 8, rotation=90)
    assert_near(classify(upright), answer(frames_of(upright)[2:6]), 1e-5)
    assert_near(classify(turned), answer(np.rot90(frames_of(upright)[2:6], axes=(1, 2))), 1e-5)
    assert_near(classify(short), answer(frames_of(short)[[0, 1, 2, 2]]), 1e-5)


@pytest.mark.parametrize("pixels", ["video"], indirect=True)
@pytest.mark.parametrize("sampling", ["stride", "segments"])
def test_of_long_videos_the_frames_that_evaluation_sees(pixels, tmp_path, sampling):
    _, _, classify, _ = pixels
    path = write_video(tmp_path / "long.mp4", 30)

    def wanted(**options) -> list[dict]:
        inputs = make_sample_loader(classify.model.config, classify.image_processor, options)(Sample(path))
        with torch.no_grad():
            logits = classify.model(inputs["pixel_values_videos"][None]).logits
        return classify.postprocess(type(classify.model).output_class(logits=logits))

    kept = classify.model.config.to_dict()
    try:
        classify.model.config.frame_sampling, classify.model.config.frame_stride = sampling, 3
        assert_near(classify(path), wanted(), 1e-5)
        assert_near(classify(path, frame_sampling_rate=7), wanted(stride=7, sampling="stride"), 1e-5)
        assert_near(classify(path, num_frames=4), classify(path), 1e-6)
        assert classify(path, num_frames=8) != classify(path)
        with pytest.raises(ValueError, match="`frame_sampling_rate` is 0"):
            classify(path, frame_sampling_rate=0)
    finally:
        for name in ("frame_sampling", "frame_stride"):
            setattr(classify.model.config, name, kept[name])


@pytest.mark.parametrize("modality", STOCK)
def test_other_models_of_pixels_keep_their_pipeline(modality):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if modality == "image":
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32))
    else:
        model = VideoMAEForVideoClassification(VideoMAEConfig(**sizes, image_size=32, num_frames=4))
    process = bridle_hf.make_image_processor(bridle_hf.BridleConfig(modality=modality, image_size=32))
    assert type(pipeline(f"{modality}-classification", model=model, image_processor=process)) is STOCK[modality]


def test_bytes_of_a_stream(classify):
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(0.5, 44_100), 44_100, format="FLAC")
    assert len(classify(buffer.getvalue())) == 3


# A model that classifies every time step


@pytest.fixture(scope="module")
def folder_of_steps(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("of_steps")
    config = bridle_hf.BridleConfig(**SIZES, **LABELS, problem_type="multi_label_classification")
    model = bridle_hf.BridleForAudioFrameClassification(config)
    model.classifier.weight.data *= 20
    model.save_pretrained(folder)
    bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=96).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rate", [22_050, 11_025])
def test_steps_last_as_long_as_their_samples(folder_of_steps, rate):
    """Where a frame's 10 ms are no whole number of samples: a step begins half a patch before the patch's middle."""
    model = bridle_hf.BridleForAudioFrameClassification.from_pretrained(folder_of_steps)
    extractor = bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=96, sampling_rate=rate)
    detect = pipeline("audio-classification", model=model, feature_extractor=extractor)
    steps = detect(sound(60, rate)[:, 0].astype(np.float32), return_timeline=True)["timeline"]
    middles = patch_times(model.config, len(steps), rate)
    apart = middles - [(step["start"] + step["end"]) / 2 for step in steps]
    np.testing.assert_allclose(apart, apart[0], atol=1e-9)
    assert steps[-1]["end"] < 60 + 0.16


@torch.no_grad()
def test_timeline_and_events_of_time_steps(folder_of_steps, tmp_path):
    """A clip of one window against the model itself; a long one, in windows, holds the same steps in its middles."""
    model = bridle_hf.BridleForAudioFrameClassification.from_pretrained(folder_of_steps).eval()
    extractor = bridle_hf.BridleFeatureExtractor.from_pretrained(folder_of_steps)
    detect = pipeline("audio-classification", model=folder_of_steps)
    assert isinstance(detect.model, bridle_hf.BridleForAudioFrameClassification)
    waveform = sound(0.9)[:, 0].astype(np.float32)
    scores = model(**extractor(waveform, sampling_rate=RATE, return_tensors="pt")).logits[0].sigmoid()[:6]
    found = detect(waveform, return_timeline=True, top_k=None)
    names = list(LABELS["id2label"].values())
    assert len(found["timeline"]) == 6
    for number, step in enumerate(found["timeline"]):
        assert (step["start"], step["end"]) == pytest.approx((number * 0.16, number * 0.16 + 0.16))
        by_name = {entry["label"]: entry["score"] for entry in step["labels"]}
        np.testing.assert_allclose([by_name[name] for name in names], scores[number], atol=1e-5)
    highest = {entry["label"]: entry["score"] for entry in found["labels"]}
    np.testing.assert_allclose([highest[name] for name in names], scores.amax(dim=0), atol=1e-5)
    assert_near(detect(waveform, top_k=None), found["labels"], atol=1e-6)
    threshold = float(scores.median())
    events = detect(waveform, return_timeline=True, threshold=threshold)["events"]
    active = torch.zeros(6, 3, dtype=torch.bool)
    for event in events:
        first, end = round(event["start"] / 0.16), round(event["end"] / 0.16)
        number = names.index(event["label"])
        assert not active[first:end, number].any()
        active[first:end, number] = True
        assert event["score"] == pytest.approx(float(scores[first:end, number].mean()), abs=1e-5)
    assert torch.equal(active, scores >= threshold) and 0 < active.sum() < 18
    long = sound(4.0)[:, 0].astype(np.float32)
    steps = detect(long, return_timeline=True, batch_size=2)["timeline"]
    assert [step["start"] for step in steps] == pytest.approx([0.16 * number for number in range(25)])
    alone = detect(long[: int(0.975 * RATE)], return_timeline=True)["timeline"]
    assert_near(steps[0]["labels"], alone[0]["labels"])


def test_events_by_remote_code(folder_of_steps, tmp_path):
    path = write(tmp_path / "a.wav", 44_100, 2)
    wanted = pipeline("audio-classification", model=folder_of_steps)(path, return_timeline=True, threshold=0.3)
    code = f"""
        import json
        from transformers import pipeline

        detect = pipeline("audio-classification", model={folder_of_steps!r}, trust_remote_code=True)
        print(json.dumps(detect({path!r}, return_timeline=True, threshold=0.3)))
    """
    found = json.loads(run_fresh(code, tmp_path / "fresh", package=False).splitlines()[-1])
    assert_near(found["labels"], wanted["labels"])
    assert found["events"] == pytest.approx([pytest.approx(event) for event in wanted["events"]])


def test_a_threshold_without_events_is_refused(classify, folder_of_steps):
    detect = pipeline("audio-classification", model=folder_of_steps)
    for run, options in ((classify, {"return_timeline": True}), (detect, {})):
        with pytest.raises(ValueError, match="`threshold` is of the events of `return_timeline`"):
            run(sound(0.9)[:, 0], threshold=0.3, **options)
