"""Arguments of pretraining, and of the cost of a recipe."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bridle_hf.cards.arguments import LICENSE_HELP, MODEL_ID_HELP, PRIVATE_HELP, check_publishing
from bridle_hf.common.arguments import YamlMapping, YamlSequence, check_ranges
from bridle_hf.data.layouts.arguments import LAYOUT_HELP, LayoutName


@dataclass
class PretrainArguments:
    """Arguments of `bridle pretrain` and of `bridle_hf.pretrain`."""

    data: str = field(metadata={"help": "folder, shards or Hub id of the recordings, images or clips"})
    output_dir: str = field(metadata={"help": "folder to write; must not exist without --resume or --overwrite"})
    modality: Literal["audio", "image", "video"] = field(default="audio", metadata={"help": "what the data is"})

    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column of the labels (for probes alone)"})
    group_column: str = field(default="group", metadata={"help": "column of the groups"})
    data_config: str | None = field(default=None, metadata={"help": "configuration of a Hub set"})
    data_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub set"})
    data_streaming: bool = field(
        default=False, metadata={"help": "read a Hub set's files where they are, do not download them all first"}
    )
    media_column: str | None = field(
        default=None, metadata={"help": "column of recordings, images or videos, where a set has several"}
    )
    layout: LayoutName = field(default="auto", metadata={"help": LAYOUT_HELP})
    exclude_groups: list[str] = field(default_factory=list, metadata={"help": "groups kept out of pretraining"})
    augment: bool = field(default=False, metadata={"help": "audio: shift and gain; image, video: crops, flip"})
    mixture: float = field(
        default=0.0, metadata={"help": "audio: share of the samples that another recording is laid over; 0: none"}
    )
    cache_mb: int = field(default=0, metadata={"help": "memory per process for decoded inputs, MiB"})

    encoder: YamlMapping = field(default_factory=dict, metadata={"help": "fields of BridleConfig"})
    tokenizer: YamlMapping = field(default_factory=dict, metadata={"help": "fields of BridleTokenizerConfig"})
    encoder_from: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of an encoder: a fresh encoder has its sizes, and starts from its weights"
        },
    )
    tokenizer_from: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a tokenizer: its codes are predicted until a phase trains a fresh tokenizer"
        },
    )
    processor: YamlMapping = field(default_factory=dict, metadata={"help": "fields of the modality's processor"})
    loader: YamlMapping = field(
        default_factory=dict, metadata={"help": "fields of the modality's loader: {flip: false}, {stride: 4}"}
    )
    measure_normalization: bool = field(
        default=False, metadata={"help": "audio: measure mean and std of the log-mel on the data"}
    )
    masks: YamlMapping = field(
        default_factory=dict, metadata={"help": "weights of the masks drawn from, as {random: 1, mel_band: 3}"}
    )
    masks_per_sample: int = field(
        default=1, metadata={"help": "masks of each sample that is read and tokenized, each a row of the encoder"}
    )
    tokenizer_patch_dropout: float = field(
        default=0.0,
        metadata={"help": "share of a sample's patches that teacher, tokenizer and estimator leave out in training"},
    )
    code_cache: bool = field(
        default=False,
        metadata={"help": "keep a frozen tokenizer's codes in OUT/codes, and take them from there where crops repeat"},
    )
    compile: bool = field(
        default=False, metadata={"help": "compile the layers: minutes at the start of each phase, then faster steps"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})

    phases: YamlSequence = field(
        default=(),
        metadata={
            "help": "the schedule: a list of phases, each as {train: encoder, epochs: 140, learning_rate: 5.0e-4}"
        },
    )
    steps_scale: float = field(default=1.0, metadata={"help": "factor on the length of every phase"})
    global_batch_size: int = field(default=64, metadata={"help": "samples per optimizer step, over all processes"})
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "samples of full length that a process holds at a time, with their masks; the rest accumulates"
        },
    )
    bucket_by_length: bool = field(
        default=True,
        metadata={"help": "audio: micro batches of samples of similar length, of which at most 5% is padding"},
    )
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW, on matrices alone"})
    encoder_ema: float = field(
        default=0.0,
        metadata={
            "help": "decay of the average of the encoder's weights that is saved and teaches, as 0.999; 0: none"
        },
    )
    levels_join_at: float = field(
        default=0.0,
        metadata={"help": "masked accuracy of a level at which the next joins the loss, as 0.05; 0: all at once"},
    )
    max_grad_norm: float | None = field(default=None, metadata={"help": "clip the gradient norm of each side"})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "autocast"})
    deterministic: bool = field(default=False, metadata={"help": "deterministic algorithms, at a price in speed"})
    seed: int = field(default=0, metadata={"help": "of everything that is random"})
    num_workers: int = field(default=0, metadata={"help": "loader processes per training process"})

    log_every: int = field(default=20, metadata={"help": "steps between lines of metrics.jsonl"})
    save_every: int = field(
        default=1000, metadata={"help": "steps between checkpoints; 0: at the end of phases alone"}
    )
    keep_last: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    keep_every: int = field(default=0, metadata={"help": "steps between checkpoints that are kept for good; 0: none"})
    keep_iterations: bool = field(default=False, metadata={"help": "keep the models of every phase in OUT/iterations"})
    report_every: int = field(default=200, metadata={"help": "steps between rewrites of report.html; 0: at the end"})
    probe_every: int = field(default=0, metadata={"help": "steps between probes, if there are labels; 0: none"})
    probe_samples: int = field(default=2000, metadata={"help": "samples that a probe uses at most"})
    tracker: str = field(
        default="tensorboard",
        metadata={"help": "beside metrics.jsonl: none, or any that accelerate knows, as tensorboard, wandb, mlflow"},
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s that one process could do at most, for the MFU; default: measured"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint of output_dir"})
    overwrite: bool = field(default=False, metadata={"help": "remove what a run left in output_dir"})
    push_to_hub: bool = field(default=False, metadata={"help": "push both models to the Hub in the end"})
    hub_model_id: str | None = field(default=None, metadata={"help": MODEL_ID_HELP})
    hub_private: bool = field(default=False, metadata={"help": PRIVATE_HELP})
    license: str | None = field(default=None, metadata={"help": LICENSE_HELP})
    dry_run: bool = field(
        default=False,
        metadata={"help": "do three steps of each phase, tell what the run would take, and write nothing"},
    )
    allow_changed_data: bool = field(
        default=False, metadata={"help": "resume though the list of files has changed; run.json records it"}
    )
    loader_timeout: float = field(
        default=0.0, metadata={"help": "seconds that the loader's workers may take for a batch; 0: no limit"}
    )
    overfit_one_batch: bool = field(
        default=False, metadata={"help": "see the first batch at every step: a check that the loss can fall"}
    )

    def __post_init__(self):
        ranges = {
            "steps_scale": (1e-9, 1e9), "global_batch_size": (1, 1e9), "micro_batch_size": (1, 1e9),
            "masks_per_sample": (1, 1e4), "tokenizer_patch_dropout": (0, 0.99), "mixture": (0, 1),
            "weight_decay": (0, 1e9), "max_grad_norm": (1e-9, math.inf), "seed": (0, 2**32 - 1),
            "num_workers": (0, 1e4), "cache_mb": (0, 1e9), "log_every": (1, 1e9), "save_every": (0, 1e9),
            "keep_last": (1, 1e9), "keep_every": (0, 1e9), "report_every": (0, 1e9), "probe_every": (0, 1e9),
            "probe_samples": (1, 1e9), "peak_tflops": (1e-9, 1e9),
            "loader_timeout": (0, 1e9),
        }  # fmt: skip
        check_ranges(self, ranges)
        check_publishing(self.push_to_hub, self.hub_model_id, self.hub_private, self.license)
        if self.loader_timeout and not self.num_workers:
            raise ValueError("--loader_timeout is for loader workers: give --num_workers 1 or more")
        if not 0 <= self.encoder_ema < 1:
            raise ValueError(f"--encoder_ema is {self.encoder_ema}: expected a number in [0, 1)")
        if not 0 <= self.levels_join_at < 1:
            raise ValueError(f"--levels_join_at is {self.levels_join_at}: expected an accuracy in [0, 1)")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam_betas is {self.adam_betas}: expected two numbers in [0, 1)")
        if self.mixture and self.modality != "audio":
            raise ValueError("--mixture is for audio: sounds add up, pictures hide each other")
        if self.code_cache and self.augment:
            raise ValueError("--code_cache is for crops that repeat: with --augment none does; leave one of them out")
        if self.measure_normalization and self.modality != "audio":
            raise ValueError("--measure_normalization is for audio: give processor.image_mean and image_std instead")


@dataclass
class FlopsArguments:
    """Arguments of `bridle flops`: what a recipe does not say."""

    samples: int = field(metadata={"help": "samples of the data set"})
    mfu: list[float] = field(
        default_factory=lambda: [0.2, 0.4], metadata={"help": "assumed shares of the peak that training reaches"}
    )
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "numbers of GPUs"})

    def __post_init__(self):
        if self.samples < 1 or min(self.gpus) < 1 or not all(0 < share <= 1 for share in self.mfu):
            raise ValueError("--samples and --gpus must be at least 1, and --mfu over 0 and at most 1")
