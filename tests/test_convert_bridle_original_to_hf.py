"""Our models against numbers computed by the reference implementation."""

from pathlib import Path

import numpy as np
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
    if golden.modality == "video":
        pytest.skip("the golden values hold no step of it; see test_training_steps_of_the_video_quantizer")
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


def test_training_steps_of_the_video_quantizer():
    """Sums and Laplace-smoothed counts, each level moved before its residual is taken, in float64."""
    name = "tokenizer.encoder.quantizer.codebooks.{}.{}"
    golden = Golden("video_rq")
    # The golden checkpoint has not been trained: sums as after training, near the codes but not equal to them.
    for level in range(4):
        size, sums = (golden.state[name.format(level, key)] for key in ("cluster_size_ema", "embed_ema"))
        sums.mul_(size[:, None]).add_(0.01 * torch.randn_like(sums))
    keys = ("weight", "cluster_size_ema", "embed_ema")
    codes, sizes, sums = (
        [golden.state[name.format(level, key)].double().numpy()[:16].copy() for level in range(4)] for key in keys
    )
    quantizer = golden.convert()[1].quantizer.train()
    for _ in range(5):
        latents = 3 * torch.randn(128, 8)
        residual = latents.double().numpy()
        for level in range(4):
            looked_up = residual / np.linalg.norm(residual, axis=1, keepdims=True)
            chosen = ((looked_up[:, None] - codes[level][None]) ** 2).sum(-1).argmin(1)
            members = np.eye(16)[chosen]
            sizes[level] = 0.99 * sizes[level] + 0.01 * members.sum(0)
            sums[level] = 0.99 * sums[level] + 0.01 * members.T @ looked_up
            total = sizes[level].sum()
            smoothed = total * (sizes[level] + 1e-5) / (total + 16 * 1e-5)
            codes[level] = sums[level] / smoothed[:, None]
            residual = residual - codes[level][chosen]
        quantizer(latents)
    np.testing.assert_allclose(quantizer.codebooks.numpy(), codes, atol=1e-4)
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), sizes, atol=1e-5)
    np.testing.assert_allclose(quantizer.cluster_sum.numpy(), sums, atol=1e-5)


# Checkpoints that the golden ones are not: other sizes, other names.


def small_heads(name: str) -> dict[str, int]:
    return {"num_attention_heads": 4, "estimator_num_attention_heads": 4, **HEADS[name]}


def original_positions(mel: int, time: int, dim: int) -> torch.Tensor:
    """(1 + patches, dim): a row of zeros for the class token, then sines and cosines of a grid of (mel, time)."""
    rates = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    places = [(column, row) for row in range(mel) for column in range(time)]
    halves = [[np.concatenate([np.sin(x * rates), np.cos(x * rates)]) for x in place] for place in places]
    table = np.concatenate(
        [np.zeros((1, dim)), np.concatenate([np.stack(halves)[:, 0], np.stack(halves)[:, 1]], axis=1)]
    )
    return torch.tensor(table, dtype=torch.float32)


def audio_state(mel: int, time: int) -> dict[str, torch.Tensor]:
    """An audio checkpoint with a plain decoder, of any grid of 16 patches."""
    state = dict(Golden("image_rq").state)
    for part, names in {"encoder_decoder": ["pos_embed", "decoder_pos_embed"], "tokenizer": ["pos_embed"]}.items():
        state[f"{part}.patch_embed.proj.weight"] = state[f"{part}.patch_embed.proj.weight"][:, :1].contiguous()
        for name in names:
            width = state[f"{part}.{name}"].shape[2]
            state[f"{part}.{name}"] = original_positions(mel, time, width)[None]
    state["tokenizer.estimator_pos_embed"] = original_positions(mel, time, 48)[None, 1:]
    return state


