"""Processors of image and video folders: channels, Auto classes, pipelines, remote code; all without torchvision."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.fresh_process import run_fresh
from helpers.videos import write_video
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    VideoMAEImageProcessorPil,
    ViTImageProcessorPil,
    pipeline,
)

from bridle_hf import (
    BridleConfig,
    BridleForImageClassification,
    BridleForVideoClassification,
    BridleImageProcessor,
    BridleTokenizerConfig,
    BridleTokenizerModel,
    BridleVideoProcessor,
    make_image_processor,
)
from bridle_hf.data.modalities import load_config, load_processor, make_sample_loader, pixel_statistics
from bridle_hf.data.sample import Sample
from bridle_hf.image_processing_bridle import fit_channels


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
}
FOLDERS = {"grey": ("image", 1), "colour": ("image", 3), "five": ("image", 5), "video": ("video", 3)}
CLASSES = {
    "grey": BridleImageProcessor,
    "colour": ViTImageProcessorPil,
    "five": BridleImageProcessor,
    "video": BridleVideoProcessor,
}


def config_of(kind, **fields):
    modality, num_channels = FOLDERS[kind]
    return BridleConfig(modality=modality, num_channels=num_channels, **TINY, **fields)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A classifier with its processor in a folder for each kind, a picture and a video."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for kind, (modality, _) in FOLDERS.items():
        model_class = BridleForVideoClassification if modality == "video" else BridleForImageClassification
        model = model_class(config_of(kind, num_labels=3))
        for parameter in model.parameters():  # so that pictures tell, in a model that has learned nothing
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / kind)
        make_image_processor(config_of(kind), *([[0.4] * model.config.num_channels] * 2)).save_pretrained(root / kind)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / "picture.png")
    write_video(root / "video.mp4")
    return root


def settings_of(processor):
    return {name: value for name, value in processor.to_dict().items() if name != "auto_map"}


def scores(answers):
    return torch.tensor([answer["score"] for answer in sorted(answers, key=lambda answer: answer["label"])])


# --- videos ---


@pytest.mark.parametrize("form", ["array", "channels first", "frames", "tensor", "Pillow", "batch"])
def test_videos_are_read_as_by_video_mae(form):
    """Pixel for pixel, in every form that transformers' class takes."""
    config = BridleConfig(modality="video", **{**TINY, "image_size": [24, 32]})
    ours = make_image_processor(config, [0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    theirs = VideoMAEImageProcessorPil(**{k: v for k, v in settings_of(ours).items() if k != "image_processor_type"})
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8)
    video = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "frames": list(frames),
        "tensor": torch.from_numpy(frames),
        "Pillow": [Image.fromarray(frame) for frame in frames],
        "batch": [list(frames), list(frames[::-1])],
    }[form]
    found, wanted = (entry(video, return_tensors="pt")["pixel_values"] for entry in (ours, theirs))
    assert found.shape == ((2 if form == "batch" else 1), 5, 3, 24, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_folders_with_video_mae_s_processor_still_load(root, tmp_path):
    """Through transformers' Auto classes as long as it has the class, and by what reads samples in any case."""
    shutil.copytree(root / "video", tmp_path / "old")
    path = tmp_path / "old" / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    del saved["auto_map"]
    path.write_text(json.dumps(saved | {"image_processor_type": "VideoMAEImageProcessor"}))
    frames = np.random.default_rng(1).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8)
    config = load_config(str(tmp_path / "old"))
    loaders = [make_sample_loader(config, load_processor(root / name, config)) for name in ("video", tmp_path / "old")]
    sample = Sample(str(root / "video.mp4"))
    first, second = (load(sample)["pixel_values_videos"] for load in loaders)
    assert torch.equal(first, second)
    values = [AutoImageProcessor.from_pretrained(folder)(list(frames), return_tensors="pt")["pixel_values"]
              for folder in (root / "video", tmp_path / "old")]  # fmt: skip
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)
    answers = [pipeline("video-classification", model=str(folder))(str(root / "video.mp4"))
               for folder in (root / "video", tmp_path / "old")]  # fmt: skip
    torch.testing.assert_close(*map(scores, answers), atol=1e-5, rtol=0)


