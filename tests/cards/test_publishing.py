"""--push_to_hub of pretraining and of fine-tuning, and `bridle push`: against a Hub on 127.0.0.1, in processes."""

import json

import pytest
from helpers.fresh_process import run_fresh
from helpers.hub_stand_in import metadata_errors, running_hub
from helpers.tiny_run import run_script, write_recipe, write_recordings
from huggingface_hub import ModelCard

from bridle_hf.cards.arguments import check_publishing


PROLOGUE = """
    import json, os
    from pathlib import Path
    from huggingface_hub import ModelCard
    from bridle_hf import commands
    from helpers.hub_stand_in import validate_cards_here
    from helpers.tiny_run import write_recipe, write_recordings

    validate_cards_here()
    data, recipe = write_recordings(Path("data"), labels=True), write_recipe(Path("recipe.yaml"))
    pretrain = ["pretrain", recipe, "--data", data, "--steps_scale", "0.2", "--push_to_hub", "true"]
    finetune = ["finetune", "--data", data, "--validation_fraction", "0.5", "--num_train_epochs", "1",
                "--push_to_hub", "true", "--disable_tqdm", "true"]

    def run(*words):
        commands.run(None, [str(word) for word in words])

    def end(*words):
        try:
            run(*words)
        except Exception as error:
            return [type(error).__name__, str(error)]
"""

PUSH = """
    run(*pretrain, "--output_dir", "run", "--hub_model_id", "org/notes", "--license", "cc-by-4.0",
        "--hub_private", "true")
    run(*finetune, "--model", "org/notes", "--output_dir", "classifier", "--hub_model_id", "namer", "--license", "mit")

    # As anyone may load it with the package.
    from helpers.sounds import write_tone
    from transformers import AutoModel, pipeline
    classify = pipeline("audio-classification", model="me/namer")
    encoder = AutoModel.from_pretrained("org/notes")
    tokenizer = AutoModel.from_pretrained("org/notes-tokenizer")
    loaded = {"scores": classify(write_tone(Path("tone.wav"))), "width": encoder.config.hidden_size,
              "codebooks": tokenizer.config.num_codebooks}

    # What the Hub refuses.
    words = {"pretrain": [*pretrain, "--output_dir", "out"],
             "finetune": [*finetune, "--model", "run/encoder", "--output_dir", "out"]}
    said = {}
    for name, command in words.items():
        command += ["--license", "mit"]
        said[name, "licence"] = end(*command[:-1], "mine", "--hub_model_id", "org/x")
        said[name, "public"] = end(*command, "--hub_model_id", "org/public", "--hub_private", "true")
        os.environ["HF_TOKEN"] = "hf_read"
        said[name, "reads"] = end(*command, "--hub_model_id", "org/x")
        said[name, "reads what is there"] = end(*command, "--hub_model_id", "org/public")
        del os.environ["HF_TOKEN"]
        said[name, "no login"] = end(*command, "--hub_model_id", "org/x")
        os.environ["HF_TOKEN"] = "hf_write"
    said["finetune", "folds"] = end(*words["finetune"][:3], "--folds", "all", *words["finetune"][5:],
                                    "--hub_model_id", "org/x")
    refused = [[*key, *value] for key, value in said.items()]
    print(json.dumps({**loaded, "refused": refused, "trained": Path("out").exists()}))
"""

LOAD = """
    import json, re
    from helpers.hub_stand_in import hub_snippets
    from huggingface_hub import ModelCard
    from transformers import pipeline

    for name in ("org/notes", "org/notes-tokenizer", "me/namer"):
        card = ModelCard.load(name)
        own = re.search(r"```python\\n(.*?)```", card.text, re.DOTALL)[1]
        for snippet in [own, *hub_snippets(name, card.data.pipeline_tag)]:
            exec(snippet, {})
    print(json.dumps(pipeline("audio-classification", model="me/namer", trust_remote_code=True)("../push/tone.wav")))
"""

