"""Export of a saved model to ONNX or torch.export, checked against the model before it is kept.

    bridle export DIR_OR_HUB_ID model.onnx --input waveform

One program takes any number of samples and, of audio, any length. It is run beside the model at the sizes that users
bring, and no file is left where the two differ: what would be wrong for some input shows here, not where it runs.
"""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bridle_hf
from bridle_hf.common.errors import ArgumentError, RunError, one_line
from bridle_hf.configuration_bridle import FRAME_SHIFT_MS
from bridle_hf.data.modalities import load_processor, load_weights, read_config
from bridle_hf.exporting.arguments import ExportArguments
from bridle_hf.exporting.programs import ModelProgram, WaveformProgram


# Sizes that a program is checked at: samples in a batch, and of audio seconds, beside the length of the config.
BATCHES = (1, 5)
SECONDS = (0.3, 31.0)
# Between a program and its model: the largest difference, in units of the largest output; of codes, the share that
# may fall to the other side of a tie.
TOLERANCE = {"codes": 0.01}
OTHER_TOLERANCE = 1e-4
LARGEST = 2**31 - 2**24  # bytes of weights that one file of ONNX holds

# Inputs by name to outputs in their order.
Runner = Callable[[dict[str, torch.Tensor]], list[np.ndarray]]


def run_export(args: ExportArguments) -> dict[str, Any]:
    """Export, check and write; returns `output`, `inputs` and `outputs` (names), `checked` (what sizes), `difference`.

    Raises:
        ArgumentError: the model cannot be read, or the file not be written. RunError: the program differs.
    """
    path = Path(args.output)
    write, open_program = _format_of(path)
    if path.exists() and not args.overwrite:
        raise ArgumentError(f"--output {path} exists: give another name, or --overwrite")
    try:
        program, config = load_program(args.model, args.input)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(program, temporary, _metadata(config))
        sizes = checked_sizes(config)
        difference = largest_difference(program, open_program(temporary), sizes)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "output": str(path),
        "inputs": list(program.free_axes()),
        "outputs": list(program.outputs),
        "checked": sizes,
        "difference": difference,
    }


def export_line(made: dict[str, Any]) -> str:
    """What [`run_export`] made, in one line."""
    batches, frames = ({size[place] for size in made["checked"]} for place in (0, 1))
    sizes = f"{min(batches)} to {max(batches)} samples"
    if None not in frames:
        shortest, longest = (FRAME_SHIFT_MS * size(frames) / 1000 for size in (min, max))
        sizes += f" of {shortest:g} to {longest:g} s"
    return (
        f"{made['output']}: {', '.join(made['inputs'])} -> {', '.join(made['outputs'])}; given {sizes} it differs "
        f"from the model by {made['difference']:.2g} at most"
    )


def load_program(model: str, takes: str = "features") -> tuple[nn.Module, Any]:
    """The program of a saved model, and the model's configuration.

    Args:
        model: folder or Hub id; of what pretraining saved, the encoder.
        takes: `features`, what the model's processor makes; or `waveform`.

    Raises:
        ValueError: no model of ours is there, or it takes no waveform.
    """
    config = read_config(model, "--model")
    named = getattr(config, "architectures", None) or ["BridleModel"]
    if config.model_type not in ("bridle", "bridle_tokenizer") or not hasattr(bridle_hf, named[0]):
        raise ValueError(f"--model {model} holds a {config.model_type!r}: give an encoder, classifier or tokenizer")
    kind = bridle_hf.BridleModel if named[0] == "BridleForPreTraining" else getattr(bridle_hf, named[0])
    loaded = load_weights(kind, model, dtype=torch.float32)
    if takes == "features":
        return ModelProgram(loaded).eval(), config
    if config.modality != "audio":
        raise ValueError(f"--input waveform: {model} is of {config.modality}")
    return WaveformProgram(loaded, load_processor(model, config)).eval(), config


