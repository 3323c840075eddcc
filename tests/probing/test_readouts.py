"""Read-outs: the gate finds the layer that knows, pooled tokens are those of the model, the control is linear."""

import numpy as np
import pytest
import torch
from helpers.tiny_run import pretrain, write_recipe, write_recordings
from sklearn.decomposition import PCA

import bridle_hf
from bridle_hf import BridleModel
from bridle_hf.common.errors import ArgumentError
from bridle_hf.patching_bridle import INPUT_NAMES, patchify
from bridle_hf.probing.probe import probe_lines
from bridle_hf.probing.probes import _learned_gate, attentive_probe, gated_probe, linear_probe
from bridle_hf.probing.readouts import ON_REQUEST, PRIMARY, READOUTS, collect_layers, encoder_tokens, patch_tokens


def layered(labels: np.ndarray, informed: int, layers: int = 4) -> np.ndarray:
    """(samples, layers, 6) noise; one layer knows the label."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(labels), layers, 6)).astype(np.float32)
    features[:, informed, :2] += 2.5 * np.eye(2)[labels % 2] + labels[:, None] // 2 * 2.0
    return features


@pytest.mark.parametrize("informed", range(4))
def test_the_gate_finds_the_layer_that_knows(informed):
    labels, folds = np.arange(240) % 4, np.arange(240) // 4 % 5
    features = layered(labels, informed)
    gate = _learned_gate(features.swapaxes(0, 1), labels)
    assert gate.argmax() == informed and gate.sum() == pytest.approx(1, abs=1e-5) and gate.min() >= 0
    found, alone = gated_probe(features, labels, folds), linear_probe(features[:, informed], labels, folds)
    assert found.score > 0.9 * alone.score > 0.5
    assert found.correct.mean() == pytest.approx(found.score)


def test_a_single_layer_is_the_linear_probe():
    labels, folds = np.arange(120) % 4, np.arange(120) // 4 % 3
    features = layered(labels, 0, layers=1)
    assert gated_probe(features, labels, folds).score == linear_probe(features[:, 0], labels, folds).score


def test_a_gate_of_several_labels_per_sample():
    labels, folds = np.arange(160) % 4, np.arange(160) // 4 % 4
    rows = np.stack([labels % 2, labels // 2], axis=1).astype(np.float32)
    found = gated_probe(layered(labels, 1), rows, folds)
    assert (found.metric, found.correct) == ("mAP", None) and found.score > 0.8


def hidden_in_one_patch(labels: np.ndarray, patches: int = 12) -> np.ndarray:
    """(samples, patches, 8) noise; a patch anywhere, told by its first number, knows the label."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(len(labels), patches, 8)).astype(np.float32)
    place = rng.integers(patches, size=len(labels))
    tokens[np.arange(len(labels)), place, 0] = 8.0
    tokens[np.arange(len(labels)), place, 1:5] = 2.0 * np.eye(4)[labels]
    return tokens


def test_attention_finds_the_patch_that_knows():
    labels, folds = np.arange(320) % 4, np.arange(320) // 4 % 4
    tokens = hidden_in_one_patch(labels)
    found, mean = attentive_probe(tokens, labels, folds), linear_probe(tokens.mean(axis=1), labels, folds)
    assert found.score > 0.85 and found.score > mean.score + 0.15
    assert found.correct.mean() == pytest.approx(found.score)


def test_attention_to_a_single_patch_is_the_linear_probe():
    labels, folds = np.arange(120) % 4, np.arange(120) // 4 % 3
    tokens = layered(labels, 0, layers=1)
    assert attentive_probe(tokens, labels, folds).score == linear_probe(tokens[:, 0], labels, folds).score


