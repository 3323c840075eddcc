"""What the models of a folder tell of a file: as the pipeline, the tokenizer and `bridle search` tell it."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.pixels import write_pixels, write_sample
from helpers.showcases import LABELS, save_models
from helpers.sounds import tiny_config, write_sounds, write_tone
from matplotlib.figure import Figure
from PIL import Image
from transformers import ViTConfig, pipeline

import bridle_hf
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError
from bridle_hf.demos.arguments import DemoArguments
from bridle_hf.demos.page import answer, make_page
from bridle_hf.demos.showcase import NEIGHBOURS, Showcase
from bridle_hf.embedding.arguments import SearchArguments
from bridle_hf.embedding.search import search


def write_data(folder, modality):
    """A labelled set of the modality, and one of its files."""
    data = write_sounds(folder) if modality == "audio" else write_pixels(folder, modality)
    return data, f"{data}/{LABELS[modality][1]}_3.{ {'audio': 'wav', 'image': 'png', 'video': 'mp4'}[modality] }"


@pytest.fixture
def models(tmp_path, modality):
    return save_models(tmp_path / "run", modality, "encoder", "tokenizer", "classifier")


def test_all_that_a_folder_can_tell(models, modality, tmp_path):
    data, file = write_data(tmp_path / "data", modality)
    table = str(tmp_path / "x.parquet")
    bridle_hf.embed(data=data, model=str(models / "encoder"), output=table)
    showcase = Showcase(str(models), table)
    kinds = ["mask", "codes", "predictions", "neighbours"]
    assert showcase.pictures == ["timeline", *kinds] if modality == "audio" else kinds
    assert showcase.missing == []
    found = showcase.look(file)
    asked = pipeline(f"{modality}-classification", model=str(models / "classifier"))(file)
    assert found.classes == pytest.approx({entry["label"]: entry["score"] for entry in asked})
    assert list(found.classes) == [entry["label"] for entry in asked]
    assert found.neighbours == search(SearchArguments(table, file, top_k=NEIGHBOURS))
    assert file.endswith(found.neighbours[0]["id"])
    assert list(found.pictures) == showcase.pictures
    assert all(isinstance(figure, Figure) for figure in found.pictures.values())


def test_codes_of_an_image_are_those_of_the_tokenizer(tmp_path):
    folder = save_models(tmp_path / "run", "image")
    _, file = write_data(tmp_path / "data", "image")
    figure = Showcase(str(folder)).look(file).pictures["codes"]
    tokenizer = bridle_hf.BridleTokenizerModel.from_pretrained(folder / "tokenizer")
    processor = bridle_hf.make_image_processor(tokenizer.config)
    pixels = np.asarray(Image.open(file))[..., None]
    inputs = processor([pixels], return_tensors="pt", input_data_format="channels_last")
    codes = tokenizer.encode(inputs["pixel_values"])[0]
    drawn = [[int(text.get_text()) for text in axes.texts] for axes in figure.axes]
    assert drawn == codes.T.tolist()


def test_what_is_not_there_is_said_and_not_shown(tmp_path, modality):
    folder = save_models(tmp_path / "run", modality, "bare", "tokenizer")
    _, file = write_data(tmp_path / "data", modality)
    bare = Showcase(str(folder / "bare"))
    assert bare.pictures == ["input"] and len(bare.missing) == 4
    found = bare.look(file)
    assert list(found.pictures) == ["input"] and not found.classes and not found.neighbours
    tokenizer = Showcase(str(folder / "tokenizer"))
    assert tokenizer.pictures == ["input", "codes"] and not any("codes" in line for line in tokenizer.missing)


def test_of_an_encoder_the_tokenizer_beside_it(tmp_path):
    folder = save_models(tmp_path / "run", "audio")
    assert Showcase(str(folder / "encoder")).paths == Showcase(str(folder)).paths
    (tmp_path / "demo").mkdir()
    shutil.move(folder, tmp_path / "demo" / "pretraining")
    save_models(tmp_path / "demo", "audio", "classifier")
    assert set(Showcase(str(tmp_path / "demo")).paths) == {"classifier", "encoder", "tokenizer"}


def test_a_long_recording_and_one_of_time_steps(tmp_path):
    names = {0: "noise", 1: "tone", 2: "click"}
    model = bridle_hf.BridleForAudioFrameClassification(
        tiny_config(id2label=names, problem_type="multi_label_classification")
    )
    torch.nn.init.constant_(model.classifier.bias, 1.0)  # over the threshold everywhere
    model.save_pretrained(tmp_path / "steps")
    bridle_hf.BridleFeatureExtractor(num_mel_bins=32, max_length=48).save_pretrained(tmp_path / "steps")
    showcase = Showcase(str(tmp_path / "steps"))
    assert showcase.pictures == ["input", "timeline"]
    found = showcase.look(write_tone(tmp_path / "long.wav", seconds=2.0))
    assert found.notes == ["Pictures of the recording show its seconds 0.75 to 1.25; classes are those of all of it."]
    assert set(found.classes) == set(names.values())
    assert found.pictures["timeline"].axes[0].get_xlim()[1] == pytest.approx(2.0, abs=0.2)
    assert showcase.look(write_tone(tmp_path / "short.wav", seconds=0.3)).notes == []


def test_neighbours_that_are_gone_have_no_picture(tmp_path):
    folder = save_models(tmp_path / "run", "audio")
    data, file = write_data(tmp_path / "data", "audio")
    bridle_hf.embed(data=data, model=str(folder / "encoder"), output=str(tmp_path / "x.npz"))
    kept = shutil.copy(file, tmp_path / "kept.wav")
    shutil.rmtree(data)
    found = Showcase(str(folder), str(tmp_path / "x.npz")).look(kept)
    assert len(found.neighbours) == NEIGHBOURS and "neighbours" not in found.pictures
    assert re.match(r"No picture of the neighbours: .*no such file", found.notes[0])


def test_files_that_cannot_be_read_are_named_without_their_folder(models, modality, tmp_path):
    bad = tmp_path / {"audio": "bad.wav", "image": "bad.png", "video": "bad.mp4"}[modality]
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"^{bad.name}: ") as caught:
        Showcase(str(models)).look(str(bad))
    assert str(tmp_path) not in str(caught.value)


def test_folders_that_cannot_be_shown(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        Showcase(str(tmp_path))
    save_models(tmp_path / "fold_1", "image", "classifier")
    (tmp_path / "fold_1" / "classifier").rename(tmp_path / "fold_2")
    with pytest.raises(ValueError, match=r"holds no model.* give one of its fold_\*"):
        Showcase(str(tmp_path))
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit holds a 'vit'"):
        Showcase(str(tmp_path / "vit"))
    folder = save_models(tmp_path / "run", "audio", "encoder")
    (folder / "encoder" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        Showcase(str(folder))
    data, _ = write_data(tmp_path / "data", "audio")
    sounds = save_models(tmp_path / "sounds", "audio", "bare")
    bridle_hf.embed(data=data, model=str(sounds / "bare"), output=str(tmp_path / "x.npz"))
    with pytest.raises(ValueError, match=r"x\.npz is of audio, but the models are of image"):
        Showcase(str(tmp_path / "fold_2"), str(tmp_path / "x.npz"))
    with pytest.raises(ValueError, match=r"y\.npz: no such file"):
        Showcase(str(sounds / "bare"), str(tmp_path / "y.npz"))


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, "give --output_dir for a demo's run, or --serve DIR"),
        ({"serve": "DIR", "output_dir": "OUT"}, "--output_dir is not for --serve"),
        ({"serve": "DIR", "steps_scale": 0.5}, "--steps_scale is not for --serve"),
        ({"output_dir": "OUT", "embeddings": "x.npz"}, "--embeddings is for --serve"),
        ({"serve": "DIR", "port": 0}, "--port is 0: expected 1 to 65535"),
    ],
)
def test_options_of_either_demo(given, wrong):
    with pytest.raises(ArgumentError, match=wrong):
        make_arguments(DemoArguments, recipe=None, values=given)
    make_arguments(DemoArguments, recipe=None, values={"serve": "DIR", "embeddings": "x.npz", "port": 80})


def test_a_picture_of_another_shape_is_taken_as_it_is(tmp_path):
    folder = save_models(tmp_path / "run", "image", "encoder")
    path = write_sample(tmp_path / "wide.png", "dark", np.random.default_rng(0))
    assert set(Showcase(str(folder)).look(path).pictures) == {"mask"}


# --- what the page is given, without gradio ---


def test_the_page_gets_pictures_or_one_line(tmp_path, monkeypatch, caplog):
    folder = save_models(tmp_path / "run", "audio", "classifier", "tokenizer")
    showcase, path = Showcase(str(folder)), write_tone(tmp_path / "tone.wav")
    said, classes, *pictures = answer(showcase, path)
    assert said == "" and set(classes) == {"noise", "tone"} and [picture.format for picture in pictures] == ["PNG"] * 3
    assert answer(showcase, None) == ["", {}, None, None, None]
    (tmp_path / "bad.wav").write_bytes(b"")
    said, *others = answer(showcase, str(tmp_path / "bad.wav"))
    assert re.match(r"\*\*Cannot be used:\*\* bad\.wav: ", said) and "\n" not in said and not any(others)

    def fails(file):
        raise ZeroDivisionError("a fault\nof ours")

    monkeypatch.setattr(showcase, "look", fails)
    assert answer(showcase, path)[0] == "**Cannot be used:** ZeroDivisionError: a fault of ours"
    assert "Traceback" in caplog.text


def test_without_gradio_one_line_says_what_to_install(tmp_path, monkeypatch):
    folder = save_models(tmp_path / "run", "image", "bare")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ArgumentError, match=r"needs gradio: pip install 'bridle_hf\[serve\]'"):
        make_page(Showcase(str(folder / "bare")), str(folder))
