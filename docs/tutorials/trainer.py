# %% [markdown]
# # Fine-tuning with the stock Trainer
#
# Our models are models of transformers, so that its `Trainer` trains them on a `datasets.Dataset`, with nothing of
# ours but the model and its processor. (`bridle_hf.finetune` is the same with layer decay, augmentation and exact
# resumption: see [the tutorial on images](image.ipynb).) A minute on one core.

# %%
# %matplotlib inline
import csv
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset, Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import bridle_hf
from bridle_hf.demos.data import make_digits


# %% [markdown]
# ## An encoder
#
# Pretrained here on all 5,000 digits, without their labels, for a few seconds. Any other does as well, also one of
# the Hub.

# %%
digits = Path(make_digits())
run = bridle_hf.pretrain(
    "image_demo", data=str(digits), output_dir="runs/tutorial", overwrite=True,
    global_batch_size=32, num_workers=0,
    phases=[{"train": "encoder", "steps": 100, "warmup_steps": 10, "learning_rate": 2.0e-3}],
)  # fmt: skip

# %% [markdown]
# ## A dataset
#
# 3,000 labelled digits to train on, 500 others to test on. The processor is called when samples are drawn.

# %%
with open(digits / "metadata.csv", newline="") as file:
    rows = list(csv.DictReader(file))
data = Dataset.from_dict({
    "image": [str(digits / row["file_name"]) for row in rows],
    "label": [int(row["label"]) for row in rows],
}).cast_column("image", Image()).shuffle(seed=0)  # fmt: skip
processor = AutoImageProcessor.from_pretrained(run.encoder)


def prepare(batch):
    inputs = processor(batch["image"], return_tensors="pt")
    return {"pixel_values": inputs.pixel_values, "labels": batch["label"]}


train = data.select(range(3000)).with_transform(prepare)
test = data.select(range(3000, 3500)).with_transform(prepare)
print(len(train), "to train on,", len(test), "to test on;", tuple(train[0]["pixel_values"].shape))

# %% [markdown]
# ## Train
#
# The best epoch is kept; training ends early once one has not been better.


# %%
def accuracy(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


set_seed(0)
names = [str(digit) for digit in range(10)]
model = AutoModelForImageClassification.from_pretrained(
    run.encoder, id2label=dict(enumerate(names)), label2id={name: digit for digit, name in enumerate(names)}
)
arguments = TrainingArguments(
    "runs/trainer", num_train_epochs=3, per_device_train_batch_size=32, learning_rate=1.0e-3,
    warmup_steps=0.1, weight_decay=1.0e-4, eval_strategy="epoch", save_strategy="epoch",
    load_best_model_at_end=True, metric_for_best_model="accuracy",
    remove_unused_columns=False, disable_tqdm=True, report_to=[],
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=train, eval_dataset=test,
    compute_metrics=accuracy, processing_class=processor,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
trainer.train()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.1%}")

# %%
epochs = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][:-1]
figure, ax = plt.subplots(figsize=(4, 2.6))
ax.plot([entry["epoch"] for entry in epochs], [100 * entry["eval_accuracy"] for entry in epochs], "o-")
ax.set(xlabel="epoch", ylabel="accuracy (%)", title="500 digits that training has not seen")
figure.tight_layout()

# %% [markdown]
# So short a pretraining is worth little yet. After the one of the demo, the same network comes to 95.8%,
# and from scratch to 87.9%: [the demos](../demos.md).

# %% [markdown]
# ## Save, and use
#
# `push_to_hub` of model and processor works, too. More that the ecosystem does with these models (LoRA, half
# precision, `torch.compile`, ONNX) is in [the toolbox](../toolbox.md).

# %%
trainer.save_model("runs/classifier")
classify = pipeline("image-classification", model="runs/classifier")
for answer in classify(str(digits / "images" / "0003.png"), top_k=2):  # a zero
    print(answer["label"], f"{answer['score']:.1%}")
