"""To a Hub and back over HTTP, in processes of their own: models, tokenizer, feature extractor and cards."""

import json

import pytest
import torch
from helpers.fresh_process import run_fresh
from helpers.hub_stand_in import running_hub
from helpers.saved_folders import OWN_CLASS, assert_equal, expected, make_models
from huggingface_hub import ModelCard


torch.set_num_threads(1)

PUBLISH = """
    from pathlib import Path

    from huggingface_hub import HfApi, ModelCard
    from bridle_hf.cards.card import write_card
    from helpers.hub_stand_in import validate_cards_here
    from helpers.saved_folders import OWN_CLASS, make_models, save_all
    from cards.test_model_cards import RESULTS, RUN

    validate_cards_here()
    models = make_models()
    save_all(models, Path())
    for kind in OWN_CLASS:
        repo_id = f"org/{kind}"
        models[kind].push_to_hub(repo_id, token="hf_any")
        models["feature_extractor"].push_to_hub(repo_id, token="hf_any")
        card = ModelCard.load(write_card(kind, RUN, RESULTS, repo_id=repo_id))
        card.validate()
        card.push_to_hub(repo_id, token="hf_any")
    # All of a folder at once.
    api = HfApi(token="hf_any")
    api.create_repo("org/folder")
    api.upload_folder(repo_id="org/folder", folder_path="classifier")
"""

BY_REMOTE_CODE = """
    import re

    from huggingface_hub import ModelCard, snapshot_download
    from helpers.saved_folders import OWN_CLASS, load_everything, pipeline_scores
    from transformers import AutoFeatureExtractor

    try:
        import bridle_hf
    except ImportError:
        print("without the package")
    torch.save(load_everything("org", trust_remote_code=True), "outputs.pt")
    torch.save(pipeline_scores(snapshot_download("org/folder"), trust_remote_code=True), "scores.pt")
    for kind, auto_class in OWN_CLASS.items():
        snippet = re.search(r"```python\\n(.*?)```", ModelCard.load(f"org/{kind}").text, flags=re.DOTALL)[1]
        assert f'name = "org/{kind}"' in snippet
        exec(snippet, {})
        for loader in (auto_class, AutoFeatureExtractor):
            loaded = loader.from_pretrained(f"org/{kind}", trust_remote_code=True)
            loaded.push_to_hub(f"again/{kind}", token="hf_any")
"""

WITH_THE_PACKAGE = """
    import bridle_hf
    from helpers.saved_folders import load_everything

    for owner in ("org", "again"):
        torch.save(load_everything(owner, trust_remote_code=None), f"{owner}.pt")
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def wanted():
    return expected(make_models())


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Where the processes work: one has pushed everything, one has loaded it by remote code and pushed it again."""
    folder = tmp_path_factory.mktemp("hub")
    run_fresh(PUBLISH, folder / "publish", package=True, HF_ENDPOINT=hub.endpoint)
    said = run_fresh(BY_REMOTE_CODE, folder / "remote", package=False, HF_ENDPOINT=hub.endpoint)
    assert said.startswith("without the package\n")
    return folder


def test_by_remote_code(published, wanted):
    assert_equal(torch.load(published / "remote" / "outputs.pt"), wanted)


def test_uploaded_folder_in_a_pipeline(published, wanted):
    assert_equal({"pipeline": torch.load(published / "remote" / "scores.pt")}, {"pipeline": wanted["pipeline"]})


@pytest.mark.slow
def test_with_the_package_and_pushed_again_by_remote_code(published, hub, wanted):
    run_fresh(WITH_THE_PACKAGE, published / "package", package=True, HF_ENDPOINT=hub.endpoint)
    for owner in ("org", "again"):
        assert_equal(torch.load(published / "package" / f"{owner}.pt"), wanted)


@pytest.mark.parametrize("kind", OWN_CLASS)
def test_pushed_again_is_what_was_pushed(published, hub, kind):
    first, again = hub.files(f"org/{kind}")[1], hub.files(f"again/{kind}")[1]
    assert first.keys() == again.keys()
    assert {f"{target.split('.')[0]}.py" for target in json.loads(first["config.json"])["auto_map"].values()} < set(
        first
    )
    for path in first:
        if path != "README.md":
            assert again[path] == first[path], path


@pytest.mark.parametrize("kind", OWN_CLASS)
def test_pushed_card_is_the_one_written(published, hub, kind):
    pushed = hub.files(f"org/{kind}")[1]["README.md"].decode()
    assert pushed == (published / "publish" / kind / "README.md").read_text(encoding="utf-8")
    assert ModelCard(pushed).data.eval_results


def test_weights_went_through_large_file_storage(published, hub):
    weights = [content for repo in hub.repos for path, content in hub.files(repo)[1].items() if "safetensors" in path]
    assert len(weights) == 2 * len(OWN_CLASS) + 1
    assert all(content in hub.objects.values() for content in weights)
