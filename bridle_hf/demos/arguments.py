"""Arguments of the demo."""

from dataclasses import dataclass, field, fields
from typing import Literal

from bridle_hf.common.arguments import check_ranges


@dataclass
class DemoArguments:
    """Arguments of `bridle demo`."""

    output_dir: str | None = field(default=None, metadata={"help": "folder to write (required without --serve)"})
    modality: Literal["audio", "image", "video"] = field(default="audio", metadata={"help": "which demo"})
    data: str | None = field(
        default=None,
        metadata={"help": "folder that the demo's data was made into (default: made in the user's cache)"},
    )
    steps_scale: float = field(default=1.0, metadata={"help": "factor on the length of pretraining"})
    finetune_epochs: float | None = field(
        default=None, metadata={"help": "epochs of fine-tuning (default: the recipe's)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier demo left in output_dir"})

    serve: str | None = field(
        default=None,
        metadata={"help": "show in a browser what the models of this folder tell of a file, in place of a demo's run"},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "of --serve: a table of `bridle embed` to find nearest neighbours in"}
    )
    port: int = field(default=7860, metadata={"help": "of --serve: port of the page, on this machine alone"})

    def __post_init__(self):
        check_ranges(self, {"steps_scale": (1e-9, 1e9), "finetune_epochs": (1e-9, 1e9), "port": (1, 65535)})
        if self.serve is None and self.output_dir is None:
            raise ValueError("give --output_dir for a demo's run, or --serve DIR to show what models tell")
        of_serve = {"embeddings", "port"}
        for entry in fields(self):
            is_given = entry.name != "serve" and getattr(self, entry.name) != entry.default
            if is_given and (entry.name in of_serve) == (self.serve is None):
                raise ValueError(f"--{entry.name} is {'' if self.serve is None else 'not '}for --serve")
