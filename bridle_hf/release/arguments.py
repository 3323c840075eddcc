"""Arguments of `python -m bridle_hf.release`."""

from dataclasses import dataclass, field


@dataclass
class ReleaseArguments:
    """Arguments of `python -m bridle_hf.release`."""

    output_dir: str = field(metadata={"help": "folder of the runs; what stands there goes on"})
    checkpoints_dir: str = field(metadata={"help": "folder to write the checkpoints to, one each"})
    names: list[str] = field(default_factory=list, metadata={"help": "make these checkpoints alone"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "where packages and data are kept (default: the user's cache)"}
    )
    steps_scale: float = field(default=1.0, metadata={"help": "factor on the length of pretraining"})
