"""Dry run: what a run would do and take, found out without doing it (`bridle pretrain ... --dry_run`).

Reads a real batch, does three steps of each phase with it (to warm up, to be timed, to have their memory counted) in a
temporary folder, and tells shapes, parameters, FLOPs, memory and the schedule. OUT is neither read nor written.
"""

import dataclasses
import itertools
import math
import tempfile
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from bridle_hf.interleaving.micro_batches import micro_batches
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.run import Run, start


@dataclass(frozen=True)
class Measured:
    """A phase's steps: the mean over what they train, by how often they do.

    Args:
        seconds: of one step.
        weights, optimizer, step: bytes of the models; of the optimizers' state; of gradients and activations where
            together they are most.
        losses: those of the last step, by name.
        patches: of a sample, padding included.
    """

    seconds: float
    weights: int
    optimizer: int
    step: int
    losses: dict[str, float]
    patches: float


def dry_run(args: PretrainArguments) -> list[str]:
    """What the run of `args` would do, in lines; of several processes one has them.

    Raises:
        ValueError: as the run itself would.
    """
    with tempfile.TemporaryDirectory() as folder:
        nowhere = {"output_dir": folder, "resume": False, "overwrite": False, "tracker": "none", "code_cache": False,
                   "push_to_hub": False, "hub_model_id": None, "hub_private": False}  # fmt: skip
        run = start(dataclasses.replace(args, **nowhere))
        began = time.monotonic()
        batch = next(run.peek(0))
        reading = time.monotonic() - began
        measured, parameters = [], {}
        for number in range(len(run.schedule.phases)):
            run.interleaving.enter_phase(number, lambda: itertools.chain([batch], run.peek(1)))
            parameters |= _count_parameters(run)
            measured.append(_measure(run, number, batch))
        lines = [
            *_batch_lines(run, batch, reading), "", *_parameter_lines(parameters), "",
            *run.flops.lines(args.global_batch_size), "", *_memory_lines(run, measured), "",
            *_schedule_lines(run, measured, reading, batch),
        ]  # fmt: skip
        run.monitor.close()
        run.accelerator.end_training()
        return lines if run.accelerator.is_main_process else []


# --- Measuring ---


def _measure(run: Run, number: int, batch: dict[str, Any]) -> Measured:
    schedule, interleaving = run.schedule, run.interleaving
    first, end = schedule.starts[number], schedule.starts[number] + schedule.lengths[number]
    seconds, peak, losses, patches = 0.0, 0, {}, run.flops.patches
    for sides, share in run.flops.shares(number).items():
        step = next(step for step in range(first, end) if schedule.sides(step) == sides)
        interleaving.step(step, batch)
        _finish(run)
        began = time.monotonic()
        metrics = interleaving.step(step, batch)
        _finish(run)
        seconds += share * (time.monotonic() - began)
        with PeakMemory() as memory:
            interleaving.step(step, batch)
        peak = max(peak, memory.peak)
        losses |= {name: float(value) for name, value in metrics.items() if name.endswith("/loss")}
        patches = float(metrics.get("input/patches", patches))
    models = filter(None, (interleaving.encoder, interleaving.tokenizer, interleaving.average))
    weights = sum(_bytes(itertools.chain(model.parameters(), model.buffers())) for model in models)
    states = [state for optimizer in interleaving.optimizers.values() for state in optimizer.state.values()]
    return Measured(seconds, weights, sum(_bytes(state.values()) for state in states), peak, losses, patches)


def _finish(run: Run) -> None:
    """Wait until the device has done what it was asked to."""
    if run.accelerator.device.type != "cpu":
        torch.get_device_module(run.accelerator.device).synchronize()


