"""Arguments of probing."""

from dataclasses import dataclass, field

from bridle_hf.common.arguments import YamlMapping, check_ranges
from bridle_hf.data.layouts.arguments import LAYOUT_HELP, LayoutName


READOUT_NAMES = ("gate", "attentive")


@dataclass
class ProbeArguments:
    """Arguments of `bridle probe` and of `bridle_hf.probe`."""

    model: str = field(metadata={"help": "folder or Hub id of a saved encoder"})
    data: str = field(metadata={"help": "folder or Hub id of labelled recordings, images or clips"})
    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    group_column: str = field(default="group", metadata={"help": "column of the groups that folds keep together"})
    data_config: str | None = field(default=None, metadata={"help": "configuration of a Hub set"})
    data_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub set"})
    data_streaming: bool = field(
        default=False, metadata={"help": "read a Hub set's files where they are, do not download them all first"}
    )
    media_column: str | None = field(
        default=None, metadata={"help": "column of recordings, images or videos, where a set has several"}
    )
    layout: LayoutName = field(default="auto", metadata={"help": LAYOUT_HELP})
    folds: str | None = field(
        default=None,
        metadata={
            "help": "all: those of the data; else their number where the data has none (default: 5, or the groups)"
        },
    )
    readouts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further read-outs: gate (a learned convex combination of all layers), attentive (learned queries "
            "attend to the patches)"
        },
    )
    loader: YamlMapping = field(
        default_factory=dict, metadata={"help": "arguments of the video loader, as {stride: 4, sampling: segments}"}
    )
    random_init: bool = field(default=False, metadata={"help": "random weights in place of the saved ones"})
    batch_size: int = field(default=64, metadata={"help": "samples per forward pass"})
    num_workers: int = field(default=0, metadata={"help": "loader processes"})
    seed: int = field(default=0, metadata={"help": "of the random weights"})

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, 1e9), "num_workers": (0, 1e4)})
        if self.folds not in (None, "all") and not str(self.folds).isdecimal():
            raise ValueError(f"--folds is {self.folds!r}: expected all, or a number")
        if unknown := set(self.readouts) - set(READOUT_NAMES):
            raise ValueError(f"--readouts {min(unknown)}: expected some of {', '.join(READOUT_NAMES)}")
