"""Pictures show every patch where it is, and say what they show."""

import functools
import sys

import librosa
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from transformers.dynamic_module_utils import get_imports

from bridle_hf import BridleConfig, BridleFeatureExtractor, visualization_bridle
from bridle_hf.visualization_bridle import (
    HIDDEN_COLOR,
    NEUTRAL_COLOR,
    RIGHT_COLOR,
    WRONG_COLOR,
    code_colors,
    plot_codes,
    plot_inputs,
    plot_masked_input,
    plot_predictions,
    plot_timeline,
)


SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
AUDIO = BridleConfig(modality="audio", max_length=80, num_mel_bins=64, **SMALL)
IMAGE = BridleConfig(modality="image", image_size=(32, 48), patch_size=16, **SMALL)
VIDEO = BridleConfig(modality="video", image_size=32, patch_size=16, num_frames=6, num_channels=1, **SMALL)
INPUTS = {
    "audio": (AUDIO, torch.randn(80, 64)),
    "image": (IMAGE, torch.rand(3, 32, 48)),
    "video": (VIDEO, torch.rand(6, 1, 32, 32)),
}


def centre_on_paper(config, patch):
    """Where the centre of a patch lies, in the units of the axes: written out by hand for each modality."""
    if config.modality == "audio":
        time, mel = divmod(patch, 4)
        ends = librosa.hz_to_mel([20, 8000], htk=True)
        centres = np.linspace(*ends, 64 + 2)[1:-1]
        return (time + 0.5) * 0.16, librosa.mel_to_hz(centres[16 * mel : 16 * mel + 16].mean(), htk=True)
    if config.modality == "image":
        row, column = divmod(patch, 3)
        return (column + 0.5) * 16, (row + 0.5) * 16
    step, place = divmod(patch, 4)
    row, column = divmod(place, 2)
    return step * 32 + (column + 0.5) * 16, (row + 0.5) * 16


