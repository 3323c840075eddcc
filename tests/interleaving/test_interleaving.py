"""The schedule against closed forms; and what each kind of phase moves, leaves alone, counts and refuses."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from benchmarks.steps import Waits
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf import BridleConfig, teacher_features
from bridle_hf.common.errors import MAX_SKIPPED_IN_A_ROW, NonFiniteError
from bridle_hf.data.masked_loader import MaskedLoader
from bridle_hf.data.sample import Sample
from bridle_hf.encoder_bridle import BridleDropPath, BridleLayer
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.masking_bridle import draw_share, random_mask
from bridle_hf.patching_bridle import patch_attention_mask, patchify


# The schedule


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["encoder", "tokenizer", "alternate", "joint"]), st.integers(1, 50)),
        min_size=1,
        max_size=6,
    )
)
def test_phases_follow_each_other_without_gap_or_overlap(entries):
    schedule = Schedule([{"train": kind, "steps": steps} for kind, steps in entries], steps_per_epoch=7.5)
    numbers = [schedule.phase_number(step) for step in range(schedule.total_steps)]
    assert numbers == [number for number, (_, steps) in enumerate(entries) for _ in range(steps)]
    distilled = 0
    for number, (kind, _) in enumerate(entries):
        distilled += kind != "encoder"
        assert schedule.iteration(number) == distilled
    for step in (-1, schedule.total_steps):
        with pytest.raises(ValueError, match="outside"):
            schedule.phase_number(step)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 500), st.floats(0.1, 3000), st.floats(0.01, 2))
def test_epochs_become_steps(epochs, per_epoch, scale):
    entries = [
        {"train": "encoder", "epochs": epochs, "warmup_epochs": epochs / 4},
        {"train": "tokenizer", "steps": 100},
    ]
    schedule = Schedule(entries, per_epoch, scale)
    assert schedule.lengths == [max(1, round(epochs * per_epoch * scale)), max(1, round(100 * scale))]
    assert schedule.warmups == [round(epochs / 4 * per_epoch * scale), 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(0, 80), st.floats(1e-6, 1.0))
def test_learning_rate_is_linear_then_a_cosine(steps, warmup, rate):
    entry = {"train": "joint", "steps": steps, "warmup_steps": warmup, "learning_rate": rate}
    entry["tokenizer_learning_rate"] = rate / 3
    schedule = Schedule([{"train": "encoder", "steps": 4}, entry], 1.0)
    warmup = min(warmup, steps)
    for offset in range(steps):
        encoder, tokenizer = schedule.learning_rates(4 + offset)
        if offset < warmup:
            expected = rate * (offset + 1) / warmup
        else:
            expected = rate * math.cos(math.pi / 2 * (offset - warmup) / (steps - warmup)) ** 2
        assert math.isclose(encoder, expected, rel_tol=1e-9, abs_tol=1e-15)
        assert math.isclose(tokenizer, expected / 3, rel_tol=1e-9, abs_tol=1e-15)


def test_the_rate_of_a_tokenizer_phase_is_its_own():
    schedule = Schedule(
        [{"train": "tokenizer", "steps": 4, "learning_rate": 0.1, "tokenizer_learning_rate": 9.0}], 1.0
    )
    assert schedule.learning_rates(0)[1] == 0.1


def test_sides():
    def sides(**entry):
        schedule = Schedule([{"steps": 3, "train": "encoder"}, {"steps": 8, **entry}], 1.0)
        return ["".join(name for name, on in zip("ET", schedule.sides(3 + step)) if on) for step in range(8)]

    assert sides(train="encoder") == ["E"] * 8
    assert sides(train="tokenizer") == ["T"] * 8
    assert sides(train="alternate", switch_every=3) == ["E", "E", "E", "T", "T", "T", "E", "E"]
    assert sides(train="joint", tokenizer_every=4) == ["ET", "E", "E", "E", "ET", "E", "E", "E"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"train": "encoder"}, "length"),
        ({"train": "encoder", "steps": 5, "epochs": 1}, "length"),
        ({"train": "decoder", "steps": 5}, "train is 'decoder'"),
        ({"steps": 5}, "train is None"),
        ({"train": "encoder", "step": 5}, "unknown key 'step'; did you mean 'steps'?"),
        ({"train": "encoder", "steps": -5}, "steps is -5"),
        ({"train": "encoder", "steps": True}, "steps is True"),
        ({"train": "encoder", "steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"train": "encoder", "steps": 10**400}, "steps is 1000"),
        ({"train": "encoder", "steps": 5, "learning_rate": "5e-4"}, "learning_rate is '5e-4'"),
        ({"train": "encoder", "steps": 5, "learning_rate": math.nan}, "learning_rate is nan"),
        ({"train": "encoder", "steps": 5, "start": "anew"}, "start is 'anew'"),
        ({"train": "encoder", "steps": 5, "target": "pixels"}, "target is 'pixels'"),
        ({"train": "encoder", "steps": 5, "target": "codes", "start": "continue"}, "start: fresh"),
        ({"train": "tokenizer", "steps": 5, "target": "patches"}, "train an encoder"),
        ({"train": "joint", "steps": 5, "tokenizer_every": 0}, "tokenizer_every"),
    ],
    ids=str,
)
def test_wrong_phases_are_refused(entry, expected):
    with pytest.raises(ValueError, match=r"phases\[1\]: ") as caught:
        Schedule([{"train": "encoder", "steps": 1}, entry], 1.0)
    assert expected in str(caught.value)


def test_an_empty_schedule_is_refused():
    with pytest.raises(ValueError, match="phases"):
        Schedule([], 1.0)


# Steps


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def build(accelerator, tiny_config, tiny_tokenizer_config):
    """`build(phases, tokenizer_fields, **options)`: an `Interleaving` on tiny models."""

    def make(phases, tokenizer=None, encoder=None, **options) -> Interleaving:
        configs = tiny_config("audio", **(encoder or {})), tiny_tokenizer_config("audio", **(tokenizer or {}))
        schedule = Schedule(phases, 1.0, kmeans=configs[1].tokenizer_type == "kmeans")
        return Interleaving(accelerator, schedule, *configs, seed=0, **options)

    return make


def make_batch(number: int, size: int = 6, padded: bool = True) -> dict:
    """Clips of different lengths, each with its own number of hidden patches. Grid (6, 4)."""
    generator = torch.Generator().manual_seed(number)
    lengths = [96, 40, 64, 96, 33, 17][:size] if padded else [96] * size
    mask = torch.stack([(torch.arange(96) < length).long() for length in lengths])
    hidden = []
    for index, length in enumerate(lengths):
        steps = -(-length // 16)
        part = random_mask((steps, 4), 0.5 + 0.05 * index, generator)
        hidden.append(torch.cat([part, torch.zeros(24 - len(part), dtype=torch.bool)]))
    values = torch.randn(size, 96, 64, generator=generator)
    return {"input_values": values, "attention_mask": mask, "bool_masked_pos": torch.stack(hidden)}


def peek():
    return (make_batch(100 + number) for number in range(1000))


def train(run: Interleaving, first: int = 0, last: int | None = None, batch=make_batch) -> list[dict]:
    """Steps `first` to `last` of the schedule; phases are entered on the way."""
    metrics = []
    for step in range(first, run.schedule.total_steps if last is None else last):
        number = run.schedule.phase_number(step)
        if step == run.schedule.starts[number]:
            run.enter_phase(number, peek)
        elif run.schedule.fits(step):
            run.fit_tokenizer(step, peek)
        metrics.append(run.step(step, batch(step)))
    return metrics


def tensors(run: Interleaving) -> dict[str, torch.Tensor]:
    state = run.state_dict()
    return {
        f"{side}.{name}": tensor.clone() for side in ("encoder", "tokenizer") for name, tensor in state[side].items()
    }


def assert_same_weights(ours: dict, theirs: dict, **tolerance) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **(tolerance or {"atol": 0, "rtol": 0}))


def moved(before: dict, after: dict) -> set[str]:
    """Which sides' weights, and whether codebooks, differ in a single bit."""
    found = set()
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            found.add("codebooks" if "quantizer" in name else name.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"train": "encoder"}, [{"encoder"}] * 4),
        ({"train": "tokenizer"}, [{"tokenizer", "codebooks"}] * 4),
        ({"train": "alternate", "switch_every": 2}, [{"encoder"}] * 2 + [{"tokenizer", "codebooks"}] * 2),
        ({"train": "joint", "tokenizer_every": 3},
         [{"encoder", "tokenizer", "codebooks"}, {"encoder"}, {"encoder"}, {"encoder", "tokenizer", "codebooks"}]),
    ],
    ids=lambda value: value.get("train") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_trained_moves_and_what_is_frozen_does_not(build, entry, expected):
    run = build([{"train": "encoder", "steps": 1}, {**entry, "steps": 4, "learning_rate": 1e-3}])
    train(run, last=1)
    run.enter_phase(1, peek)
    before = tensors(run)
    for step, sides in enumerate(expected, start=1):
        metrics = run.step(step, make_batch(step))
        after = tensors(run)
        assert moved(before, after) == sides
        assert {name.split("/")[0] for name in metrics} - {"counts", "usage", "input"} == sides - {"codebooks"}
        before = after


