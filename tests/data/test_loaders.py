"""Tests of data/decoding.py and data/loaders.py on images and videos: small real files."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import soundfile
import torch
from av.stream import Disposition
from helpers.videos import numbers, picture, shade, write_video
from PIL import Image
from transformers import pipeline
from transformers.image_utils import load_image
from transformers.pipelines.video_classification import read_video_pyav

from bridle_hf import BridleConfig, BridleForImageClassification, make_image_processor
from bridle_hf import pixel_decoding_bridle as reading
from bridle_hf.common.errors import MediaError
from bridle_hf.data.batches import DrawDataset
from bridle_hf.data.decoding import read_image, read_video
from bridle_hf.data.finding import find_samples
from bridle_hf.data.loaders import ImageLoader, VideoLoader, segment_indices, stride_indices
from bridle_hf.data.modalities import load_processor, make_processor, make_sample_loader
from bridle_hf.data.sample import Sample


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {"patch_size": 8, "tubelet_size": 2, "num_frames": 4}


def model_config(modality, num_channels, image_size=32, **fields):
    return BridleConfig(modality=modality, image_size=image_size, num_channels=num_channels, **SIZES, **fields)


def processor(modality, image_size=32, num_channels=3):
    return make_image_processor(model_config(modality, num_channels, image_size))


def photo(height=40, width=60, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_image(path, pixels, **options):
    Image.fromarray(pixels.squeeze()).save(path, **options)
    return str(path)


# --- images ---


def test_colour_and_grey_images(tmp_path):
    colour, grey = photo(), photo(channels=1)
    path = write_image(tmp_path / "colour.png", colour)
    np.testing.assert_array_equal(read_image(path), colour)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_image(file.read()), colour)
    as_grey = read_image(path, num_channels=1)[..., 0].astype(int)
    assert np.abs(as_grey - np.asarray(Image.fromarray(colour).convert("L"))).max() <= 1
    path = write_image(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read_image(path, num_channels=1), grey)
    np.testing.assert_array_equal(read_image(path), grey.repeat(3, axis=-1))


def test_images_of_other_kinds_are_converted(tmp_path):
    image = Image.fromarray(photo())
    image.quantize(16).save(tmp_path / "palette.png")
    expected = np.asarray(image.quantize(16).convert("RGB"))
    np.testing.assert_array_equal(read_image(str(tmp_path / "palette.png")), expected)
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(read_image(str(tmp_path / "cmyk.tif")), photo())
    image.convert("1").save(tmp_path / "bits.png")
    assert set(read_image(str(tmp_path / "bits.png"), num_channels=1).ravel()) == {0, 255}


# Colour under full transparency, a ramp, and every pixel another one.
HIDDEN = np.dstack([photo(), np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))])


def transparent(image, colour):
    image.info["transparency"] = colour
    return image


PICTURES = {
    "1": lambda: Image.fromarray(photo(channels=1).squeeze()).convert("1"),
    "L": lambda: Image.fromarray(photo(channels=1).squeeze()),
    "LA": lambda: Image.fromarray(HIDDEN).convert("LA"),
    "P": lambda: Image.fromarray(photo()).quantize(16),
    "L, a transparent grey": lambda: transparent(Image.fromarray(photo(channels=1).squeeze() // 32), 3),
    "P, a transparent colour": lambda: transparent(Image.fromarray(photo()).quantize(16), 3),
    "P, transparent by degrees": lambda: transparent(Image.fromarray(photo()).quantize(16), bytes(range(0, 160, 10))),
    "RGB, a transparent colour": lambda: transparent(Image.fromarray(photo() // 128), (1, 0, 1)),
    "PA": lambda: Image.fromarray(HIDDEN).convert("PA"),
    "RGB": lambda: Image.fromarray(photo()),
    "RGBA": lambda: Image.fromarray(HIDDEN),
    "CMYK": lambda: Image.fromarray(photo()).convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(photo()).convert("YCbCr"),
    "LAB": lambda: Image.fromarray(photo(), "LAB"),
}
SUFFIXES = {"CMYK": "tif", "YCbCr": "tif", "LAB": "tif", "PA": "tif"}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", PICTURES)
def test_loader_and_pipeline_see_the_same_pixels(tmp_path, mode, num_channels):
    path = tmp_path / f"picture.{SUFFIXES.get(mode, 'png')}"
    try:
        PICTURES[mode]().save(path)
        Image.open(path).load()
    except OSError:
        pytest.skip("Pillow writes no such file, or cannot read it itself")
    process = processor("image", num_channels=num_channels)
    seen = []
    model = BridleForImageClassification(model_config("image", num_channels, **TINY))
    classify = pipeline("image-classification", model=model, image_processor=process)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"][0]), with_kwargs=True)
    classify(str(path))
    expected = process(load_image(str(path)), return_tensors="pt")["pixel_values"][0]
    loaded = ImageLoader(process)(Sample(str(path)))["pixel_values"]
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded, seen[0], rtol=0, atol=1e-6)


def test_alpha_is_kept_by_models_that_take_it(tmp_path):
    path = write_image(tmp_path / "alpha.png", HIDDEN)
    np.testing.assert_array_equal(read_image(path, num_channels=4), HIDDEN)
    expected = processor("image", num_channels=4)(Image.open(path), return_tensors="pt")["pixel_values"][0]
    loaded = ImageLoader(processor("image", num_channels=4))(Sample(path))["pixel_values"]
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)
    with pytest.raises(MediaError, match="has 3 channels where 2 are expected"):
        read_image(path, num_channels=2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused_not_clipped(tmp_path, dtype):
    Image.fromarray(np.linspace(0, 60000, 4096).astype(dtype).reshape(64, 64)).save(tmp_path / "deep.tif")
    for num_channels in (1, 3):
        with pytest.raises(MediaError, match=r"of mode (I;16|I|F), which transformers' `load_image` clips at 255"):
            read_image(str(tmp_path / "deep.tif"), num_channels=num_channels)


def test_videos_with_alpha_and_of_many_bits(tmp_path):
    for pix_fmt in ("bgra", "gray16le", "yuv444p10le"):
        with av.open(str(tmp_path / "video.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 60, 40, pix_fmt
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(HIDDEN, format="rgba").reformat(format=pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with av.open(str(tmp_path / "video.mkv")) as container:
            expected = read_video_pyav(container, np.arange(4))
        np.testing.assert_array_equal(read_video(str(tmp_path / "video.mkv")), expected)


def test_images_come_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = photo()
    path = write_image(tmp_path / "turned.png", pixels, exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(pixels, -1))


def test_bad_images(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(photo(200, 200)).save(whole, "PNG")
    first, second = (Image.fromarray(photo(seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    Image.fromarray(photo(channels=1).squeeze().astype(np.float32)).save(tmp_path / "float.tif")
    header = bytearray(whole.getvalue())
    header[16:20] = bytes(4)  # the width
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    cases = {
        str(tmp_path / "missing.png"): "no such file",
        bytes(header): "cannot be decoded",
        whole.getvalue()[:20000]: "cannot be decoded: .*truncated",
        b"": "cannot be decoded",
        b"not an image": "cannot be decoded",
        str(tmp_path / "animated.gif"): "holds 2 pictures where one is expected",
        str(tmp_path / "float.tif"): "pixels of mode F, which transformers' `load_image` clips at 255",
    }
    for media, message in cases.items():
        with pytest.raises(MediaError, match=message):
            read_image(media)
    with pytest.raises(MediaError, match=r"here\.png: has 3 channels where 5 are expected"):
        read_image(whole.getvalue(), "here.png", num_channels=5)


def test_whatever_pillow_raises(tmp_path):
    content = io.BytesIO()
    Image.fromarray(photo(200, 200)).save(content, "TIFF")
    content = bytearray(content.getvalue())
    (entries,) = struct.unpack_from("<I", content, 4)
    struct.pack_into("<H", content, entries + 2, 65000)  # the first tag, the width, is another one: TypeError
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_image(bytes(content))


def test_the_pictures_of_a_camera(tmp_path):
    first, second = (Image.fromarray(photo(seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "camera.mpo", save_all=True, append_images=[second])
    assert read_image(str(tmp_path / "camera.mpo")).shape == (40, 60, 3)


# --- video ---


@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts", "webm", "avi"])
def test_frames_of_any_container(tmp_path, extension):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(extension, "libx264")
    video = write_video(tmp_path / f"video.{extension}", codec=codec)
    frames = read_video(video)
    assert frames.shape == (20, 48, 64, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(20))
    choice = np.array([[13, 19], [2, 7], [7, 2]])
    clips = read_video(video, choose=lambda total, rate: choice)
    assert clips.shape == (3, 2, 48, 64, 3)
    assert numbers(clips.reshape(6, 48, 64, 3)) == choice.ravel().tolist()
    with open(video, "rb") as file:
        assert numbers(read_video(file.read(), choose=lambda total, rate: np.array([total - 1]))) == [19]


def test_an_open_video_is_read_in_any_order(tmp_path):
    with reading.open_video(write_video(tmp_path / "video.mp4")) as video:
        for indices in ([13, 14], [2, 3], [3, 19], [18], [0]):
            assert numbers(video.read(np.array(indices))) == indices


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    decoded = []
    following = reading._Video._next
    monkeypatch.setattr(reading._Video, "_next", lambda video: decoded.append(1) or following(video))
    video = write_video(tmp_path / "video.mp4", 200)
    assert numbers(read_video(video, choose=lambda total, rate: np.array([103, 104, 190]))) == [3, 4, 15]
    assert len(decoded) <= 12  # two runs from the key frame before, five apart


def test_varying_rate_goes_by_timestamps(tmp_path):
    stamps = [0, 100, 200, 300, 1000, 1100, 1200, 2000, 2500, 2600]
    video = write_video(tmp_path / "video.mkv", 10, pts=stamps)
    frames = numbers(read_video(video))
    assert len(frames) == 27  # at the 10 frames per second of its header
    for index, number in enumerate(frames):
        assert abs(stamps[number] - 100 * index) == min(abs(stamp - 100 * index) for stamp in stamps)


def test_rotation(tmp_path):
    upright = read_video(write_video(tmp_path / "upright.mp4", 4))
    for degrees in (90, 180, -90):
        turned = read_video(write_video(tmp_path / f"{degrees}.mp4", 4, rotation=degrees))
        np.testing.assert_array_equal(turned, np.rot90(upright, degrees // 90, axes=(1, 2)))
    with pytest.raises(MediaError, match="turned by 45 degrees"):
        read_video(write_video(tmp_path / "45.mp4", 4, rotation=45))


def test_the_matrix_that_a_phone_writes_turns_clockwise(tmp_path):
    with open(write_video(tmp_path / "video.mp4", 4), "rb") as file:
        content = bytearray(file.read())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    upright = read_video(str(tmp_path / "video.mp4"))
    np.testing.assert_array_equal(read_video(bytes(content)), np.rot90(upright, -1, axes=(1, 2)))


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_sound_is_ignored_however_long(tmp_path, extension):
    video = write_video(tmp_path / f"video.{extension}", sound_seconds=5.0)
    assert numbers(read_video(video)) == list(range(20))


def write_changing_video(path, sizes):
    """Motion JPEG: every frame is a picture of its own size."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        (stream.width, stream.height), stream.pix_fmt = sizes[0], "yuvj420p"
        for index, size in enumerate(sizes):
            content = io.BytesIO()
            Image.fromarray(picture(index, size)).save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), index, index
            packet.is_keyframe = True
            container.mux(packet)
    return str(path)


