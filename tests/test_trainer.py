"""Tests of the models in the stock `Trainer`, and quantized by torch: what other models of transformers can do."""

import math

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig

import bridle_hf
from bridle_hf.patching_bridle import INPUT_NAMES


def first_step(model, samples, folder, batch_size: int) -> dict[str, float]:
    """Loss and gradient norm that `Trainer` logs for a first step on all samples, in batches of `batch_size`."""
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=batch_size, logging_steps=1, report_to="none", use_cpu=True,
        gradient_accumulation_steps=len(samples) // batch_size, remove_unused_columns=False, save_strategy="no",
        dataloader_pin_memory=False, disable_tqdm=True, max_grad_norm=1e9,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    return {name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")}


def both(make_model, samples, folder) -> list[dict[str, float]]:
    found = []
    for batch_size in (8, 2):
        torch.manual_seed(0)
        found.append(first_step(make_model(), samples, str(folder), batch_size))
    return found


def test_accumulation_does_not_multiply_the_loss(modality, tiny_config, tiny_input, tmp_path):
    """8 x 1 against 2 x 4, as ViT does it in the same script."""
    head = getattr(bridle_hf, f"BridleFor{modality.capitalize()}Classification")
    config = tiny_config(modality, num_labels=3)
    inputs, name = tiny_input(modality, batch=8), INPUT_NAMES[modality]
    samples = [{name: values, "labels": torch.tensor(number % 3)} for number, values in enumerate(inputs)]
    whole, parts = both(lambda: head(config), samples, tmp_path)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_accumulation_of_pretraining_is_the_mean_over_micro_batches(modality, tiny_config, tiny_input, tmp_path):
    """Equal to the whole batch where each holds as many hidden patches; else the mean of their means."""
    config = tiny_config(modality, decoder_type="plain")  # Swin layers drop some of their position bias at random
    inputs, name = tiny_input(modality, batch=8), INPUT_NAMES[modality]
    patches = math.prod(config.patch_grid)
    hidden = torch.stack([torch.randperm(patches) < patches // 2 for _ in inputs])
    codes = torch.randint(config.codebook_size, (8, patches, config.num_codebooks))
    samples = [
        {name: values, "bool_masked_pos": mask, "labels": labels}
        for values, mask, labels in zip(inputs, hidden, codes)
    ]
    whole, parts = both(lambda: bridle_hf.BridleForPreTraining(config), samples, tmp_path)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_peer_does_the_same(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=3)
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(number % 3)} for number in range(8)]
    whole, parts = both(lambda: AutoModelForImageClassification.from_config(config), samples, tmp_path)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_quantized_by_torch(modality, tiny_config, tiny_input):
    """Linear layers in int8: close to float32, and of its own type where a dtype is asked for."""
    model = bridle_hf.BridleModel(tiny_config(modality)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    values = tiny_input(modality)
    with torch.no_grad():
        expected, found = (each(values).last_hidden_state for each in (model, quantized))
    similarity = torch.nn.functional.cosine_similarity(expected, found, dim=-1)
    assert similarity.mean() > 0.99