def test_every_weight_that_can_matter_is_trained(build):
    run = build([{"train": "joint", "steps": 2, "tokenizer_every": 1, "learning_rate": 1e-2}])
    run.enter_phase(0, peek)
    before = tensors(run)
    train_steps = [run.step(step, make_batch(step)) for step in range(2)]
    after = tensors(run)
    assert len(train_steps) == 2
    parameters = {f"{side}.{name}" for side in ("encoder", "tokenizer")
                  for name, _ in getattr(run, f"unwrapped_{side}").named_parameters()}  # fmt: skip
    still = {name for name in parameters if torch.equal(before[name], after[name])}
    assert all(name.endswith(("k_proj.bias", "position_bias.3.bias")) for name in still)


def test_biases_that_a_softmax_does_not_see(build):
    """That they are not trained loses nothing: whatever they are, the outputs are the same."""
    run = build([{"train": "joint", "steps": 1}])
    run.enter_phase(0, peek)
    batch = make_batch(0)
    outputs = []
    for shift in (0.0, 3.0):
        for model in (run.unwrapped_encoder, run.unwrapped_tokenizer):
            for name, parameter in model.eval().named_parameters():
                if name.endswith(("k_proj.bias", "position_bias.3.bias")):
                    assert not parameter.requires_grad
                    parameter.data += shift * torch.randn_like(parameter)
        with torch.no_grad():
            latents = run.unwrapped_tokenizer.latents(batch["input_values"], batch["attention_mask"])
            outputs.append((run.unwrapped_encoder(**batch).logits, latents))
    for first, second in zip(*outputs):
        real = patch_attention_mask(batch["attention_mask"], run.encoder_config)
        torch.testing.assert_close(first[real], second[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "joint"])
