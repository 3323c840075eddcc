"""Arguments of the small commands: report, card, convert."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ReportArguments:
    """Arguments of `bridle report`."""

    output_dir: str = field(metadata={"help": "output folder of a run, which holds a metrics.jsonl"})


@dataclass
class CardArguments:
    """Arguments of `bridle card`."""

    folder: str = field(metadata={"help": "a saved encoder, tokenizer or classifier"})
    run: str = field(metadata={"help": "run.json of the run that made it"})
    repo_id: str | None = field(
        default=None, metadata={"help": "Hub id that the card's snippets load (default: the folder's name)"}
    )


@dataclass
class ConvertArguments:
    """Arguments of `bridle convert`."""

    checkpoint: str = field(
        metadata={
            "help": "what the authors' code saved by torch.save; a file of MAE or AudioMAE (timm's names); or a "
            "folder or Hub id of transformers: ViTMAE, ViT, DINOv2, VideoMAE"
        }
    )
    output_dir: str = field(metadata={"help": "folder that gets encoder/, and of the authors' code tokenizer/"})
    modality: Literal["audio", "image", "video"] | None = field(
        default=None, metadata={"help": "what a checkpoint of the authors' code was trained on"}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "of the encoder (default: ViT-B's)"})
    decoder_num_attention_heads: int | None = field(default=None, metadata={"help": "of the decoder"})
    estimator_num_attention_heads: int | None = field(default=None, metadata={"help": "of the estimator"})
    num_mel_bins: int | None = field(
        default=None, metadata={"help": "of audio (default: what the checkpoint's positions tell)"}
    )
    image_size: int | None = field(default=None, metadata={"help": "height and width of video (default: 224)"})
    num_frames: int | None = field(default=None, metadata={"help": "of a clip of video (default: 16)"})