def test_a_stream_that_changes_size(tmp_path):
    video = write_changing_video(tmp_path / "video.mkv", [(64, 48)] * 3 + [(96, 96)] * 3)
    frames = read_video(video)
    assert frames.shape == (6, 48, 64, 3)
    assert numbers(frames) == list(range(6))
    assert read_video(video, choose=lambda total, rate: np.array([4, 1])).shape == (2, 48, 64, 3)


def write_video_with_cover(path, with_video):
    """Sound with a cover picture, as music players keep it, and perhaps a video."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        video = container.add_stream("libx264", rate=10) if with_video else None
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 320, 240, "yuvj420p", Disposition.attached_pic
        if with_video:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for index in range(5):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
            container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
        content = io.BytesIO()
        Image.new("RGB", (320, 240)).save(content, "JPEG")
        packet = av.Packet(content.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = cover, 0, 0, True
        container.mux(packet)
    return str(path)


def test_cover_pictures_are_no_videos(tmp_path):
    assert read_video(write_video_with_cover(tmp_path / "video.mp4", True)).shape == (5, 48, 64, 3)
    with pytest.raises(MediaError, match="holds no video"):
        read_video(write_video_with_cover(tmp_path / "song.mp4", False))


def test_bad_videos(tmp_path):
    with open(write_video(tmp_path / "video.mp4", 100, movflags="faststart"), "rb") as file:
        content = file.read()
    cases = {
        str(tmp_path / "missing.mp4"): "no such file",
        content[: len(content) // 2]: "cannot be decoded|truncated",
        content[: len(content) // 2] + bytes(500) + content[len(content) // 2 + 500 :]: "cannot be decoded|corrupt",
        b"": "cannot be decoded",
        b"not a video": "cannot be decoded",
        # H.264 with reordered frames has no way to say so in this container.
        write_video(tmp_path / "reordered.avi"): "timestamps missing or out of order",
    }
    for media, message in cases.items():
        with pytest.raises(MediaError, match=message):
            read_video(media)
    with pytest.raises(IndexError, match=r"frames 0 \.\. 100 were chosen out of 100"):
        read_video(content, choose=lambda total, rate: np.array([0, total]))


def test_a_codec_that_nobody_knows_and_a_broken_tag(tmp_path):
    with open(write_video(tmp_path / "video.mp4", 10), "rb") as file:
        content = file.read()
    assert content.count(b"avc1") >= 1
    with pytest.raises(MediaError, match="codec that libav does not know"):
        read_video(content.replace(b"avc1", b"zzz1"))
    with open(write_video(tmp_path / "video.mkv", 10), "rb") as file:
        content = file.read()
    broken = content.replace(b"00:00:0", b"00:0x:0")
    assert broken != content
    np.testing.assert_array_equal(read_video(broken), read_video(content))


def test_a_video_that_ends_before_its_header_says(tmp_path, monkeypatch):
    video = write_video(tmp_path / "video.mp4", 40)
    monkeypatch.setattr(reading._Video, "_seconds", lambda self: 6.0)
    assert numbers(read_video(video, choose=lambda total, rate: np.array([39, 41]))) == [14, 14]  # badly rounded
    with pytest.raises(MediaError, match=r"truncated: it ends 2\.0 s before a frame that it should have"):
        read_video(video, choose=lambda total, rate: np.array([59]))


@pytest.mark.parametrize("extension", ["mkv", "webm"])
def test_a_video_that_ends_before_its_tag_says(tmp_path, extension):
    codec = "libvpx-vp9" if extension == "webm" else "libx264"
    with open(write_video(tmp_path / f"video.{extension}", 20, codec=codec), "rb") as file:
        content = file.read()
    longer = content.replace(b"00:00:02.0", b"00:00:05.0")
    assert longer != content
    with pytest.raises(MediaError, match=r"truncated: it ends 3\.0 s before a frame that it should have"):
        read_video(longer, choose=lambda total, rate: np.array([total - 1]))
    assert numbers(read_video(longer, choose=lambda total, rate: np.array([7]))) == [7]
    for odd in (b"00:00:nan ", b"00:00:inf "):  # no duration
        assert len(read_video(content.replace(b"00:00:02.000000000", odd.ljust(18)))) == 20


@pytest.mark.parametrize("codec, extension", [("mpeg1video", "mpg"), ("mpeg2video", "mpeg"), ("mpeg2video", "ts")])
@pytest.mark.parametrize("num_frames", [1, 20, 90])
def test_mpeg_streams_have_all_their_frames(tmp_path, codec, extension, num_frames):
    options = {"g": "5", "b": "4000000"}
    video = write_video(tmp_path / f"video.{extension}", num_frames, rate=25, codec=codec, options=options)
    with av.open(video) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == num_frames
    frames = read_video(video)
    assert num_frames <= len(frames) <= num_frames + 2  # the muxer's timestamps may jump
    np.testing.assert_array_equal(frames[0], decoded[0])
    np.testing.assert_array_equal(frames[-1], decoded[-1])
    assert sorted(set(numbers(frames))) == sorted(set(numbers(np.stack(decoded))))


def test_frames_too_far_from_their_key_frame(tmp_path, monkeypatch):
    video = write_video(tmp_path / "video.mp4", 60, options={"g": "60", "sc_threshold": "0"})
    monkeypatch.setattr(reading, "MAX_DECODED_PIXELS", 40 * 64 * 48)
    assert numbers(read_video(video, choose=lambda total, rate: np.array([30, 59]))) == [5, 9]
    with pytest.raises(MediaError, match="too few key frames"):
        read_video(video, choose=lambda total, rate: np.array([50]))


def test_videos_too_large_or_too_thin(tmp_path):
    for path, reason in (
        (write_video(tmp_path / "large.mp4", 1, (4160, 2304)), "is 4160 x 2304 pixels, more than 9.4 million"),
        (write_changing_video(tmp_path / "thin.mkv", [(16, 640)]), "is 16 x 640 pixels, longer than 32 times"),
    ):
        with pytest.raises(MediaError, match=reason):
            read_video(path)
    # Later in the stream libav itself refuses.
    video = write_changing_video(tmp_path / "video.mkv", [(64, 48)] * 3 + [(4160, 2304)] * 3)
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_video(video)
    assert len(read_video(video, choose=lambda total, rate: np.arange(2))) == 2


# --- which frames ---


def test_indices():
    assert stride_indices(100, 4, 10, 0.0).tolist() == [0, 10, 20, 30]
    assert stride_indices(100, 4, 10, 1.0).tolist() == [69, 79, 89, 99]
    assert stride_indices(3, 4, 2, 0.7).tolist() == [0, 2, 4, 6]
    assert segment_indices(100, 4, 0.5).tolist() == [12, 37, 62, 87]
    assert segment_indices(100, 4, np.array([0.0, 0.5, 0.99, 1.0])).tolist() == [0, 37, 74, 99]
    assert segment_indices(2, 4, 0.5).tolist() == [0, 0, 1, 1]


# --- loaders ---


@pytest.fixture
def images(tmp_path):
    return [Sample(write_image(tmp_path / f"{index}.png", photo(seed=index))) for index in range(6)]


@pytest.fixture
def video(tmp_path):
    return Sample(write_video(tmp_path / "video.mp4", 20))


def test_evaluation_is_what_the_processor_does(images):
    for size in (32, (16, 24), 64):
        load = ImageLoader(processor("image", size), augment=True)
        expected = load.image_processor(Image.open(images[0].path), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(load(images[0])["pixel_values"], expected, rtol=0, atol=1e-6)


def test_images_of_the_right_size_are_only_normalised(tmp_path):
    sample = Sample(write_image(tmp_path / "digit.png", photo(32, 32, 1)))
    load = ImageLoader(processor("image", 32, num_channels=1))
    expected = load.image_processor(Image.open(sample.path), return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (1, 32, 32)
    torch.testing.assert_close(load(sample)["pixel_values"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(load(sample, np.random.default_rng(0))["pixel_values"], expected, rtol=0, atol=1e-6)


def test_random_views_depend_on_the_draw_alone(images, video):
    for load, samples in (
        (ImageLoader(processor("image"), augment=True), images),
        (VideoLoader(processor("video"), 4, 2, augment=True), [video]),
    ):
        dataset = DrawDataset(samples, load, seed=3)
        name = "pixel_values" if samples is images else "pixel_values_videos"
        first = dataset[5][name]
        state = torch.get_rng_state()
        torch.manual_seed(7)
        before = torch.get_rng_state()
        torch.testing.assert_close(dataset[5][name], first, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), before)  # and disturb nobody else's
        torch.set_rng_state(state)
        assert not torch.equal(dataset[5 + len(samples)][name], first)


def test_random_crop_and_flip(tmp_path):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    sample = Sample(write_image(tmp_path / "ramp.png", ramp))
    load = ImageLoader(processor("image"), augment=True, min_crop=0.3)
    views = [load(sample, np.random.default_rng(seed))["pixel_values"] for seed in range(40)]
    assert {view.shape for view in views} == {(3, 32, 32)}
    slopes = [float(view[0, 0, -1] - view[0, 0, 0]) for view in views]
    assert 8 <= sum(slope < 0 for slope in slopes) <= 32
    assert min(map(abs, slopes)) < 1.4 < max(map(abs, slopes))
    straight = ImageLoader(processor("image"), augment=True, min_crop=0.3, flip=False)
    assert all(
        view[0, 0, -1] > view[0, 0, 0]
        for view in (straight(sample, np.random.default_rng(seed))["pixel_values"] for seed in range(20))
    )


def test_frames_of_a_clip_are_cropped_alike(tmp_path):
    still = Sample(write_changing_video(tmp_path / "still.mkv", [(64, 48)]))
    load = VideoLoader(processor("video"), 4, 1, augment=True)  # one frame, repeated
    views = load(still, np.random.default_rng(0))["pixel_values_videos"]
    assert views.shape == (4, 3, 32, 32)
    assert torch.equal(views[0], views[3])


def test_clips(video):
    load = VideoLoader(processor("video", (48, 64)), 4, 2)

    def indices(clip):
        middle = clip[:, :, 24, 32].mean(dim=1) * 127.5 + 127.5
        return [round((float(value) - shade(0)) / 8) for value in middle]

    assert indices(load(video)["pixel_values_videos"]) == [7, 9, 11, 13]
    starts = {indices(load(video, np.random.default_rng(seed))["pixel_values_videos"])[0] for seed in range(60)}
    assert starts == set(range(14))
    segments = VideoLoader(processor("video", (48, 64)), 4, sampling="segments")
    assert indices(segments(video)["pixel_values_videos"]) == [2, 7, 12, 17]
    assert load(video)["pixel_values_videos"].shape == (4, 3, 48, 64)


def test_short_videos(video):
    load = VideoLoader(processor("video"), 8, 4)
    repeated = load(video)["pixel_values_videos"]
    assert torch.equal(repeated[5], repeated[7]) and not torch.equal(repeated[3], repeated[4])
    for sampling, num_frames, stride in (("stride", 8, 4), ("segments", 22, 1)):
        load = VideoLoader(processor("video"), num_frames, stride, sampling=sampling, short="skip")
        with pytest.raises(MediaError, match=r"video.mp4: has 20 frames where a clip needs (29|22)"):
            load(video)
    for wrong in ({"num_frames": 0}, {"sampling": "random"}, {"short": "loop"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VideoLoader(processor("video"), **wrong)


def test_the_cache_changes_nothing(images, video, monkeypatch):
    for make, samples, reader in (
        (lambda size: ImageLoader(processor("image"), augment=True, cache_bytes=size), images, "read_image"),
        (lambda size: VideoLoader(processor("video"), 4, 5, augment=True, cache_bytes=size), [video], "open_video"),
    ):
        plain, cached = make(0), make(10**6)
        for seed in (0, 1):
            for sample in samples:
                (name, expected), *_ = plain(sample, np.random.default_rng(seed)).items()
                assert torch.equal(cached(sample, np.random.default_rng(seed))[name], expected)
        with monkeypatch.context() as patch:
            patch.setattr(f"bridle_hf.data.loaders.{reader}", lambda *args: pytest.fail("read again"))
            cached(samples[0], np.random.default_rng(2))


def test_long_videos_are_not_cached(tmp_path):
    load = VideoLoader(processor("video"), 4, 2, cache_bytes=10**9)
    load(Sample(write_video(tmp_path / "long.mp4", 60)))
    assert not load._cache


def test_views(video):
    load = VideoLoader(processor("video"), 4, 2)
    views = load.views(video)
    assert views.shape == (15, 4, 3, 32, 32)
    # The middle crop of the middle clip is the one of plain evaluation.
    torch.testing.assert_close(views[7], load(video)["pixel_values_videos"], rtol=0, atol=1e-6)
    shades = views[1::3, 0, :, 16, 16].mean(dim=1) * 127.5 + 127.5
    assert [round((float(value) - shade(0)) / 8) for value in shades] == [0, 3, 7, 10, 13]
    # The white patch lies in the left crop, and not in the right one.
    assert views[0, 0, 0, 0, 0] > 0.9 and views[2, 0, 0, 0, 4] < 0
    assert load.views(video, num_clips=1, num_crops=1).shape == (1, 4, 3, 32, 32)


def test_views_of_a_video_with_one_key_frame_decode_it_once(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", 60, options={"g": "60", "sc_threshold": "0"})
    decoded, following = [], reading._Video._next
    monkeypatch.setattr(reading._Video, "_next", lambda video: decoded.append(1) or following(video))
    views = VideoLoader(processor("video"), num_frames=4, stride=2).views(Sample(path), num_clips=5, num_crops=3)
    assert len(views) == 15 and len(decoded) <= 61  # its frames, and the end


# --- what scripts use: any modality ---


def config_of(modality, **fields):
    return BridleConfig(modality=modality, image_size=32, max_length=64, num_mel_bins=32, **SIZES, **fields)


def test_processors_and_loaders_of_any_modality(modality, tmp_path):
    config = config_of(modality)
    fields = {"mean": -5.0, "std": 2.0} if modality == "audio" else {"image_mean": [0.1, 0.2, 0.3]}
    made = make_processor(config, fields)
    made.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path), config)
    assert type(loaded) is type(made)
    assert all(np.array_equal(getattr(loaded, name), value) for name, value in fields.items())
    sample = {
        "audio": lambda: Sample(write_sound(tmp_path / "sound.wav")),
        "image": lambda: Sample(write_image(tmp_path / "image.png", photo())),
        "video": lambda: Sample(write_video(tmp_path / "video.mp4")),
    }[modality]()
    sample = make_sample_loader(config, loaded, augment=True, cache_bytes=10**6)(sample, np.random.default_rng(0))
    shape = {"audio": (64, 32), "image": (3, 32, 32), "video": (4, 3, 32, 32)}[modality]
    assert next(iter(sample.values())).shape == shape


def write_sound(path):
    soundfile.write(path, np.random.default_rng(0).normal(size=16000) * 0.1, 16000)
    return str(path)


def test_options_of_loaders():
    load = make_sample_loader(config_of("video"), processor("video"), {"stride": 2, "short": "skip", "min_crop": 1})
    assert (load.num_frames, load.stride, load.short) == (4, 2, "skip")
    of_segments = config_of("video", frame_sampling="segments")
    assert make_sample_loader(of_segments, processor("video")).sampling == "segments"
    assert make_sample_loader(of_segments, processor("video"), {"stride": 2}).sampling == "stride"
    for options, message in (
        ({"num_frames": 8}, "loader.num_frames is not a field"),  # the model decides
        ({"strides": 2}, "loader.strides is not a field; did you mean 'stride'"),
        ({"stride": 2.5}, "loader.stride is 2.5: expected a value like 4"),
        ({"stride": True}, "loader.stride is True: expected a value like 4"),
        ({"flip": 1}, "loader.flip is 1: expected a value like True"),
        ({"min_crop": 0}, "min_crop is 0: expected a part of the area"),
        ({"sampling": "all"}, "sampling 'all': stride or segments"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sample_loader(config_of("video"), processor("video"), options)
    with pytest.raises(ValueError, match=r"loader\.stride is not a field"):
        make_sample_loader(config_of("audio"), make_processor(config_of("audio")), {"stride": 2})


def test_fields_of_processors():
    for modality, fields, message in (
        ("audio", {"num_mel_bin": 8}, "processor.num_mel_bin is not a field; did you mean 'num_mel_bins'"),
        ("audio", {"max_length": 128}, "those of the encoder"),
        ("audio", {"mean": "low"}, "processor.mean is 'low': expected a number"),
        ("image", {"image_mean": 0.5}, "processor.image_mean is 0.5: expected a list of numbers"),
        ("image", {"image_std": [0.5]}, "give 3 numbers"),
        ("video", {"mean": 0.5}, "processor.mean is not a field"),
    ):
        with pytest.raises(ValueError, match=message):
            make_processor(config_of(modality), fields)


def test_samples_of_folders_and_of_hub_sets(images, tmp_path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for sample in images[:2]:
        Path(sample.path).rename(tmp_path / "folder" / "a" / Path(sample.path).name.upper())
    write_video(tmp_path / "folder" / "b" / "video.mov", 4)
    assert [sample.label for sample in find_samples(str(tmp_path / "folder"), "image")] == ["a", "a"]
    assert [sample.label for sample in find_samples(str(tmp_path / "folder"), "video")] == ["b"]

    content = Path(images[2].path).read_bytes()
    rows = datasets.Dataset.from_dict({"picture": [{"bytes": content, "path": None}], "label": ["x"]})
    rows = rows.cast_column("picture", datasets.Image(decode=False))
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    (sample,) = find_samples(str(tmp_path / "set"), "image")
    assert (sample.label, sample.split) == ("x", "train")
    load = ImageLoader(processor("image"))
    assert torch.equal(load(sample)["pixel_values"], load(images[2])["pixel_values"])