@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("size", [None, 1, 4])
def test_accumulated_micro_batches_equal_the_whole_batch(build, kind, size, by_length):
    """Clips are padded to different lengths and hide different shares, so that micro batches weigh differently.

    The right loss is the mean over the hidden (real) patches of the whole batch, not the mean of the micro batches'
    means; and the codebooks move once per optimizer step, on all of its latents: were they moved by each forward, the
    later micro batches would meet other codes, and the decay would depend on how the batch is cut.
    """
    entry = {"train": kind, "steps": 3, "learning_rate": 1e-3, "tokenizer_every": 2}
    phases = [{"train": "encoder", "steps": 1}, entry]
    reseeding = {"dead_code_threshold": 0.9}
    whole = build(phases, reseeding, bucket_by_length=False)
    cut = build(phases, reseeding, micro_batch_size=size, bucket_by_length=by_length)
    for expected, found in zip(train(whole), train(cut)):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name.startswith("input/"):
                continue
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, check_dtype=False)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(cut)[name], value, atol=1e-5, rtol=0)


def test_a_decoded_share_weighs_the_same_in_micro_batches(build):
    """Clips have different numbers of decoded patches, of which each counts the same."""
    fields = {"decoder_type": "cross", "decoded_ratio": 0.5, "decoder_encoder_layers": [0]}
    phases = [{"train": "joint", "steps": 3, "tokenizer_every": 2, "learning_rate": 1e-3}]

    def batch(number: int) -> dict:
        made = make_batch(number)
        decoded = draw_share(made["bool_masked_pos"], 0.5, torch.Generator().manual_seed(number))
        return {**made, "bool_decoded_pos": decoded}

    whole = build(phases, encoder=fields, bucket_by_length=False)
    cut = build(phases, encoder=fields, micro_batch_size=2)
    for expected, found in zip(train(whole, batch=batch), train(cut, batch=batch)):
        for name in expected.keys() - {"input/padding", "input/patches"}:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, check_dtype=False)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(cut)[name], value, atol=1e-5, rtol=0)


def test_visible_patches_weigh_the_same_in_micro_batches(build):
    """Clips show different shares: two means, of hidden and of visible patches, each over the whole batch."""
    phases = [{"train": "joint", "steps": 3, "tokenizer_every": 2, "learning_rate": 1e-4}]
    fields = {"visible_loss_weight": 0.5}
    whole, cut = build(phases, encoder=fields), build(phases, encoder=fields, micro_batch_size=2)
    for expected, found in zip(train(whole), train(cut)):
        assert expected.keys() == found.keys() and "encoder/visible_loss" in found
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, check_dtype=False)


def several_masks(batch: dict, count: int) -> dict:
    """The batch with `count` masks of each sample, which hide as many patches as its own."""
    real = patch_attention_mask(batch["attention_mask"], BridleConfig(num_mel_bins=64))
    generator = torch.Generator().manual_seed(7)
    scores = torch.rand(len(real), count, 24, generator=generator).masked_fill(~real[:, None], -1.0)
    ranks = scores.argsort(dim=2, descending=True).argsort(dim=2)
    return {**batch, "bool_masked_pos": ranks < batch["bool_masked_pos"].sum(dim=1)[:, None, None]}


def test_a_step_of_several_masks_is_the_mean_of_steps_of_one(build):
    """The loss, and the gradient by its norm; the sample is tokenized once."""
    batch = several_masks(make_batch(1), 4)
    singles = [{**batch, "bool_masked_pos": batch["bool_masked_pos"][:, number]} for number in range(4)]
    metrics = []
    for each in [batch, *singles]:
        run = build([{"train": "encoder", "steps": 1}], encoder={"decoder_type": "cross"})
        run.enter_phase(0, peek)
        gradients = {}

        def note(optimizer, *args, gradients=gradients, run=run):
            named = run.unwrapped_encoder.named_parameters()
            gradients |= {name: p.grad.clone() for name, p in named if p.grad is not None}

        run.optimizers["encoder"].register_step_pre_hook(note)
        metrics.append({**run.step(0, each), "gradients": gradients})
    together, apart = metrics[0], metrics[1:]
    for name in ("encoder/loss", "encoder/accuracy"):
        torch.testing.assert_close(together[name], sum(one[name] for one in apart) / 4, atol=1e-6, rtol=0)
    for name, gradient in together["gradients"].items():
        mean = sum(one["gradients"][name] for one in apart) / 4
        torch.testing.assert_close(gradient, mean, atol=1e-6, rtol=1e-4)
    assert torch.equal(together["counts"], apart[0]["counts"])


@pytest.mark.parametrize("kind", ["encoder", "joint"])
def test_several_masks_in_micro_batches(build, kind):
    """A row keeps its fate in stochastic depth, whichever micro batch its sample stands in."""
    phases = [{"train": kind, "steps": 3, "tokenizer_every": 2, "learning_rate": 1e-4}]
    fields = {"drop_path_rate": 0.5}
    whole = build(phases, fields, fields, bucket_by_length=False)
    cut = build(phases, fields, fields, micro_batch_size=2)
    runs = [train(run, batch=lambda number: several_masks(make_batch(number), 3)) for run in (whole, cut)]
    for expected, found in zip(*runs):
        for name in ("encoder/loss", "encoder/grad_norm"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(cut)[name], value, atol=1e-5, rtol=0)