@functools.lru_cache(maxsize=1)
def rasterize(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def region(figure, ax, config, patch):
    """Pixels (n, 3) in 0..1 of the middle of a patch, as the file would show them, off its number and edges."""
    pixels = rasterize(figure)
    x, y = ax.transData.transform(centre_on_paper(config, patch))
    row, column = round(pixels.shape[0] - y), round(x)
    return pixels[row - 14 : row - 10, column - 12 : column + 12].reshape(-1, 3)


def is_hatched(pixels):
    """Bluish in the colour of hidden patches or of their hatching, nowhere the picture's own colours."""
    red, _, blue = pixels.T
    return bool(np.all(blue - red > 0.1) and np.abs(pixels - to_rgb(HIDDEN_COLOR)).sum(axis=1).min() < 0.05)


@pytest.mark.parametrize("modality", INPUTS)
def test_the_hidden_patch_is_covered_where_it_is(modality):
    config, values = INPUTS[modality]
    values = torch.zeros_like(values)
    num_patches = int(np.prod(config.patch_grid))
    for hidden in (1, num_patches - 2):
        mask = torch.zeros(num_patches, dtype=torch.bool)
        mask[hidden] = True
        figure = plot_masked_input(values, mask, config)
        whole, seen = figure.axes[:2]
        for patch in (0, 1, 2, num_patches - 2, num_patches - 1):
            assert is_hatched(region(figure, seen, config, patch)) == (patch == hidden), (hidden, patch)
        assert not is_hatched(region(figure, whole, config, hidden))
        assert f"Visible: {num_patches - 1} of {num_patches} patches" in seen.get_title()


@pytest.mark.parametrize("modality", INPUTS)
def test_the_input_lies_under_its_patches(modality):
    """One bright patch, made through the model's own patch order, is bright at its place and nowhere else."""
    config, values = INPUTS[modality]
    values = torch.zeros_like(values)
    patch = 6
    if modality == "audio":
        values[16:32, 32:48] = 1  # time 1, mel 2
    elif modality == "image":
        patch = 5
        values[:, 16:32, 32:48] = 1  # row 1, column 2
    else:
        values[2:4, :, 16:32, :16] = 1  # step 1, row 1, column 0
    figure = plot_masked_input(values, torch.zeros(int(np.prod(config.patch_grid)), dtype=torch.bool), config)
    brightness = [
        region(figure, figure.axes[0], config, index).mean() for index in range(int(np.prod(config.patch_grid)))
    ]
    assert int(np.argmax(brightness)) == patch
    assert sorted(brightness)[-2] < 0.1 < 0.8 < brightness[patch]


@pytest.mark.parametrize("modality", INPUTS)
def test_codes_have_their_colours_at_their_places(modality):
    config, _ = INPUTS[modality]
    num_patches = int(np.prod(config.patch_grid))
    codes = torch.randint(0, 256, (num_patches, 2), generator=torch.Generator().manual_seed(0))
    figure = plot_codes(codes, config, config.patch_grid)
    assert len(figure.axes) == 2
    for level, ax in enumerate(figure.axes):
        assert ax.get_title().startswith(f"Level {level + 1}: {len(codes[:, level].unique())} different codes")
        for patch in range(num_patches):
            expected = code_colors(codes[patch, level].numpy())
            np.testing.assert_allclose(region(figure, ax, config, patch), expected[None].repeat(96, 0), atol=0.01)


def test_predictions_tell_right_wrong_and_not_hidden():
    codes = torch.arange(20)[:, None].repeat(1, 4)
    predicted = codes.clone()
    predicted[7:, 0] += 1  # of the ten hidden ones below, three are wrong at level 1
    hidden = torch.arange(20) < 10
    figure = plot_predictions(codes, predicted, hidden, AUDIO, (5, 4))
    true, guessed, hits, bars = figure.axes
    assert "7 of 10 hidden patches right at level 1 (70%; chance 0.4%)" in figure.get_suptitle()
    for patch, color in ((0, RIGHT_COLOR), (6, RIGHT_COLOR), (7, WRONG_COLOR), (10, NEUTRAL_COLOR)):
        np.testing.assert_allclose(region(figure, hits, AUDIO, patch).mean(axis=0), to_rgb(color), atol=0.01)
    np.testing.assert_allclose(region(figure, true, AUDIO, 8).mean(axis=0), code_colors(np.array(8)), atol=0.01)
    np.testing.assert_allclose(region(figure, guessed, AUDIO, 8).mean(axis=0), code_colors(np.array(9)), atol=0.01)
    np.testing.assert_allclose(region(figure, guessed, AUDIO, 12).mean(axis=0), to_rgb(NEUTRAL_COLOR), atol=0.01)
    heights = [round(bar.get_height()) for bar in bars.patches]
    assert heights[:4] == [70, 100, 100, 100], "accuracy by level"
    assert heights[4:] == [10] * 4, "the most common of ten different codes"


def test_no_hidden_patch_and_one_codebook():
    codes = torch.zeros(20, 1, dtype=torch.long)
    figure = plot_predictions(codes, codes, torch.zeros(20, dtype=torch.bool), AUDIO)
    assert "0 of 0" in figure.get_suptitle()


def test_axes_carry_their_units():
    mask = torch.zeros(20, dtype=torch.bool)
    ax = plot_masked_input(INPUTS["audio"][1], mask, AUDIO).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "frequency (Hz, mel scale)")
    centres = librosa.mel_frequencies(64 + 2, fmin=20, fmax=8000, htk=True)
    assert ax.get_xlim() == (0, 0.8) and centres[0] < ax.get_ylim()[0] < centres[1]
    assert centres[-2] < ax.get_ylim()[1] < centres[-1]
    ax = plot_codes(torch.zeros(20, 1), AUDIO, sampling_rate=32000).axes[0]
    assert 8000 < ax.get_ylim()[1] < 16000, "the mel axis ends at half of the sampling rate"
    ax = plot_masked_input(INPUTS["video"][1], torch.zeros(12, dtype=torch.bool), VIDEO).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "4"]
    assert ax.get_ylim() == (32, 0), "the first row on top"


def test_a_clip_shorter_than_the_full_length():
    codes = torch.zeros(12, 4, dtype=torch.long)
    assert plot_codes(codes, AUDIO, (3, 4)).axes[0].get_xlim() == (0, 0.48)
    # 41 frames are three patches, the last one padded.
    assert plot_masked_input(torch.randn(41, 64), codes[:, 0].bool(), AUDIO).axes[0].get_xlim() == (0, 0.48)


def test_wrong_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"`codes` has shape \(12, 4\); a grid of \(5, 4\) patches needs 20 rows"):
        plot_codes(torch.zeros(12, 4, dtype=torch.long), AUDIO)
    with pytest.raises(ValueError, match="`bool_masked_pos`"):
        plot_masked_input(INPUTS["audio"][1], torch.zeros(3, dtype=torch.bool), AUDIO)


