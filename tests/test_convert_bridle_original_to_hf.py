"""Our models against numbers computed by the reference implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridle_hf import teacher_features
from bridle_hf.convert_bridle_original_to_hf import convert_state_dict


GOLDEN = Path(__file__).parent / "golden"
HEADS = {
    "audio_rq": {"decoder_num_attention_heads": 16},
    "image_rq": {"decoder_num_attention_heads": 4},
    "image_vq": {"decoder_num_attention_heads": 4},
    "video_rq": {"decoder_num_attention_heads": 2, "estimator_num_attention_heads": 2},
}
FLOATS, LOSSES = {"atol": 2e-5, "rtol": 0.0}, {"atol": 1e-5, "rtol": 0.0}


class Golden:
    """One reference checkpoint, converted, with what the reference computed."""

    def __init__(self, name: str):
        self.name, self.modality = name, name.split("_")[0]
        self.state = load_file(GOLDEN / f"{name}_state_dict.safetensors")
        self.expected = load_file(GOLDEN / f"{name}_outputs.safetensors")
        self.model, self.tokenizer = self.convert()
        inputs = self.expected["input"]
        # Ours: audio without a channel axis, video with frames before channels.
        self.inputs = {
            "audio": lambda: inputs[:, 0],
            "image": lambda: inputs,
            "video": lambda: inputs.transpose(1, 2),
        }[self.modality]()
        self.mask = self.expected["mask"].bool()

    def convert(self, **kwargs):
        heads = {"num_attention_heads": 4, "estimator_num_attention_heads": 4, **HEADS[self.name]}
        return convert_state_dict(self.state, modality=self.modality, **heads, **kwargs)

    def codes(self, name: str) -> torch.Tensor:
        codes = self.expected[name]
        return codes if codes.dim() == 3 else codes[:, :, None]


@pytest.fixture(scope="module", params=sorted(HEADS))
def golden(request) -> Golden:
    return Golden(request.param)


def test_codes_of_the_trained_tokenizer(golden):
    name = "tokenizer.codes_full" if golden.modality == "video" else "tokenizer.codes"
    assert torch.equal(golden.tokenizer.encode(golden.inputs), golden.codes(name))


def test_codes_of_the_cold_start_tokenizer(golden):
    name = "tokenizer.codes_cold_start_full" if golden.modality == "video" else "tokenizer.codes_cold_start"
    _, cold = golden.convert(tokenizer_type="random_projection")
    assert torch.equal(cold.encode(golden.inputs), golden.codes(name))


@torch.no_grad()
def test_encoder_without_mask(golden):
    hidden = golden.model.bridle(golden.inputs).last_hidden_state
    torch.testing.assert_close(hidden, golden.expected["encoder.last_hidden_state"], **FLOATS)


@torch.no_grad()
def test_encoder_of_visible_patches(golden):
    hidden = golden.model.bridle(golden.inputs, bool_masked_pos=golden.mask).last_hidden_state
    expected = golden.expected["encoder.visible_hidden_state"]
    if golden.modality != "video":
        # The reference keeps visible patches in the order of its shuffle, we in that of the grid.
        visible = golden.expected["ids_restore"].argsort(dim=1)[:, : expected.shape[1] - 1]
        order = torch.cat([torch.zeros(len(visible), 1, dtype=torch.long), 1 + visible.argsort(dim=1)], dim=1)
        expected = expected.gather(1, order[:, :, None].expand_as(expected))
    torch.testing.assert_close(hidden, expected, **FLOATS)


@torch.no_grad()
def test_logits_and_loss_of_the_encoder_phase(golden):
    codes = golden.tokenizer.encode(golden.inputs)
    if golden.modality == "video":
        # The reference's video tokenizer sees the masked patches alone; its loss is over those codes.
        codes = codes.masked_scatter(golden.mask[:, :, None], golden.expected["tokenizer.codes_masked"])
    output = golden.model(golden.inputs, bool_masked_pos=golden.mask, labels=codes)
    logits = output.logits.flatten(2)
    if golden.modality == "video":
        logits, expected = logits[golden.mask], golden.expected["decoder.logits_masked"].flatten(0, 1)
    else:
        expected = golden.expected["decoder.logits"]
    torch.testing.assert_close(logits, expected, **FLOATS)
    torch.testing.assert_close(output.loss, golden.expected["loss.encoder_phase"].squeeze(), **LOSSES)


@torch.no_grad()
def test_quantized_estimate_and_losses_of_the_tokenizer_phase(golden):
    teacher = teacher_features(golden.model.bridle, golden.inputs)
    output = golden.tokenizer(golden.inputs, teacher_hidden_states=teacher)
    decoded = golden.tokenizer.decode(output.codes)
    torch.testing.assert_close(decoded, golden.expected["tokenizer.quantized"], **FLOATS)
    torch.testing.assert_close(output.estimate, golden.expected["estimator.last_hidden_state"], **FLOATS)
    torch.testing.assert_close(output.cosine_loss, golden.expected["loss.cosine"].squeeze(), **LOSSES)
    torch.testing.assert_close(output.codebook_loss, golden.expected["loss.codebook"].squeeze(), **LOSSES)


@torch.no_grad()
def test_one_ema_step_of_the_quantizer(golden):
    if "ema.latents" not in golden.expected:
        assert golden.modality == "video"
        return
    quantizer = golden.convert()[1].quantizer.train()
    output = quantizer(golden.expected["ema.latents"].flatten(0, 1))
    codes = golden.expected["ema.codes"].view(output.codes.shape)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.loss, golden.expected["ema.loss"].squeeze(), **LOSSES)
    for level in range(quantizer.codebooks.shape[0]):
        torch.testing.assert_close(
            quantizer.codebooks[level], golden.expected[f"ema.codebook_after.{level}"], **FLOATS
        )
        torch.testing.assert_close(
            quantizer.cluster_size[level], golden.expected[f"ema.cluster_size_after.{level}"], **FLOATS
        )