def test_losses_are_means_over_the_patches_of_the_whole_batch(build):
    run = build([{"train": "joint", "steps": 2, "tokenizer_every": 1}], micro_batch_size=2)
    run.enter_phase(0, peek)
    batch = make_batch(3)
    codes = run.unwrapped_tokenizer.encode(batch["input_values"], batch["attention_mask"])
    run.seed_step(0)
    encoder = copy.deepcopy(run.unwrapped_encoder).train()
    logits = encoder(**batch).logits[batch["bool_masked_pos"]]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes[batch["bool_masked_pos"]].flatten())
    teacher = teacher_features(run.unwrapped_encoder.bridle.eval(), batch["input_values"], batch["attention_mask"])
    tokenizer = copy.deepcopy(run.unwrapped_tokenizer).eval()
    estimate = tokenizer(**{name: batch[name] for name in ("input_values", "attention_mask")},
                         teacher_hidden_states=teacher).estimate  # fmt: skip
    real = patch_attention_mask(batch["attention_mask"], run.encoder_config)
    cosine = 1 - torch.nn.functional.cosine_similarity(teacher, estimate, dim=-1)[real].mean()
    metrics = run.step(0, batch)
    torch.testing.assert_close(metrics["encoder/loss"], expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["tokenizer/cosine_loss"], cosine.detach(), atol=1e-5, rtol=0)
    assert int(metrics["counts"].sum()) == 3 * int(real.sum())


def test_weight_decay_is_on_matrices_alone(build):
    run = build([{"train": "joint", "steps": 1}], weight_decay=0.1, adam_betas=[0.8, 0.7])
    run.enter_phase(0, peek)
    for side in ("encoder", "tokenizer"):
        groups = run.optimizers[side].param_groups
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        assert {group["betas"] for group in groups} == {(0.8, 0.7)}
        for name, parameter in getattr(run, f"unwrapped_{side}").named_parameters():
            if parameter.requires_grad:
                assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0), name


def test_weight_of_the_tokenizer_in_joint(build):
    """AdamW hides the scale of a gradient; its norm shows it."""
    norms = {}
    for weight in (0.2, 1.0):
        run = build([{"train": "joint", "steps": 1, "tokenizer_loss_weight": weight}])
        (metrics,) = train(run)
        norms[weight] = metrics["tokenizer/grad_norm"], metrics["encoder/grad_norm"], metrics["tokenizer/loss"]
    torch.testing.assert_close(norms[0.2][0], 0.2 * norms[1.0][0], rtol=1e-4, atol=0)
    assert torch.equal(norms[0.2][1], norms[1.0][1]) and torch.equal(norms[0.2][2], norms[1.0][2])


def test_gradients_are_clipped_side_by_side(build):
    run = build([{"train": "joint", "steps": 1}], max_grad_norm=1e-3)
    run.enter_phase(0, peek)
    seen = {}
    for side, optimizer in run.optimizers.items():

        def note(*args, side=side, groups=optimizer.param_groups):
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            seen[side] = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())

        optimizer.register_step_pre_hook(note)
    run.step(0, make_batch(0))
    assert seen.keys() == {"encoder", "tokenizer"} and all(abs(norm - 1e-3) < 1e-5 for norm in seen.values())


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "joint"])
def test_kmeans_comes_before_the_first_step(build, kind):
    run = build([{"train": kind, "steps": 1}])
    run.enter_phase(0, peek)
    quantizer = run.unwrapped_tokenizer.quantizer
    assert bool(quantizer.initialized)
    batch = next(iter(peek()))
    output = run.unwrapped_tokenizer.eval()(batch["input_values"], batch["attention_mask"])
    # Codes drawn at random leave more than they take away; those of k-means do not.
    assert float(output.usage.quantization_error[-1]) < 0.7 and float(output.usage.used_fraction.min()) > 0.7


def test_kmeans_does_not_depend_on_micro_batches(build):
    cuts = [{"bucket_by_length": False}, {"bucket_by_length": False, "micro_batch_size": 4}, {"micro_batch_size": 4}]
    runs = [build([{"train": "tokenizer", "steps": 1}], **cut) for cut in cuts]
    for run in runs:
        run.enter_phase(0, peek)
    first, *others = (run.unwrapped_tokenizer.quantizer.codebooks for run in runs)
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-5, rtol=0)


def test_what_starts_fresh_and_what_continues(build):
    phases = [{"train": "joint", "steps": 2}, {"train": "encoder", "steps": 1}, {"train": "tokenizer", "steps": 1},
              {"train": "encoder", "steps": 1}]  # fmt: skip
    phases[3]["start"] = "continue"
    run = build(phases)
    train(run, last=2)
    joint = tensors(run)
    run.enter_phase(1, peek)
    assert moved(joint, tensors(run)) == {"encoder"}
    train_step = run.step(2, make_batch(2))
    assert "encoder/loss" in train_step
    encoder = tensors(run)
    run.enter_phase(2, peek)
    assert moved(encoder, tensors(run)) == {"tokenizer", "codebooks"}
    run.step(3, make_batch(3))
    both = tensors(run)
    run.enter_phase(3, peek)
    assert moved(both, tensors(run)) == set()


def test_soft_codes_are_the_targets(build):
    run = build([{"train": "encoder", "steps": 1}], {"num_soft_codes": 3})
    run.enter_phase(0, peek)
    batch = make_batch(0)
    codes = run.unwrapped_tokenizer.encode(batch["input_values"], batch["attention_mask"], soft=True)
    assert codes.shape == (6, 24, 3, 3)
    run.seed_step(0)
    hidden = batch["bool_masked_pos"]
    logits = copy.deepcopy(run.unwrapped_encoder).train()(**batch).logits[hidden].log_softmax(dim=-1)
    expected = -logits.gather(-1, codes[hidden]).mean()
    torch.testing.assert_close(run.step(0, batch)["encoder/loss"], expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [None, [0, 1, 2], [-1]])