def test_a_video_by_its_path_is_its_first_frames(root):
    import av

    processor = BridleVideoProcessor.from_pretrained(root / "video")
    with av.open(str(root / "video.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:4]
    found = processor(str(root / "video.mp4"), num_frames=4, do_sample_frames=True, return_tensors="pt")
    assert torch.equal(found["pixel_values"], processor(frames, return_tensors="pt")["pixel_values"])
    for video, options in ((str(root / "video.mp4"), {}), (frames, {"num_frames": 2})):
        with pytest.raises(ValueError, match="`num_frames` is for a video by its path or URL, which needs it"):
            processor(video, return_tensors="pt", **options)


def test_grey_videos():
    config = BridleConfig(modality="video", num_channels=1, **TINY)
    processor = make_image_processor(config)
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    values = processor(frames.repeat(3, axis=-1), return_tensors="pt")["pixel_values"]
    wanted = torch.from_numpy(frames / 127.5 - 1).permute(0, 3, 1, 2)[None].float()
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=0)


def test_settings_of_images_are_none_of_videos(root):
    with pytest.raises(ValueError, match="settings of BridleImageProcessor, not of a video processor"):
        BridleVideoProcessor.from_pretrained(root / "grey")


# --- channels ---


def test_fit_channels():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    colour = fit_channels(grey, 3)
    np.testing.assert_array_equal(colour, grey.repeat(3, axis=-1))
    np.testing.assert_array_equal(fit_channels(colour, 1), grey)
    np.testing.assert_allclose(fit_channels(colour / 255, 1), grey / 255)  # floats stay floats
    alpha = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)  # is dropped
    np.testing.assert_array_equal(fit_channels(alpha, 3), alpha[..., :3])
    np.testing.assert_array_equal(fit_channels(alpha, 1), fit_channels(alpha[..., :3], 1))
    with pytest.raises(ValueError, match="has 2 channels where 3 are expected"):
        fit_channels(np.zeros((2, 2, 2)), 3)


@pytest.mark.parametrize("layout", ["(height, width)", "channels last", "channels first", "tensor", "Pillow"])
def test_grey_images_in_every_layout(layout):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    image = {
        "(height, width)": pixels,
        "channels last": pixels[..., None].repeat(3, axis=-1),
        "channels first": pixels[None],
        "tensor": torch.from_numpy(pixels),
        "Pillow": Image.fromarray(pixels),
    }[layout]
    processor = BridleImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = torch.from_numpy(pixels / 127.5 - 1)[None, None].float()
    for images in (image, [image]):
        values = processor(images, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert processor([image, image], return_tensors="pt")["pixel_values"].shape == (2, 1, 28, 28)


def test_each_of_many_channels_is_resized_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)
    one = make_image_processor(config_of("grey"))(pixels, return_tensors="pt")["pixel_values"]
    five = make_image_processor(config_of("five"))(np.stack([pixels] * 5), return_tensors="pt")["pixel_values"]
    assert five.shape == (1, 5, 32, 32)
    torch.testing.assert_close(five, one.expand(-1, 5, -1, -1))
    with pytest.raises(ValueError, match="has 3 channels where 5 are expected"):
        make_image_processor(config_of("five"))(Image.new("RGB", (40, 48)))


@pytest.mark.parametrize("kind", FOLDERS)
def test_no_shape_takes_more_memory(kind):
    process = make_image_processor(config_of(kind))
    channels = FOLDERS[kind][1]
    for shape in ((2, 64), (64, 2), (320, 10000)):  # up to 32 times as long as short, as before
        pixels = np.zeros((*shape, channels), np.uint8)
        assert process([pixels], return_tensors="pt")["pixel_values"].shape[-3:] == (channels, 32, 32)
    for shape in ((1, 20000), (20000, 1), (1, 2_000_000)):
        with pytest.raises(ValueError, match=r"longer than 32 times its shorter edge|height and width must be > 0"):
            process([np.zeros((*shape, channels), np.uint8)])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e19, -1.0, 256.0])
