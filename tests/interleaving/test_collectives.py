"""Exchanges between processes in a step: as many for a deep model as for a shallow one, in two processes or twelve."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.forks import in_forks
from torch.profiler import ProfilerActivity, profile

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.masking_bridle import make_mask


SIZES = {"modality": "audio", "max_length": 320, "num_mel_bins": 32, "hidden_size": 16, "num_attention_heads": 2,
         "intermediate_size": 32, "num_codebooks": 2, "codebook_size": 8}  # fmt: skip
DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
ESTIMATOR = {"estimator_hidden_size": 16, "estimator_num_attention_heads": 2}
KINDS = ("encoder", "tokenizer", "joint")


def draw_batch(rank: int) -> dict[str, torch.Tensor]:
    """Clips of as many lengths as there are processes: each has other micro batches."""
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(1, 321, (4,), generator=generator)
    steps = (-(lengths // -16)).tolist()
    masks = [make_mask("random", (step, 2), 0.8, generator, padded_grid=(20, 2)) for step in steps]
    return {
        "input_values": torch.randn(4, 320, 32, generator=generator),
        "attention_mask": (torch.arange(320) < lengths[:, None]).long(),
        "bool_masked_pos": torch.stack(masks),
    }


def count(out: Path, layers: int) -> None:
    """Write how many tensors are trained, and the exchanges of a step, to `out`."""
    torch.set_num_threads(1)
    accelerator, found = Accelerator(cpu=True), {}
    config = BridleConfig(**SIZES, **DECODER, num_hidden_layers=layers, decoder_num_hidden_layers=layers)
    tokenizer = BridleTokenizerConfig(
        **SIZES, **ESTIMATOR, code_dim=8, num_hidden_layers=layers, estimator_num_hidden_layers=layers,
        dead_code_threshold=0.1,
    )  # fmt: skip
    batch = draw_batch(accelerator.process_index)
    for kind in KINDS:
        phases = [{"train": kind, "steps": 3, "tokenizer_every": 1}]
        run = Interleaving(accelerator, Schedule(phases, 1000.0), config, tokenizer, seed=0, micro_batch_size=2)
        run.enter_phase(0, lambda: (draw_batch(1000 + number) for number in range(1000)))
        # After the first step, gradients are gathered into buckets anew.
        for step in range(2):
            run.step(step, batch)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            assert run.step(2, batch)
        names = Counter(event.name for event in profiled.events() if event.name.startswith("gloo:"))
        tensors = sum(len(group["params"]) for entry in run.optimizers.values() for group in entry.param_groups)
        found[kind] = {"tensors": tensors, "exchanges": dict(sorted(names.items()))}
    if accelerator.is_main_process:
        out.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.slow
def test_exchanges_grow_neither_with_the_model_nor_with_the_processes(tmp_path):
    found = {}
    for processes, layers in ((2, 2), (2, 8), (4, 2), (12, 8)):
        out = tmp_path / f"{processes}_{layers}.json"
        in_forks(tmp_path / "log", count, out, layers, processes=processes)
        found[processes, layers] = json.loads(out.read_text(encoding="utf-8"))
    for kind in KINDS:
        assert found[12, 8][kind]["tensors"] > 3 * found[2, 2][kind]["tensors"]
        counts = [entry[kind]["exchanges"] for entry in found.values()]
        assert all(entry == counts[0] for entry in counts)
        assert sum(counts[0].values()) <= 20