def test_layers_that_teach(build, layers):
    run = build([{"train": "tokenizer", "steps": 1}], {"teacher_layers": layers})
    run.enter_phase(0, peek)
    batch = make_batch(0, padded=False)
    with torch.no_grad():
        states = run.unwrapped_encoder.bridle.eval()(batch["input_values"], output_hidden_states=True)
        if layers is None:
            teacher = states.last_hidden_state[:, 1:]
        else:
            chosen = [states.hidden_states[layer][:, 1:] for layer in layers]
            standard = [(h - h.mean(-1, keepdim=True)) / h.std(-1, unbiased=False, keepdim=True) for h in chosen]
            teacher = torch.stack(standard).mean(dim=0)
        tokenizer = copy.deepcopy(run.unwrapped_tokenizer).eval()
        expected = tokenizer(batch["input_values"], teacher_hidden_states=teacher).cosine_loss
    torch.testing.assert_close(run.step(0, batch)["tokenizer/cosine_loss"], expected, atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_nothing(build):
    """With drop path: in `joint`, the layers run again after the encoder has taught in eval mode."""
    phases = [{"train": "joint", "steps": 3, "tokenizer_every": 1, "learning_rate": 1e-3}]
    runs = [build(phases, encoder={"drop_path_rate": 0.5}, gradient_checkpointing=on) for on in (False, True)]
    first, second = (train(run) for run in runs)
    for expected, found in zip(first, second):
        torch.testing.assert_close(found["encoder/grad_norm"], expected["encoder/grad_norm"], rtol=1e-5, atol=0)
    assert moved(tensors(runs[0]), tensors(runs[1])) == set()


@pytest.mark.parametrize("decoder", [{}, {"decoder_type": "plain"}, {"decoder_type": "cross", "decoded_ratio": 0.5}])
@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "joint"])
def test_a_host_waits_for_its_device_once_in_a_step(build, kind, decoder):
    """To know whether the gradient is finite: however many micro batches, where clips are not padded."""
    phases = [{"train": "encoder", "steps": 1}, {"train": kind, "steps": 2, "tokenizer_every": 1}]
    run = build(phases, encoder=decoder, micro_batch_size=2)
    masks = torch.stack([random_mask((6, 4), 0.8) for _ in range(6)])
    batch = {"input_values": make_batch(0)["input_values"], "bool_masked_pos": masks}
    if "decoded_ratio" in decoder:
        batch["bool_decoded_pos"] = draw_share(masks, 0.5)
    train(run, last=1, batch=lambda step: batch)
    run.enter_phase(1, peek)
    with Waits() as waits:
        run.step(1, batch)
    assert waits.count == 1


@pytest.mark.slow
def test_compiled_layers_change_nothing(build, monkeypatch):
    """But rounding. Traced and differentiated as for any backend; the kernels are those of eager."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    phases = [{"train": "joint", "steps": 2, "tokenizer_every": 1, "learning_rate": 1e-3}]
    eager, compiled = build(phases), build(phases, compile_layers=True)
    for expected, found in zip(train(eager), train(compiled)):
        for name in ("encoder/loss", "tokenizer/loss", "encoder/grad_norm", "tokenizer/grad_norm"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    layers = [module for module in compiled.unwrapped_encoder.modules() if isinstance(module, BridleLayer)]
    assert layers and all(layer._compiled_call_impl is not None for layer in layers)
    assert tensors(compiled).keys() == tensors(eager).keys()


def test_stochastic_depth_does_not_depend_on_micro_batches(build):
    """A sample loses the same layers, whichever part of the batch it stands in; and others lose others."""
    phases = [{"train": "joint", "steps": 3, "tokenizer_every": 1, "learning_rate": 1e-3}]
    fields = {"drop_path_rate": 0.5}
    whole = build(phases, fields, fields, bucket_by_length=False)
    cut = build(phases, fields, fields, micro_batch_size=2)
    for expected, found in zip(train(whole), train(cut)):
        for name in ("encoder/loss", "tokenizer/loss"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(cut)[name], value, atol=1e-5, rtol=0)

    drop_path = BridleDropPath(0.5).train()
    torch.manual_seed(0)
    kept = drop_path(torch.ones(64, 3, 2))
    assert 0 < int((kept == 0).all(dim=(1, 2)).sum()) < 64 and set(kept.unique().tolist()) == {0.0, 2.0}
    for first in range(3):
        torch.manual_seed(0)
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(first))[:16]
        drop_path.rows = rows, 64
        assert torch.equal(drop_path(torch.ones(16, 3, 2)), kept[rows])


# Half precision


def test_codes_are_those_of_float32_under_autocast(build):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    run = build([{"train": "joint", "steps": 2, "tokenizer_every": 1, "learning_rate": 1e-3}])
    run.accelerator = accelerator
    run.enter_phase(0, peek)
    quantizer, found = run.unwrapped_tokenizer.quantizer, []
    nearest = quantizer._nearest

    def note(q, vectors, count):
        codes = nearest(q, vectors, count)
        exact = torch.cdist(vectors.double(), quantizer.codebooks[q].double())
        # As near as the nearest, up to float32's rounding: half precision is off by 1e-2.
        excess = exact.gather(1, codes) ** 2 - exact.min(dim=1, keepdim=True).values ** 2
        found.append((vectors.dtype, torch.is_autocast_enabled("cpu"), float(excess.max())))
        return codes

    quantizer._nearest = note
    linear = run.unwrapped_encoder.bridle.layers[0].mlp.fc1
    inner = []
    linear.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    metrics = [run.step(step, make_batch(step)) for step in range(2)]
    assert set(inner) == {torch.bfloat16}
    assert len(found) > 6 and all(dtype == torch.float32 and not half for dtype, half, _ in found)
    assert max(excess for *_, excess in found) < 1e-5
    assert all(bool(torch.isfinite(value).all()) for row in metrics for value in row.values())
    for tensor in tensors(run).values():
        assert tensor.dtype in (torch.float32, torch.bool)


@pytest.fixture
def scaled(build):
    """An `Interleaving` whose loss is scaled, as in fp16; the arithmetic stays in float32."""

    def make(phases, scale, growth_interval=2000, **options):
        run = build(phases, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
        run.accelerator.scaler = scaler
        return run

    return make


def test_scaling_the_loss_changes_nothing(build, scaled):
    """Both sides' gradients are scaled back once, before they are clipped."""
    phases = [{"train": "joint", "steps": 4, "tokenizer_every": 2, "learning_rate": 1e-3}]
    plain = build(phases, max_grad_norm=0.1)
    expected = train(plain)
    run = scaled(phases, 2.0**12, max_grad_norm=0.1)
    for first, second in zip(expected, train(run)):
        for name in first:
            torch.testing.assert_close(second[name], first[name], atol=1e-5, rtol=1e-5, check_dtype=False)
    for name, value in tensors(plain).items():
        torch.testing.assert_close(tensors(run)[name], value, atol=1e-5, rtol=0)


