"""Names of layouts, as `--layout` takes them, and options of `bridle prepare`."""

from dataclasses import dataclass, field
from typing import Literal


LayoutName = Literal[
    "auto", "folder", "lists", "esc50", "urbansound8k", "speech_commands", "audioset", "audioset_balanced", "fsd50k",
    "imagenet", "kinetics", "ssv2", "ucf101",
]  # fmt: skip
LAYOUT_HELP = "how the data lies: folder (class folders, metadata), lists (of paths), or as a set is downloaded"


@dataclass
class PrepareArguments:
    """Arguments of `bridle prepare`."""

    layout: LayoutName = field(metadata={"help": LAYOUT_HELP})
    data: str = field(metadata={"help": "folder of the set as downloaded, or its list files"})
    modality: Literal["audio", "image", "video"] | None = field(
        default=None, metadata={"help": "what list files list (default: what the layout is of)"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder that metadata.csv is written to (default: the data's)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "write metadata.csv anew"})
