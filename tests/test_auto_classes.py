"""Every saved folder through every Auto class: with the package, and by remote code alone in a fresh process."""

import json

import pytest
import torch
from helpers.fresh_process import run_fresh
from helpers.saved_folders import (
    OWN_CLASS,
    assert_equal,
    expected,
    load_everything,
    load_processors,
    make_models,
    save_all,
    save_processors,
)
from transformers import Trainer, TrainingArguments


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def wanted(models):
    return expected(models)


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    """Saved folders; the classifier's is written by `Trainer.save_model`."""
    root = tmp_path_factory.mktemp("saved")
    save_all(models, root)
    for path in (root / "classifier").iterdir():
        path.unlink()
    arguments = TrainingArguments(output_dir=root / "trainer", use_cpu=True, report_to="none")
    trainer = Trainer(models["classifier"], arguments, processing_class=models["feature_extractor"])
    trainer.save_model(root / "classifier")
    return root


@pytest.fixture(scope="module")
def by_remote_code(root):
    """Outputs of the folders in a process without the package, which also saved all of them again."""
    code = f"""
        from pathlib import Path
        from helpers.saved_folders import load_everything
        from transformers import AutoModelForAudioClassification

        torch.save(load_everything({str(root)!r}, True, again=Path("again")), "outputs.pt")
        model = AutoModelForAudioClassification.from_pretrained({str(root / "classifier")!r}, trust_remote_code=True)
        model.bridle.save_pretrained("encoder_of_classifier")
        try:
            import bridle_hf
        except ImportError:
            print("without the package")
    """
    assert run_fresh(code, root / "remote", package=False).endswith("without the package\n")
    return torch.load(root / "remote" / "outputs.pt")


def test_with_the_package(root, wanted):
    assert_equal(load_everything(str(root), trust_remote_code=False), wanted)


def test_remote_code_is_not_preferred_to_the_package(root, wanted):
    assert_equal(load_everything(str(root), trust_remote_code=True), wanted)


def test_by_remote_code(by_remote_code, wanted):
    assert_equal(by_remote_code, wanted)


def test_saved_again_by_remote_code(by_remote_code, root, wanted):
    again = root / "remote" / "again"
    assert_equal(load_everything(str(again), trust_remote_code=False), wanted)
    for kind in OWN_CLASS:
        assert {path.name for path in (again / kind).glob("*.py")} == {
            path.name for path in (root / kind).glob("*.py")
        }


@pytest.mark.slow
def test_loaded_again_by_remote_code(by_remote_code, root, wanted):
    again, encoder = str(root / "remote" / "again"), str(root / "remote" / "encoder_of_classifier")
    code = f"""
        from helpers.saved_folders import load_everything
        from transformers import AutoModel

        torch.save(load_everything({again!r}, True), "outputs.pt")
        AutoModel.from_pretrained({encoder!r}, trust_remote_code=True)
    """
    run_fresh(code, root / "remote_again", package=False)
    assert_equal(torch.load(root / "remote_again" / "outputs.pt"), wanted)


@pytest.mark.parametrize("kind", OWN_CLASS)
def test_saved_config_names_all_classes_whatever_was_saved_or_loaded(models, kind, tmp_path):
    model = models[kind]
    model.save_pretrained(tmp_path)
    # Read back, it carries an `auto_map`; saved twice, transformers has added its own entries.
    type(model).from_pretrained(tmp_path).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == type(model.config)._auto_map
    assert all((tmp_path / f"{target.split('.')[0]}.py").is_file() for target in auto_map.values())


def assert_right_processors(root, found: dict[str, str]) -> None:
    for name in ("audio", "image", "grey", "video"):
        saved = json.loads((root / name / "preprocessor_config.json").read_text())
        fitting, other = ("AutoFeatureExtractor", "AutoImageProcessor")[:: 1 if name == "audio" else -1]
        # Saved anew, it is what was there, not a mixture.
        assert json.loads(found[f"{name} {fitting}"]) == saved
        assert json.loads(found[f"{name} AutoProcessor"]) == saved
        assert "Error: " in found[f"{name} {other}"], f"{other} took the folder of {name}"


def test_no_auto_class_takes_another_modalitys_processor(tmp_path):
    save_processors(tmp_path)
    found = load_processors(str(tmp_path), trust_remote_code=False, again=tmp_path / "again")
    assert_right_processors(tmp_path, found)
    assert "settings of BridleFeatureExtractor" in found["audio AutoImageProcessor"]
    assert "settings of BridleVideoProcessor" in found["video AutoFeatureExtractor"]
    assert "settings of ViTImageProcessor" in found["image AutoFeatureExtractor"]
    assert "settings of BridleImageProcessor" in found["grey AutoFeatureExtractor"]


def test_no_auto_class_takes_another_modalitys_processor_by_remote_code(tmp_path):
    save_processors(tmp_path)
    code = f"""
        import json
        from pathlib import Path
        from helpers.saved_folders import load_processors

        print(json.dumps(load_processors({str(tmp_path)!r}, True, Path("again"))))
    """
    found = json.loads(run_fresh(code, tmp_path / "fresh", package=False).splitlines()[-1])
    assert_right_processors(tmp_path, found)
