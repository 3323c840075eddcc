"""Saved models, whole and broken in many ways: what is loaded fits together, and what does not is told in one line."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.sounds import save_encoder, write_sounds
from safetensors.torch import load_file, save_file
from transformers import ASTFeatureExtractor, AutoModel, AutoModelForAudioClassification, ViTImageProcessor

from bridle_hf import BridleConfig, BridleModel, make_image_processor
from bridle_hf.commands import main
from bridle_hf.data.modalities import load_config, load_processor, load_weights


DEEP = "[" * 100_000


def set_fields(name, **fields):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: w for k, w in weights.items() if "layers.1.mlp.fc1" not in k}, folder / "model.safetensors")


BROKEN = {
    "wrong type": (set_fields("config.json", hidden_size="abc"), "hidden_size"),
    "wrong value": (set_fields("config.json", num_attention_heads=5), "num_attention_heads"),
    "null": (set_fields("config.json", patch_size=None), "patch_size"),
    "three sizes": (set_fields("config.json", patch_size=[16, 16, 16]), "patch_size"),
    "no such modality": (set_fields("config.json", modality="radar"), "modality"),
    "labels": (set_fields("config.json", id2label=[1, 2]), "config|no model"),
    "dtype": (set_fields("config.json", dtype="float99"), "float99"),
    "activation": (set_fields("config.json", hidden_act="gulp"), "hidden_act.*gulp"),
    "no config": (write("config.json", "[[[["), "JSON"),
    "deep config": (write("config.json", DEEP), "recursion"),
    "list for a config": (write("config.json", "[]"), "no model is there"),
    "no processor": (write("preprocessor_config.json", "[[[["), "processor.*JSON"),
    "deep processor": (write("preprocessor_config.json", DEEP), "processor.*recursion"),
    "list for a processor": (write("preprocessor_config.json", "[]"), "processor"),
    "mel bins": (set_fields("preprocessor_config.json", num_mel_bins=64, feature_size=64), "64 mel bins.*32"),
    "mel bins of a wrong type": (set_fields("preprocessor_config.json", num_mel_bins="x"), "num_mel_bins"),
    "AST's extractor": (lambda folder: ASTFeatureExtractor().save_pretrained(folder), "ASTFeatureExtractor, not a Br"),
    "image processor": (lambda folder: ViTImageProcessor().save_pretrained(folder), "ViTImageProcessor"),
    "half of the weights": (cut, "weights cannot be loaded"),
    "empty weights": (write("model.safetensors", ""), "weights cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "other sizes": (set_fields("config.json", intermediate_size=64), "weights cannot be loaded"),
    "a weight too few": (drop_a_weight, "weights are missing, as layers.1.mlp.fc1"),
    "a layer too many": (set_fields("config.json", num_hidden_layers=3), "weights are missing, as layers.2"),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return Path(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_in_one_error(encoder, tmp_path, name):
    break_it, message = BROKEN[name]
    folder = str(shutil.copytree(encoder, tmp_path / "broken"))
    break_it(Path(folder))
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        load_processor(folder, load_config(folder))
        load_weights(AutoModel, folder)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["wrong type", "deep config", "list for a processor", "mel bins", "half of the weights"]
)
def test_commands_end_with_one_line(encoder, tmp_path, capsys, name):
    folder = shutil.copytree(encoder, tmp_path / "broken")
    BROKEN[name][0](folder)
    data = write_sounds(tmp_path / "sounds", per_class=2)
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}, "data": data}))
    commands = {
        "probe": ["--model", folder, "--data", data, "--folds", "2"],
        "finetune": ["--model", folder, "--data", data, "--output_dir", tmp_path / "out", "--eval_group", "1"],
        "card": [folder, "--run", tmp_path / "run.json"],
    }
    if name == "half of the weights":
        del commands["card"]  # it reads none
    for command, words in commands.items():
        with pytest.raises(SystemExit) as caught:
            main(argv=[command, *map(str, words)])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and len(error[error.index("error: ") :].splitlines()) == 1
        assert str(folder) in error


def test_the_record_of_a_run_that_is_none(encoder, tmp_path, capsys):
    for text, message in {"[[[[": "is not JSON", DEEP: "is not JSON", "[]": "not the record", "{}": "lacks"}.items():
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(SystemExit):
            main(argv=["card", str(encoder), "--run", str(tmp_path / "run.json")])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and "run.json" in line
    (tmp_path / "metrics.jsonl").write_text(DEEP)
    (tmp_path / "run.json").write_text(DEEP)
    with pytest.raises(SystemExit):
        main(argv=["report", str(tmp_path)])
    assert "run.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_processor_of_pixels_fits_its_model(modality, tmp_path):
    config = BridleConfig(modality=modality, image_size=32, num_frames=4, hidden_size=16, num_attention_heads=2)
    make_image_processor(config).save_pretrained(tmp_path)
    assert load_processor(tmp_path, config).crop_size["height"] == 32
    larger = {"crop_size": {"height": 48, "width": 64}}  # whole patches: the model takes them
    set_fields("preprocessor_config.json", **larger)(tmp_path)
    load_processor(tmp_path, config)
    for fields, message in [
        ({"crop_size": {"height": 40, "width": 40}}, "cannot be cut into patches"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "1 channels"),
        ({"do_center_crop": False}, "no fixed height"),
        ({"image_processor_type": "CLIPImageProcessor"}, "(it is a|settings of) CLIPImageProcessor"),
    ]:
        make_image_processor(config).save_pretrained(tmp_path)
        set_fields("preprocessor_config.json", **fields)(tmp_path)
        with pytest.raises(ValueError, match=f"its processor (does not fit the model|cannot be loaded).*{message}"):
            load_processor(tmp_path, config)


def test_a_head_may_be_missing(encoder, tmp_path):
    BridleModel.from_pretrained(encoder).save_pretrained(tmp_path)
    model = load_weights(AutoModelForAudioClassification, str(tmp_path), num_labels=3)
    assert model.config.num_labels == 3
