"""The models against transformers' own ViTs, against themselves in other circumstances, and against bad input."""

import pytest
import torch
from helpers.classifiers import CLASSIFIERS
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from bridle_hf import (
    BridleConfig,
    BridleForAudioClassification,
    BridleForPreTraining,
    BridleModel,
    BridleTokenizerModel,
)
from bridle_hf.encoder_bridle import BridleDropPath, BridleSwinAttention
from bridle_hf.masking_bridle import make_mask
from bridle_hf.patching_bridle import INPUT_NAMES, patchify


EXACT = {"atol": 1e-5, "rtol": 0.0}
MODELS = ["encoder", "pretraining", "classifier", "random_projection", "self_distilled"]
# Frames of clips in one batch: whole windows, whole patches, neither, and less than a window of the Swin decoder.
CLIPS = [96, 64, 41, 17]


def make_masks(config: BridleConfig, batch: int = 2) -> torch.Tensor:
    return torch.stack([make_mask(config.mask_type, config.patch_grid, config.mask_ratio) for _ in range(batch)])


def make_codes(*shape: int) -> torch.Tensor:
    return torch.randint(16, shape)


def padded_batch(fill: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of `CLIPS` frames, padded with `fill`, and their attention mask."""
    values, mask = torch.full((len(CLIPS), max(CLIPS), 64), fill), torch.zeros(len(CLIPS), max(CLIPS))
    clips = torch.Generator().manual_seed(3)
    for index, frames in enumerate(CLIPS):
        values[index, :frames] = torch.randn(frames, 64, generator=clips)
        mask[index, :frames] = 1
    return values.to(dtype), mask


def real_patches(frames: int) -> int:
    return -(-frames // 16) * 4


def sharpen(model: nn.Module) -> nn.Module:
    """Weights so large that attention is sharp and a leak shows; float64, in which rounding then does not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.mul_(3.0)
        for module in model.modules():
            if isinstance(module, BridleSwinAttention):
                module.tau.fill_(0.01)
    return model.double().eval()


def untouched(model: nn.Module) -> nn.Module:
    return model.eval()


# transformers' own models


def load_oracle(ours: BridleModel, oracle: nn.Module, rename: dict[str, str]) -> None:
    state = {}
    for name, tensor in oracle.state_dict().items():
        for theirs, our in rename.items():
            name = name.replace(theirs, our)
        # Convolutions become linear; each side computes its positions itself.
        if "position" not in name:
            state[name] = tensor.flatten(1) if name == "embeddings.projection.weight" else tensor
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("table") for name in missing)


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


VIT_NAMES = {
    "embeddings.patch_embeddings.projection": "embeddings.projection",
    "encoder.layer.": "layers.",
    "attention.attention.": "attention.",
    "attention.query.": "attention.q_proj.",
    "attention.key.": "attention.k_proj.",
    "attention.value.": "attention.v_proj.",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "image"])
def test_hidden_states_equal_those_of_vit_mae(tiny_config, modality):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    channels = 1 if modality == "audio" else 3
    oracle = randomise(
        ViTMAEModel(
            ViTMAEConfig(
                **sizes, image_size=64, patch_size=16, num_channels=channels, mask_ratio=0.0, layer_norm_eps=1e-6
            )
        )
    )
    # The constructor of transformers 5.23 leaves the positions at zero. MAE's own order is width, then height.
    positions = build_2d_sinusoidal_position_embedding(4, 4, 48, cls_token=True)
    oracle.embeddings.position_embeddings.copy_(positions.roll(24, dims=1))
    ours = BridleModel(tiny_config(modality, max_length=64)).eval()
    load_oracle(ours, oracle, VIT_NAMES)
    pixels = torch.randn(2, channels, 64, 64)
    # Noise in order: the oracle then keeps the patches in their places.
    expected = oracle(pixels, noise=torch.arange(16.0).expand(2, -1), output_hidden_states=True)
    output = ours(pixels[:, 0] if modality == "audio" else pixels, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=0)
    for our_state, their_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(our_state, their_state, atol=2e-5, rtol=0)