BROKEN = """
    said = [end(*pretrain, "--output_dir", "pretrained", "--hub_model_id", "org/a", "--license", "mit"),
            end(*finetune, "--model", "pretrained/encoder", "--output_dir", "finetuned", "--hub_model_id", "org/b",
                "--license", "mit"),
            end("push", "data"), end("push", "pretrained", "--hub_model_id", "a/b/c")]
    os.chdir("data")  # where the paths that the runs were given lead nowhere
    run("push", "../pretrained")
    run("push", "../finetuned", "--hub_model_id", "org/elsewhere", "--license", "apache-2.0")
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Where the processes work, and what the one that pushed said in the end."""
    hub.repos["org/public"] = []
    hub.commit("org/public", {"README.md": b"mine"})
    folder = tmp_path_factory.mktemp("publishing")
    said = run_fresh(PROLOGUE + PUSH, folder / "push", package=True, HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_write")
    return folder, json.loads(said.splitlines()[-1])


def card(hub, name):
    content = hub.files(name)[1]["README.md"].decode()
    assert metadata_errors(content) == []
    return ModelCard(content)


def test_what_pretraining_and_fine_tuning_have_pushed(hub, published):
    folder, _ = published
    assert hub.private == {"org/notes", "org/notes-tokenizer"}
    kept = {"org/notes": "run/encoder", "org/notes-tokenizer": "run/tokenizer", "me/namer": "classifier"}
    for name, model in kept.items():
        pushed = hub.files(name)[1]
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_bridle.py"} < pushed.keys()
        assert not [path for path in pushed if "/" in path or path in ("run.json", "results.json", ".lock")]
        assert pushed["model.safetensors"] == (folder / "push" / model / "model.safetensors").read_bytes()
        assert f'name = "{name}"' in pushed["README.md"].decode()
        assert str(folder) not in pushed["README.md"].decode()


def test_their_cards(hub, published):
    for name in ("org/notes", "org/notes-tokenizer"):
        data = card(hub, name).data
        assert (data.license, data.base_model, data.pipeline_tag) == ("cc-by-4.0", None, None)
    data = card(hub, "me/namer").data
    assert (data.license, data.base_model, data.pipeline_tag) == ("mit", "org/notes", "audio-classification")
    assert data.eval_results[0].metric_name == "accuracy"


def test_they_load_with_the_package_and_by_remote_code(hub, published):
    folder, said = published
    assert (said["width"], said["codebooks"]) == (16, 2)
    loaded = run_fresh(LOAD, folder / "load", package=False, HF_ENDPOINT=hub.endpoint)
    scores = json.loads(loaded.splitlines()[-1])
    assert [entry["label"] for entry in scores] == [entry["label"] for entry in said["scores"]]
    assert [entry["score"] for entry in scores] == pytest.approx([entry["score"] for entry in said["scores"]])
    assert {entry["label"] for entry in scores} == {"noise", "tone"}


def test_what_cannot_be_pushed_is_refused_before_training(hub, published):
    _, said = published
    assert not said["trained"]
    parts = {
        "licence": ("--license mine: the Hub cannot take it", "must be one of"),
        "public": ("--hub_private: org/public is there and public",),
        "reads": ("--hub_model_id org/x: the Hub cannot take it", "This token may read alone"),
        "reads what is there": ("--hub_model_id org/public", "This token may read alone"),
        "no login": ("not logged in to the Hub: run `hf auth login`",),
        "folds": ("--push_to_hub pushes one model",),
    }
    assert len(said["refused"]) == 11
    for command, what, kind, line in said["refused"]:
        assert kind == "ArgumentError" and "\n" not in line, (command, line)
        assert all(part in line for part in parts[what]), (command, line)
    assert "org/x" not in hub.repos and hub.files("org/public")[1] == {"README.md": b"mine"}


@pytest.mark.slow
def test_a_failed_push_loses_nothing_and_is_done_again_by_a_command(hub, published):
    folder, hub.failures = published[0], 2
    said = run_fresh(PROLOGUE + BROKEN, folder / "broken", package=True, HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_write")
    pretrained, finetuned, no_run, wrong_id = json.loads(said.splitlines()[-1])
    for name, (kind, line) in {"pretrained": pretrained, "finetuned": finetuned}.items():
        assert kind == "RunError" and "\n" not in line
        assert f"{name} is whole, but was not pushed to" in line and f"`bridle push {name}` does it again" in line
        assert "The storage is full" in line
    assert no_run == ["ArgumentError", "data holds no run of pretraining or fine-tuning"]
    assert wrong_id[0] == "ArgumentError" and "--hub_model_id is 'a/b/c'" in wrong_id[1]
    for name, kept in {"org/a": "pretrained/encoder", "org/a-tokenizer": "pretrained/tokenizer",
                       "org/elsewhere": "finetuned"}.items():  # fmt: skip
        pushed = hub.files(name)[1]
        assert pushed["model.safetensors"] == (folder / "broken" / kept / "model.safetensors").read_bytes()
    assert (card(hub, "org/a").data.license, card(hub, "org/elsewhere").data.license) == ("mit", "apache-2.0")
    assert card(hub, "org/elsewhere").data.base_model is None  # a folder's path is none


COMMAND = """
import sys
from helpers.hub_stand_in import validate_cards_here
from bridle_hf.commands import main

validate_cards_here()
main(argv=sys.argv[1:])
"""


@pytest.mark.slow
def test_one_of_two_processes_pushes_and_a_refusal_ends_both(hub, tmp_path):
    words = ["pretrain", write_recipe(tmp_path / "recipe.yaml"), "--data", write_recordings(tmp_path / "data"),
             "--steps_scale", "0.2", "--push_to_hub", "true", "--license", "mit", "--hub_model_id"]  # fmt: skip
    kept = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_write", "HF_HOME": str(tmp_path / "hf_home")}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def run(name, out, **changes):
        words_of_run = [*words, name, "--output_dir", str(tmp_path / out), str(tmp_path / "command.py")]
        return run_script(COMMAND, *words_of_run, processes=2, **kept | changes)

    done = run("org/both", "out")
    assert done.returncode == 0, done.stderr
    for name, model in {"org/both": "encoder", "org/both-tokenizer": "tokenizer"}.items():
        assert len(hub.repos[name]) == 2, "made, and pushed to once"
        assert hub.files(name)[1]["model.safetensors"] == (tmp_path / "out" / model / "model.safetensors").read_bytes()
    refused = run("org/never", "refused", HF_TOKEN="hf_read")
    assert refused.returncode != 0 and refused.stderr.count("This token may read alone") == 1
    assert "org/never" not in hub.repos and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("wrong", "given"),
    [
        ("--license is 'MIT'", {"license": "MIT"}),
        ("--license is ''", {"license": ""}),
        ("--hub_model_id is for --push_to_hub", {"push_to_hub": False}),
        ("--hub_private is for --push_to_hub", {"push_to_hub": False, "hub_private": True}),
        ("needs --hub_model_id", {"hub_model_id": None}),
        ("needs --license", {"license": None}),
        ("--hub_model_id is 'datasets/org/name'", {"hub_model_id": "datasets/org/name"}),
        ("--hub_model_id is 'my model'", {"hub_model_id": "my model"}),
        ("--hub_model_id is ''", {"hub_model_id": ""}),
    ],
)
def test_what_no_hub_would_take(wrong, given):
    right = {"push_to_hub": True, "hub_model_id": "org/name", "hub_private": False, "license": "mit"}
    check_publishing(**right)
    with pytest.raises(ValueError, match=wrong):
        check_publishing(**{**right, **given})
