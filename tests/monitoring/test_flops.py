"""FLOPs from the configs against those that torch counts in the steps themselves."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridle_hf import BridleConfig, BridleTokenizerConfig, encoder_bridle
from bridle_hf.commands import main
from bridle_hf.common.arguments import make_arguments
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.masking_bridle import draw_share, make_mask
from bridle_hf.monitoring.flops import (
    ScheduleFlops,
    find_peak,
    measure_peak,
    num_visible_patches,
    warn_of_slow_precision,
)
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs as make_configs_of


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
CODES = {"num_codebooks": 3, "codebook_size": 8}
TOKENIZER = {
    "code_dim": 12, "estimator_hidden_size": 24, "estimator_num_hidden_layers": 2, "estimator_num_attention_heads": 2
}  # fmt: skip
# A grid of (5, 4) patches is padded to whole windows of (4, 4).
INPUTS = {
    "audio": ({"patch_size": 8, "num_mel_bins": 32, "max_length": 40, "decoder_type": "swin"}, (40, 32)),
    "image": ({"patch_size": 8, "image_size": 32, "decoder_type": "plain"}, (3, 32, 32)),
    "video": ({"patch_size": 8, "image_size": 16, "num_frames": 8, "tubelet_size": 2}, (8, 3, 16, 16)),
}
CROSS = {"decoder_type": "cross", "decoded_ratio": 0.5}
DECODERS = [*((modality, {}) for modality in INPUTS), *((modality, CROSS) for modality in INPUTS),
            ("audio", {**CROSS, "decoder_encoder_layers": [0, 2]}), ("audio", {"visible_loss_weight": 0.5}),
            ("image", {**CROSS, "visible_loss_weight": 0.5})]  # fmt: skip
PHASES = [{"train": "encoder", "steps": 2}, {"train": "joint", "steps": 7, "tokenizer_every": 3},
          {"train": "tokenizer", "steps": 3}, {"train": "alternate", "steps": 10, "switch_every": 4},
          {"train": "encoder", "steps": 2}]  # fmt: skip


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def make_configs(modality: str, **decoder) -> tuple[BridleConfig, BridleTokenizerConfig]:
    own, _ = INPUTS[modality]
    shared = {"modality": modality, **SMALL, **CODES}
    shape = {name: value for name, value in own.items() if name != "decoder_type"}
    encoder = BridleConfig(**{**shared, **own, **DECODER, **decoder})
    return encoder, BridleTokenizerConfig(**shared, **shape, **TOKENIZER)


def make_batch(config: BridleConfig, size: int, masks_per_sample: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    masks = [make_mask(config.mask_type, config.patch_grid, config.mask_ratio, generator) for _ in range(size)]
    inputs = torch.randn(size, *INPUTS[config.modality][1], generator=generator)
    masks = torch.stack(masks)
    if masks_per_sample > 1:
        # Each sample's own, and those of others: all hide as many.
        masks = torch.stack([masks.roll(number, dims=0) for number in range(masks_per_sample)], dim=1)
    decoded = draw_share(masks.flatten(0, -2), config.decoded_ratio, generator).view(masks.shape)
    return {INPUT_NAMES[config.modality]: inputs, "bool_masked_pos": masks, "bool_decoded_pos": decoded}


def count(interleaving: Interleaving, step: int, batch: dict[str, torch.Tensor]) -> int:
    """What torch counts in a step; fused attention on a CPU it does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        interleaving.step(step, batch)
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def keep_all(monkeypatch):
    """What the backward makes anew counts once, as with gradient checkpointing."""
    monkeypatch.setattr(encoder_bridle, "made_anew", lambda function, *tensors: function(*tensors))


@pytest.mark.parametrize(
    ("modality", "decoder", "masks_per_sample", "dropout"),
    [(*case, 3, 0.3) for case in DECODERS] + [(modality, {}, 1, 0.0) for modality in INPUTS],
    ids=str,
)
def test_flops_are_those_that_torch_counts(modality, decoder, masks_per_sample, dropout, accelerator):
    """One more sample costs, to the last FLOP, what is computed from the configs: in each phase, for each side."""
    encoder, tokenizer = make_configs(modality, **decoder)
    schedule = Schedule(PHASES, steps_per_epoch=1.0)
    flops = ScheduleFlops(schedule, encoder, tokenizer, {}, masks_per_sample, dropout)
    interleaving = Interleaving(accelerator, schedule, encoder, tokenizer, seed=0)
    seen = set()
    for step in range(schedule.total_steps):
        number = schedule.phase_number(step)
        if step == schedule.starts[number]:
            interleaving.enter_phase(number, lambda: iter([make_batch(encoder, 40)]))
        if (number, schedule.sides(step)) in seen:
            continue
        seen.add((number, schedule.sides(step)))
        batches = [make_batch(encoder, size, masks_per_sample) for size in (2, 3)]
        for batch in batches if dropout else ():
            every = torch.ones(len(batch["bool_masked_pos"]), flops.patches, dtype=torch.bool)
            batch["bool_dropped_pos"] = ~draw_share(every, 1 - dropout)
        fewer, more = (count(interleaving, step, batch) for batch in batches)
        assert flops.of_step(step) == more - fewer, (number, schedule.sides(step))
    assert len(seen) == 7