@torch.no_grad()
def test_hidden_states_equal_those_of_video_mae(tiny_config, tiny_input):
    oracle = randomise(
        VideoMAEModel(
            VideoMAEConfig(
                hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32,
                patch_size=8, num_frames=8, tubelet_size=2, layer_norm_eps=1e-6, use_mean_pooling=False,
            )
        )
    )  # fmt: skip
    ours = BridleModel(tiny_config("video")).eval()
    names = {"q_bias": "q_proj.bias", "v_bias": "v_proj.bias", **VIT_NAMES}
    load_oracle(ours, oracle, names)
    videos = tiny_input("video")
    mask = make_masks(ours.config, 1).expand(2, -1)
    for given in (None, mask):
        expected = oracle(videos, bool_masked_pos=given).last_hidden_state
        output = ours(videos, bool_masked_pos=given).last_hidden_state
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)


# Padding


def compare_with_alone(batch: torch.Tensor, alone: list[torch.Tensor], real: list[int] | None = None) -> None:
    for index, expected in enumerate(alone):
        ours = batch[index : index + 1] if real is None else batch[index : index + 1, : real[index]]
        torch.testing.assert_close(ours, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("prepare", [untouched, sharpen])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_clip_is_encoded_as_alone(prepare, tiny_config, attention):
    model = prepare(BridleModel(tiny_config("audio", attn_implementation=attention)))
    values, mask = padded_batch(7.0, model.dtype)
    output = model(values, mask)
    alone = [model(values[i : i + 1, :frames]) for i, frames in enumerate(CLIPS)]
    tokens = [1 + real_patches(frames) for frames in CLIPS]
    compare_with_alone(output.last_hidden_state, [one.last_hidden_state for one in alone], tokens)
    compare_with_alone(output.pooler_output, [one.pooler_output for one in alone])


@torch.no_grad()
@pytest.mark.parametrize("prepare", [untouched, sharpen])
@pytest.mark.parametrize("decoder_type", ["swin", "plain", "cross"])
def test_a_padded_clip_is_decoded_as_alone(prepare, tiny_config, decoder_type):
    model = prepare(BridleForPreTraining(tiny_config("audio", decoder_type=decoder_type, decoder_window_shift=(2, 1))))
    values, mask = padded_batch(7.0, model.dtype)
    hidden = torch.rand(len(CLIPS), 24) < 0.5
    logits = model(values, mask, hidden).logits
    real = [real_patches(frames) for frames in CLIPS]
    alone = [
        model(values[i : i + 1, :frames], None, hidden[i : i + 1, : real[i]]).logits for i, frames in enumerate(CLIPS)
    ]
    compare_with_alone(logits, alone, real)


@torch.no_grad()
@pytest.mark.parametrize("prepare", [untouched, sharpen])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_padded_clip_is_classified_as_alone(prepare, tiny_config, pooling):
    model = prepare(BridleForAudioClassification(tiny_config("audio", num_labels=5, pooling=pooling)))
    values, mask = padded_batch(7.0, model.dtype)
    alone = [model(values[i : i + 1, :frames]).logits for i, frames in enumerate(CLIPS)]
    compare_with_alone(model(values, mask).logits, alone)


@torch.no_grad()
@pytest.mark.parametrize("tokenizer_type", ["random_projection", "self_distilled"])
def test_a_padded_clip_is_tokenized_as_alone(tiny_tokenizer_config, tokenizer_type):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio", tokenizer_type=tokenizer_type)).eval()
    values, mask = padded_batch(fill=7.0)
    real = [real_patches(frames) for frames in CLIPS]
    codes = tokenizer.encode(values, mask)
    alone = [tokenizer.encode(values[i : i + 1, :frames]) for i, frames in enumerate(CLIPS)]
    compare_with_alone(codes, alone, real)
    assert all(not codes[i, count:].any() for i, count in enumerate(real))
    # Padding counts neither in the usage nor in the losses.
    output = tokenizer(values, mask)
    assert output.counts.sum(1).tolist() == [sum(real)] * 3
    alone = [tokenizer(values[i : i + 1, :frames]) for i, frames in enumerate(CLIPS)]
    torch.testing.assert_close(output.counts, sum(one.counts for one in alone))
    expected = sum(one.codebook_loss * count for one, count in zip(alone, real)) / sum(real)
    torch.testing.assert_close(output.codebook_loss, expected, **EXACT)


@torch.no_grad()
def test_a_padded_clip_is_estimated_as_alone(tiny_tokenizer_config):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio")).eval()
    values, mask = padded_batch(fill=7.0)
    teacher = torch.randn(len(CLIPS), 24, 48)
    real = [real_patches(frames) for frames in CLIPS]
    output = tokenizer(values, mask, teacher_hidden_states=teacher)
    alone = [
        tokenizer(values[i : i + 1, :frames], teacher_hidden_states=teacher[i : i + 1, : real[i]])
        for i, frames in enumerate(CLIPS)
    ]
    compare_with_alone(output.estimate, [one.estimate for one in alone], real)
    expected = sum(one.cosine_loss * count for one, count in zip(alone, real)) / sum(real)
    torch.testing.assert_close(output.cosine_loss, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("fill", [1e4, float("nan"), float("inf")])
def test_what_the_padding_holds_does_not_matter(tiny_config, tiny_tokenizer_config, fill):
    model = BridleForPreTraining(tiny_config("audio")).eval()
    tokenizers = [
        BridleTokenizerModel(tiny_tokenizer_config("audio", tokenizer_type=kind)).eval()
        for kind in ("random_projection", "self_distilled")
    ]
    (zeros, mask), (filled, _) = padded_batch(), padded_batch(fill)
    hidden = torch.rand(len(CLIPS), 24) < 0.5
    assert torch.equal(model(filled, mask, hidden).logits, model(zeros, mask, hidden).logits)
    for tokenizer in tokenizers:
        assert torch.equal(tokenizer.encode(filled, mask), tokenizer.encode(zeros, mask))


def test_masks_that_are_drawn_hide_real_patches_only(tiny_config):
    model = BridleForPreTraining(tiny_config("audio", mask_ratio=0.75)).eval()
    values, mask = padded_batch()
    hidden = model(values, mask).bool_masked_pos
    real = [real_patches(frames) for frames in CLIPS]
    assert hidden.sum(1).tolist() == [count * 3 // 4 for count in real]
    assert all(not hidden[i, count:].any() for i, count in enumerate(real))


# The same numbers by another way


@torch.no_grad()
def test_eager_equals_sdpa(tiny_config, tiny_input, modality):
    model = BridleForPreTraining(tiny_config(modality)).eval()
    values, mask = tiny_input(modality), make_masks(model.config)
    expected = model(values, bool_masked_pos=mask).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(values, bool_masked_pos=mask).logits, expected, **EXACT)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_encoder_equals_eager(tiny_config, tiny_input):
    model = BridleModel(tiny_config("audio", num_hidden_layers=1)).eval()
    torch._dynamo.reset()
    values = tiny_input("audio")
    output = torch.compile(model, fullgraph=True)(values)
    torch.testing.assert_close(output.last_hidden_state, model(values).last_hidden_state, **EXACT)


# How many patches a mask leaves visible, and which, are numbers that torch.compile must be told to follow.
@pytest.mark.slow
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_compiled_graphs_of_padding_classifier_and_pretraining(tiny_config, tiny_input):
    torch._dynamo.reset()
    values, mask = padded_batch()
    classifier = BridleForAudioClassification(tiny_config("audio", num_labels=5, num_hidden_layers=1)).eval()
    compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(values, mask).logits, classifier(values, mask).logits, **EXACT)
    model = BridleForPreTraining(tiny_config("audio", num_hidden_layers=1)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"bool_masked_pos": make_masks(model.config), "labels": make_codes(2, 24, 3)}
    values = tiny_input("audio")
    expected, output = model(values, **inputs), compiled(values, **inputs)
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    weight = model.bridle.embeddings.projection.weight
    gradients = [torch.autograd.grad(each.loss, weight)[0] for each in (expected, output)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("decoder_type", ["swin", "plain"])
def test_gradient_checkpointing_changes_no_gradient(tiny_config, tiny_input, decoder_type):
    model = BridleForPreTraining(tiny_config("audio", decoder_type=decoder_type, drop_path_rate=0.5)).train()
    inputs = {"bool_masked_pos": make_masks(model.config), "labels": make_codes(2, 24, 3)}
    values, gradients = tiny_input("audio"), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model.zero_grad()
        model(values, **inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("prepare", [untouched, sharpen])
def test_visible_patches_alone_equal_full_attention_confined_to_them(prepare, tiny_config, tiny_input, modality):
    model = prepare(BridleModel(tiny_config(modality, attn_implementation="eager")))
    config, values = model.config, tiny_input(modality).to(model.dtype)
    hidden = make_masks(config)
    output = model(values, bool_masked_pos=hidden).last_hidden_state
    tokens, _ = model.embeddings(values)
    first = int(config.use_class_token)
    visible = F.pad(~hidden, (first, 0), value=True)
    bias = torch.where(visible, 0.0, float("-inf"))[:, None, None]
    for layer in model.layers:
        tokens = layer(tokens, bias)
    expected = model.layernorm(tokens)[visible].view(output.shape)
    torch.testing.assert_close(output, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("prepare", [untouched, sharpen])
def test_rows_with_unequal_numbers_of_visible_patches(prepare, tiny_config, tiny_input, modality):
    model = prepare(BridleForPreTraining(tiny_config(modality)))
    values, hidden = tiny_input(modality).to(model.dtype), make_masks(model.config)
    hidden[0] = True
    hidden[0, 3] = False
    logits = model(values, bool_masked_pos=hidden).logits
    alone = [model(values[i : i + 1], bool_masked_pos=hidden[i : i + 1]).logits for i in range(2)]
    compare_with_alone(logits, alone)


# Outputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions(tiny_config, tiny_tokenizer_config, tiny_input, modality, attention):
    config, values = tiny_config(modality, attn_implementation=attention), tiny_input(modality)
    model = BridleModel(config).eval()
    tokens = torch.Size(config.patch_grid).numel() + int(config.use_class_token)
    output = model(values, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, tokens, 48)] * 3
    assert [weights.shape for weights in output.attentions] == [(2, 4, tokens, tokens)] * 2
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(2, 4, tokens))
    torch.testing.assert_close(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    torch.testing.assert_close(model(values).last_hidden_state, output.last_hidden_state, **EXACT)
    assert model.config._attn_implementation == attention
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config(modality, attn_implementation=attention))
    for model in (BridleForPreTraining(config), CLASSIFIERS[modality](config), tokenizer):
        output = model.eval()(values, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 3 and len(output.attentions) == 2
        assert model(values).hidden_states is None and model(values).attentions is None


def test_attentions_of_padded_clips_skip_the_padding(tiny_config):
    values, mask = padded_batch()
    output = BridleModel(tiny_config("audio")).eval()(values, mask, output_attentions=True)
    for index, frames in enumerate(CLIPS):
        assert not output.attentions[0][index, :, :, 1 + real_patches(frames) :].any()


def test_tuples_on_request(tiny_config, tiny_input):
    values = tiny_input("audio")
    model = BridleForPreTraining(tiny_config("audio"))
    loss, logits, *_ = model(values, labels=make_codes(2, 24, 3), return_dict=False)
    assert loss.shape == () and logits.shape == (2, 24, 3, 16)
    assert model.bridle(values, return_dict=False)[0].shape == (2, 25, 48)


def test_names_that_transformers_relies_on(tiny_config, modality):
    for model_class in (BridleModel, BridleForPreTraining, CLASSIFIERS[modality]):
        model = model_class(tiny_config(modality))
        assert model.main_input_name == INPUT_NAMES[modality] and model.base_model_prefix == "bridle"
        assert isinstance(model.get_input_embeddings(), nn.Linear)
        assert model.base_model is getattr(model, "bridle", model)


@torch.no_grad()
def test_inputs_by_position_and_by_name(tiny_config, tiny_input, modality):
    model, values = BridleModel(tiny_config(modality)).eval(), tiny_input(modality)
    names = {INPUT_NAMES[modality]} | ({"pixel_values"} if modality == "video" else set())
    expected = model(values).pooler_output
    assert all(torch.equal(model(**{name: values}).pooler_output, expected) for name in names)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 95, 96, 97, 300])
def test_a_clip_of_any_length_runs(tiny_config, frames):
    model = BridleForPreTraining(tiny_config("audio")).eval()
    assert model(torch.randn(1, frames, 64)).logits.shape == (1, real_patches(frames), 3, 16)
    assert BridleForAudioClassification(tiny_config("audio"))(torch.randn(2, frames, 64)).logits.shape == (2, 2)


@torch.no_grad()
def test_other_resolutions_and_numbers_of_frames_run(tiny_config):
    for decoder_type in ("plain", "swin"):
        model = BridleForPreTraining(tiny_config("image", decoder_type=decoder_type)).eval()
        assert model(torch.randn(1, 3, 48, 112)).logits.shape == (1, 21, 3, 16)
    model = BridleForPreTraining(tiny_config("video")).eval()
    assert model(torch.randn(1, 4, 3, 32, 32)).logits.shape == (1, 32, 3, 16)
    assert model(torch.randn(1, 10, 3, 40, 24)).logits.shape == (1, 75, 3, 16)


def test_patches_against_unfold(tiny_config, tiny_input):
    images = tiny_input("image")
    patches, grid = patchify(images, tiny_config("image"))
    assert grid == (4, 4) and torch.equal(patches, F.unfold(images, 16, stride=16).transpose(1, 2))
    clips = tiny_input("audio")
    patches, grid = patchify(clips, tiny_config("audio"))
    assert grid == (6, 4) and torch.equal(patches, F.unfold(clips[:, None], 16, stride=16).transpose(1, 2))


# Losses


@pytest.mark.parametrize("soft", [False, True])
def test_pretraining_loss_is_cross_entropy_over_masked_patches(tiny_config, tiny_input, modality, soft):
    model = BridleForPreTraining(tiny_config(modality)).eval()
    values, mask = tiny_input(modality), make_masks(model.config)
    labels = make_codes(*mask.shape, 3, *([2] if soft else []))
    output = model(values, bool_masked_pos=mask, labels=labels)
    logits, targets = output.logits[mask], labels[mask]
    if soft:
        targets = F.one_hot(targets, 16).float().mean(dim=2)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
        hits = logits.argmax(-1) == labels[mask][..., 0]
    else:
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        hits = logits.argmax(-1) == targets
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.accuracy, hits.float().mean(0))
    assert torch.equal(output.bool_masked_pos, mask)