@pytest.mark.parametrize(("mel", "time"), [(2, 8), (4, 4), (8, 2), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mel_bins_are_read_from_the_position_table(mel, time, dtype):
    state = audio_state(mel, time)
    assert original_positions(8, 64, 48)[None].allclose(
        load_file(GOLDEN / "audio_rq_state_dict.safetensors")["encoder_decoder.pos_embed"], atol=1e-5
    )
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model, tokenizer = convert_state_dict(state, modality="audio", **small_heads("image_rq"))
    for config in (model.config, tokenizer.config):
        assert (config.num_mel_bins, config.max_length, config.patch_grid) == (16 * mel, 16 * time, (time, mel))
    assert tokenizer.encode(torch.randn(1, 16 * time, 16 * mel)).shape == (1, 16, 4)
    same, _ = convert_state_dict(state, modality="audio", num_mel_bins=16 * mel, **small_heads("image_rq"))
    assert same.config.max_length == 16 * time
    with pytest.raises(ValueError, match=f"`num_mel_bins` is 256.*{16 * mel} mel bins"):
        convert_state_dict(state, modality="audio", num_mel_bins=256, **small_heads("image_rq"))


def test_trained_positions_need_mel_bins():
    state = audio_state(2, 8)
    state["encoder_decoder.pos_embed"] = state["encoder_decoder.pos_embed"].roll(1, dims=2)
    with pytest.raises(ValueError, match="give `num_mel_bins`"):
        convert_state_dict(state, modality="audio", **small_heads("image_rq"))
    model, _ = convert_state_dict(state, modality="audio", num_mel_bins=32, **small_heads("image_rq"))
    assert model.config.patch_grid == (8, 2) and model.config.position_embedding_type == "table"


@pytest.mark.parametrize("name", sorted(HEADS))
def test_names_of_data_parallel_training(name):
    golden = Golden(name)
    golden.state = {f"module.{key}": tensor for key, tensor in golden.state.items()}
    for ours, plain in zip(golden.convert(), (golden.model, golden.tokenizer)):
        for key, tensor in plain.state_dict().items():
            assert torch.equal(ours.state_dict()[key], tensor)


@pytest.mark.parametrize("cold_start", [False, True])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_unknown_tensors_are_named(name, cold_start):
    kind = {"tokenizer_type": "random_projection"} if cold_start else {}
    unknown = [
        "encoder_decoder.blocks.0.gamma",
        "tokenizer.extra.weight",
        "tokenizer.quantizer.codebooks.0.offset",
        "head.bias",
    ]
    for key in unknown:
        golden = Golden(name)
        golden.state[key] = torch.zeros(3)
        with pytest.raises(ValueError, match=key.split(".")[-1]):
            golden.convert(**kind)


@pytest.mark.parametrize("name", ["audio_rq", "video_rq"])
def test_what_kmeans_leaves_behind_is_known(name):
    golden = Golden(name)
    nested = "encoder." if name == "video_rq" else ""
    for level in range(4):
        golden.state[f"tokenizer.{nested}quantizer.codebooks.{level}.initted"] = torch.ones(1)
    golden.convert()


@torch.no_grad()
def test_video_with_one_codebook():
    golden = Golden("video_rq")
    image = Golden("image_vq")
    state = {name: tensor for name, tensor in golden.state.items() if ".quantizer." not in name}
    for name, tensor in image.state.items():
        if ".quantizer." in name:
            state[name.replace("tokenizer.", "tokenizer.encoder.")] = tensor
    state["encoder_decoder.decoder.head.weight"] = torch.randn(32, 24)
    state["encoder_decoder.decoder.head.bias"] = torch.randn(32)
    model, tokenizer = convert_state_dict(state, modality="video", image_size=32, **small_heads("video_rq"))
    assert (model.config.num_codebooks, model.config.codebook_size) == (1, 32)
    latents = torch.nn.functional.normalize(golden.tokenizer.latents(golden.inputs), dim=-1)
    codebook = image.state["tokenizer.quantizer.embedding.weight"]
    assert torch.equal(tokenizer.encode(golden.inputs)[..., 0], (latents @ codebook.T).argmax(dim=-1))
    # It trains on as that of images does.
    steps = [quantizer.quantizer.train() for quantizer in (tokenizer, image.convert()[1])]
    for quantizer in steps:
        quantizer(image.expected["ema.latents"].flatten(0, 1))
    assert torch.equal(steps[0].codebooks, steps[1].codebooks)