def test_a_scale_that_overflows_is_lowered_and_the_step_skipped(scaled):
    run = scaled([{"train": "joint", "steps": 9, "tokenizer_every": 1, "learning_rate": 1e-3}], 2.0**127)
    run.enter_phase(0, peek)
    before = tensors(run)
    assert run.step(0, make_batch(0)) == {} and moved(before, tensors(run)) == set()
    assert run.accelerator.scaler.get_scale() == 2.0**126 and run.skipped_steps == 1
    metrics = [run.step(step, make_batch(step)) for step in range(1, 9)]
    assert metrics[-1] and moved(before, tensors(run)) == {"encoder", "tokenizer", "codebooks"}


def test_the_scale_is_resumed(scaled):
    phases = [{"train": "joint", "steps": 6, "tokenizer_every": 2, "learning_rate": 1e-3}]
    undisturbed = scaled(phases, 2.0**8, growth_interval=2)
    train(undisturbed, last=3)
    state = copy.deepcopy(undisturbed.state_dict())
    saved = json.loads(json.dumps(state["gradient_scaler"]))
    # Doubled once, and halfway to the next time.
    assert (saved["scale"], saved["_growth_tracker"]) == (2.0**9, 1)
    train(undisturbed, 3)
    end = undisturbed.accelerator.scaler.state_dict()
    resumed = scaled(phases, 2.0**8, growth_interval=2)
    resumed.load_state_dict(state, 3)
    train(resumed, 3)
    assert resumed.accelerator.scaler.state_dict() == end != saved
    assert moved(tensors(undisturbed), tensors(resumed)) == set()


# Steps that are not finite


def poison(batch: dict) -> dict:
    batch["input_values"][1] = math.nan
    return batch


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "joint"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_step_that_is_not_finite_touches_nothing(build, kind, micro_batch_size):
    run = build([{"train": kind, "steps": 9, "tokenizer_every": 1}], micro_batch_size=micro_batch_size)
    run.enter_phase(0, peek)
    run.step(0, make_batch(0))
    before, moments = tensors(run), copy.deepcopy(run.state_dict()["optimizers"])
    assert run.step(1, poison(make_batch(1))) == {}
    assert moved(before, tensors(run)) == set()
    for side, state in run.state_dict()["optimizers"].items():
        for number, entries in state["state"].items():
            assert all(torch.equal(value, moments[side]["state"][number][name]) for name, value in entries.items())
    assert (run.skipped_steps, run.skipped_in_a_row) == (1, 1)
    assert run.step(2, make_batch(2))
    assert (run.skipped_steps, run.skipped_in_a_row) == (1, 0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run).values())


def test_a_quantizer_of_ones_own_loop_is_not_poisoned_either(tiny_tokenizer_config):
    from bridle_hf.quantization_bridle import BridleResidualQuantizer

    for fields in ({}, {"ema_update": "direction", "codebook_normalization": "level"}, {"unit_norm_codes": True}):
        quantizer = BridleResidualQuantizer(tiny_tokenizer_config("audio", dead_code_threshold=0.9, **fields)).train()
        quantizer(torch.randn(500, 8))
        before = copy.deepcopy(dict(quantizer.named_buffers()))
        latents = torch.randn(500, 8)
        latents[3, 2] = math.nan
        quantizer(latents)
        assert all(bool(torch.isfinite(buffer).all()) for buffer in quantizer.buffers())
        assert torch.equal(quantizer.cluster_sum[0], before["cluster_sum"][0]) or fields
        quantizer(torch.full((500, 8), math.inf))
        assert all(bool(torch.isfinite(buffer).all()) for buffer in quantizer.buffers())


def test_twenty_in_a_row_stop_the_run(build):
    run = build([{"train": "encoder", "steps": 50}])
    run.enter_phase(0, peek)
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        assert run.step(step, poison(make_batch(step))) == {}
    with pytest.raises(NonFiniteError, match="20 steps in a row"):
        run.step(19, poison(make_batch(19)))


# State


TRAINED = [{"train": "encoder", "steps": 1}, {"train": "tokenizer", "steps": 2}, {"train": "joint", "steps": 2}]
FITTED = [{"train": "encoder", "steps": 2},
          {"train": "alternate", "steps": 5, "switch_every": 2, "learning_rate": 1e-2}]  # fmt: skip
KMEANS = {"tokenizer_type": "kmeans", "teacher_layers": [1, 2]}