@pytest.mark.parametrize("weights", [[3.0, 2.0, 1.0], [3, 2, 1], [1, 0, 0]], ids=str)
def test_codebook_loss_weights(tiny_config, tiny_input, weights):
    model = BridleForPreTraining(tiny_config("audio", codebook_loss_weights=weights)).eval()
    mask, labels = make_masks(model.config), make_codes(2, 24, 3)
    output = model(tiny_input("audio"), bool_masked_pos=mask, labels=labels)
    losses = [F.cross_entropy(output.logits[mask][:, q], labels[mask][:, q]) for q in range(3)]
    weighted = [weight * loss for weight, loss in zip(weights, losses)]
    torch.testing.assert_close(output.loss, sum(weighted) / sum(weights))


@pytest.mark.parametrize("target", ["patches", "features"])
def test_a_regression_is_the_squared_error_of_masked_patches(tiny_config, tiny_input, modality, target):
    model = BridleForPreTraining(tiny_config(modality, target=target, target_feature_size=5)).eval()
    mask, size = make_masks(model.config), 5 if target == "features" else model.config.patch_dim
    labels = torch.randn(*mask.shape, size)
    output = model(tiny_input(modality), bool_masked_pos=mask, labels=labels)
    assert output.logits.shape == (*mask.shape, 1, size) and output.accuracy is None
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(2)[mask], labels[mask]))
    with pytest.raises(ValueError, match=rf"`labels` must be \(batch, patches, {size}\)"):
        model(tiny_input(modality), bool_masked_pos=mask, labels=labels[..., 1:])