def test_code_colors_are_stable_and_differ():
    colors = code_colors(np.arange(1024))
    assert np.all((colors >= 0) & (colors <= 1))
    np.testing.assert_array_equal(colors[:256], code_colors(np.arange(256)))
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 0.3, "numbers that follow differ clearly"
    assert len(np.unique(np.round(255 * colors[:256]), axis=0)) == 256


def test_a_mel_axis_needs_librosa(monkeypatch):
    assert "librosa" not in get_imports(visualization_bridle.__file__)
    monkeypatch.setitem(sys.modules, "librosa.display", None)
    with pytest.raises(ImportError, match=r"bridle_hf\[viz,audio\]"):
        plot_codes(torch.zeros(20, 4, dtype=torch.long), AUDIO)


def test_a_tone_lies_at_its_frequency():
    """The brightest row of the picture, in Hz as its axis says."""
    config = BridleConfig(modality="audio", max_length=96, num_mel_bins=64, **SMALL)
    extractor = BridleFeatureExtractor(num_mel_bins=64, max_length=96)
    for frequency in (300, 1200, 5000):
        tone = np.sin(2 * np.pi * frequency * np.arange(16000) / 16000)
        values = extractor(tone, sampling_rate=16000, return_tensors="pt")["input_values"][0]
        ax = plot_masked_input(values, torch.zeros(24, dtype=torch.bool), config).axes[0]
        (mesh,) = ax.collections
        row = int(mesh.get_array().mean(axis=1).argmax())
        low, high = mesh.get_coordinates()[[row, row + 1], 0, 1]
        assert 0.95 * low < frequency < 1.05 * high and high < 1.2 * low + 60


def test_remote_code_loads_without_matplotlib(monkeypatch):
    assert "matplotlib" not in get_imports(visualization_bridle.__file__)
    monkeypatch.setattr(visualization_bridle, "Figure", None)
    with pytest.raises(ImportError, match=r"bridle_hf\[viz\]"):
        plot_codes(torch.zeros(20, 4, dtype=torch.long), AUDIO)


# Several inputs, and what sounds when


@pytest.mark.parametrize(
    ("modality", "shapes"),
    [
        ("audio", [(96, 64), (40, 64), (16, 64), (70, 64)]),
        ("image", [(3, 64, 64)] * 5),
        ("video", [(8, 3, 32, 32)] * 2),
    ],
)
def test_inputs_have_a_panel_each(modality, shapes, tiny_config):
    titles = [f"number {number}" for number in range(len(shapes))]
    inputs = [torch.rand(*shape) for shape in shapes]
    figure = plot_inputs(inputs, titles, tiny_config(modality), title="All of them")
    assert [ax.get_title() for ax in figure.axes] == titles and figure.get_suptitle() == "All of them"
    if modality == "audio":
        assert [ax.get_xlim() for ax in figure.axes] == [(0, shape[0] / 100) for shape in shapes]


def test_a_timeline_has_the_scores_at_their_times():
    def labels(**scores):
        ordered = sorted(scores.items(), key=lambda pair: -pair[1])
        return [{"label": name, "score": score} for name, score in ordered]

    timeline = [
        {"start": 0.0, "end": 1.0, "labels": labels(dog=0.9, rain=0.2)},
        {"start": 0.8, "end": 1.8, "labels": labels(rain=0.7)},  # dog is not among its top_k
        {"start": 1.6, "end": 2.0, "labels": labels(dog=0.1, rain=0.6)},
    ]
    events = [{"start": 0.9, "end": 2.0, "label": "rain", "score": 0.65}]
    figure = plot_timeline({"labels": labels(dog=0.5, rain=0.4), "timeline": timeline, "events": events})
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["dog", "rain"]
    (mesh,) = [entry for entry in ax.collections if hasattr(entry, "get_coordinates")]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0.0, 0.9, 1.7, 2.0])
    found = mesh.get_array()
    np.testing.assert_allclose(found.filled(-1), [[0.9, -1, 0.1], [0.2, 0.7, 0.6]])
    (frame,) = ax.patches
    assert (frame.get_x(), frame.get_y(), frame.get_width()) == pytest.approx((0.9, 1, 1.1))
    alone = plot_timeline({"labels": labels(dog=0.5, rain=0.4), "timeline": timeline}, most=1, title="One")
    assert not alone.axes[0].patches and len(alone.axes[0].get_yticklabels()) == 1
