"""Decoders: cross-attention against torch's own, hidden patches alone against all, and shares of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bridle_hf import BridleConfig, BridleForPreTraining, encoder_bridle
from bridle_hf.decoder_bridle import BridleCrossLayer
from bridle_hf.encoder_bridle import BridleSwinAttention
from bridle_hf.masking_bridle import chosen_patches, draw_share, make_mask
from bridle_hf.pretraining.dry_run import PeakMemory


EXACT = {"atol": 1e-5, "rtol": 0.0}
LAYERS = [None, [0, 1], [-2]]
SIZES = {
    "modality": "audio", "max_length": 96, "num_mel_bins": 64, "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 96, "decoder_type": "cross", "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "num_codebooks": 3, "codebook_size": 16,
}  # fmt: skip


def make_masks(config: BridleConfig, batch: int = 2) -> torch.Tensor:
    return torch.stack([make_mask(config.mask_type, config.patch_grid, config.mask_ratio) for _ in range(batch)])


def cross(modality: str, tiny_config, **fields) -> BridleForPreTraining:
    model = BridleForPreTraining(tiny_config(modality, decoder_type="cross", **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def test_cross_attention_equals_that_of_torch(tiny_config):
    layer = BridleCrossLayer(tiny_config("audio", decoder_type="cross", attn_implementation="sdpa")).eval()
    ours, oracle = layer.attention, nn.MultiheadAttention(32, 4, kdim=48, vdim=48, batch_first=True)
    for name in ("q", "k", "v"):
        getattr(oracle, f"{name}_proj_weight").copy_(getattr(ours, f"{name}_proj").weight)
    oracle.in_proj_bias.copy_(torch.cat([getattr(ours, f"{name}_proj").bias for name in "qkv"]))
    oracle.out_proj.load_state_dict(ours.o_proj.state_dict())
    tokens, context = torch.randn(2, 5, 32), torch.randn(2, 7, 48)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    normed = layer.layernorm_before(tokens)
    expected = tokens + oracle(normed, context, context, key_padding_mask=~real, need_weights=False)[0]
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    output = layer(tokens, context, real[:, None, None].expand(-1, -1, 5, -1))
    torch.testing.assert_close(output, expected, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_window_attention_equals_that_of_torch(masked):
    """Outputs and gradients, also of a token of zeros, as padding may be."""
    layer = BridleSwinAttention(32, 4, (2, 3)).double().eval()
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([0.001, 0.1, 1.0, 3.0]))
        layer.qkv.bias.zero_()
    windows = torch.randn(2, 5, 6, 32, dtype=torch.double)
    windows[0, 0, 0] = 0.0
    windows.requires_grad_()
    mask = torch.where(torch.rand(5, 1, 6, 6) < 0.3, -1e4, 0.0).double() if masked else None
    query, key, value = layer.qkv(windows).unflatten(-1, (3, 4, 8)).permute(3, 0, 1, 4, 2, 5)
    query, key = F.normalize(query, dim=-1, eps=1e-6), F.normalize(key, dim=-1, eps=1e-6)
    bias = (layer._bias() if mask is None else layer._bias() + mask).expand(2, 5, -1, -1, -1)
    query = query / layer.tau.clamp(min=0.01)[:, None, None]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    expected = layer.o_proj(attended.transpose(2, 3).flatten(3))
    found, weights = layer(windows, mask), torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    tensors = [windows, *layer.parameters()]
    gradients = (torch.autograd.grad((output * weights).sum(), tensors) for output in (found, expected))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_hidden_patches_alone_have_logits(tiny_config, tiny_input, modality, layers):
    model = cross(modality, tiny_config, decoder_encoder_layers=layers)
    hidden = make_masks(model.config)
    output = model(tiny_input(modality), bool_masked_pos=hidden)
    assert output.logits.shape == (*hidden.shape, 3, 16) and torch.equal(output.bool_decoded_pos, hidden)
    assert not output.logits[~hidden].any() and output.logits[hidden].abs().amin(dim=-1).gt(0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_patch_is_decoded_alike_whichever_others_are(data):
    """And whichever others are in the batch, padded or not: clips of 6, 4 and 2 steps of 4 patches."""
    torch.manual_seed(data.draw(st.integers(0, 2**30)))
    layers = data.draw(st.sampled_from(LAYERS))
    model = BridleForPreTraining(BridleConfig(**SIZES, decoder_encoder_layers=layers)).double().eval()
    steps = data.draw(st.permutations([6, 4, 2]))
    values = torch.randn(3, 96, 64, dtype=torch.double)
    mask = torch.arange(96) < 16 * torch.tensor(steps)[:, None]
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    for row, count in enumerate(steps):
        share = data.draw(st.integers(1, 4 * count - 1))
        hidden[row, torch.randperm(4 * count)[:share]] = True
    some = hidden & (torch.rand(hidden.shape) < 0.5)
    with torch.no_grad():
        whole = model(values, mask, hidden).logits
        torch.testing.assert_close(model(values, mask, hidden, bool_decoded_pos=some).logits[some], whole[some])
        for row, count in enumerate(steps):
            alone = model(values[row : row + 1, : 16 * count], None, hidden[row : row + 1, : 4 * count]).logits
            torch.testing.assert_close(alone[0], whole[row, : 4 * count])


def test_a_share_of_the_hidden_patches_is_decoded_while_training(tiny_config, tiny_input, modality):
    model = BridleForPreTraining(tiny_config(modality, decoder_type="cross", decoded_ratio=0.25))
    hidden, values = make_masks(model.config), tiny_input(modality)
    labels = torch.randint(16, (*hidden.shape, 3))
    output = model.train()(values, bool_masked_pos=hidden, labels=labels)
    decoded = output.bool_decoded_pos
    assert decoded.sum(1).tolist() == [round(0.25 * int(count)) for count in hidden.sum(1)]
    assert not (decoded & ~hidden).any() and not output.logits[~decoded].any()
    expected = F.cross_entropy(output.logits[decoded].flatten(0, 1), labels[decoded].flatten())
    torch.testing.assert_close(output.loss, expected)
    hits = output.logits[decoded].argmax(-1) == labels[decoded]
    torch.testing.assert_close(output.accuracy, hits.float().mean(0))
    assert torch.equal(model.eval()(values, bool_masked_pos=hidden, labels=labels).bool_decoded_pos, hidden)


@pytest.mark.parametrize("decoder_type", ["plain", "cross"])
def test_the_loss_is_that_of_all_logits(tiny_config, tiny_input, modality, decoder_type):
    """While training, logits of hidden patches alone are computed: loss and gradients are those of all."""
    model = BridleForPreTraining(tiny_config(modality, decoder_type=decoder_type))
    hidden, values = make_masks(model.config), tiny_input(modality)
    hidden[1] &= torch.rand(hidden.shape[1]) < 0.7
    labels, gradients = torch.randint(16, (*hidden.shape, 3)), []
    logits = model.eval()(values, bool_masked_pos=hidden).logits[hidden]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[hidden].flatten())
    for each in (loss, model.train()(values, bool_masked_pos=hidden, labels=labels).loss):
        model.zero_grad()
        each.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        torch.testing.assert_close(each, loss, **EXACT)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, **EXACT, msg=name)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_loss_on_visible_patches_is_a_mean_of_its_own(data):
    """Codes or regression, any decoder, clips of 6, 4 and 2 steps: from logits of patches that are decoded alone."""
    torch.manual_seed(data.draw(st.integers(0, 2**30)))
    weight, decoder_type = data.draw(st.floats(0.01, 3)), data.draw(st.sampled_from(["swin", "plain", "cross"]))
    target, training = data.draw(st.sampled_from(["codes", "patches"])), data.draw(st.booleans())
    sizes = {**SIZES, "decoder_type": decoder_type, "target": target}
    model = BridleForPreTraining(BridleConfig(**sizes, visible_loss_weight=weight)).double().train(training)
    plain = BridleForPreTraining(BridleConfig(**sizes)).double().train(training)
    plain.load_state_dict(model.state_dict())
    steps = torch.tensor([6, 4, 2])
    values, real = torch.randn(3, 96, 64, dtype=torch.double), torch.arange(96) < 16 * steps[:, None]
    patches = torch.arange(24) < 4 * steps[:, None]
    hidden = patches & (torch.rand(3, 24) < 0.6)
    hidden[:, 0], hidden[:, 1] = True, False
    some = hidden & (torch.rand(3, 24) < 0.5)
    some[:, 0] = True
    labels = torch.randint(16, (3, 24, 3)) if target == "codes" else torch.randn(3, 24, 256, dtype=torch.double)
    outputs = []
    for each in (model, plain):
        torch.manual_seed(0)  # of the dropout in the position bias of Swin
        outputs.append(each(values, real, hidden, labels=labels, bool_decoded_pos=some))
    output, before = outputs
    assert before.visible_loss is None and torch.equal(output.bool_decoded_pos, before.bool_decoded_pos)
    chosen = output.logits[patches & ~hidden]
    if target == "codes":
        expected = F.cross_entropy(chosen.flatten(0, 1), labels[patches & ~hidden].flatten())
        torch.testing.assert_close(output.accuracy, before.accuracy)
    else:
        expected = F.mse_loss(chosen[:, 0], labels[patches & ~hidden])
    torch.testing.assert_close(output.visible_loss.double(), expected.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, before.loss + weight * output.visible_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits[some], before.logits[some], atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_several_masks_are_the_mean_of_as_many_passes(data):
    """Loss, accuracy, gradients and outputs, of samples of unequal lengths whose masks hide equally many patches."""
    torch.manual_seed(data.draw(st.integers(0, 2**30)))
    masks, decoder_type = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["swin", "plain", "cross"]))
    sizes = {**SIZES, "decoder_type": decoder_type, "initializer_range": 0.5}
    model = BridleForPreTraining(BridleConfig(**sizes)).double().eval()
    steps = torch.tensor([6, 4, 2])
    values, real = torch.randn(3, 96, 64, dtype=torch.double), torch.arange(96) < 16 * steps[:, None]
    hidden = torch.zeros(3, masks, 24, dtype=torch.bool)
    for row, count in enumerate(steps.tolist()):
        for number in range(masks):
            hidden[row, number, torch.randperm(4 * count)[: 3 * count]] = True
    labels = torch.randint(16, (3, 24, 3))
    together = model(values, real, hidden, labels=labels)
    apart = [model(values, real, hidden[:, number], labels=labels) for number in range(masks)]
    torch.testing.assert_close(together.loss, sum(one.loss for one in apart) / masks)
    torch.testing.assert_close(together.accuracy, sum(one.accuracy for one in apart) / masks)
    torch.testing.assert_close(together.logits, torch.stack([one.logits for one in apart], dim=1).flatten(0, 1))
    assert torch.equal(together.bool_masked_pos, hidden.flatten(0, 1))
    weight = model.bridle.embeddings.projection.weight
    gradients = torch.autograd.grad(together.loss, weight), torch.autograd.grad(sum(o.loss for o in apart), weight)
    torch.testing.assert_close(gradients[0][0], gradients[1][0] / masks)


@torch.no_grad()
def test_several_masks_of_every_modality(tiny_config, tiny_input, modality):
    model = BridleForPreTraining(tiny_config(modality)).eval()
    hidden, values = torch.stack([make_masks(model.config) for _ in range(3)], dim=1), tiny_input(modality)
    together = model(values, bool_masked_pos=hidden).logits.unflatten(0, (2, 3))
    for number in range(3):
        alone = model(values, bool_masked_pos=hidden[:, number]).logits
        torch.testing.assert_close(together[:, number], alone, **EXACT)


@torch.no_grad()
def test_a_mix_of_one_state_reads_that_state(tiny_config, tiny_input):
    """A mix whose weight is on the encoder's output alone reads what the decoder without mixes reads."""
    plain = cross("audio", tiny_config)
    mixed = BridleForPreTraining(tiny_config("audio", decoder_type="cross", decoder_encoder_layers=[0])).eval()
    missing, unexpected = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("decoder.mix.") for name in missing)
    mixed.decoder.mix.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    mixed.decoder.mix.layernorms = nn.ModuleList([nn.Identity(), nn.Identity()])
    hidden, values = make_masks(plain.config), tiny_input("audio")
    expected = plain(values, bool_masked_pos=hidden)
    output = mixed(values, bool_masked_pos=hidden)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    assert output.hidden_states is None
    assert len(mixed(values, bool_masked_pos=hidden, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("layers", LAYERS)
def test_every_parameter_learns_with_and_without_checkpointing(tiny_config, tiny_input, modality, layers):
    model = BridleForPreTraining(tiny_config(modality, decoder_type="cross", decoder_encoder_layers=layers)).train()
    hidden, values, gradients = make_masks(model.config), tiny_input(modality), []
    labels = torch.randint(16, (*hidden.shape, 3))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(values, bool_masked_pos=hidden, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert not [name for name, gradient in gradients[0].items() if gradient is None]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder_type", ["swin", "cross"])
def test_what_the_backward_makes_anew_is_the_same_to_the_bit(
    tiny_config, tiny_input, monkeypatch, decoder_type, precision
):
    """With dropout (of the position bias), under autocast, too; and what lives until the backward is less."""
    model = BridleForPreTraining(tiny_config("audio", decoder_type=decoder_type)).train()
    hidden, values = make_masks(model.config, batch=8), tiny_input("audio", batch=8)
    labels = torch.randint(16, (*hidden.shape, 3))

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        with PeakMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = model(values, bool_masked_pos=hidden, labels=labels).loss
            kept = memory.live
        loss.backward()
        return kept, [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    less, found = step()
    monkeypatch.setattr(encoder_bridle, "made_anew", lambda function, *tensors: function(*tensors))
    more, expected = step()
    assert all(map(torch.equal, found, expected)) and less < more


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 2**30))
def test_shares_are_drawn_of_the_chosen_alone(patches, share, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(5, patches, generator=generator) < 0.6
    drawn = draw_share(chosen, share, generator)
    assert not (drawn & ~chosen).any()
    for count, left in zip(chosen.sum(1).tolist(), drawn.sum(1).tolist()):
        assert abs(left - count * share) <= 0.5 + 1e-4 or left == min(1, count)
    indices, valid = chosen_patches(drawn)
    found = [sorted(row[good].tolist()) for row, good in zip(indices, valid)]
    assert found == [row.nonzero()[:, 0].tolist() for row in drawn]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("decoder_type", ["swin", "plain", "cross"])
def test_numbers_of_patches_that_are_given_change_nothing(tiny_config, tiny_input, decoder_type, training):
    """Nor do labels of patches that are not decoded: they need not be codes."""
    model = BridleForPreTraining(tiny_config("image", decoder_type=decoder_type)).train(training)
    values, masks = tiny_input("image", 3), torch.stack([make_mask("random", (4, 4), 0.7) for _ in range(3)])
    codes = torch.randint(16, (3, 16, 3))
    torch.manual_seed(1)
    expected = model(values, bool_masked_pos=masks, labels=codes)
    num_decoded = int(masks[0].sum())
    torch.manual_seed(1)
    found = model(
        values, bool_masked_pos=masks, labels=codes.masked_fill(~masks[:, :, None], -100),
        num_visible=16 - num_decoded, num_decoded=num_decoded,
    )  # fmt: skip
    for name in ("loss", "logits", "accuracy"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
