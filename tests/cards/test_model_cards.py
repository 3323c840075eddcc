"""Cards of every kind: metadata that the Hub takes, facts from the run and the folder, snippets that run."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.hub_stand_in import hub_snippets, metadata_errors
from helpers.saved_folders import make_models, save_all
from huggingface_hub import ModelCard
from PIL import Image

import bridle_hf
from bridle_hf import commands
from bridle_hf.cards.card import readdress_card, write_card


torch.set_num_threads(1)

RUN = {
    "arguments": {"data": "/home/me/notes", "output_dir": "/home/me/out", "global_batch_size": 64, "license": "mit"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "git_revision": "0123abcd",
    "seed": 7,
    "modality": "audio",
    "data": "/home/me/notes",
    "phases": [
        {"kind": "encoder", "iteration": 0, "steps": 600},
        {"kind": "tokenizer", "iteration": 1, "steps": 500},
        {"kind": "encoder", "iteration": 1, "steps": 600},
    ],
    "samples": 3024,
    "seconds": 412.3,
}
RESULTS = {
    "instrument, octaves held out, linear probe": {
        "metric": "accuracy",
        "value": 0.671,
        "controls": {"untrained encoder": 0.53, "log-mel regression": 0.477},
        "note": "folds seen unlabelled in pretraining",
    }
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    save_all(make_models(), root)
    return root


@pytest.mark.parametrize("results", [None, RESULTS])
@pytest.mark.parametrize("kind", ["pretraining", "base", "classifier", "tokenizer"])
def test_card_is_valid_and_its_snippets_run(root, kind, results, monkeypatch, capsys):
    path = write_card(root / kind, RUN, results)
    content = path.read_text(encoding="utf-8")
    assert metadata_errors(content) == []
    data = ModelCard(content).data
    assert (data.license, data.library_name) == ("mit", "transformers")
    assert data.pipeline_tag == ("audio-classification" if kind == "classifier" else None)
    assert {"bridle", "self-supervised", "audio"} <= set(data.tags)
    monkeypatch.chdir(root)
    snippets = re.findall(r"```python\n(.*?)```", content, flags=re.DOTALL)
    assert len(snippets) == 1
    exec(snippets[0], {})
    assert_comments_tell_what_is_printed(snippets[0], capsys.readouterr().out.splitlines())
    for snippet in hub_snippets(kind, data.pipeline_tag):
        exec(snippet, {})


def assert_comments_tell_what_is_printed(snippet, printed):
    """`print(x.shape)  # (batch, class token + 8 patches, 32)` against `torch.Size([2, 9, 32])`."""
    for line, comment in zip(printed, re.findall(r"\.shape\)  # \((.*?)\)", snippet)):
        sizes = [
            sum(int(n) for n in re.findall(r"\d+", part)) + ("class token" in part) for part in comment.split(",")
        ]
        assert list(map(int, re.findall(r"\d+", line)))[1:] == sizes[1:]


def test_measured_results_and_their_controls(root):
    content = write_card(root / "base", RUN, RESULTS).read_text(encoding="utf-8")
    assert "0.671 | untrained encoder 0.53, log-mel regression 0.477 | folds seen unlabelled" in content
    (result,) = ModelCard(content).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.671)
    assert (result.dataset_type, result.dataset_name, result.task_type) == ("notes", "notes", "audio-classification")
    from_run = write_card(root / "base", {**RUN, "results": RESULTS}).read_text(encoding="utf-8")
    assert from_run == content
    with pytest.raises(TypeError, match="valeu"):
        write_card(root / "base", RUN, {"accuracy": {"metric": "accuracy", "valeu": 1.0}})


def test_card_tells_the_run_and_nothing_of_the_machine(root):
    content = write_card(root / "base", RUN).read_text(encoding="utf-8")
    for fact in [
        "3024 samples",
        "412 s",
        "git revision 0123abcd",
        "torch 2.13.0, transformers 5.23.0",
        "| seed | 7 |",
    ]:
        assert fact in content
    assert "| 2 | tokenizer | 1 | 500 |" in content
    assert '"global_batch_size": 64' in content
    assert "mean -3.0 and standard deviation\n2.0, padded or cut to 64 frames" in content
    assert "/home/me" not in content
    assert "nothing was measured" in content
    assert "2502.02118" in content


def test_what_the_run_does_not_state_is_unknown(root):
    run = {**RUN, "arguments": {}, "git_revision": None}
    content = write_card(root / "base", run).read_text(encoding="utf-8")
    assert ModelCard(content).data.license == "unknown"
    assert "states no licence" in content and "not run from a git checkout" in content


def test_hub_data_and_repository(root):
    run = {**RUN, "data": "org/notes"}
    content = write_card(root / "classifier", run, RESULTS, repo_id="org/model").read_text(encoding="utf-8")
    data = ModelCard(content).data
    assert metadata_errors(content) == []
    assert data.datasets == ["org/notes"] and data.eval_results[0].dataset_type == "org/notes"
    assert data.model_name == "model" and 'name = "org/model"' in content


def test_a_card_needs_the_processor(root, tmp_path):
    bridle_hf.BridleModel.from_pretrained(root / "base").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        write_card(tmp_path, RUN)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_other_modalities(modality, tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    sizes |= {"image_size": 32, "num_frames": 4, "modality": modality}
    estimator = {"estimator_hidden_size": 16, "estimator_num_hidden_layers": 1, "estimator_num_attention_heads": 2}
    tokenizer = bridle_hf.BridleTokenizerConfig(**sizes, **estimator, code_dim=8)
    classifier = getattr(bridle_hf, f"BridleFor{modality.title()}Classification")
    models = {
        "encoder": bridle_hf.BridleModel(bridle_hf.BridleConfig(**sizes)),
        "tokenizer": bridle_hf.BridleTokenizerModel(tokenizer),
        "classifier": classifier(bridle_hf.BridleConfig(**sizes)),
    }
    monkeypatch.chdir(tmp_path)
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        bridle_hf.make_image_processor(model.config).save_pretrained(tmp_path / kind)
        content = write_card(tmp_path / kind, {**RUN, "modality": modality}).read_text(encoding="utf-8")
        assert metadata_errors(content) == []
        exec(re.search(r"```python\n(.*?)```", content, flags=re.DOTALL)[1], {})
        names: dict = {}
        for snippet in hub_snippets(kind, ModelCard(content).data.pipeline_tag):
            exec(snippet, names)
        if modality == "image" and kind != "tokenizer":
            answer = names["pipe"](Image.new("RGB", (40, 40)))
            assert answer[0]["label"] == "LABEL_0" if kind == "classifier" else np.shape(answer) == (1, 5, 32)


def test_command_line(root, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    words = ["card", str(root / "tokenizer"), "--run", str(tmp_path / "run.json"), "--repo_id", "org/codes"]
    commands.run(None, words)
    assert 'name = "org/codes"' in (root / "tokenizer" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "metadata",
    ["license: mine", "pipeline_tag: hearing", "tags: bridle", "model-index:\n- name: a\n  results: [{}]"],
)
def test_the_stand_in_refuses_wrong_metadata(metadata):
    assert metadata_errors(f"---\n{metadata}\n---\n")


def test_a_card_that_is_readdressed_keeps_what_it_says(root):
    """Results that a run.json lacks, and what was written by hand."""
    path = write_card(root / "base", RUN, RESULTS)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("## Limits", "## Limits\n\nNot for bats."), encoding="utf-8")
    readdress_card(path, "org/birds", "apache-2.0")
    found = path.read_text(encoding="utf-8")
    wanted = write_card(root / "base", {**RUN, "arguments": {**RUN["arguments"], "license": "apache-2.0"}}, RESULTS,
                        repo_id="org/birds").read_text(encoding="utf-8")  # fmt: skip
    assert ModelCard(found).data.to_dict() == ModelCard(wanted).data.to_dict()
    body, ours = ModelCard(wanted).text, ModelCard(found).text.replace("\n\nNot for bats.", "")
    before = '"license": "mit"'  # the run's own arguments stay
    assert ours.replace(before, "") == body.replace('"license": "apache-2.0"', "")
