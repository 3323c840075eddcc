"""Releases: what is exported is what was trained, in half the bytes; cards with their licences; limits of size."""

import json
import re

import pytest
import torch
from helpers.tiny_run import write_recipe, write_recordings
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForPreTraining

from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError
from bridle_hf.modeling_bridle import BridleForPreTraining, BridleModel
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs
from bridle_hf.release import release
from bridle_hf.release.arguments import ReleaseArguments
from bridle_hf.release.measuring import MEASURED, Measured
from bridle_hf.release.release import RELEASES, Release, make_releases
from bridle_hf.study.sets import Task


torch.set_num_threads(1)

# Of licences that let anyone use, change and sell what is made of the material.
PERMISSIVE = {"MIT", "CC0-1.0", "public domain", "BSD-like, of Carnegie Mellon University"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A release of seconds, with one task to measure."""
    root = tmp_path_factory.mktemp("release")
    (root / "data").mkdir()
    data = write_recordings(root / "data", labels=True)
    tiny = Release(
        "audio",
        write_recipe(root / "recipe.yaml"),
        lambda cache: data,
        RELEASES["bridle-audio-small"].materials,
        "For tests.",
    )
    patch = pytest.MonkeyPatch()
    patch.setitem(RELEASES, "tiny", tiny)
    tasks = {"sounds: kind (2)": Measured(lambda cache: data, Task(folds=4))}
    patch.setitem(MEASURED, "audio", tasks)
    args = ReleaseArguments(str(root / "out"), str(root / "released"), ["tiny"])
    lines = list(make_releases(args))
    yield root, args, lines
    patch.undo()


def test_what_is_exported_was_trained(made):
    root, _, lines = made
    assert lines == [f"tiny: {root / 'released' / 'tiny'}"]
    for part, place in {"encoder": "tiny", "tokenizer": "tiny/tokenizer"}.items():
        trained = AutoModelForPreTraining.from_pretrained(root / "out" / "tiny" / "pretraining" / part)
        loaded = AutoModelForPreTraining.from_pretrained(root / "released" / place)
        assert loaded.dtype == torch.float32
        for name, tensor in trained.state_dict().items():
            kept = tensor if "quantizer" in name else tensor.half().float()  # a code that is rounded is another
            torch.testing.assert_close(loaded.state_dict()[name], kept, rtol=0, atol=0)
        sizes = [
            (root / folder / "model.safetensors").stat().st_size
            for folder in (f"released/{place}", f"out/tiny/pretraining/{part}")
        ]
        assert 0.4 < sizes[0] / sizes[1] < 0.75
    assert AutoModel.from_pretrained(root / "released" / "tiny").dtype == torch.float32


def test_the_card_lists_licences_and_what_was_measured(made):
    root, *_ = made
    content = (root / "released" / "tiny" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(content)
    assert card.data.license == "mit"
    (result,) = card.data.eval_results
    measured = json.loads((root / "out" / "tiny" / "measured.json").read_text(encoding="utf-8"))["tasks"]
    scores = measured["sounds: kind (2)"]
    assert result.metric_value == scores["encoder"] and set(scores) == {
        "encoder",
        "untrained",
        "patches",
        "log-mel regression",
    }
    for material in RELEASES["tiny"].materials:
        package = material.package
        assert f"| `{package.name} {package.version}` | {package.client} | {material.licence} |" in content
    assert "For tests." in content
    assert "tiny/tokenizer" in (root / "released" / "tiny" / "tokenizer" / "README.md").read_text(encoding="utf-8")


def test_the_same_command_goes_on_where_it_was(made, monkeypatch):
    """Nothing is trained or measured again; measured numbers of other weights do not count."""
    root, args, lines = made
    monkeypatch.setattr(release, "measure", lambda *arguments: pytest.fail("measured again"))
    assert list(make_releases(args)) == lines
    path = root / "out" / "tiny" / "measured.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(re.sub('"weights": "..', '"weights": "  ', before), encoding="utf-8")
    monkeypatch.setattr(release, "measure", lambda *arguments: {"encoder": 0.5})
    list(make_releases(args))
    assert json.loads(path.read_text(encoding="utf-8"))["tasks"] == {"sounds: kind (2)": {"encoder": 0.5}}


def test_a_name_that_is_none_is_refused(tmp_path):
    args = ReleaseArguments(str(tmp_path / "out"), str(tmp_path / "released"), ["bridle-audio-smal"])
    with pytest.raises(ArgumentError, match="no checkpoint 'bridle-audio-smal'; did you mean 'bridle-audio-small'"):
        list(make_releases(args))


@pytest.mark.parametrize("name", [name for name in RELEASES if name.startswith("bridle-")])
def test_recipes_make_encoders_of_the_promised_size(name):
    (args,) = make_arguments(PretrainArguments, recipe=RELEASES[name].recipe, values={"data": "-", "output_dir": "-"})
    assert args.modality == RELEASES[name].modality
    config, _ = make_configs(args)
    with torch.device("meta"):
        encoder, whole = BridleModel(config), BridleForPreTraining(config)
    assert 3e6 <= sum(weight.numel() for weight in encoder.parameters()) <= 6e6
    assert 2 * sum(weight.numel() for weight in whole.parameters()) < 12e6
    assert {material.licence for material in RELEASES[name].materials} <= PERMISSIVE