def test_values_that_are_no_pixels(value):
    pixels = np.full((40, 40), 100.0)
    pixels[3, 3] = value
    with pytest.raises(ValueError, match=r"holds values of .* give 0 to 255"):
        make_image_processor(config_of("grey"))(pixels)


@pytest.mark.parametrize("kind", ["grey", "five", "video"])
def test_floats_are_as_whole_numbers(kind):
    """Pillow takes no fractions: colours weighted to grey, or what came of an augmentation."""
    processor, rng = make_image_processor(config_of(kind)), np.random.default_rng(0)
    channels = FOLDERS[kind][1]
    pixels = rng.integers(0, 256, (48, 40, 3 if channels == 1 else channels)).astype(np.float32)
    wanted = processor([pixels.astype(np.uint8)], return_tensors="pt")["pixel_values"]
    for image in (pixels, pixels + rng.uniform(-0.4, 0.4, pixels.shape).clip(-pixels, 255 - pixels)):
        found = processor([image], return_tensors="pt")["pixel_values"]
        assert (found - wanted).abs().max() < 1.01 / 255 / 0.2


def test_images_that_are_scaled_already_are_told(caplog):
    processor = make_image_processor(config_of("grey"))
    propagate = logging.getLogger("transformers").propagate
    logging.getLogger("transformers").propagate = True
    try:
        processor(np.full((40, 40), 0.5), return_tensors="pt")
    finally:
        logging.getLogger("transformers").propagate = propagate
    assert "give `do_rescale=False`" in caplog.text


def test_make_image_processor():
    for kind, processor_class in CLASSES.items():
        assert type(make_image_processor(config_of(kind))) is processor_class
    with pytest.raises(ValueError, match="for audio: use BridleFeatureExtractor"):
        make_image_processor(BridleConfig(modality="audio"))
    with pytest.raises(ValueError, match=r"`image_std` is \[0\.5\]: give 3 numbers"):
        make_image_processor(config_of("colour"), image_std=[0.5])


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("fields", [{}, {"do_normalize": False}])
def test_a_processor_made_by_the_statistics_of_another_gives_the_same(kind, fields):
    channels = FOLDERS[kind][1]
    source = make_image_processor(config_of(kind), [0.4] * channels, [0.3] * channels)
    source = type(source)(**{**source.to_dict(), **fields})
    made = make_image_processor(config_of(kind), *map(list, pixel_statistics(source.to_dict(), channels)))
    pixels = [np.random.default_rng(0).integers(0, 256, (48, 40, channels), dtype=np.uint8)]
    values = [processor(pixels, return_tensors="pt")["pixel_values"] for processor in (source, made)]
    torch.testing.assert_close(*values)


# --- folders ---


