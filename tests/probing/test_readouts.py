"""Read-outs: the gate finds the layer that knows, pooled tokens are those of the model, the control is linear."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from bridle_hf import BridleModel
from bridle_hf.patching_bridle import INPUT_NAMES, patchify
from bridle_hf.probing.probes import _learned_gate, gated_probe, linear_probe
from bridle_hf.probing.readouts import PRIMARY, READOUTS, collect_layers, encoder_tokens, patch_tokens


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
