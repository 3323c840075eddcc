"""The classifiers: losses, labels, heads of other checkpoints, and frames classified each for itself."""

import pytest
import torch
from helpers.classifiers import CLASSIFIERS
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
)

from bridle_hf import (
    BridleForAudioClassification,
    BridleForAudioFrameClassification,
    BridleForImageClassification,
    BridleModel,
)


BATCH = torch.tensor([0, 4])
HOT = torch.eye(5)[BATCH]


@pytest.mark.parametrize(
    ("fields", "labels", "loss"),
    [
        ({}, torch.tensor([0, 4]), F.cross_entropy),
        (
            {"label_smoothing": 0.1},
            torch.tensor([0, 4]),
            lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1),
        ),
        (
            {"problem_type": "single_label_classification"},
            torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 1.0, 0, 0]]),
            F.cross_entropy,
        ),
        ({}, torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]), F.binary_cross_entropy_with_logits),
        (
            {"problem_type": "multi_label_classification"},
            torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 1.0, 0, 0]]),
            F.binary_cross_entropy_with_logits,
        ),
        (
            {"num_labels": 1},
            torch.tensor([0.5, -2.0]),
            lambda logits, labels: F.mse_loss(logits.squeeze(), labels),
        ),
    ],
)
def test_classification_losses(tiny_config, tiny_input, modality, fields, labels, loss):
    model = CLASSIFIERS[modality](tiny_config(modality, **{"num_labels": 5, **fields})).eval()
    output = model(tiny_input(modality), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


@pytest.mark.parametrize(
    ("fields", "labels", "same_as"),
    [
        ({}, BATCH.int(), BATCH),
        ({}, BATCH.to(torch.uint8), BATCH),
        ({}, BATCH[:, None], BATCH),
        ({}, BATCH[:, None].int(), BATCH),
        ({}, HOT.bool(), HOT),
        ({"problem_type": "multi_label_classification"}, HOT.int(), HOT),
        ({"problem_type": "multi_label_classification"}, HOT.bool(), HOT),
        ({"num_labels": 1}, torch.tensor([2, 3]), torch.tensor([2.0, 3.0])),
        ({"num_labels": 1}, torch.tensor([[2.0], [3.0]]), torch.tensor([2.0, 3.0])),
    ],
)
def test_labels_of_other_types_and_shapes(tiny_config, tiny_input, fields, labels, same_as):
    losses = []
    for given in (labels, same_as):
        model = BridleForAudioClassification(tiny_config("audio", **{"num_labels": 5, **fields})).eval()
        torch.nn.init.constant_(model.classifier.bias, 0.5)
        torch.nn.init.eye_(model.classifier.weight)
        for parameter in model.bridle.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        torch.manual_seed(1)
        losses.append(model(tiny_input("audio"), labels=given).loss)
    losses[0].backward()
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, BATCH.bool()),
        ({}, BATCH.float()),
        ({}, HOT.int()),
        ({}, BATCH[:1]),
        ({}, torch.zeros(2, 2, dtype=torch.long)),
        ({}, torch.tensor(3)),
        ({"problem_type": "single_label_classification"}, HOT.bool()),
        ({"problem_type": "single_label_classification"}, BATCH.float()),
        ({"problem_type": "multi_label_classification"}, BATCH),
        ({"problem_type": "multi_label_classification"}, HOT[:, :4]),
        ({"problem_type": "regression", "num_labels": 1}, torch.zeros(3)),
    ],
)
def test_labels_in_doubt_are_refused_in_one_line(tiny_config, tiny_input, fields, labels):
    model = BridleForAudioClassification(tiny_config("audio", **{"num_labels": 5, **fields}))
    with pytest.raises(ValueError, match=r"^`labels` are torch\.\w+ of shape .*; for problem_type='\w+' give .*$"):
        model(tiny_input("audio"), labels=labels)


