"""Micro batches by length: every sample once, cut to what is real; and a step that is that of the padded batch."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.common.length_buckets import MOST_PADDING
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.micro_batches import micro_batches, sample_order
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.masking_bridle import make_mask


CPU = torch.device("cpu")
SIZES = {"modality": "audio", "max_length": 320, "num_mel_bins": 32, "hidden_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2, "intermediate_size": 32, "num_codebooks": 2, "codebook_size": 8}  # fmt: skip
CONFIG = BridleConfig(**SIZES, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
                      drop_path_rate=0.3)  # fmt: skip


def make_batch(lengths: list[int], masks: int = 1, seed: int = 0) -> dict:
    """Clips of so many frames, on a grid of (20, 2); what lies behind their end is noise, too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> torch.Tensor:
        drawn = [make_mask("random", (-(-length // 16), 2), 0.8, generator, padded_grid=(20, 2)) for _ in range(masks)]
        return drawn[0] if masks == 1 else torch.stack(drawn)

    return {
        "input_values": torch.randn(len(lengths), 320, 32, generator=generator),
        "attention_mask": (torch.arange(320) < torch.tensor(lengths)[:, None]).long(),
        "bool_masked_pos": torch.stack([draw(length) for length in lengths]),
    }


lengths_of_frames = st.lists(st.integers(1, 320), min_size=1, max_size=24)


@given(lengths_of_frames, st.none() | st.integers(1, 12), st.integers(1, 3), st.none() | st.integers(0, 40))
def test_every_sample_once_with_little_padding(lengths, size, masks, wanted):
    """And of each nothing that is real is lost; the parts that are wanted on top are made."""
    batch = make_batch(lengths, masks)
    agree = None if wanted is None else lambda number: min(max(number, wanted), len(lengths))
    parts = list(micro_batches(batch, CONFIG, size, CPU, agree=agree))
    assert sorted(sample for part in parts for sample in part.samples) == list(range(len(lengths)))
    if wanted is not None:
        assert len(parts) >= min(wanted, len(lengths))
    assert sum(map(sum, (part.num_real for part in parts))) >= 0.95 * sum(part.num_patches for part in parts)
    for part in parts:
        patches = part.bool_masked_pos.shape[-1]
        assert part.num_patches == len(part.samples) * patches
        # What is cut further has no more in all.
        assert wanted is not None or sum(part.num_real) >= (1 - MOST_PADDING) * part.num_patches
        assert part.num_patches <= (size or len(lengths)) * 40
        real, visible = part.real(CONFIG), set()
        for row, (sample, number) in enumerate(zip(part.samples, part.num_real)):
            assert number == -(-lengths[sample] // 16) * 2
            assert real is None or (int(real[row].sum()) == number and bool(real[row, :number].all()))
            visible |= set((~part.bool_masked_pos[row, ..., :number]).sum(dim=-1).flatten().tolist())
            own = part.inputs[row, : lengths[sample]]
            assert torch.equal(own, batch["input_values"][sample, : lengths[sample]])
            assert part.attention_mask is not None or not part.inputs[row, lengths[sample] :].any()
            assert torch.equal(part.bool_masked_pos[row], batch["bool_masked_pos"][sample, ..., :patches])
        assert part.num_visible == (visible.pop() if len(visible) == 1 else None)


@given(lengths_of_frames, st.integers(1, 12))
def test_the_order_of_the_samples_is_found_again(lengths, size):
    parts = list(micro_batches(make_batch(lengths), CONFIG, size, CPU))
    rows = torch.tensor([(sample, patch) for part in parts for sample, number in zip(part.samples, part.num_real)
                         for patch in range(number)])  # fmt: skip
    order = sample_order(parts)
    rows = rows if order is None else rows[order]
    assert rows.tolist() == sorted(rows.tolist())


@given(st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_full_length_is_cut_as_without(count, size, with_mask):
    """To the bit, and without a copy."""
    batch = make_batch([320] * count)
    if not with_mask:
        del batch["attention_mask"]
    for part, other in zip(*(micro_batches(batch, CONFIG, size, CPU, by_length) for by_length in (True, False))):
        assert part.samples == other.samples and part.attention_mask is other.attention_mask is None
        assert torch.equal(part.inputs, other.inputs) and torch.equal(part.bool_masked_pos, other.bool_masked_pos)
        assert part.inputs.untyped_storage().data_ptr() == batch["input_values"].untyped_storage().data_ptr()


# A step


@pytest.fixture
def build():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)

    def make(kind: str, decoder: dict, tokenizer: dict, **options) -> Interleaving:
        config = BridleConfig.from_dict(CONFIG.to_dict() | decoder)
        tokenizer_config = BridleTokenizerConfig(
            **SIZES, code_dim=8, estimator_hidden_size=16, estimator_num_hidden_layers=1, drop_path_rate=0.3,
            estimator_num_attention_heads=2, dead_code_threshold=0.9, **tokenizer,
        )  # fmt: skip
        phases = [{"train": kind, "steps": 2, "tokenizer_every": 1, "learning_rate": 1e-4}]
        return Interleaving(accelerator, Schedule(phases, 1.0), config, tokenizer_config, seed=0, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def observed_step(run: Interleaving, batch: dict) -> tuple[dict, dict, list]:
    """Metrics, gradients, and what the codebooks were moved by, in the order that they took it in."""
    gradients, moved_by = {}, []
    quantizer, update = run.unwrapped_tokenizer.quantizer, run.unwrapped_tokenizer.quantizer.update

    def note(optimizer, *args):
        for side in ("encoder", "tokenizer"):
            named = getattr(run, f"unwrapped_{side}").named_parameters()
            gradients.update({f"{side}.{name}": p.grad.clone() for name, p in named if p.grad is not None})

    def note_update(statistics, order):
        order = slice(None) if order is None else order
        rows = (torch.cat([getattr(part, name) for part in statistics])[order] for name in ("latents", "codes"))
        moved_by.extend([*rows, *(sum(getattr(part, name) for part in statistics) for name in ("counts", "sums"))])
        return update(statistics, order)

    hooks = [optimizer.register_step_pre_hook(note) for optimizer in run.optimizers.values()]
    quantizer.update = note_update
    metrics = run.step(0, batch)
    quantizer.update = update
    for hook in hooks:
        hook.remove()
    return metrics, gradients, moved_by


CROSS, REFERENCE = {"decoder_type": "cross", "decoded_ratio": 0.5}, {"codebook_normalization": "level"}


@pytest.mark.parametrize(
    ("size", "masks", "decoder", "tokenizer"),
    [
        (None, 1, {}, {}),
        (3, 1, {"decoder_type": "plain"}, REFERENCE | {"ema_update": "direction"}),
        (3, 3, CROSS, {}),
        (None, 3, {}, REFERENCE),
    ],
)
def test_a_step_by_length_is_the_step_of_the_padded_batch(build, size, masks, decoder, tokenizer):
    """Gradients and codebook statistics; codes to the last one. Samples lose layers, and codes are re-seeded."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 321, (12,), generator=generator).tolist()
    batch = make_batch(lengths, masks)
    if "decoded_ratio" in decoder:
        batch["bool_decoded_pos"] = batch["bool_masked_pos"] & (torch.rand(batch["bool_masked_pos"].shape) < 0.5)
    found = []
    for options in ({"bucket_by_length": False}, {"micro_batch_size": size}):
        run = build("joint", decoder, tokenizer, **options)
        run.enter_phase(0, lambda: (make_batch(lengths, masks, seed) for seed in range(100)))
        found.append([*observed_step(run, batch), run.unwrapped_tokenizer.quantizer.state_dict()])
    (padded, gradients, moved_by, buffers), (cut, own_gradients, own_moved_by, own_buffers) = found
    # Of latents that are not normalised, a mean of micro batches' ratios.
    inexact = {"usage/quantization_error"} if tokenizer else set()
    for name in padded.keys() - {"input/padding", "input/patches"} - inexact:
        torch.testing.assert_close(cut[name], padded[name], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == own_gradients.keys() and len(gradients) > 40
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, atol=1e-5, rtol=0)
    for name, mine, theirs in zip(("latents", "codes", "counts", "sums"), own_moved_by, moved_by, strict=True):
        if name in ("codes", "counts"):
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for name, buffer in buffers.items():
        torch.testing.assert_close(own_buffers[name], buffer, atol=1e-5, rtol=1e-5)
    real = sum(-(-length // 16) for length in lengths)
    assert float(padded["input/padding"]) == pytest.approx(1 - real / (12 * 20)) and padded["input/patches"] == 40
    assert float(cut["input/padding"]) <= MOST_PADDING
    assert float(cut["input/patches"]) == pytest.approx(2 * real / 12 / (1 - float(cut["input/padding"])))
