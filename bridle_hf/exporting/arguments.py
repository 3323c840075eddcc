"""Arguments of `bridle export`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ExportArguments:
    """Arguments of `bridle export`."""

    model: str = field(metadata={"help": "folder or Hub id of an encoder, a classifier or a tokenizer"})
    output: str = field(metadata={"help": "file to write: .onnx, or .pt2 for torch.export"})
    input: Literal["features", "waveform"] = field(
        default="features",
        metadata={"help": "what the program takes: what the processor makes, or of audio the waveform itself"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the file"})
