"""Tests of finetuning/augmentation.py."""

import numpy as np
import pytest
import torch
from helpers.pixels import pixel_config, write_sample
from helpers.sounds import RATE
from PIL import Image, ImageEnhance, ImageOps

from bridle_hf.common.errors import MediaError
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.data.modalities import make_processor, make_sample_loader
from bridle_hf.data.sample import Sample
from bridle_hf.finetuning import augmentation
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.augmentation import (
    AudioTrainingLoader,
    PixelTrainingLoader,
    cutmix,
    erase,
    mix_waveforms,
    rand_augment,
    spec_augment,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- audio ---


def test_mix_waveforms(rng):
    first, second = rng.normal(size=100).astype(np.float32) + 3, rng.normal(size=60).astype(np.float32) - 2
    mixed = mix_waveforms(first, second, 0.25)
    assert mixed.dtype == np.float32 and len(mixed) == 100
    expected = 0.25 * (first - first.mean())
    np.testing.assert_allclose(mixed[60:], expected[60:], atol=1e-6)
    np.testing.assert_allclose(mixed[:60], expected[:60] + 0.75 * (second - second.mean()), atol=1e-6)
    np.testing.assert_allclose(mix_waveforms(second, first, 1.0), second - second.mean(), atol=1e-6)


def test_spec_augment_hides_one_stripe_each_way(rng):
    values = torch.ones(80, 32)
    widths = []
    for _ in range(300):
        hidden = spec_augment(values, num_real=64, mel_mask=8, time_mask=512, rng=rng) == 0
        frames, bins = hidden.all(dim=1), hidden.all(dim=0)
        for stripe in (frames, bins):
            where = stripe.nonzero().flatten()
            assert len(where) == 0 or where[-1] - where[0] == len(where) - 1, "one piece"
        assert torch.equal(hidden, frames[:, None] | bins[None])
        assert not frames[64:].any(), "among the real frames"
        widths.append((int(frames.sum()), int(bins.sum())))
    assert (values == 1).all(), "on a copy"
    frames, bins = zip(*widths)
    assert set(bins) == set(range(9)) and min(frames) == 0 and max(frames) == 32  # 512 of 1024 = 32 of 64
    assert torch.equal(spec_augment(values, 64, 0, 0, rng), values)


class LoaderOfArrays(AudioLoader):
    """Three recordings in memory, the third of them broken; a frame holds a whole waveform of 8 samples."""

    def _decode(self, sample, rng):
        if sample.path == "broken":
            raise MediaError("broken", "cannot be decoded")
        return {"a": np.ones((1, 8)), "b": np.eye(1, 8)}[sample.path].astype(np.float32), RATE, 0, True

    def features(self, waveform, sampling_rate):
        return torch.tensor(waveform)


def loader_and_samples(**options):
    samples = [Sample("a", label="x"), Sample("b", label="y"), Sample("broken", label="y")]
    targets = {sample.path: torch.tensor("xy".index(sample.label)) for sample in samples}
    args = FinetuneArguments(model="", data="", **options)
    return AudioTrainingLoader(LoaderOfArrays(None, 1), samples, targets, 2, args), samples


def test_mixup_mixes_targets_as_waveforms(rng):
    load, samples = loader_and_samples(mixup_probability=1.0)
    weights = []
    for _ in range(200):
        sample = load(samples[1], rng)
        assert sample["labels"].dtype == torch.float32 and sample["labels"].sum() == pytest.approx(1)
        weights.append(float(sample["labels"][1]))
        if 0 < weights[-1] < 1:  # with "a", whose waveform minus its mean is silence
            expected = weights[-1] * (np.eye(1, 8) - 1 / 8)
            np.testing.assert_allclose(sample["input_values"], expected, atol=1e-6)
    mixed = [weight for weight in weights if weight < 1]
    assert 0.2 < len(mixed) / 200 < 0.5, "a third of the partners are of the other class"
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.05)
    assert np.std(mixed) == pytest.approx((100 / (400 * 21)) ** 0.5, rel=0.3), "Beta(10, 10)"


