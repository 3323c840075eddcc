"""Arguments of `bridle embed` and `bridle search`."""

from dataclasses import dataclass, field
from typing import Literal

from bridle_hf.data.layouts.arguments import LAYOUT_HELP, LayoutName


@dataclass
class EmbedArguments:
    """Arguments of `bridle embed`."""

    data: str = field(metadata={"help": "folder, shards or Hub id of recordings, images or videos"})
    model: str = field(metadata={"help": "folder or Hub id of an encoder or a classifier"})
    output: str = field(metadata={"help": "table to write: .parquet, .npz, or .npy (its ids in a .csv beside it)"})
    level: Literal["clip", "frame", "patch"] = field(
        default="clip", metadata={"help": "one row for each file, for each of its time steps, or for each patch"}
    )
    layers: list[str] = field(
        default_factory=lambda: ["-1"],
        metadata={"help": "layers: 0 is the embedding, -1 the output; several are concatenated; or mean, or all"},
    )
    pooling: str | None = field(
        default=None, metadata={"help": "mean, mean_std, band_mean (audio) or region_mean (default: mean)"}
    )
    split: str | None = field(default=None, metadata={"help": "only this split"})
    data_config: str | None = field(default=None, metadata={"help": "configuration of a Hub set"})
    data_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub set"})
    data_streaming: bool = field(
        default=False, metadata={"help": "read a Hub set's files where they are, do not download them all first"}
    )
    media_column: str | None = field(
        default=None, metadata={"help": "column of recordings, images or videos, where a set has several"}
    )
    layout: LayoutName = field(default="auto", metadata={"help": LAYOUT_HELP})
    batch_size: int | None = field(
        default=None, metadata={"help": "full-size windows in a batch (default: 4 on a CPU, 64 on a GPU)"}
    )
    overlap: float = field(default=0.25, metadata={"help": "fraction of a window that the next one shares"})
    stride: int | None = field(
        default=None,
        metadata={"help": "frames of a video from one that the model sees to the next (default: the model's)"},
    )
    overwrite: bool = field(default=False, metadata={"help": "write the table anew"})


@dataclass
class SearchArguments:
    """Arguments of `bridle search`."""

    table: str = field(metadata={"help": "what `bridle embed` wrote: .parquet or .npz, of level clip"})
    file: str = field(metadata={"help": "recording, image or video to look for"})
    top_k: int = field(default=10, metadata={"help": "how many neighbours"})
    model: str | None = field(default=None, metadata={"help": "the model, where it is no more where it was"})
    picture: str | None = field(
        default=None, metadata={"help": "a .png to write: the file and its neighbours, which must be where they were"}
    )

    def __post_init__(self):
        if self.picture is not None and not self.picture.endswith(".png"):
            raise ValueError(f"--picture is {self.picture!r}: give a name that ends with .png")
