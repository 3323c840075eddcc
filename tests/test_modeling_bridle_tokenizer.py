"""The tokenizer model: what it trains, its codes, the random projection, and its teacher."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from bridle_hf import (
    BridleModel,
    BridleTokenizerModel,
    teacher_features,
)
from bridle_hf.patching_bridle import INPUT_NAMES, patchify


EXACT = {"atol": 1e-5, "rtol": 0.0}


def test_tokenizer_trains_what_it_should(tiny_tokenizer_config, tiny_input, modality):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config(modality)).train()
    values = tiny_input(modality)
    codebooks = tokenizer.quantizer.codebooks.clone()
    patches = torch.Size(tokenizer.config.patch_grid).numel()
    output = tokenizer(values, teacher_hidden_states=torch.randn(2, patches, 48))
    output.loss.backward()
    assert not [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert not torch.equal(tokenizer.quantizer.codebooks, codebooks)
    torch.testing.assert_close(output.loss, output.cosine_loss + output.codebook_loss)
    assert output.codes.shape == (2, patches, 3) and output.usage.perplexity.shape == (3,)


@pytest.mark.parametrize("counted", [True, False])
def test_patches_left_out_at_the_end_are_those_of_a_shorter_input(
    tiny_config, tiny_tokenizer_config, tiny_input, modality, counted
):
    """Positions are a prefix: without its last step along the first axis, an input is a smaller one."""
    torch.manual_seed(0)
    config = tiny_tokenizer_config(modality)
    tokenizer, encoder = BridleTokenizerModel(config).train(), BridleModel(tiny_config(modality)).eval()
    tokenizer.quantizer.update_in_forward = False
    values, grid = tiny_input(modality), config.patch_grid
    first = config.patch_shape[0 if modality == "video" else 1]
    axis = {"audio": 1, "image": 2, "video": 1}[modality]
    shorter = values.narrow(axis, 0, values.shape[axis] - first)
    patches, row = torch.Size(grid).numel(), torch.Size(grid[1:]).numel()
    dropped = (torch.arange(patches) >= patches - row).expand(2, -1)
    dropout = {"bool_masked_pos": dropped, "num_visible": patches - row if counted else None}
    teacher = teacher_features(encoder, values, **dropout)
    torch.testing.assert_close(teacher, teacher_features(encoder, shorter), **EXACT)
    ours = tokenizer(values, teacher_hidden_states=teacher, **dropout)
    theirs = tokenizer(shorter, teacher_hidden_states=teacher)
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.counts, theirs.counts)
    for name in ("loss", "cosine_loss", "estimate"):
        torch.testing.assert_close(ours[name], theirs[name], **EXACT)
    torch.testing.assert_close(ours.statistics.sums, theirs.statistics.sums, **EXACT)


@pytest.mark.parametrize("tokenizer_type", ["random_projection", "self_distilled"])
def test_codes_of_some_patches_are_in_grid_order(tiny_tokenizer_config, tiny_input, modality, tokenizer_type):
    """Those of a random projection depend on nothing else."""
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config(modality, tokenizer_type=tokenizer_type)).eval()
    values, patches = tiny_input(modality), torch.Size(tokenizer.config.patch_grid).numel()
    dropped = torch.arange(patches).expand(2, -1) % 3 == torch.tensor([[0], [1]])
    codes = tokenizer(values, bool_masked_pos=dropped).codes
    if tokenizer_type == "random_projection":
        whole = tokenizer.encode(values)
        assert all(torch.equal(codes[row, : len(kept)], kept) for row, kept in enumerate(map(_kept, whole, dropped)))
    assert codes.shape == (2, int((~dropped).sum(dim=1).max()), 3)
    assert torch.equal(tokenizer(values, bool_masked_pos=torch.zeros_like(dropped)).codes, tokenizer.encode(values))


def _kept(codes: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    return codes[~dropped]


def test_each_sample_may_leave_out_others_and_be_padded(tiny_config, tiny_tokenizer_config, tiny_input):
    """A batch is its samples one by one; what is left out of padding is none."""
    torch.manual_seed(0)
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio")).eval()
    encoder, values = BridleModel(tiny_config("audio")).eval(), tiny_input("audio", batch=3)
    mask = (torch.arange(96) < torch.tensor([96, 50, 17])[:, None]).long()
    dropped = torch.rand(3, 24) < 0.4
    teacher = teacher_features(encoder, values, mask, bool_masked_pos=dropped)
    batch = tokenizer(values, mask, teacher_hidden_states=teacher, bool_masked_pos=dropped)
    counts, losses = 0, []
    for number, patches in enumerate([24, 16, 8]):
        one, left = (values[[number]], mask[[number]]), dropped[[number]]
        kept = int((~left[:, :patches]).sum())
        own = teacher_features(encoder, *one, bool_masked_pos=left)
        torch.testing.assert_close(teacher[number, :kept], own[0], **EXACT)
        single = tokenizer(*one, teacher_hidden_states=own, bool_masked_pos=left)
        assert torch.equal(batch.codes[number, :kept], single.codes[0]) and not batch.codes[number, kept:].any()
        torch.testing.assert_close(batch.estimate[number, :kept], single.estimate[0], **EXACT)
        counts, losses = counts + single.counts, [*losses, *[single.cosine_loss] * kept]
    assert torch.equal(batch.counts, counts)
    torch.testing.assert_close(batch.cosine_loss, torch.stack(losses).mean(), **EXACT)
    with pytest.raises(ValueError, match="bool_masked_pos"):
        tokenizer(values, mask, bool_masked_pos=dropped[:, :20])


@pytest.mark.parametrize("tokenizer_type", ["random_projection", "self_distilled"])
def test_encode_and_decode(tiny_tokenizer_config, tiny_input, modality, tokenizer_type):
    config = tiny_tokenizer_config(modality, tokenizer_type=tokenizer_type, num_soft_codes=3)
    tokenizer = BridleTokenizerModel(config).train()
    values, codebooks = tiny_input(modality), tokenizer.quantizer.codebooks.clone()
    frozen = next(tokenizer.children()).eval()
    codes, soft = tokenizer.encode(values), tokenizer.encode(values, soft=True)
    assert tokenizer.training and tokenizer.quantizer.training and not frozen.training
    assert torch.equal(tokenizer.quantizer.codebooks, codebooks)
    assert codes.dtype == torch.int64 and soft.shape == (*codes.shape, 3)
    assert torch.equal(soft[..., 0], codes) and torch.equal(codes, tokenizer.encode(**{INPUT_NAMES[modality]: values}))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (*codes.shape[:2], 8)
    quantized = tokenizer.quantizer.eval()(tokenizer.latents(values).flatten(0, 1)).quantized
    torch.testing.assert_close(decoded.flatten(0, 1), quantized, **EXACT)
    with pytest.raises(ValueError, match="codes"):
        tokenizer.decode(codes[..., :2])


@pytest.mark.parametrize("tokenizer_type", ["random_projection", "self_distilled"])
def test_tokenizers_claim_what_they_can(tiny_tokenizer_config, tokenizer_type):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio", tokenizer_type=tokenizer_type))
    # The class speaks for both types.
    assert not BridleTokenizerModel.supports_gradient_checkpointing
    assert BridleTokenizerModel.main_input_name == "inputs" and tokenizer.main_input_name == "input_values"
    if tokenizer.is_trained:
        tokenizer.gradient_checkpointing_enable()
        assert tokenizer.is_gradient_checkpointing
    else:
        with pytest.raises(ValueError, match="does not support"):
            tokenizer.gradient_checkpointing_enable()
    embedding = nn.Linear(256, 48)
    assert tokenizer.get_input_embeddings().weight.shape == embedding.weight.shape
    tokenizer.set_input_embeddings(embedding)
    assert tokenizer.get_input_embeddings() is embedding
    tokenizer.encode(torch.randn(1, 96, 64))


def test_encode_restores_the_mode_after_an_error(tiny_tokenizer_config):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio")).train()
    with pytest.raises(ValueError, match="mel bins"):
        tokenizer.encode(torch.randn(1, 96, 63))
    assert tokenizer.training


def test_the_random_projection_is_linear_in_normalised_patches(tiny_tokenizer_config, tiny_input, modality):
    config = tiny_tokenizer_config(modality, tokenizer_type="random_projection")
    tokenizer, values = BridleTokenizerModel(config).eval(), tiny_input(modality)
    patches, _ = patchify(values, config)
    patches = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, unbiased=False, keepdim=True)
    projection = tokenizer.random_projection
    expected = projection.projection(projection.embedding(patches))
    torch.testing.assert_close(tokenizer.latents(values), expected, atol=1e-4, rtol=0)
    # A louder recording, a brighter picture: the same codes.
    assert torch.equal(tokenizer.encode(values), tokenizer.encode(2 * values + 1))


def test_the_random_projection_stays_frozen_and_exact(tiny_tokenizer_config, tiny_input, tmp_path):
    config = tiny_tokenizer_config("audio", tokenizer_type="random_projection")
    BridleTokenizerModel(config).save_pretrained(tmp_path)
    tokenizer, values = BridleTokenizerModel.from_pretrained(tmp_path), tiny_input("audio", batch=16)
    assert not tokenizer(values).loss.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer.encode(values)
    assert torch.equal(codes, tokenizer.encode(values))
    with pytest.raises(ValueError, match="teacher_hidden_states"):
        tokenizer(values, teacher_hidden_states=torch.randn(16, 24, 48))


def test_positions_may_be_added_to_the_projection(tiny_tokenizer_config, modality):
    fields = {"tokenizer_type": "random_projection", "normalize_target_patches": False}
    silence = torch.zeros({"audio": (1, 96, 64), "image": (1, 3, 64, 64), "video": (1, 8, 3, 32, 32)}[modality])
    plain = BridleTokenizerModel(tiny_tokenizer_config(modality, **fields))
    placed = BridleTokenizerModel(tiny_tokenizer_config(modality, **fields, add_position_to_projection=True))
    placed.load_state_dict(plain.state_dict())
    assert plain.latents(silence).std(dim=1).max() < 1e-6
    positions = placed.random_projection.positions.table
    expected = plain.latents(silence) + plain.random_projection.projection(positions)
    torch.testing.assert_close(placed.latents(silence), expected, **EXACT)


@torch.no_grad()
def test_teacher_layers(tiny_config, tiny_input, modality):
    encoder, values = BridleModel(tiny_config(modality)).eval(), tiny_input(modality)
    first = int(encoder.config.use_class_token)
    outputs = encoder(values, output_hidden_states=True)
    assert torch.equal(teacher_features(encoder, values), outputs.last_hidden_state[:, first:])
    states = [outputs.hidden_states[layer][:, first:] for layer in (1, -1)]
    standardised = [
        (state - state.mean(-1, keepdim=True)) / state.std(-1, keepdim=True, unbiased=False) for state in states
    ]
    teacher = teacher_features(encoder, values, layers=[1, -1])
    torch.testing.assert_close(teacher, sum(standardised) / 2, atol=1e-3, rtol=0)


def test_a_teacher_of_another_width(tiny_tokenizer_config, tiny_input):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio", teacher_hidden_size=20))
    values = tiny_input("audio")
    assert tokenizer(values, teacher_hidden_states=torch.randn(2, 24, 20)).estimate.shape == (2, 24, 20)
    with pytest.raises(ValueError, match=r"teacher_hidden_states.*\(2, 25, 20\).*\(2, 24, 20\)"):
        tokenizer(values, teacher_hidden_states=torch.randn(2, 25, 20))


@pytest.mark.parametrize("tokenizer_type", ["self_distilled", "random_projection", "kmeans"])
def test_made_in_half_precision_as_loaded_in_it(tiny_tokenizer_config, tiny_input, tokenizer_type, tmp_path):
    """What `from_pretrained` keeps in float32 is in float32 where `from_config` makes a model, too."""
    width = {"code_dim": 48} if tokenizer_type == "kmeans" else {}  # it quantizes features as they are
    config = tiny_tokenizer_config("audio", tokenizer_type=tokenizer_type, **width)
    made = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    made.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name: value.dtype for name, value in loaded.state_dict().items()}
    assert {name: value.dtype for name, value in made.state_dict().items()} == types
    values = tiny_input("audio").bfloat16()
    assert torch.equal(made.encode(values), loaded.encode(values))
