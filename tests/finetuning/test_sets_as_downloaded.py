"""Fine-tuning on sets as they are downloaded, in miniature: their splits, their classes in order, and kind."""

import json

import pytest
from helpers import miniatures
from helpers.pixels import save_pixel_encoder
from helpers.sounds import save_encoder

from bridle_hf.commands import main


CLASSES = {
    "speech_commands": ["bed", "no", "yes"],
    "audioset": [name for _, name in miniatures.AUDIOSET],
    "audioset_balanced": [name for _, name in miniatures.AUDIOSET],
    "fsd50k": [name for name, _ in miniatures.FSD50K],
    "imagenet": ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"],
    "kinetics": ["abseiling", "air drumming", "zumba"],
    "ssv2": list(miniatures.SSV2),
}
MULTI_LABEL = {"audioset", "audioset_balanced", "fsd50k"}
# Evaluated on, and samples to train on, to evaluate on and to test: as the set's own lists say.
PARTS = {
    "speech_commands": ("split validation", 6, 3, 3), "audioset": ("split test", 4, 2, 0),
    "audioset_balanced": ("split test", 2, 2, 0), "fsd50k": ("split validation", 3, 1, 2),
    "imagenet": ("split validation", 6, 3, 0), "kinetics": ("split validation", 3, 2, 0),
    "ssv2": ("split validation", 3, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_set_trains_as_it_is_meant_to(tmp_path, name):
    folder = getattr(miniatures, f"write_{name.removesuffix('_balanced')}")(tmp_path / "data")
    modality = {"imagenet": "image", "kinetics": "video", "ssv2": "video"}.get(name, "audio")
    model = save_encoder(tmp_path / "encoder") if modality == "audio" else save_pixel_encoder(
        tmp_path / "encoder", modality, **({"num_channels": 3} if modality == "image" else {})
    )  # fmt: skip
    words = ["--model", model, "--data", str(folder), "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1"]
    words += ["--balanced_sampling", "true", "--disable_tqdm", "true", "--save_strategy", "no"]
    words += ["--load_best_model_at_end", "false"]
    main("finetune", words + (["--layout", name] if name == "audioset_balanced" else []))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    held_out, *counts = PARTS[name]
    assert results["evaluated_on"] == held_out and list(results["samples"].values()) == counts
    assert results["metric"] == ("mAP" if name in MULTI_LABEL else "accuracy")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(len(CLASSES[name]))] == CLASSES[name]
    assert config["problem_type"] == f"{'multi' if name in MULTI_LABEL else 'single'}_label_classification"


def test_an_official_split_is_probed(tmp_path, capsys):
    folder = miniatures.write_speech_commands(tmp_path)
    main("probe", ["--model", save_encoder(tmp_path / "encoder"), "--data", str(folder), "--split", "train"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["samples"] == 6