@pytest.mark.parametrize(
    ("phases", "options"),
    [
        pytest.param(TRAINED, {}, id="trained", marks=pytest.mark.slow),
        pytest.param(TRAINED, {"encoder_ema": 0.9}, id="averaged", marks=pytest.mark.slow),
        pytest.param(FITTED, {"tokenizer": KMEANS, "encoder_ema": 0.9}, id="fitted"),
        pytest.param(TRAINED, {"levels_join_at": 1e-3}, id="levels"),
    ],
)
def test_a_state_resumes_bit_equal_at_every_step(build, phases, options):
    """In the middle of phases and between them, whatever was trained before."""
    undisturbed = build(phases, **options)
    states = []
    for step in range(undisturbed.schedule.total_steps):
        train(undisturbed, step, step + 1)
        states.append(copy.deepcopy(undisturbed.state_dict()))
    for done, state in enumerate(states, start=1):
        resumed = build(phases, **options)
        resumed.load_state_dict(state, done)
        train(resumed, done)
        assert moved(tensors(undisturbed), tensors(resumed)) == set(), done
        for ours, theirs in zip(undisturbed.whole_models(), resumed.whole_models()):
            assert_same_weights(ours.state_dict(), theirs.state_dict())


def whole(batch: dict[str, torch.Tensor]) -> SimpleNamespace:
    """A batch as its only micro batch."""
    return SimpleNamespace(inputs=batch["input_values"], attention_mask=batch.get("attention_mask"))


@pytest.mark.parametrize("size", [None, 1, 4])
def test_a_centred_teacher_has_no_mean_at_any_position(build, size):
    """Over the batches that its phase begins with, padding left out, however they are cut."""
    phases = [{"train": "encoder", "steps": 1}, {"train": "tokenizer", "steps": 2, "learning_rate": 1e-3}]
    run = build(phases, tokenizer={"center_teacher": True}, micro_batch_size=size)
    run.schedule.steps_per_epoch = 3.0
    train(run, last=2)
    total = count = 0
    for batch in itertools.islice(peek(), 3):
        mask = patch_attention_mask(batch["attention_mask"], run.encoder_config).float()[:, :, None]
        total = total + (run._teacher(whole(batch)) * mask).sum(dim=0)
        count = count + mask.sum(dim=0)
    torch.testing.assert_close(total / count, torch.zeros_like(total), atol=1e-5, rtol=0)
    raw = teacher_features(run.encoder.bridle.eval(), make_batch(100)["input_values"])
    assert raw.mean(dim=0).abs().max() > 0.1, "without it, there is one"
    resumed = build(phases, tokenizer={"center_teacher": True}, micro_batch_size=size)
    resumed.load_state_dict(copy.deepcopy(run.state_dict()), 2)
    assert moved(tensors(run), tensors(resumed)) == set()
    for one in (run, resumed):
        one.step(2, make_batch(2))
    assert moved(tensors(run), tensors(resumed)) == set()


