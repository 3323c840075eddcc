"""What users of transformers do with our models (docs/toolbox.md): adapters, half precision, placing, stock training.

python -m pytest tests/test_toolbox.py -s      # prints the differences
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.classifiers import CLASSIFIERS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from bridle_hf import (
    BridleModel,
)


def classifier(tiny_config, modality: str, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    return CLASSIFIERS[modality](tiny_config(modality, num_labels=3, **fields)).eval()


def difference(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of the largest value; printed."""
    value = float((found.float() - expected).abs().max() / expected.abs().max())
    print(f"{name}: {value:.2g}")
    return value


@torch.no_grad()
def test_adapters_of_peft(tiny_config, tiny_input, modality, tmp_path):
    """Saved alone, loaded onto the model they were made for, and merged into it."""
    values, model = tiny_input(modality), classifier(tiny_config, modality)
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
    adapted.eval()
    expected = adapted(values).logits
    adapted.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 50_000
    loaded = PeftModel.from_pretrained(classifier(tiny_config, modality), tmp_path).eval()
    assert difference("loaded", loaded(values).logits, expected) < 1e-6
    assert difference("merged", loaded.merge_and_unload()(values).logits, expected) < 1e-5


def test_adapters_alone_are_trained(tiny_config, tiny_input, modality):
    adapted = get_peft_model(
        classifier(tiny_config, modality).train(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    adapted(tiny_input(modality), labels=torch.tensor([0, 2])).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert moved and all("lora_" in name for name in moved)


@torch.no_grad()
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision(tiny_config, tiny_input, modality, tmp_path, dtype, most):
    values, model = tiny_input(modality), classifier(tiny_config, modality)
    model.save_pretrained(tmp_path)
    half = CLASSIFIERS[modality].from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype
    assert difference(f"{modality}, {dtype}", half(values.to(dtype)).logits, model(values).logits) < most


@torch.no_grad()
def test_device_map(tiny_config, tiny_input, modality, tmp_path):
    """Half of the layers wait on disk."""
    model = BridleModel(tiny_config(modality)).eval()
    model.save_pretrained(tmp_path)
    places = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layernorm": "cpu"}
    placed = BridleModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded").eval()
    assert placed.hf_device_map["layers.1"] == "disk"
    values = tiny_input(modality)
    assert torch.equal(placed(values).last_hidden_state, model(values).last_hidden_state)


def test_early_stopping_of_the_stock_trainer(tiny_config, tmp_path):
    """On a `datasets.Dataset`: it ends once the loss on held-out samples rises no more, and the best model is kept."""
    model, rng = classifier(tiny_config, "audio"), np.random.default_rng(0)
    values = rng.normal(size=(24, 96, model.config.num_mel_bins)).astype(np.float32)
    labels = rng.integers(3, size=24)  # nothing to learn but by heart
    data = Dataset.from_dict({"input_values": values, "labels": labels}).with_format("torch")
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=40, per_device_train_batch_size=8, learning_rate=3e-3, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data.select(range(16)), eval_dataset=data.select(range(16, 24)),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch < 40
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
