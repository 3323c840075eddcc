"""Models in 8 and 4 bits, by torchao and bitsandbytes, as they are loaded (docs/toolbox.md); adapters on these.

    make test-quantization      # prints the differences

Both libraries are imported by every process that imports transformers, where they are installed: a second each. So
they are no part of what development needs.
"""

import pytest
import torch
from helpers.classifiers import CLASSIFIERS
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, TorchAoConfig


REASON = "is not installed: make test-quantization"
ao = pytest.importorskip("torchao.quantization", reason=f"torchao {REASON}")
pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {REASON}")


@pytest.fixture
def saved(tmp_path):
    """A classifier of each modality, of sizes that 4-bit kernels take, in a folder."""

    def make(tiny_config, modality: str) -> tuple[torch.nn.Module, str]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3}
        model = CLASSIFIERS[modality](tiny_config(modality, **sizes)).eval()
        model.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return make


QUANTIZED = {
    "torchao int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
    "torchao int8 of activations, too": lambda: TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"]),
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_as_it_is_loaded(saved, tiny_config, tiny_input, modality, name):
    model, folder = saved(tiny_config, modality)
    quantized = type(model).from_pretrained(folder, quantization_config=QUANTIZED[name]()).eval()
    # Nothing but the linear layers is: what adapters and processors find is as it was.
    assert [name for name, _ in quantized.named_modules()] == [name for name, _ in model.named_modules()]
    values = tiny_input(modality)
    found, expected = (each(values, output_hidden_states=True).hidden_states[-1] for each in (quantized, model))
    assert not torch.equal(found, expected)
    difference = float((found.float() - expected).abs().max() / expected.abs().max())
    print(f"{name}: {difference:.2g}")
    assert difference < (0.3 if "4 bit" in name else 0.05)


def test_adapters_on_four_bits(saved, tiny_config, tiny_input, modality):
    """QLoRA: the frozen weights in 4 bits, what is trained in float32."""
    model, folder = saved(tiny_config, modality)
    quantized = type(model).from_pretrained(folder, quantization_config=QUANTIZED["bitsandbytes 4 bit"]())
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = get_peft_model(prepare_model_for_kbit_training(quantized), config).train()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    values, losses = tiny_input(modality), []
    for _ in range(8):
        loss = adapted(values, labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in moved)
