"""`TrainingArguments` with the defaults of fine-tuning."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from bridle_hf.cards.arguments import MODEL_ID_HELP


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of `bridle finetune`."""

    output_dir: str | None = field(default=None, metadata={"help": "folder to write (required)"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept, beside the best"})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "keep the best epoch's model, not the last's"}
    )
    metric_for_best_model: str | None = field(
        default="auto", metadata={"help": "what the best epoch is chosen by; auto: the accuracy or mAP"}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW, on matrices alone"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "of the single-label cross-entropy"})
    seed: int = field(default=0, metadata={"help": "of everything that is random"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "faster copies to a GPU"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the classifier to the Hub in the end"})
    hub_model_id: str | None = field(default=None, metadata={"help": MODEL_ID_HELP})
    # Without it, several processes on CPUs would not know of each other, and bf16 would be refused.
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "no GPU"})
    # The batches hold what the model takes, and `skipped` for the trainer.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("the following arguments are required: --output_dir")
        super().__post_init__()