def checked_sizes(config: Any) -> list[tuple[int, int | None]]:
    """(samples in a batch, frames) that a program is checked at."""
    if config.modality != "audio":
        return [(batch, None) for batch in BATCHES]
    frames = {config.max_length, *(int(1000 * seconds / FRAME_SHIFT_MS) for seconds in SECONDS)}
    if config.position_embedding_type == "table":
        # Such a model has no positions for more, and refuses it.
        frames = {min(number, config.max_length) for number in frames}
    return list(itertools.product(BATCHES, sorted(frames)))


@torch.no_grad()
def largest_difference(program: nn.Module, run: Runner, sizes: list[tuple[int, int | None]]) -> float:
    """Between the outputs of a program, exported and not: see `TOLERANCE`.

    Raises:
        RunError: it is too large, or the exported one cannot be run: names the size.
    """
    largest = 0.0
    for batch, frames in sizes:
        where = f"the exported program, given {batch} samples" + (f" of {frames} frames" if frames else "")
        inputs = program.example(batch, frames)
        expected = program(**inputs)
        try:
            found = run(inputs)
        except Exception as error:  # of several runtimes, each with errors of its own
            raise RunError(f"{where}, fails: {one_line(error)}") from error
        for name, one, other in zip(program.outputs, found, expected):
            if one.shape != tuple(other.shape):
                raise RunError(f"{where}, gives {name} of shape {one.shape} and not {tuple(other.shape)}")
            difference = _difference(one, other.numpy())
            if not difference <= TOLERANCE.get(name, OTHER_TOLERANCE):
                raise RunError(f"{where}, gives other {name} than the model: they differ by {difference:.2g}")
            largest = max(largest, difference)
    return largest


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    if expected.dtype.kind in "iu":
        return float((found != expected).mean())
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


# --- Formats ---


def _format_of(path: Path) -> tuple[Callable[[nn.Module, Path, dict[str, str]], None], Callable[[Path], Runner]]:
    """How a file is written, and how it is opened."""
    formats = {".onnx": (_write_onnx, _open_onnx), ".pt2": (_write_exported, _open_exported)}
    if path.suffix not in formats:
        raise ArgumentError(f"--output {path}: the name must end with {' or '.join(formats)}")
    return formats[path.suffix]


@torch.no_grad()
def _write_onnx(program: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    if sum(tensor.nbytes for tensor in program.state_dict().values()) > LARGEST:
        raise RunError("its weights are more than the 2 GB that a file of ONNX holds: write a .pt2")
    import onnxscript  # noqa: F401  (that it is missing shows before the model is traced)

    made = torch.onnx.export(
        program,
        kwargs=program.example(2),
        dynamic_shapes=_dynamic_shapes(program),
        input_names=list(program.free_axes()),
        output_names=list(program.outputs),
        dynamo=True,
        verbose=False,
    )
    made.model.metadata_props.update(metadata)
    made.save(path, external_data=False)


def _open_onnx(path: Path) -> Runner:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


@torch.no_grad()
def _write_exported(program: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    made = torch.export.export(program, (), program.example(2), dynamic_shapes=_dynamic_shapes(program))
    torch.export.save(made, path, extra_files=metadata)


def _open_exported(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda inputs: [output.numpy() for output in module(**inputs)]


def _dynamic_shapes(program: nn.Module) -> dict[str, dict[int, Any]]:
    return {name: dict.fromkeys(free, torch.export.Dim.AUTO) for name, free in program.free_axes().items()}


def _metadata(config: Any) -> dict[str, str]:
    """What whoever runs the program needs to know, beside its shapes."""
    told = {"modality": config.modality, "bridle_hf_version": bridle_hf.__version__}
    if getattr(config, "architectures", None) and "Classification" in config.architectures[0]:
        told |= {"id2label": json.dumps(config.id2label), "problem_type": str(config.problem_type)}
    return told
