"""Arguments of a study."""

from dataclasses import dataclass, field

from bridle_hf.common.arguments import check_ranges


@dataclass
class StudyArguments:
    """Arguments of `bridle study`."""

    grid: str = field(metadata={"help": "a grid of the package, as development or reported, or the path of a YAML"})
    output_dir: str = field(metadata={"help": "folder to write; a study that stands there goes on"})
    workers: int = field(default=1, metadata={"help": "runs side by side, of one thread each"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "where data sets are made (default: the user's cache)"}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "do these arms or sets alone"})
    seeds: list[int] = field(default_factory=list, metadata={"help": "do these seeds alone (default: the grid's)"})
    retry_failed: bool = field(default=False, metadata={"help": "do runs anew that have failed"})
    keep_models: bool = field(default=False, metadata={"help": "keep what the runs wrote, as models and checkpoints"})
    report: bool = field(
        default=False, metadata={"help": "do no runs; write tables and figures of those that are done"}
    )
    page: str | None = field(
        default=None, metadata={"help": "with --report: a page whose parts between `<!-- NAME -->` marks are filled"}
    )

    def __post_init__(self):
        check_ranges(self, {"workers": (1, 1e4)})
        if self.page and not self.report:
            raise ValueError("--page is filled by --report: give it, too")