def test_what_the_encoder_regresses(build):
    """Patches, normalised or raw, or what the tokenizer would quantize; a run goes from one target to the next."""
    phases = [{"train": "encoder", "steps": 1, "target": target} for target in ("codes", "patches", "features")]
    run = build(phases, tokenizer={"normalize_target_patches": False}, encoder={"target_feature_size": 8})
    batch = make_batch(0, padded=False)
    patches, _ = patchify(batch["input_values"], run.encoder_config)
    for step, phase in enumerate(phases):
        (metrics,) = train(run, step, step + 1, lambda step: batch)
        assert ("encoder/accuracy" in metrics, "counts" in metrics) == (phase["target"] == "codes",) * 2
        labels, _ = run._labels(batch, whole(batch))
        expected = {"patches": patches, "features": run.tokenizer.latents(batch["input_values"])}
        if phase["target"] != "codes":
            torch.testing.assert_close(labels, expected[phase["target"]])
        resumed = build(phases, tokenizer={"normalize_target_patches": False}, encoder={"target_feature_size": 8})
        resumed.load_state_dict(copy.deepcopy(run.state_dict()), step + 1)
        assert moved(tensors(run), tensors(resumed)) == set()
    run.tokenizer_config.normalize_target_patches = True
    run.enter_phase(1, peek)
    normalised, _ = run._labels(batch, whole(batch))
    torch.testing.assert_close(normalised.mean(dim=-1), torch.zeros(normalised.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(dim=-1, correction=0), torch.ones(normalised.shape[:2]))


def test_patches_are_cut_once_by_the_encoder_and_once_by_the_tokenizer(build, monkeypatch):
    """In an encoder step, of iteration 0 and of iteration 1; the loader that draws the masks cuts none."""
    cuts = []

    def counted(values, config):
        cuts.append(config.model_type)
        return patchify(values, config)

    for module in ("patching_bridle", "modeling_bridle_tokenizer"):
        monkeypatch.setattr(f"bridle_hf.{module}.patchify", counted)
    phases = [{"train": kind, "steps": 1} for kind in ("encoder", "tokenizer", "encoder")]
    run = build(phases, bucket_by_length=False)
    for step in range(3):
        run.enter_phase(step, peek)
        cuts.clear()
        run.step(step, make_batch(step))
        if step != 1:
            assert sorted(cuts) == ["bridle", "bridle_tokenizer"]
    cuts.clear()
    loaded = {name: value[0] for name, value in make_batch(0).items() if name != "bool_masked_pos"}
    load = MaskedLoader(lambda sample, rng: loaded, run.encoder_config, {})
    assert load(Sample("a.wav"), np.random.default_rng(0))["bool_masked_pos"].shape == (24,) and not cuts


# Options of the method


@pytest.mark.parametrize("kind", ["encoder", "joint", "alternate"])
def test_the_average_is_that_of_the_weights_and_what_a_phase_leaves(build, kind):
    """Against the recurrence in float64; it teaches, from within the phase on, and the next phase begins with it."""
    phases = [
        {"train": kind, "steps": 12, "learning_rate": 1e-2, "switch_every": 5},
        {"train": "tokenizer", "steps": 1},
    ]
    run, plain = build(phases, encoder_ema=0.4), build(phases)
    run.enter_phase(0, peek)
    expected = {name: value.detach().double() for name, value in run.unwrapped_encoder.named_parameters()}
    for step in range(12):
        run.step(step, make_batch(step))
        decay = min(0.4, (1 + step) / (10 + step)) if run.schedule.sides(step)[0] else 1.0
        for name, value in run.unwrapped_encoder.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    left = run.whole_models()[0]
    assert_same_weights(dict(left.named_parameters()), expected, atol=1e-6, rtol=0, check_dtype=False)
    assert moved(
        tensors(run),
        {f"encoder.{name}": value for name, value in left.state_dict().items()}
        | {name: value for name, value in tensors(run).items() if name.startswith("tokenizer")},
    ) == {"encoder"}
    batch = make_batch(3)
    teacher = teacher_features(left.bridle, batch["input_values"], batch["attention_mask"])
    torch.testing.assert_close(run._teacher(whole(batch)), teacher)
    run.enter_phase(1, peek)
    assert_same_weights(run.unwrapped_encoder.state_dict(), left.state_dict())
    assert "average" not in run.state_dict() and not any(value.requires_grad for value in left.parameters())
    if kind == "encoder":  # what is trained is none the wiser
        train(plain, last=12)
        again = build(phases, encoder_ema=0.4)
        train(again, last=12)
        assert moved(tensors(plain), tensors(again)) == set()


@torch.no_grad()
def test_kmeans_codes_are_the_nearest_to_standardised_features(build):
    """Of the encoder before, fitted anew in `alternate` to the one that is trained; level by level, in float64."""
    run = build(FITTED, tokenizer=KMEANS, micro_batch_size=4)
    batch, states = make_batch(100), []
    real = patch_attention_mask(batch["attention_mask"], run.encoder_config)
    for step in range(7):
        before = copy.deepcopy(run.unwrapped_encoder.bridle)
        with torch.enable_grad():
            train(run, step, step + 1)
        tokenizer = run.unwrapped_tokenizer
        states.append({name: value.clone() for name, value in tokenizer.state_dict().items()})
        assert tokenizer.config.tokenizer_type == ("kmeans" if step > 1 else "random_projection")
        if not run.schedule.fits(step):
            continue
        features = teacher_features(before.eval(), batch["input_values"], batch["attention_mask"], [1, 2])[real]
        standardisation = tokenizer.standardization
        left = ((features - standardisation.mean) / standardisation.deviation).double()
        torch.testing.assert_close(left.std(dim=0).mean(), torch.tensor(1.0).double(), atol=0.15, rtol=0)
        codes = tokenizer.encode(batch["input_values"], batch["attention_mask"])[real]
        left = torch.nn.functional.normalize(left, dim=1)  # `codebook_normalization` is that of all tokenizers
        energy = left.square().sum()
        for level, codebook in enumerate(tokenizer.quantizer.codebooks.double()):
            nearest = torch.cdist(left, codebook).argmin(dim=1)
            assert (nearest == codes[:, level]).float().mean() > 0.99
            left = left - codebook[codes[:, level]]
        assert left.square().sum() < 0.8 * energy
    same = [all(torch.equal(old[name], new[name]) for name in old) for old, new in itertools.pairwise(states[2:])]
    assert same == [True, False, True, False], "fitted before steps 2, 4 and 6"


@pytest.mark.parametrize(
    "phases",
    [[{"train": "encoder", "steps": 1}, {"train": "tokenizer", "steps": 1}], [{"train": "alternate", "steps": 1}]],
)
def test_what_kmeans_cannot_do_is_refused(phases):
    with pytest.raises(ValueError, match=r"phases\[\d\]: train is .* kmeans"):
        Schedule(phases, 1.0, kmeans=True)


@pytest.mark.parametrize("given", [None, [1.0, 0.5, 0.25]], ids=str)
def test_a_level_joins_once_the_one_before_is_predictable(build, given):
    """The loss is that of a model whose weights are 0 from there on; a fresh encoder begins with one level."""
    phases = [{"train": "encoder", "steps": 20, "learning_rate": 1e-2}] * 2
    run = build(phases, encoder={"codebook_loss_weights": given}, levels_join_at=0.08, micro_batch_size=4)
    weights, levels, average, seen = given or [1.0] * 3, 1, 0.0, []
    for step in range(40):
        if step in (0, 20):
            run.enter_phase(step // 20, peek)
            levels, average = 1, 0.0
        masked = [*weights[:levels], *[0.0] * (3 - levels)]
        before = copy.deepcopy(run.unwrapped_encoder.state_dict())
        plain = build(phases, encoder={"codebook_loss_weights": masked})
        batch = make_batch(0)
        plain.encoder.load_state_dict(before)
        labels, _ = run._labels(batch, whole(batch))
        plain.seed_step(step)
        expected = plain.encoder.train()(**batch, labels=labels)
        found = run.step(step, batch)
        torch.testing.assert_close(found["encoder/loss"], expected.loss, atol=1e-5, rtol=1e-5)
        assert found["encoder/levels"] == levels
        seen.append(levels)
        average += 0.1 * (float(found["encoder/accuracy"][levels - 1]) - average)
        if average >= 0.08 and levels < 3:
            levels, average = levels + 1, 0.0
    assert seen[0] == seen[20] == 1 and seen[19] > 1