def _bytes(tensors: Iterable[Any]) -> int:
    """What this process holds of `tensors`."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and live at the same time: `peak`, on any device.

    What is inside of an operation (the scratch memory of a matrix product) is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What an operation is given was there before, unless it has been counted when it was made.
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, counts=False)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: Any, counts: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.live -= size


# --- Telling ---


def _batch_lines(run: Run, batch: dict[str, Any], seconds: float) -> list[str]:
    count = len(batch["index"])
    rows = [[name, str(tuple(value.shape)), str(value.dtype).removeprefix("torch.")]
            for name, value in batch.items() if isinstance(value, torch.Tensor)]  # fmt: skip
    title = f"A batch of this process: {count} samples, read by one process in {seconds:.2f} s"
    lines = [f"{title} ({count / seconds:.4g} samples/s)", *_table([["name", "shape", "type"], *rows])]
    if "attention_mask" in batch:
        lines.append(f"  padding: {_padding(run, batch, True)} by length, {_padding(run, batch, False)} otherwise")
    return lines


def _padding(run: Run, batch: dict[str, Any], by_length: bool) -> str:
    """Of a batch in micro batches."""
    cpu, size = torch.device("cpu"), run.args.micro_batch_size
    parts = list(micro_batches(batch, run.encoder_config, size, cpu, by_length))
    share = 1 - sum(sum(part.num_real) for part in parts) / sum(part.num_patches for part in parts)
    return f"{share:.1%} of the patches in {len(parts)} micro batches"


def _count_parameters(run: Run) -> dict[str, dict[str, int]]:
    """By model, its parameters by part; the random projection and the self-distilled tokenizer are two models."""
    encoder, tokenizer = run.interleaving.unwrapped_encoder, run.interleaving.unwrapped_tokenizer
    kind = tokenizer.config.tokenizer_type.replace("_", " ")
    return {
        name: {part: sum(map(torch.numel, found)) for part, found in model.parameters_by_part().items()}
        for name, model in {"encoder": encoder, f"tokenizer, {kind}": tokenizer}.items()
    }


def _parameter_lines(parameters: dict[str, dict[str, int]]) -> list[str]:
    rows = [[model, f"{sum(parts.values()):,}", ", ".join(f"{part} {count:,}" for part, count in parts.items())]
            for model, parts in parameters.items()]  # fmt: skip
    return ["Parameters", *_table([["model", "all", "by part"], *rows])]


def _memory_lines(run: Run, measured: list[Measured]) -> list[str]:
    rows = []
    for number, phase in enumerate(measured):
        sizes = (phase.weights, phase.optimizer, phase.step, phase.weights + phase.optimizer + phase.step)
        rows.append([_name(run, number), *(f"{size / 2**20:,.1f}" for size in sizes)])
    share = run.args.global_batch_size // run.accelerator.num_processes
    held = min(run.args.micro_batch_size or share, share)
    title = f"Memory of one process, MiB, of which gradients and activations with {held} samples at a time"
    return [title, *_table([["phase", "weights", "optimizer", "gradients and activations", "all"], *rows])]


def _schedule_lines(run: Run, measured: list[Measured], reading: float, batch: dict[str, Any]) -> list[str]:
    schedule, size, workers = run.schedule, run.args.global_batch_size, run.args.num_workers
    header = ["phase", "steps", "epochs", "samples", "s/step", "samples/s", "MFU", "time", "losses after a step"]
    rows, total = [], 0.0
    for number, phase in enumerate(measured):
        length = schedule.lengths[number]
        # Workers read while the device computes.
        seconds = max(phase.seconds, reading / workers) if workers else phase.seconds + reading
        total += length * seconds
        operations = run.flops.of_phases[number] * run.flops.share(phase.patches) * size
        speed = operations / phase.seconds / (run.peak["tflops"] * 1e12)
        rows.append([
            _name(run, number), f"{length:,}", f"{length * size / len(run.samples):.4g}", f"{length * size:,}",
            f"{seconds:.4g}", f"{size / seconds:.4g}", f"{speed / run.accelerator.num_processes:.1%}",
            tqdm.format_interval(length * seconds),
            ", ".join(f"{name} {value:.4g}" for name, value in phase.losses.items()),
        ])  # fmt: skip
    fastest = len(batch["index"]) / min(phase.seconds for phase in measured)
    enough = math.ceil(fastest * reading / len(batch["index"]))
    return [
        f"Schedule; time with {workers} loader workers, without checkpoints, probes and reports; "
        f"peak {run.peak['tflops']:g} TFLOP/s ({run.peak['source']})",
        *_table([header, *rows]),
        f"all: {schedule.total_steps:,} steps, {tqdm.format_interval(total)}; for reading to keep up with the fastest "
        f"phase, one process needs {enough} workers",
    ]


def _name(run: Run, number: int) -> str:
    return f"{number}: {run.schedule.phases[number].train} {run.schedule.iteration(number)}"


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of equal columns; numbers stand to the right, but for the first column, which holds names."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    numeric = [number > 0 and all(cell[:1].isdigit() for cell in column[1:])
               for number, column in enumerate(zip(*rows))]  # fmt: skip
    return [
        "  " + "  ".join(cell.rjust(width) if right else cell.ljust(width)
                         for cell, width, right in zip(row, widths, numeric)).rstrip()
        for row in rows
    ]  # fmt: skip
