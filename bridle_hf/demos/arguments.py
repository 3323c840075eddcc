"""Arguments of the demo."""

from dataclasses import dataclass, field
from typing import Literal

from bridle_hf.common.arguments import check_ranges


@dataclass
class DemoArguments:
    """Arguments of `bridle demo`."""

    output_dir: str = field(metadata={"help": "folder to write"})
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

    def __post_init__(self):
        check_ranges(self, {"steps_scale": (1e-9, 1e9), "finetune_epochs": (1e-9, 1e9)})
