"""Tests of probing/probes.py, probing/metrics.py and training/probe.py."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.miniatures import write_esc50
from helpers.pixels import pixel_config, save_pixel_encoder, write_pixels
from helpers.sounds import save_encoder, tiny_config, write_sounds
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score
from transformers import AutoFeatureExtractor

from bridle_hf import BridleForPreTraining, BridleModel, BridleTokenizerConfig, BridleTokenizerModel
from bridle_hf.commands import main
from bridle_hf.data.sample import Sample
from bridle_hf.pretraining.evaluation import check_probes
from bridle_hf.probing import probe
from bridle_hf.probing.explained_variance import codes_explained_variance
from bridle_hf.probing.features import collect_features, untrained_encoder
from bridle_hf.probing.metrics import TOP5, ClassificationMetric, mean_average_precision
from bridle_hf.probing.probes import format_probes, knn_probe, linear_probe, majority


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return BridleModel(tiny_config())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def clusters(rng, samples=120, classes=3, dim=6, noise=0.3):
    labels = np.arange(samples) % classes
    centres = rng.normal(size=(classes, dim))
    return centres[labels] + noise * rng.normal(size=(samples, dim)), labels, np.arange(samples) // classes % 4


# --- metrics ---


def test_average_precision_by_hand():
    # Ranks of the positives: 1 and 3 in the first class, 2 in the second; the third class has none and does not count.
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.7, 0.2], [0.4, 0.1, 0.3]])
    assert mean_average_precision(targets, scores) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="no positive among 3 samples of 3 classes"):
        mean_average_precision(0 * targets, scores)


def test_metric_as_the_trainer_uses_it(rng):
    logits = rng.normal(size=(50, 4)).astype(np.float32)
    targets = rng.integers(4, size=50)
    metric = ClassificationMetric(config_name="single_label", keep_in_memory=True)
    for _ in range(2):  # as after each epoch
        found = metric.compute(predictions=logits, references=targets)
        assert found == {"accuracy": pytest.approx((logits.argmax(axis=1) == targets).mean())}
    wide = rng.normal(size=(50, 9)).astype(np.float32)
    found = metric.compute(predictions=wide, references=targets)
    in_top5 = [target in np.argsort(row)[-5:] for row, target in zip(wide, targets)]
    assert found.keys() == {"accuracy", TOP5} and found[TOP5] == pytest.approx(np.mean(in_top5))
    rows = (rng.random((50, 4)) < 0.3).astype(np.int64)
    found = ClassificationMetric(config_name="multi_label", keep_in_memory=True).compute(
        predictions=logits, references=rows
    )
    expected = np.mean([average_precision_score(rows[:, k], logits[:, k]) for k in range(4)])
    assert found == {"mAP": pytest.approx(expected, abs=1e-6)}
    with pytest.raises(ValueError, match="config_name 'regression'"):
        ClassificationMetric(config_name="regression")


# --- features ---


def test_padding_does_not_change_features(encoder, rng):
    clip = torch.tensor(rng.normal(size=(1, 32, 32)), dtype=torch.float32)
    padded = torch.cat([clip, torch.full((1, 16, 32), 7.0)], dim=1)
    mask = (torch.arange(48) < 32).long()[None]
    alone = collect_features({"encoder": encoder}, [{"input_values": clip}])["encoder"]
    found = collect_features({"encoder": encoder}, [{"input_values": padded, "attention_mask": mask}])
    beside, control = found["encoder"], found["log-mel regression"]
    assert alone.keys() == {"mean", "mean_std", "band_mean"}
    for name in alone:
        np.testing.assert_allclose(alone[name], beside[name], atol=1e-5)
    expected = torch.cat([clip.mean(dim=1), clip.std(dim=1, correction=0)], dim=1)
    np.testing.assert_allclose(control["mean_std"], expected, atol=1e-5)


def test_clips_of_many_lengths_keep_their_rows(encoder, rng):
    """They go through the encoder by length, with under 5% of padding; each is what it is alone."""
    lengths = rng.integers(1, 49, size=40)
    values = torch.tensor(rng.normal(size=(40, 48, 32)), dtype=torch.float32)
    mask = (torch.arange(48) < torch.tensor(lengths)[:, None]).long()
    batches = [{"input_values": values[part], "attention_mask": mask[part]} for part in (slice(25), slice(25, 40))]
    seen = []
    hook = encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel() // 16))
    found = collect_features({"encoder": encoder}, batches, with_input=False)["encoder"]
    hook.remove()
    assert sum(-(-lengths // 16)) >= 0.95 * sum(seen)
    for row, length in enumerate(lengths):
        clip = torch.nn.functional.pad(values[row : row + 1, :length], (0, 0, 0, -length % 16))
        alone = collect_features({"encoder": encoder}, [{"input_values": clip}], with_input=False)["encoder"]
        for name, features in alone.items():
            np.testing.assert_allclose(found[name][row : row + 1], features, atol=1e-5)


def test_poolings_against_the_model(encoder, rng):
    batches = [{"input_values": torch.tensor(rng.normal(size=(size, 48, 32)), dtype=torch.float32)} for size in (3, 2)]
    encoder.train()
    features = collect_features({"encoder": encoder}, iter(batches), with_input=False)["encoder"]
    assert encoder.training, "left in the mode it was in"
    encoder.eval()
    with torch.no_grad():
        patches = encoder(torch.cat([batch["input_values"] for batch in batches])).last_hidden_state[:, 1:]
    np.testing.assert_allclose(features["mean"], patches.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(features["mean_std"][:, 16:], patches.std(dim=1, correction=0), atol=1e-5)
    np.testing.assert_allclose(features["band_mean"], patches.view(5, 3, 2 * 16).mean(dim=1), atol=1e-5)
    assert all(array.dtype == np.float32 for array in features.values())


@pytest.mark.parametrize("pixels", ["image", "video"])
def test_pixels_beside_their_encoder(pixels, rng):
    config = pixel_config(pixels)
    name, shape = {"image": ("pixel_values", (1, 16, 16)), "video": ("pixel_values_videos", (4, 3, 32, 32))}[pixels]
    inputs = torch.tensor(rng.normal(size=(20, *shape)), dtype=torch.float32)
    for strength in (1, 2):  # two directions to be found
        inputs += strength * torch.randn(20, *[1] * len(shape)) * torch.randn(shape)
    encoder = BridleModel(config).eval()
    found = collect_features({"encoder": encoder}, [{name: inputs[:14]}, {name: inputs[14:]}])
    with torch.no_grad():
        patches = encoder(inputs).last_hidden_state[:, int(config.use_class_token) :]
    expected = torch.cat([patches.mean(dim=1), patches.std(dim=1, correction=0)], dim=1)
    np.testing.assert_allclose(found["encoder"]["mean_std"], expected, atol=1e-5)
    control = found["pixel regression" if pixels == "image" else "frame regression"][""]
    flat = inputs.flatten(1).numpy()
    if pixels == "image":  # 256 numbers: as they are
        np.testing.assert_array_equal(control, flat)
    else:  # 12,288 of 20 samples: two components
        left, strengths, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
        np.testing.assert_allclose(np.abs(control), np.abs(left[:, :2] * strengths[:2]), rtol=1e-2, atol=1)


def test_large_pictures_are_averaged():
    blocks = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    picture = blocks.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    encoder = BridleModel(pixel_config("image", image_size=64))
    found = collect_features({"encoder": encoder}, [{"pixel_values": picture}])
    np.testing.assert_array_equal(found["pixel regression"][""], blocks.flatten(1))


def test_untrained_encoder_leaves_the_global_state_alone(encoder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = untrained_encoder(encoder, seed=1), untrained_encoder(encoder, seed=1)
    assert torch.equal(torch.rand(3), expected)
    weights = [model.embeddings.projection.weight for model in (first, second, encoder)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# --- probes ---


def test_probes_find_clusters_and_nothing_in_noise(rng):
    features, labels, folds = clusters(rng)
    for run in (linear_probe, knn_probe):
        result = run(features, labels, folds)
        assert result.metric == "accuracy" and len(result.per_fold) == 4
        assert result.score == pytest.approx(np.mean(result.per_fold)) and result.score > 0.95
        assert run(rng.normal(size=(120, 6)), labels, folds).score < 0.6
    assert majority(labels, folds).score == pytest.approx(1 / 3)


def test_multi_label_probes(rng):
    features = rng.normal(size=(200, 5))
    labels = (features[:, :3] > 0.5).astype(np.float32)
    folds = np.arange(200) % 4
    result = linear_probe(features, labels, folds)
    assert result.metric == "mAP" and result.score > 0.95
    assert knn_probe(features, labels, folds).score > 0.7
    assert majority(labels, folds).score == pytest.approx(labels.mean(), abs=0.1)


def test_a_class_that_the_training_folds_lack_counts_as_wrong(rng):
    features, labels, folds = clusters(rng)
    folds = np.where(labels == 2, 0, folds)  # class 2 in the first fold only
    result = linear_probe(features, labels, folds)
    share_of_class_2 = (labels[folds == 0] == 2).mean()
    assert result.per_fold[0] <= 1 - share_of_class_2 + 1e-9
    rows = np.eye(3, dtype=np.float32)[labels]
    assert 0 < linear_probe(features, rows, folds).score <= 1


def test_a_single_class_in_the_training_folds_is_what_is_guessed(rng):
    features, labels, folds = clusters(rng)
    folds = np.where(labels == 2, 0, 1)
    found = linear_probe(features, (labels == 2).astype(int), folds)
    assert found.per_fold == (0.0, 0.0)


def test_probes_refuse_what_does_not_fit(rng):
    features, labels, folds = clusters(rng)
    with pytest.raises(ValueError, match="120 features, 119 labels and 120 folds"):
        linear_probe(features, labels[1:], folds)
    with pytest.raises(ValueError, match="one fold"):
        knn_probe(features, labels, np.zeros(120))


def test_what_cannot_be_probed_on_is_known_before_a_run():
    check_probes([Sample("a"), Sample("b")], 10)  # no labels, no probes
    check_probes([Sample(name, label=name, group=name) for name in "ab"], 10)
    with pytest.raises(ValueError, match="b has no group"):
        check_probes([Sample("a", label="a", group="1"), Sample("b", label="b")], 10)


# --- codes ---


def test_codes_explained_variance_against_linear_regression(rng):
    codes = rng.integers(5, size=(60, 8, 2))
    tables = rng.normal(size=(2, 5, 7))
    teacher = tables[0][codes[..., 0]] + 0.5 * tables[1][codes[..., 1]] + 0.3 * rng.normal(size=(60, 8, 7))
    real = np.ones((60, 8), dtype=bool)
    real[:, 6:] = False
    broken = teacher.copy()
    broken[:, 6:] = 1e6  # padding must not matter
    shares = codes_explained_variance(codes, broken, real, ridge=1e-6)

    def one_hot(half):
        return np.eye(5)[codes[half][:, :6]].reshape(-1, 10)

    even, odd = slice(0, None, 2), slice(1, None, 2)
    fit = LinearRegression().fit(one_hot(even), teacher[even][:, :6].reshape(-1, 7))
    target = teacher[odd][:, :6].reshape(-1, 7)
    error = np.square(target - fit.predict(one_hot(odd))).sum()
    assert shares[-1] == pytest.approx(1 - error / np.square(target - target.mean(axis=0)).sum(), abs=1e-6)
    assert 0 < shares[0] < shares[1] < 1


def test_codes_without_meaning_explain_nothing(rng):
    codes, teacher = rng.integers(4, size=(200, 6, 3)), rng.normal(size=(200, 6, 5))
    assert codes_explained_variance(codes, teacher) == pytest.approx([0, 0, 0], abs=0.05)
    with pytest.raises(ValueError, match="must share"):
        codes_explained_variance(codes, teacher[:, 1:])


# --- the script ---


@pytest.fixture
def saved_encoder(tmp_path):
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def sounds(tmp_path):
    return write_sounds(tmp_path / "sounds")


def test_script_prints_a_table_and_json(saved_encoder, sounds, capsys):
    main("probe", ["--model", saved_encoder, "--data", sounds])
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    names = [(row["features"], row["pooling"]) for row in result["probes"]]
    assert names[0] == ("encoder", "mean") and names[-1] == ("majority", "")
    assert {name for name, _ in names} == {"encoder", "untrained encoder", "log-mel regression", "majority"}
    assert result["folds"] == 2 and result["classes"] == 2 and result["samples"] == 24
    assert "\n".join(table).endswith(format_probes(result["probes"]))
    by_name = {(row["features"], row["pooling"]): row for row in result["probes"]}
    assert by_name["log-mel regression", "mean"]["linear"] > 0.9  # a tone and noise
    assert by_name["majority", ""]["linear"] == 0.5


def test_script_with_random_weights(saved_encoder, sounds, capsys):
    arguments = ["--model", saved_encoder, "--data", sounds, "--random_init", "--folds", "2", "--seed", "3"]
    main("probe", arguments)
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {row["features"] for row in result["probes"]} == {"untrained encoder"}


@pytest.mark.parametrize("pixels", ["image", "video"])
def test_script_on_pixels(pixels, tmp_path, capsys):
    model, data = save_pixel_encoder(tmp_path / "encoder", pixels), write_pixels(tmp_path / "set", pixels)
    main("probe", ["--model", model, "--data", data, *(["--loader.stride", "1"] if pixels == "video" else [])])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["probes"]
    control = "pixel regression" if pixels == "image" else "frame regression"
    assert [(row["features"], row["pooling"]) for row in rows] == [
        ("encoder", "mean"), ("encoder", "mean_std"), ("untrained encoder", "mean"),
        ("untrained encoder", "mean_std"), (control, ""), ("majority", ""),
    ]  # fmt: skip
    assert rows[4]["linear"] > 0.9 and rows[0]["linear"] > 0.9 and rows[5]["linear"] == 0.5


def test_script_names_what_is_wrong(saved_encoder, sounds, tmp_path, capsys):
    def fails(message, **options):
        options = {"model": saved_encoder, "data": sounds, **options}
        argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with pytest.raises(SystemExit):
            main("probe", argv)
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error

    fails("no column 'voice'", label_column="voice")
    fails("needs at least 2 folds, and a group for each", folds=9)
    fails("nowhere", model=tmp_path / "nowhere")
    fails("loader.stride is not a field", **{"loader.stride": 4})
    fails("--batch_size is 0: expected 1 to", batch_size=0)
    metadata = Path(sounds) / "metadata.csv"
    whole = metadata.read_text()
    metadata.write_text(whole.replace(",tone,", ",noise,"))
    fails("have one class only (noise)")
    metadata.write_text(whole)
    for number in range(3):
        (Path(sounds) / f"tone_{number}.wav").write_bytes(b"broken")
    fails("3 files cannot be read, see above")
    config = BridleTokenizerConfig(hidden_size=16, num_attention_heads=2, tokenizer_type="random_projection")
    BridleTokenizerModel(config).save_pretrained(tmp_path / "tokenizer")
    fails("holds a 'bridle_tokenizer': give", model=tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="the data has folds of its own"):
        probe.make_folds([Sample("a", fold="1"), Sample("b", fold="2")], 2)


def test_features_that_are_not_finite_name_the_file(saved_encoder, sounds, tmp_path, capsys):
    model = BridleForPreTraining.from_pretrained(saved_encoder)
    model.bridle.layernorm.weight.data[0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoFeatureExtractor.from_pretrained(saved_encoder).save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit) as ended:
        main("probe", ["--model", str(tmp_path / "broken"), "--data", sounds])
    assert ended.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the features of encoder are not finite for" in message and ".wav" in message


# Sets as downloaded


def test_folds_of_a_set_as_downloaded(saved_encoder, tmp_path, capsys):
    folder = str(write_esc50(tmp_path, folds=3, takes=2))
    main("probe", ["--model", saved_encoder, "--data", folder, "--folds", "all"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result["folds"], result["classes"], result["samples"]) == (3, 3, 18)
    for row in result["probes"]:
        for probe_name in ("linear", "knn"):
            values = row[f"{probe_name}_folds"]
            assert row[probe_name] == pytest.approx(sum(values) / 3)
            assert row[f"{probe_name}_deviation"] == pytest.approx(statistics.stdev(values))


def test_samples_that_are_never_held_out_are_trained_on_by_all_folds(rng):
    features, labels, _ = clusters(rng)
    # Class 2 is tested in fold 0 alone, so that only what is never held out can teach it.
    folds = np.where(labels == 2, np.where(np.arange(len(labels)) % 2, -1, 0), np.arange(len(labels)) // 3 % 2)
    result = linear_probe(features, labels, folds)
    assert len(result.per_fold) == 2 and result.correct[(labels == 2) & (folds == 0)].all()
    assert not result.correct[folds == -1].any()  # not tested
    kept = folds >= 0
    assert not linear_probe(features[kept], labels[kept], folds[kept]).correct[labels[kept] == 2].any()


def test_folds_that_are_not_there_are_refused(saved_encoder, sounds, capsys):
    for words, message in {"all": "the data has no folds", "some": "expected all, or a number"}.items():
        with pytest.raises(SystemExit):
            main("probe", ["--model", saved_encoder, "--data", sounds, "--folds", words])
        assert message in capsys.readouterr().err
