"""Arguments of fine-tuning beside those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Literal

from bridle_hf.cards.arguments import LICENSE_HELP, PRIVATE_HELP
from bridle_hf.common.arguments import YamlMapping, check_ranges
from bridle_hf.data.layouts.arguments import LAYOUT_HELP, LayoutName


@dataclass
class FinetuneArguments:
    """Arguments of `bridle finetune` and of `bridle_hf.finetune`, beside those of `TrainingArguments`."""

    model: str = field(metadata={"help": "folder or Hub id of a saved encoder"})
    data: str = field(metadata={"help": "folder or Hub id of labelled recordings, images or clips"})
    label_column: str = field(default="label", metadata={"help": "column of the labels; `labels`: several per sample"})
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
    label_order: str | None = field(
        default=None, metadata={"help": "csv with index, mid, display_name that numbers the classes (AudioSet)"}
    )
    train_split: str = field(default="train", metadata={"help": "split to train on, where the data has splits"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on (default: validation, else test)"}
    )
    eval_fold: list[str] = field(default_factory=list, metadata={"help": "folds to evaluate on, train on the others"})
    folds: Literal["all"] | None = field(
        default=None, metadata={"help": "a run for each fold of the data, OUT/fold_NAME; mean and deviation in OUT"}
    )
    eval_group: list[str] = field(default_factory=list, metadata={"help": "groups to evaluate on"})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "evaluate on this random fraction; of whole groups where samples have one"}
    )

    from_scratch: bool = field(default=False, metadata={"help": "random weights: the control"})
    freeze_encoder: bool = field(default=False, metadata={"help": "train the head alone (linear probing)"})
    lora_rank: int | None = field(
        default=None, metadata={"help": "train adapters of this rank beside the frozen encoder's weights (LoRA)"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "input length in frames (default: the processor's)"}
    )
    mean: float | None = field(default=None, metadata={"help": "mean of the log-mel (default: the processor's)"})
    std: float | None = field(default=None, metadata={"help": "std of the log-mel (default: the processor's)"})

    layer_decay: float = field(default=1.0, metadata={"help": "learning rate of a layer, relative to the one above"})
    drop_path_rate: float = field(default=0.0, metadata={"help": "stochastic depth of the last layer"})
    patch_dropout: list[float] = field(
        default_factory=lambda: [0.0, 0.0], metadata={"help": "fractions of (time, mel) stripes of patches dropped"}
    )
    loader: YamlMapping = field(
        default_factory=dict,
        metadata={"help": "arguments of the image or video loader, as {stride: 4, min_crop: 0.2, flip: false}"},
    )
    augment: bool = field(
        default=False,
        metadata={"help": "audio: circular shift and gain, Beta(10, 10) + 0.5; image, video: random crop and flip"},
    )
    mixup_probability: float = field(default=0.0, metadata={"help": "mix this share of the inputs with another"})
    mixup_alpha: float = field(default=10.0, metadata={"help": "the mix is Beta(alpha, alpha)"})
    mel_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in mel bins"})
    time_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in frames of a clip of 1024"})
    cutmix_probability: float = field(default=0.0, metadata={"help": "paste a box of another into this share"})
    rand_augment: float = field(default=0.0, metadata={"help": "magnitude of RandAugment, up to 10; 0: none"})
    random_erasing: float = field(default=0.0, metadata={"help": "erase a rectangle of this share of the inputs"})
    balanced_sampling: bool = field(default=False, metadata={"help": "draw samples by 1 / frequency of their classes"})
    draws_per_epoch: int | None = field(
        default=None, metadata={"help": "samples per epoch (default: draws_per_sample of each sample)"}
    )
    draws_per_sample: int = field(default=1, metadata={"help": "samples drawn of a sample in a row, each at random"})
    eval_clips: int = field(default=1, metadata={"help": "clips per video in the last evaluation, spread over it"})
    eval_crops: int = field(default=1, metadata={"help": "crops per clip in the last evaluation, side by side"})
    cache_mb: int = field(default=0, metadata={"help": "memory per process for decoded inputs, MiB"})

    loader_timeout: float = field(
        default=0.0, metadata={"help": "seconds that the loader's workers may take for a batch; 0: no limit"}
    )

    hub_private: bool = field(default=False, metadata={"help": f"of --push_to_hub: {PRIVATE_HELP}"})
    license: str | None = field(default=None, metadata={"help": LICENSE_HELP})

    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint of output_dir"})
    overwrite: bool = field(default=False, metadata={"help": "remove what a run left in output_dir"})

    def __post_init__(self):
        ranges = {
            "validation_fraction": (0, 0.99), "max_length": (1, 1e9), "lora_rank": (1, 1e9), "std": (1e-9, 1e9),
            "mixup_alpha": (1e-9, 1e9),
            "draws_per_epoch": (1, 1e9), "cache_mb": (0, 1e9), "loader_timeout": (0, 1e9),
        }  # fmt: skip
        check_ranges(self, ranges)
        if len(self.patch_dropout) != 2:
            raise ValueError(f"--patch_dropout is {self.patch_dropout}: expected two numbers, for time and mel")