def test_flops_of_codes_by_kmeans(accelerator):
    encoder, tokenizer = make_configs("image")
    tokenizer = BridleTokenizerConfig.from_dict(tokenizer.to_dict() | {"tokenizer_type": "kmeans"})
    schedule = Schedule([{"train": "encoder", "steps": 1}, {"train": "alternate", "steps": 2}], 1.0, kmeans=True)
    flops = ScheduleFlops(schedule, encoder, tokenizer, {})
    interleaving = Interleaving(accelerator, schedule, encoder, tokenizer, seed=0)
    for step in range(2):
        interleaving.enter_phase(step, lambda: iter([make_batch(encoder, 40)]))
        fewer, more = (count(interleaving, step, make_batch(encoder, size)) for size in (2, 3))
        assert flops.of_step(step) == more - fewer


def test_sums_over_a_schedule():
    schedule = Schedule(PHASES, steps_per_epoch=1.0)
    flops = ScheduleFlops(schedule, *make_configs("image"), masks={})
    of_steps = [flops.of_step(step) for step in range(schedule.total_steps)]
    for number, (start, length) in enumerate(zip(schedule.starts, schedule.lengths)):
        assert math.isclose(flops.of_phases[number], sum(of_steps[start : start + length]) / length)
        # Exact between phases; within one, its steps count as equal.
        assert math.isclose(flops.left(start), sum(of_steps[start:]))
    assert flops.left(schedule.total_steps) == 0
    assert math.isclose(flops.left(1), flops.left(0) - of_steps[0])


def test_masks_of_several_kinds_count_as_the_one_that_shows_most():
    config = BridleConfig(modality="audio", mask_ratio=0.7)
    assert num_visible_patches(config, {}) == num_visible_patches(config, {"random": 1.0}) == math.floor(512 * 0.3)
    # 2 of 8 bands are visible, or 30% of the patches.
    assert num_visible_patches(config, {"mel_band": 1.0}) == 128
    assert num_visible_patches(config, {"mel_band": 1.0, "random": 0.1}) == 153
    assert num_visible_patches(config, {"mel_band": 1.0, "random": 0.0}) == 128


def test_peak_is_given_or_measured():
    device = torch.device("cpu")
    assert find_peak(989.0, device, "bf16") == {"tflops": 989.0, "source": "given"}
    measured = find_peak(None, device, "no")
    assert measured["tflops"] > 0 and "float32 matrices 512 x 512" in measured["source"]
    assert measure_peak(device, 64, torch.bfloat16, seconds=0.0) > 0


@pytest.mark.parametrize(
    ("precision", "speed", "warned"), [("bf16", 0.1, True), ("bf16", 2.0, False), ("no", 0.1, False)]
)
def test_a_precision_that_slows_this_machine_down_is_told_of(precision, speed, warned, monkeypatch, caplog):
    """CPUs without bf16 compute in it through float32."""
    speeds = {torch.float32: 1.0, torch.bfloat16: speed}
    monkeypatch.setattr("bridle_hf.monitoring.flops.measure_peak", lambda device, size, dtype, seconds: speeds[dtype])
    warn_of_slow_precision(precision, torch.device("cpu"))
    assert [record.getMessage().startswith("bf16: this CPU") for record in caplog.records] == [True] * warned


def of_recipe(name: str) -> ScheduleFlops:
    (args,) = make_arguments(PretrainArguments, recipe=name, values={"data": "-", "output_dir": "-"})
    schedule = Schedule(args.phases, 1_000_000 / args.global_batch_size)
    return ScheduleFlops(schedule, *make_configs_of(args), args.masks, args.masks_per_sample)


@pytest.mark.parametrize("modality", INPUTS)
def test_fast_recipes_take_a_third_per_masked_view(modality):
    exact, fast = of_recipe(f"{modality}_base"), of_recipe(f"{modality}_base_fast")
    views = [flops.of_phases[2] / flops.masks_per_sample for flops in (exact, fast)]
    assert views[1] < views[0] / 3
    # As many masked views, of as many optimizer steps.
    steps = [flops.schedule.lengths[2] for flops in (exact, fast)]
    assert math.isclose(*steps, rel_tol=0.01)
    if modality == "audio":
        assert views[1] < 2 * 45e9


def test_command(capsys):
    main("flops", ["audio_base_joint", "--samples", "20480", "--mfu", "0.5"])
    shown = capsys.readouterr().out
    # 200 epochs of 20 steps; ViT-B on 102 of 512 patches, 27 GMAC forward and backward.
    assert "4,000 steps of 1024 samples" in shown and "25% of the steps" in shown
    assert "encoder 53.74, decoder 157, codes 98.12" in shown and "days on 64" in shown
    with pytest.raises(SystemExit) as caught:
        main("flops", ["audio_base_joint", "--samples", "0"])
    assert caught.value.code == 2 and "--samples" in capsys.readouterr().err