@pytest.mark.parametrize("kind", FOLDERS)
def test_auto_image_processor(root, kind, tmp_path):
    fresh = make_image_processor(config_of(kind), *([[0.4] * FOLDERS[kind][1]] * 2))
    # Where torchvision is asked for and missing, as where it is there: a class of the same name, or ours.
    for options in ({}, {"backend": "torchvision"}, {"trust_remote_code": True}):
        processor = AutoImageProcessor.from_pretrained(root / kind, **options)
        assert type(processor) is CLASSES[kind]
        assert settings_of(processor) == settings_of(fresh)
    processor.save_pretrained(tmp_path)
    assert settings_of(AutoImageProcessor.from_pretrained(tmp_path)) == settings_of(fresh)
    saved = json.loads((root / kind / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == CLASSES[kind].__name__.removesuffix("Pil")


def test_auto_image_processor_of_a_tokenizer(tmp_path):
    sizes = {"estimator_hidden_size": 16, "estimator_num_hidden_layers": 1, "estimator_num_attention_heads": 2}
    config = BridleTokenizerConfig(modality="image", num_channels=1, **TINY, **sizes, code_dim=8, codebook_size=8)
    BridleTokenizerModel(config).save_pretrained(tmp_path)
    make_image_processor(config).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is BridleImageProcessor


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_image_pipeline_on_path_image_and_array(root, kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run remote code"))
    image = Image.open(root / "picture.png")
    processor = AutoImageProcessor.from_pretrained(root / kind)
    model = AutoModelForImageClassification.from_pretrained(root / kind)
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(dim=-1)
    classify = pipeline("image-classification", model=str(root / kind))
    for media in (str(root / "picture.png"), image, np.asarray(image)):
        torch.testing.assert_close(scores(classify(media)), expected, rtol=0, atol=1e-6)


def test_image_pipeline_on_a_grey_array(root):
    pixels = np.asarray(Image.open(root / "picture.png").convert("L"))
    classify = pipeline("image-classification", model=str(root / "grey"))
    assert classify(pixels) == classify(Image.fromarray(pixels))


def test_video_pipeline_on_a_path(root):
    from bridle_hf.data.decoding import read_video

    frames = read_video(str(root / "video.mp4"), choose=lambda total, rate: np.arange(4) + (total - 4 + 1) // 2)
    processor = AutoImageProcessor.from_pretrained(root / "video")
    model = AutoModelForVideoClassification.from_pretrained(root / "video")
    inputs = processor(list(frames), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(**inputs).logits[0].softmax(dim=-1)
    classify = pipeline("video-classification", model=str(root / "video"))
    found = classify(str(root / "video.mp4"), frame_sampling_rate=1)
    torch.testing.assert_close(scores(found), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(scores(classify(str(root / "video.mp4"))), expected, atol=1e-4)  # every fourth frame


# --- without the package, without Pillow ---


def test_by_remote_code(root):
    code = f"""
        from transformers import AutoImageProcessor, pipeline

        root, answers = {str(root)!r}, {{}}
        for kind in ("grey", "colour", "five", "video"):
            processor = AutoImageProcessor.from_pretrained(f"{{root}}/{{kind}}", trust_remote_code=True)
            processor.save_pretrained(f"again/{{kind}}")
            print(type(AutoImageProcessor.from_pretrained(f"again/{{kind}}", trust_remote_code=True)).__name__)
            task, file = ("video", "video.mp4") if kind == "video" else ("image", "picture.png")
            if kind != "five":
                classify = pipeline(f"{{task}}-classification", model=f"{{root}}/{{kind}}", trust_remote_code=True)
                assert type(classify).__name__ == f"Bridle{{task.title()}}ClassificationPipeline", type(classify)
                answers[kind] = classify(f"{{root}}/{{file}}")
                classify.save_pretrained(f"whole/{{kind}}")
                again = pipeline(model=f"whole/{{kind}}", trust_remote_code=True)  # its config tells the task
                assert type(again).__name__ == type(classify).__name__
                assert again(f"{{root}}/{{file}}") == answers[kind]
        assert "bridle_hf" not in {{name for name, module in sys.modules.items() if module}}
        torch.save(answers, "answers.pt")
    """
    names = run_fresh(code, root / "remote", package=False).split()
    assert names == [CLASSES[kind].__name__ for kind in FOLDERS]
    answers = torch.load(root / "remote" / "answers.pt")
    for kind, task, file in (("grey", "image", "picture.png"), ("video", "video", "video.mp4")):
        here = pipeline(f"{task}-classification", model=str(root / kind))(str(root / file))
        torch.testing.assert_close(scores(answers[kind]), scores(here), rtol=0, atol=1e-6)


def test_audio_needs_no_pillow(tmp_path):
    code = """
        sys.modules["PIL"] = None
        import bridle_hf
        print(len(bridle_hf.BridleFeatureExtractor()([0.1] * 16000, sampling_rate=16000)["input_values"]))
    """
    assert run_fresh(code, tmp_path, package=True).strip() == "1"


def test_nothing_here_needs_torchvision():
    assert "torchvision" not in sys.modules