def test_heads_load_by_their_former_names(tiny_config, tmp_path):
    model = BridleForAudioClassification(tiny_config("audio", num_labels=3))
    torch.nn.init.normal_(model.fc_norm.weight)
    model.save_pretrained(tmp_path)
    former = {k.replace("fc_norm.", "classifier_norm."): w for k, w in model.state_dict().items()}
    assert "classifier_norm.weight" in former
    save_file(former, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for auto_class in (AutoModelForAudioClassification, BridleForAudioClassification):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded.fc_norm.weight, model.fc_norm.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(model.state_dict())
    fresh = BridleForAudioClassification(model.config)
    fresh.load_state_dict(former)
    assert torch.equal(fresh.fc_norm.weight, model.fc_norm.weight)
    assert "classifier_norm.weight" in former, "what was given is left as it is"
    _, info = BridleModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def test_a_head_of_another_size_is_the_only_part_made_anew(tiny_config, tmp_path):
    model = BridleForAudioClassification(tiny_config("audio", num_labels=3))
    model.save_pretrained(tmp_path)
    resized = BridleForAudioClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    for name, parameter in resized.named_parameters():
        same = parameter.shape == model.get_parameter(name).shape
        assert same == (not name.startswith("classifier")) and (not same or parameter.equal(model.get_parameter(name)))


def test_frames_are_classified_each_for_itself(tiny_config):
    """Equal to the clip classifier's head on the mean of the step's patches; padding changes and counts nothing."""
    model = BridleForAudioFrameClassification(tiny_config("audio", num_labels=5)).eval()
    clips = [torch.randn(1, frames, 64) for frames in (96, 40)]
    padded = torch.cat([clips[0], F.pad(clips[1], (0, 0, 0, 56), value=3.0)])
    mask = (torch.arange(96) < torch.tensor([[96], [40]])).long()
    logits = model(padded, mask).logits
    assert logits.shape == (2, 6, 5)
    for row, clip in zip(logits, clips):
        steps = -(-clip.shape[1] // 16)
        patches = model.bridle(clip).last_hidden_state[:, 1:].view(steps, 4, -1)
        torch.testing.assert_close(
            row[:steps], model.classifier(model.fc_norm(patches.mean(dim=1))), atol=1e-5, rtol=0
        )
    one = torch.randint(5, (2, 6))
    one[0, 2] = -100
    counted = [(0, step) for step in (0, 1, 3, 4, 5)] + [(1, step) for step in range(3)]
    wanted = F.cross_entropy(torch.stack([logits[place] for place in counted]), torch.stack([one[p] for p in counted]))
    torch.testing.assert_close(model(padded, mask, labels=one).loss, wanted)
    model.config.problem_type, several = None, torch.randint(2, (2, 6, 5))
    wanted = F.binary_cross_entropy_with_logits(
        torch.cat([logits[0], logits[1, :3]]), torch.cat([several[0], several[1, :3]]).float()
    )
    for kind in (torch.int64, torch.float32, torch.bool):
        torch.testing.assert_close(model(padded, mask, labels=several.to(kind)).loss, wanted)
    model.config.problem_type = None
    model(padded, mask, labels=one).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for wrong in (one[:, :5], one.float(), several[:, :, :2]):
        with pytest.raises(ValueError, match="`labels` are"):
            model(padded, mask, labels=wrong)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.zeros(1, 6, dtype=torch.int64), "single_label_classification"),
        (torch.ones(1, 6, 2), "multi_label_classification"),
    ],
)
def test_a_frame_classifier_keeps_its_problem(tiny_config, labels, problem):
    """As the classifiers of whole clips do: a pipeline reads there what makes scores of logits."""
    model = BridleForAudioFrameClassification(tiny_config("audio", num_labels=2))
    model(torch.randn(1, 96, 64), labels=labels)
    assert model.config.problem_type == problem


def test_a_frame_classifier_regresses(tiny_config):
    model = BridleForAudioFrameClassification(tiny_config("audio", num_labels=1, problem_type="regression")).eval()
    clip = torch.randn(1, 96, 64)
    out = model(clip, labels=torch.full((1, 6, 1), 7.0))
    torch.testing.assert_close(out.loss, F.mse_loss(model(clip).logits, torch.full((1, 6, 1), 7.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_regressed_is_not_rounded_to_half_precision(tiny_config, dtype):
    """1001.7 is 1000 in bfloat16, and 70,001 infinite in float16."""
    model = BridleForImageClassification(tiny_config("image", num_labels=1)).eval().to(dtype)
    wanted = torch.tensor([70001.0, 1001.7])
    out = model(torch.randn(2, 3, 32, 32, dtype=dtype), labels=wanted)
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits.float().squeeze(1), wanted))


def test_a_frame_classifier_saved_and_loaded(tiny_config, tmp_path):
    clip_model = BridleForAudioClassification(tiny_config("audio", num_labels=3))
    clip_model.save_pretrained(tmp_path)
    frames = AutoModelForAudioFrameClassification.from_pretrained(tmp_path)
    assert type(frames) is BridleForAudioFrameClassification
    assert torch.equal(frames.classifier.weight, clip_model.classifier.weight)
    frames.save_pretrained(tmp_path / "frames")
    assert "BridleForAudioFrameClassification" in (tmp_path / "frames" / "config.json").read_text()
    again = AutoModelForAudioFrameClassification.from_pretrained(tmp_path / "frames")
    for name, value in frames.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_classifier_of_another_modality_is_refused(tiny_config):
    with pytest.raises(ValueError, match="modality='image'"):
        BridleForImageClassification(tiny_config("audio"))


def test_patch_dropout_hides_whole_stripes_while_training(tiny_config, tiny_input, modality):
    model = CLASSIFIERS[modality](tiny_config(modality, patch_dropout=(0.5, 0.25)))
    dropped = model.train()._dropped_patches(tiny_input(modality), None)
    dropped = dropped.view(2, -1, *model.config.patch_grid[-2:])
    rows, columns = model.config.patch_grid[-2:]
    assert (dropped == dropped[:, :1]).all(), "the same in all frames"
    assert dropped[:, 0].all(dim=2).sum(1).tolist() == [rows // 2] * 2
    assert dropped[:, 0].all(dim=1).sum(1).tolist() == [columns // 4] * 2
    left = (rows - rows // 2) * (columns - columns // 4)
    assert (~dropped[:, 0]).flatten(1).sum(1).tolist() == [left] * 2
    assert model(tiny_input(modality)).logits.shape == (2, 2)
    assert model.eval()._dropped_patches(tiny_input(modality), None) is None


def test_patch_dropout_leaves_each_clip_its_share_of_real_steps(tiny_config):
    """Of 6 steps, 1 to 6 of them real, half of the real ones stay, and all rows keep as many patches."""
    model = BridleForAudioClassification(tiny_config("audio", patch_dropout=(0.5, 0.0))).train()
    lengths = torch.arange(1, 7).repeat(20)
    mask = (torch.arange(96) < 16 * lengths[:, None]).long()
    kept = ~model._dropped_patches(torch.zeros(len(lengths), 96, 64), mask).view(len(lengths), 6, 4)
    assert (kept == kept[:, :, :1]).all() and (kept[:, :, 0].sum(1) == 3).all()
    real = kept[:, :, 0] & (torch.arange(6) < lengths[:, None])
    assert torch.equal(real.sum(1), lengths - lengths // 2)
    seen = real.view(20, 6, 6)[:, -1].float().mean(0)
    assert (seen > 0).all() and (seen < 1).all(), "drawn anew for each clip"
