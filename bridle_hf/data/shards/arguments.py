"""Arguments of making shards."""

from dataclasses import dataclass, field
from typing import Literal

from bridle_hf.data.layouts.arguments import LAYOUT_HELP, LayoutName


@dataclass
class ShardArguments:
    """Arguments of `bridle shard`."""

    data: str = field(metadata={"help": "folder, shards or Hub id of the recordings, images or clips"})
    output_dir: str = field(metadata={"help": "folder to write; must be empty without --resume"})
    modality: Literal["audio", "image", "video"] = field(default="audio", metadata={"help": "what the data is"})
    format: Literal["tar", "parquet"] = field(default="tar", metadata={"help": "of the shards"})
    shard_size_mb: int = field(default=256, metadata={"help": "bytes of media in a shard, at most, MiB"})
    samples_per_shard: int | None = field(default=None, metadata={"help": "samples in a shard, whatever their size"})
    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column that is kept as the label"})
    group_column: str = field(default="group", metadata={"help": "column that is kept as the group"})
    data_config: str | None = field(default=None, metadata={"help": "configuration of a Hub set"})
    data_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub set"})
    data_streaming: bool = field(
        default=False, metadata={"help": "read a Hub set's files where they are, do not download them all first"}
    )
    media_column: str | None = field(
        default=None, metadata={"help": "column of recordings, images or videos, where a set has several"}
    )
    layout: LayoutName = field(default="auto", metadata={"help": LAYOUT_HELP})
    num_workers: int = field(default=0, metadata={"help": "processes that write; 0: this one"})
    resume: bool = field(default=False, metadata={"help": "make the shards that are missing in output_dir"})

    def __post_init__(self):
        for name, least in {"shard_size_mb": 1, "samples_per_shard": 1, "num_workers": 0}.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= 1e9:
                raise ValueError(f"--{name} is {value}: expected {least} to 1e9")