def test_attention_leaves_padding_out():
    labels, folds = np.arange(160) % 4, np.arange(160) // 4 % 4
    tokens = hidden_in_one_patch(labels)
    padded = np.concatenate([tokens, np.full((160, 3, 8), np.nan, dtype=np.float32)], axis=1)
    found, alone = (attentive_probe(features, labels, folds) for features in (padded, tokens))
    assert (found.correct == alone.correct).mean() > 0.98 and found.score == pytest.approx(alone.score, abs=0.02)
    rows = np.stack([labels % 2, labels // 2], axis=1).astype(np.float32)
    assert attentive_probe(padded, rows, folds).metric == "mAP"


def test_tokens_are_those_of_the_last_layer(tiny_config, tiny_input, modality):
    config = tiny_config(modality)
    encoder, inputs = BridleModel(config).eval(), tiny_input(modality, batch=3)
    readout = ON_REQUEST["attentive"]
    batch = {INPUT_NAMES[modality]: inputs}
    found = collect_layers({"x": encoder_tokens(encoder)}, config, [batch, batch], [readout])["x"][readout.pooling]
    with torch.no_grad():
        expected = encoder(inputs).last_hidden_state[:, int(config.use_class_token) :]
    np.testing.assert_allclose(found, torch.cat([expected, expected]), atol=1e-5)
    assert ON_REQUEST["gate"] in READOUTS and readout not in READOUTS


def test_tokens_of_padding_are_left_open(tiny_config):
    config = tiny_config("audio")
    mask = (torch.arange(96) < torch.tensor([[48], [96]])).long()
    batch = {"input_values": torch.randn(2, 96, 64), "attention_mask": mask}
    readout = ON_REQUEST["attentive"]
    found = collect_layers({"x": encoder_tokens(BridleModel(config))}, config, [batch], [readout])["x"]["attentive"]
    open_ = np.isnan(found).all(axis=2)
    assert open_[0].tolist() == [False] * 12 + [True] * 12 and not open_[1].any() and not np.isnan(found[~open_]).any()


def test_bridle_probe_reads_out_what_it_is_asked(tmp_path):
    (tmp_path / "data").mkdir()
    data = write_recordings(tmp_path / "data", labels=True)
    pretrain(write_recipe(tmp_path / "recipe.yaml"), data, tmp_path / "run", "--steps_scale", "0.01")
    asked = {"model": str(tmp_path / "run" / "encoder"), "data": data, "folds": "3"}
    plain, more = bridle_hf.probe(**asked), bridle_hf.probe(**asked, readouts=["gate", "attentive"])
    assert more["probes"][: len(plain["probes"])] == plain["probes"]
    added = more["probes"][len(plain["probes"]) :]
    assert [(row["features"], row["pooling"]) for row in added] == [
        (source, name)
        for source in ("encoder", "untrained encoder", "patches")
        for name in ("region_mean_std/gate", "attentive/last")
    ]
    assert all(0 <= row["linear"] <= 1 and len(row["linear_folds"]) == 3 and "knn" not in row for row in added)
    table = probe_lines(more)
    assert sum("attentive/last" in line for line in table[1].splitlines()) == 3
    with pytest.raises(ArgumentError, match="--readouts attention: expected some of gate, attentive"):
        bridle_hf.probe(**asked, readouts=["attention"])


def test_layers_are_pooled_as_the_model_has_them(tiny_config, tiny_input, modality):
    config = tiny_config(modality)
    encoder = BridleModel(config).eval()
    inputs = tiny_input(modality, batch=5)
    batches = [{INPUT_NAMES[modality]: part} for part in inputs.split(3)]
    found = collect_layers({"encoder": encoder_tokens(encoder)}, config, batches)["encoder"]
    with torch.no_grad():
        output = encoder(inputs, output_hidden_states=True)
    last = output.last_hidden_state[:, int(config.use_class_token) :]
    first = output.hidden_states[0][:, int(config.use_class_token) :]
    assert found["mean_std"].shape == (5, 3, 96)
    np.testing.assert_allclose(found["mean_std"][:, -1, :48], last.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(found["mean_std"][:, 0, 48:], first.std(dim=1, correction=0), atol=1e-4)
    # Grids (6, 4), (4, 4) and (4, 4, 4): per mel band over time, every place, every place over time.
    regions = last.unflatten(1, ({"audio": 6, "image": 1, "video": 4}[modality], -1)).mean(dim=1)
    expected = torch.cat([regions.flatten(1), last.std(dim=1, correction=0)], dim=1)
    np.testing.assert_allclose(found["region_mean_std"][:, -1], expected, atol=1e-4)


def test_the_control_is_the_principal_components_of_the_patches(tiny_config, modality):
    """As many as the encoder is wide; scikit-learn's, up to sign."""
    config = tiny_config(modality)
    shape = {"audio": (96, 64), "image": (3, 64, 64), "video": (8, 3, 32, 32)}[modality]
    # Structure within patches, so that components are told apart.
    inputs = torch.randn(30, *shape).cumsum(dim=-1)
    name = INPUT_NAMES[modality]
    (tokens,) = patch_tokens(config, [{name: part} for part in inputs.split(7)])(inputs, None)
    patches, _ = patchify(inputs, config)
    assert tokens.shape == (*patches.shape[:2], 48)
    flat = patches.flatten(0, 1).numpy()
    pca = PCA(48).fit(flat)
    expected = pca.transform(flat)
    # eigh gives the largest last
    ours = tokens.flatten(0, 1).numpy()[:, ::-1]
    explained = ours.var(axis=0).sum()
    assert explained == pytest.approx(expected.var(axis=0).sum(), rel=1e-3)
    np.testing.assert_allclose(np.abs(ours[:, :3]), np.abs(expected[:, :3]), rtol=0.02, atol=0.1)


def test_patches_of_few_numbers_are_taken_as_they_are(tiny_config):
    config = tiny_config("image", patch_size=4, num_channels=1)
    inputs = torch.randn(2, 1, 64, 64)
    (tokens,) = patch_tokens(config, [])(inputs, None)
    assert torch.equal(tokens, patchify(inputs, config)[0])


def test_padding_does_not_change_what_is_read(tiny_config):
    config = tiny_config("audio")
    encoder = BridleModel(config).eval()
    clip = torch.randn(2, 48, 64)
    padded = torch.cat([clip, torch.full((2, 48, 64), 9.0)], dim=1)
    mask = (torch.arange(96) < 48).long().expand(2, -1)
    batches = {"alone": [{"input_values": clip}], "beside": [{"input_values": padded, "attention_mask": mask}]}
    for source in (encoder_tokens(encoder), patch_tokens(config, batches["beside"])):
        alone, beside = (collect_layers({"x": source}, config, batch)["x"] for batch in batches.values())
        for pooling in alone:
            np.testing.assert_allclose(alone[pooling], beside[pooling], atol=1e-4)


def test_the_primary_read_out_is_one_of_those_that_are_read():
    assert PRIMARY in READOUTS and len({readout.name for readout in READOUTS}) == len(READOUTS)