def test_every_parameter_learns(tiny_config, tiny_input, modality):
    model = BridleForPreTraining(tiny_config(modality)).train()
    output = model(tiny_input(modality), labels=make_codes(2, torch.Size(model.config.patch_grid).numel(), 3))
    output.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_codes_of_any_integer_type(tiny_config, tiny_input):
    model = BridleForPreTraining(tiny_config("audio")).eval()
    values, codes, mask = tiny_input("audio"), make_codes(2, 24, 3), make_masks(model.config)
    losses = [model(values, bool_masked_pos=mask, labels=labels).loss for labels in (codes, codes.int(), codes.byte())]
    assert losses[0] == losses[1] == losses[2]
    for labels in (codes.float(), codes.bool()):
        with pytest.raises(ValueError, match="give codes, which are integers"):
            model(values, bool_masked_pos=mask, labels=labels)


# Export


@pytest.mark.parametrize("masked", [False, True])
def test_one_exported_program_takes_clips_of_any_length(tiny_config, masked):
    """Shorter than `max_length` and longer, whatever length it was exported with."""
    model = BridleForAudioClassification(tiny_config("audio", num_hidden_layers=1)).eval()
    batch, time = torch.export.Dim("batch", max=8), torch.export.Dim("time", min=17, max=4096)

    def inputs(clips: int, frames: int) -> dict[str, torch.Tensor]:
        values = {"input_values": torch.randn(clips, frames, 64)}
        mask = (torch.arange(frames) < torch.tensor([[frames]] + [[1 + frames // 2]] * (clips - 1))).long()
        return {**values, "attention_mask": mask} if masked else values

    example = inputs(2, 96)
    program = torch.export.export(model, (), example, dynamic_shapes={name: {0: batch, 1: time} for name in example})
    for frames in (17, 40, 95, 96, 97, 112, 1000):
        given = inputs(3, frames)
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, atol=1e-5, rtol=0)


# Not of video: transformers asks whether there are two tokens, which without a class token is not known before.
@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "image"])
def test_an_exported_program_of_pretraining_takes_other_masks(tiny_config, tiny_input, modality):
    """How many patches they leave visible is not known before."""
    model = BridleForPreTraining(tiny_config(modality)).eval()
    inputs = {"inputs": tiny_input(modality), "bool_masked_pos": make_masks(model.config)}
    program = torch.export.export(model, (), inputs).module()
    for share in (0.2, 0.5, 0.9):
        inputs["bool_masked_pos"] = torch.rand(2, inputs["bool_masked_pos"].shape[1]) < share
        torch.testing.assert_close(program(**inputs)["logits"], model(**inputs).logits, **EXACT)


# Regularisation


def test_drop_path_keeps_the_expectation():
    drop_path = BridleDropPath(0.3).train()
    dropped = drop_path(torch.ones(20000, 2, 3))
    assert ((dropped == 0) | ((dropped - 1 / 0.7).abs() < 1e-6)).all()
    assert (dropped == dropped[:, :1, :1]).all(), "a sample as a whole"
    assert abs(float(dropped.mean()) - 1) < 5 * (0.3 / 0.7 / 20000) ** 0.5
    assert torch.equal(drop_path.eval()(dropped), dropped)


def test_drop_path_grows_linearly(tiny_config):
    model = BridleModel(tiny_config("audio", num_hidden_layers=3, drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.1, 0.2])


# Weights


@pytest.mark.parametrize("model_class", MODELS)
def test_every_parameter_and_buffer_is_initialised(tiny_config, tiny_tokenizer_config, modality, model_class):
    def build():
        if model_class in ("random_projection", "self_distilled"):
            return BridleTokenizerModel(tiny_tokenizer_config(modality, tokenizer_type=model_class))
        heads = {"encoder": BridleModel, "pretraining": BridleForPreTraining, "classifier": CLASSIFIERS[modality]}
        return heads[model_class](tiny_config(modality))

    reference = build()
    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 1)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for (name, tensor), expected in zip(model.state_dict(keep_vars=True).items(), reference.state_dict().values()):
        assert torch.isfinite(tensor).all(), name
        # Constants are equal, random tensors are spread alike.
        if tensor.numel() > 1:
            torch.testing.assert_close(tensor.float().std(), expected.float().std(), rtol=0.5, atol=1e-3, msg=name)
    for (name, buffer), expected in zip(model.named_buffers(), reference.buffers()):
        if name.endswith(("table", "initialized")) or "cluster" in name:
            assert torch.equal(buffer, expected), name


