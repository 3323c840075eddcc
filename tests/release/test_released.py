"""Checkpoints in model_cards/released: their sizes, cards and licences; slow: each does what its card says."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel

import bridle_hf
from bridle_hf.release.measuring import MEASURED, measure
from bridle_hf.release.release import RELEASES


FOLDER = Path(__file__).parents[2] / "model_cards" / "released"


@pytest.fixture(params=list(RELEASES))
def released(request) -> Path:
    folder = FOLDER / request.param
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not released yet")
    return folder


def test_it_is_small_and_loads(released):
    weights = released / "model.safetensors"
    assert weights.stat().st_size < 12e6
    assert sum(path.stat().st_size for path in released.rglob("*") if path.is_file()) < 24e6
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    encoder, tokenizer = AutoModel.from_pretrained(released), AutoModel.from_pretrained(released / "tokenizer")
    assert 3e6 <= sum(weight.numel() for weight in encoder.parameters()) <= 6e6
    assert encoder.dtype == torch.float32 and tokenizer.config.patch_grid == encoder.config.patch_grid


def test_its_code_is_that_of_the_package(released):
    """It loads without the package, by copies beside the weights."""
    copies = list(released.rglob("*.py"))
    for copy in copies:
        assert copy.read_bytes() == (Path(bridle_hf.__file__).parent / copy.name).read_bytes(), (
            f"{copy} is old: make released-code"
        )
    assert copies


def test_the_card_lists_every_material_and_task(released):
    content = (released / "README.md").read_text(encoding="utf-8")
    release = RELEASES[released.name]
    for material in release.materials:
        assert f"| `{material.package.name} {material.package.version}` |" in content and material.licence in content
    assert release.uses in content
    assert [result.task_name for result in ModelCard(content).data.eval_results] == list(MEASURED[release.modality])


@pytest.mark.slow
def test_its_headline_comes_out_again(released, tmp_path):
    (name, measured), *_ = MEASURED[RELEASES[released.name].modality].items()
    headline, *_ = ModelCard.load(released / "README.md").data.eval_results
    assert headline.task_name == name
    found = measure(released, measured, None, tmp_path / "skipped.jsonl", controls=False)
    assert found["encoder"] == pytest.approx(headline.metric_value, abs=0.01)