def test_mixup_with_broken_files(rng):
    load, samples = loader_and_samples(mixup_probability=1.0)
    with pytest.raises(MediaError, match="broken"):
        load(samples[2], rng)
    for _ in range(50):  # one partner in three is broken, and left out
        assert load(samples[0], rng)["labels"].sum() == pytest.approx(1)


def test_without_mixup_labels_are_numbers(rng):
    load, samples = loader_and_samples()
    assert load(samples[1], rng)["labels"].tolist() == 1


# --- RandAugment ---


def smooth_picture(rng, size=48):
    """(size, size, 3) uint8 without hard edges, where interpolation and rounding hardly matter."""
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def by_kornia(name, pixels, level, sign):
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    operation = next(entry for entry in augmentation.OPERATIONS if getattr(entry, "__name__", "") == name)
    found = operation(values, level, sign, torch.full((3, 1, 1), 0.5))
    return (found[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy().astype(int)


def test_operations_are_those_of_pillow(rng):
    """timm's operations are Pillow's; the formulas of the levels are timm's, "increasing" ones."""
    pixels = smooth_picture(rng)
    image = Image.fromarray(pixels)
    expected = {
        ("_auto_contrast", 0.9, 1): ImageOps.autocontrast(image),
        ("_equalize", 0.9, 1): ImageOps.equalize(image),
        ("_invert", 0.9, 1): ImageOps.invert(image),
        ("_posterize", 0.4, 1): ImageOps.posterize(image, 3),
        ("_posterize", 0.9, 1): ImageOps.posterize(image, 1),
        ("_solarize", 0.5, 1): ImageOps.solarize(image, 128),
        ("_color", 0.9, 1): ImageEnhance.Color(image).enhance(1.81),
        ("_color", 0.9, -1): ImageEnhance.Color(image).enhance(0.19),
        ("_contrast", 0.9, 1): ImageEnhance.Contrast(image).enhance(1.81),
        ("_contrast", 0.9, -1): ImageEnhance.Contrast(image).enhance(0.19),
        ("_brightness", 0.9, 1): ImageEnhance.Brightness(image).enhance(1.81),
        ("_brightness", 0.9, -1): ImageEnhance.Brightness(image).enhance(0.19),
        ("_sharpness", 0.9, 1): ImageEnhance.Sharpness(image).enhance(1.81),
    }
    for (name, level, sign), wanted in expected.items():
        difference = np.abs(by_kornia(name, pixels, level, sign) - np.asarray(wanted).astype(int))
        assert np.mean(difference > 2) < 0.005, (name, level, sign, difference.max())
    brighter = np.where(pixels < 128, np.minimum(pixels.astype(int) + 55, 255), pixels)
    assert np.abs(by_kornia("_solarize_add", pixels, 0.5, 1) - brighter).max() <= 1


def test_geometry(rng):
    pixels = smooth_picture(rng)
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    fill = torch.full((3, 1, 1), 0.25)
    *_, shear_x, shear_y, right, down = augmentation.OPERATIONS
    moved = right(values, 0.5, 1, fill)  # 0.45 * 0.5 * 48 pixels
    assert torch.allclose(moved[..., :10], torch.tensor(0.25), atol=1e-3)
    assert torch.allclose(down(values.mT, 0.5, 1, fill).mT, moved, atol=1e-4)
    assert torch.allclose(shear_x(values, 0.9, -1, fill)[..., 0, :], values[..., 0, :], atol=1e-3), "about the corner"
    assert torch.allclose(shear_y(values, 0.9, 1, fill)[..., 0], values[..., 0], atol=1e-3)
    turned = by_kornia("_rotate", pixels, 1.0, 1)
    expected = np.asarray(Image.fromarray(pixels).rotate(30, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(turned - expected)[14:34, 14:34].mean() < 4


def test_rand_augment(rng):
    frames = torch.from_numpy(smooth_picture(rng)).permute(2, 0, 1).expand(4, -1, -1, -1)
    found = [rand_augment(frames, np.random.default_rng(seed), 9.0, torch.full((3,), 0.5)) for seed in range(60)]
    assert all(views.shape == frames.shape and views.dtype == torch.uint8 for views in found)
    assert all(torch.equal(views[0], views[3]) for views in found), "frames are changed alike"
    again = rand_augment(frames, np.random.default_rng(7), 9.0, torch.full((3,), 0.5))
    assert torch.equal(again, found[7])
    # Two operations, each left out half of the time.
    assert 0.1 < np.mean([torch.equal(views, frames) for views in found]) < 0.45
    grey = rand_augment(frames[:, :1], rng, 9.0, torch.full((1,), 0.5))
    assert grey.shape == (4, 1, 48, 48)


# --- erasing and mixing of pixels ---


def test_erase(rng):
    shares = []
    for _ in range(100):
        erased = erase(torch.ones(2, 3, 40, 40), rng) == 0
        assert torch.equal(erased[0, 0], erased[1, 2])
        rows, columns = erased[0, 0].any(dim=1), erased[0, 0].any(dim=0)
        assert torch.equal(erased[0, 0], rows[:, None] & columns), "a rectangle"
        shares.append(float(erased[0, 0].float().mean()))
    assert 0.01 < min(shares) < 0.1 and 0.25 < max(shares) < 0.36
    assert erase(torch.ones(1, 8, 8), rng).shape == (1, 8, 8)


def test_cutmix(rng):
    first, second = torch.zeros(2, 3, 30, 40), torch.ones(2, 3, 30, 40)
    for weight in rng.random(100):
        mixed, left = cutmix(first, second, weight, rng)
        assert float(1 - mixed.mean()) == pytest.approx(left, abs=1e-6) and left >= weight - 0.06
        rows, columns = mixed[0, 0].any(dim=1), mixed[0, 0].any(dim=0)
        assert torch.equal(mixed[1, 2].bool(), rows[:, None] & columns)
    assert not first.any(), "on a copy"


@pytest.fixture
def two_images(tmp_path, rng):
    return [Sample(write_sample(tmp_path / f"{name}.png", name, rng), label=name) for name in ("dark", "bright")]


def pixel_loader(samples, augment=False, **options):
    config = pixel_config("image")
    load = make_sample_loader(config, make_processor(config), augment=augment)
    targets = {sample.path: torch.tensor(number) for number, sample in enumerate(samples)}
    return PixelTrainingLoader(load, samples, targets, 2, FinetuneArguments(model="", data="", **options))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pixels_have_mixed_targets(two_images, rng, kind):
    load = pixel_loader(two_images, **{f"{kind}_probability": 0.5, "mixup_alpha": 1.0})
    plain = [load.load(sample)["pixel_values"] for sample in two_images]
    weights = []
    for _ in range(200):
        sample = load(two_images[0], rng)
        weight = float(sample["labels"][0])
        assert sample["labels"].sum() == pytest.approx(1)
        expected = weight * plain[0].mean() + (1 - weight) * plain[1].mean()
        assert sample["pixel_values"].mean() == pytest.approx(float(expected), abs=1e-5 if kind == "mixup" else 0.05)
        weights.append(weight)
    assert 0.15 < np.mean(np.array(weights) < 1) < 0.35, "half are mixed, half of these with the other class"


def test_pixels_depend_on_the_draw_alone(two_images):
    options = {"augment": True, "rand_augment": 9.0, "random_erasing": 0.5, "mixup_probability": 0.5}
    for seed in range(10):
        first, second = (
            pixel_loader(two_images, **options, cutmix_probability=0.5)(two_images[1], np.random.default_rng(seed))
            for _ in range(2)
        )
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])
        torch.rand(seed)


def test_unmixed_labels_are_numbers_and_erasing_hides(two_images, rng):
    load = pixel_loader(two_images, random_erasing=0.5)
    plain = load.load(two_images[1])["pixel_values"]
    hidden = [float((load(two_images[1], rng)["pixel_values"] != plain).float().mean()) for _ in range(100)]
    assert 0.35 < np.mean(np.array(hidden) > 0) < 0.65
    assert load(two_images[1], rng)["labels"].tolist() == 1