@torch.no_grad()
def test_saved_models_compute_the_same(tiny_config, tiny_input, modality, tmp_path):
    values, mask = tiny_input(modality), make_masks(tiny_config(modality))
    model = BridleForPreTraining(tiny_config(modality)).eval()
    model.save_pretrained(tmp_path)
    loaded = BridleForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded(values, bool_masked_pos=mask).logits, model(values, bool_masked_pos=mask).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(values).last_hidden_state, model.bridle(values).last_hidden_state)
    classifier = CLASSIFIERS[modality].from_pretrained(tmp_path, num_labels=7)
    assert classifier(values).logits.shape == (2, 7)
    for name, weight in model.bridle.state_dict().items():
        assert torch.equal(classifier.bridle.state_dict()[name], weight)
    # A head of another size is drawn anew.
    classifier.save_pretrained(tmp_path)
    resized = CLASSIFIERS[modality].from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert resized(values).logits.shape == (2, 4) and torch.isfinite(resized(values).logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(tiny_config, tiny_tokenizer_config, modality, dtype):
    shape = {"audio": (2, 96, 64), "image": (2, 3, 64, 64), "video": (2, 8, 3, 32, 32)}[modality]
    values = torch.randn(shape, dtype=dtype)
    model = BridleForPreTraining(tiny_config(modality)).to(dtype)
    patches = torch.Size(model.config.patch_grid).numel()
    output = model(values, labels=make_codes(2, patches, 3))
    output.loss.backward()
    assert output.logits.dtype == dtype and torch.isfinite(output.loss)
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config(modality)).to(dtype)
    output = tokenizer(values, teacher_hidden_states=torch.randn(2, patches, 48, dtype=dtype))
    output.loss.backward()
    assert torch.isfinite(output.loss) and tokenizer.quantizer.codebooks.dtype == torch.float32


# Bad input


@pytest.mark.parametrize("given", [[], ["input_values", "pixel_values"], ["other"]])
def test_exactly_one_input_is_taken(tiny_config, tiny_tokenizer_config, tiny_input, modality, given):
    other = "pixel_values" if modality == "audio" else "input_values"
    inputs = {other if name == "other" else name: tiny_input(modality) for name in given}
    models = [model_class(tiny_config(modality)) for model_class in (BridleModel, BridleForPreTraining)]
    models += [CLASSIFIERS[modality](tiny_config(modality)), BridleTokenizerModel(tiny_tokenizer_config(modality))]
    for model in models:
        with pytest.raises(ValueError, match=r"input_values.*pixel_values.*pixel_values_videos"):
            model(**inputs)


@pytest.mark.parametrize(
    ("modality", "shape", "message"),
    [
        ("audio", (96, 64), r"`input_values`.*\(batch, frames, mel bins\).*\(96, 64\)"),
        ("audio", (1, 96, 63), "`input_values`.*63 mel bins"),
        ("audio", (1, 0, 64), "input"),
        ("image", (3, 64, 64), "`pixel_values`"),
        ("image", (1, 4, 64, 64), "4 channels"),
        ("image", (1, 3, 64, 60), "64, 60.*patches"),
        ("video", (8, 3, 32, 32), "`pixel_values_videos`"),
        ("video", (1, 3, 8, 32, 32), "8 channels"),
        ("video", (1, 7, 3, 32, 32), "7, 32, 32.*patches"),
    ],
)
def test_an_input_of_a_wrong_shape_is_named(tiny_config, modality, shape, message):
    with pytest.raises(ValueError, match=message):
        BridleModel(tiny_config(modality))(torch.randn(shape))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 95)}, r"attention_mask.*\(2, 95\).*\(2, 96\)"),
        ({"attention_mask": torch.ones(1, 96)}, "attention_mask"),
        ({"attention_mask": torch.zeros(2, 96)}, "attention_mask.*clip 0"),
        ({"bool_masked_pos": torch.ones(2, 23)}, r"bool_masked_pos.*\(2, 23\).*\(2, 24\)"),
        ({"bool_masked_pos": torch.ones(2, 24, 5)}, r"bool_masked_pos.*\(2, 24, 5\).*\(2, 24\)"),
        ({"bool_masked_pos": torch.ones(24)}, "bool_masked_pos"),
        ({"bool_masked_pos": torch.ones(2, 0, 24)}, "bool_masked_pos"),
        ({"bool_masked_pos": torch.ones(2, 24)}, "hides all"),
        ({"bool_decoded_pos": torch.ones(2, 23)}, "bool_decoded_pos"),
        ({"labels": make_codes(2, 23, 3)}, "labels"),
        ({"labels": make_codes(2, 24, 2)}, "labels"),
        ({"labels": make_codes(2, 24)}, "labels"),
    ],
)
def test_an_argument_of_a_wrong_shape_is_named(tiny_config, tiny_input, inputs, message):
    with pytest.raises(ValueError, match=message):
        BridleForPreTraining(tiny_config("audio"))(tiny_input("audio"), **inputs)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_images_and_video_take_no_attention_mask(tiny_config, tiny_tokenizer_config, tiny_input, modality):
    models = [
        BridleModel(tiny_config(modality)),
        BridleForPreTraining(tiny_config(modality)),
        BridleTokenizerModel(tiny_tokenizer_config(modality)),
    ]
    for model in models:
        with pytest.raises(ValueError, match="attention_mask"):
            model(tiny_input(modality), attention_mask=torch.ones(2, 16))


@torch.no_grad()
def test_a_stored_table_of_positions_refuses_another_grid(tiny_config):
    model = BridleModel(tiny_config("audio", position_embedding_type="table")).eval()
    assert model(torch.randn(1, 40, 64)).last_hidden_state.shape == (1, 13, 48)
    assert "embeddings.positions.table" in model.state_dict()
    with pytest.raises(ValueError, match="sincos"):
        model(torch.randn(1, 97, 64))
