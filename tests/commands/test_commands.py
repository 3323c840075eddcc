"""The command `bridle`: help without torch, statuses, recipes by name; and the same from Python."""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_stand_in import metadata_errors
from helpers.sounds import save_encoder, write_sounds
from helpers.tiny_run import ROOT, write_recipe, write_recordings
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import bridle_hf
from bridle_hf.commands import COMMANDS, main
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError, RunError
from bridle_hf.common.recipes import find_recipe, list_recipes
from bridle_hf.pretraining.arguments import PretrainArguments


PACKAGE = ROOT / "bridle_hf"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    kept = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refusal(capsys, status: int, *words: str) -> str:
    """The one line on stderr that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main(argv=words)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == status and line.startswith("error: ")
    return line


# --- what is imported when ---


def test_help_and_wrong_words_need_no_torch():
    code = """
import sys
sys.argv[0] = "/usr/bin/bridle"
from bridle_hf.commands import COMMANDS, main
main(argv=[])
main(argv=["recipes"])
for name in COMMANDS:
    main(argv=[name, "--help"])
for words in (["nothing"], ["pretrain", "no_such_recipe"], ["probe", "recipe"], ["recipes", "more"]):
    try:
        main(argv=words)
    except SystemExit as end:
        assert end.code == 2
assert not {"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)
"""
    assert "usage: bridle" in run_python(code)


def test_importing_the_package_imports_no_room_nor_librosa_and_registers_the_models():
    code = """
import os, sys, bridle_hf, transformers
assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
assert bridle_hf.BridleFeatureExtractor and not {"librosa", "numba", "matplotlib"} & sys.modules.keys()
print([name for name in sys.modules if name.startswith("bridle_hf.")])
assert "bridle" in transformers.AutoConfig.for_model("bridle").model_type
assert set(bridle_hf.__all__) <= set(dir(bridle_hf)) and bridle_hf.BridleModel
"""
    loaded = ast.literal_eval(run_python(code))
    assert loaded and not {name.split(".")[1] for name in loaded} & ROOMS


def test_model_files_import_nothing_of_the_rooms():
    """Remote code is copied flat: siblings alone."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    for name in files:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(module.startswith("bridle_hf") for module in names), f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/bridle", "info"], [], True),
        (["C:/Scripts/bridle.exe"], [], True),
        (["-m", "audio_base"], ["python", "-u", "-m", "bridle_hf.pretraining", "audio_base"], True),
        (["-m"], ["python", "-m", "pytest", "-k", "bridle_hf.pretraining"], False),
        (["-c"], ["python", "-c", "import bridle_hf"], False),
        ([""], ["python"], False),
        ([str(ROOT / "training" / "pretrain.py")], [], True),
        ([str(ROOT / "training" / "mine.py")], [], False),
        (["/elsewhere/pretrain.py"], [], False),
        (["/elsewhere/bridle.py"], [], False),
    ],
)
def test_starts_of_commands_are_recognised(monkeypatch, argv, original, expected):
    monkeypatch.chdir(ROOT / "training")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert bridle_hf._starts_a_command() is expected


def test_every_file_of_training_is_a_start():
    assert sorted(bridle_hf._SCRIPTS) == sorted(path.name for path in (ROOT / "training").glob("*.py"))


def test_commands_ask_for_threads_that_spin_shortly():
    command = """
import os, sys
sys.argv[0] = "/usr/bin/bridle"
import bridle_hf
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    assert run_python(command) == "1000"
    assert run_python(command, GOMP_SPINCOUNT="7") == "7"
    assert run_python(command, OMP_WAIT_POLICY="active") == "None"


# --- help, statuses ---


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_the_recipe(name, capsys):
    main(argv=[name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: bridle {name}") and max(map(len, lines)) <= 119
    if COMMANDS[name].takes_recipe:
        assert "RECIPE" in lines[0] and "`bridle recipes`" in "\n".join(lines[:4])
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(options) == len(set(options)) and "--logging_steps" not in options
    assert ("transformers.TrainingArguments" in "\n".join(lines)) == (name == "finetune")


def test_wrong_arguments_end_with_2_and_failed_runs_with_1(tmp_path, capsys, monkeypatch):
    out = ["--output_dir", str(tmp_path / "out")]
    assert "no command 'pretrian'; did you mean 'pretrain'?" in refusal(capsys, 2, "pretrian")
    assert "required: --data" in refusal(capsys, 2, "pretrain", "audio_demo", *out)
    assert "is one word too many" in refusal(capsys, 2, "probe", "audio_demo")
    assert "no metrics.jsonl" in refusal(capsys, 2, "report", str(tmp_path))
    assert "No such file" in refusal(capsys, 2, "card", str(tmp_path), "--run", str(tmp_path / "run.json"))
    assert "phases" in refusal(capsys, 2, "flops", "--samples", "3")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    words = ["convert", str(tmp_path / "garbage.pth"), str(tmp_path / "out"), "--modality", "audio"]
    assert "is not a file of weights" in refusal(capsys, 2, *words)

    def fails(error):
        def demo(args):
            raise error

        monkeypatch.setattr("bridle_hf.commands.actions.demo", demo)

    fails(RunError("the third step\nwas one too many"))
    assert refusal(capsys, 1, "demo", *out) == "error: the third step was one too many"
    fails(ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend"))
    assert "needs mlxtend, which is not installed" in refusal(capsys, 1, "demo", *out)
    fails(ZeroDivisionError("a fault of ours"))
    with pytest.raises(ZeroDivisionError):
        main(argv=["demo", *out])


def test_ctrl_c_ends_with_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("bridle_hf.commands.actions.recipes", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(argv=["recipes"])
    assert (caught.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


def test_info(capsys):
    main(argv=["info"])
    shown = capsys.readouterr().out
    assert f"bridle_hf: {bridle_hf.__version__}" in shown and f"torch: {torch.__version__}" in shown


# --- recipes ---


def test_recipes_are_found_by_name_path_and_old_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packaged = PACKAGE / "recipes" / "audio_base.yaml"
    for name in ("audio_base", "audio_base.yaml", "training/recipes/audio_base.yaml", str(packaged)):
        assert find_recipe(name).samefile(packaged)
    (tmp_path / "audio_base.yaml").write_text("seed: 1")
    assert find_recipe("audio_base").samefile(packaged)
    assert find_recipe("audio_base.yaml").resolve() == tmp_path / "audio_base.yaml"
    for wrong in ("audio_bass", "training/recipes/audio_bass.yaml"):
        with pytest.raises(ArgumentError, match=r"did you mean 'audio_base'\?.*bridle recipes"):
            find_recipe(wrong)
    with pytest.raises(ArgumentError, match="No such file"):
        find_recipe("elsewhere/audio_base.yaml")
    main(argv=["recipes"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_begin_with_a_sentence(name):
    assert list_recipes()[name].endswith((".", "?")) and len(list_recipes()[name]) <= 119


# --- from Python ---


def test_keywords_change_a_recipe_entry_by_entry(tmp_path):
    changes = {"encoder": {"num_hidden_layers": 6}, "tokenizer": None, "exclude_groups": [], "output_dir": tmp_path}
    (args,) = make_arguments(PretrainArguments, recipe="audio_base", values={"data": "d", "seed": 3, **changes})
    (stock,) = make_arguments(PretrainArguments, recipe="audio_base", values={"data": "d", "output_dir": "o"})
    assert args.encoder == {**stock.encoder, "num_hidden_layers": 6} and args.phases == stock.phases
    assert args.tokenizer == {} and args.exclude_groups == [] and args.seed == 3 and args.output_dir == str(tmp_path)
    for values, message in (({"sed": 1}, "'sed'; did you mean 'seed'"), ({"data": "d"}, "required: --output_dir")):
        with pytest.raises(ValueError, match=message):
            make_arguments(PretrainArguments, recipe=None, values=values)


def test_pretrain_finetune_and_probe(tmp_path):
    data = write_recordings(tmp_path / "data", count=8)
    recipe = write_recipe(tmp_path / "recipe.yaml", phases=[{"train": "encoder", "steps": 2, "learning_rate": 1e-3}])
    options = {"data": data, "output_dir": tmp_path / "out", "encoder": {"intermediate_size": 24}}
    made = bridle_hf.pretrain(recipe, global_batch_size=4, **options)
    assert made.finished and made.metrics["step"] == 2 and made.output_dir == tmp_path / "out"
    config = AutoModel.from_pretrained(made.encoder).config
    assert (config.hidden_size, config.intermediate_size) == (16, 24) and (made.tokenizer / "config.json").exists()
    with pytest.raises(ArgumentError, match="is not empty"):
        bridle_hf.pretrain(recipe, **options)

    encoder, sounds = save_encoder(tmp_path / "encoder"), write_sounds(tmp_path / "sounds", per_class=4)
    tuned = bridle_hf.finetune(
        model=encoder, data=sounds, output_dir=tmp_path / "tuned", eval_group=["1"], num_train_epochs=1,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    assert tuned.results == json.loads((tmp_path / "tuned" / "results.json").read_text(encoding="utf-8"))
    probed = bridle_hf.probe(model=encoder, data=sounds, folds=2, random_init=True)
    assert probed["samples"] == 8 and {row["features"] for row in probed["probes"]} == {"untrained encoder"}
    with pytest.raises(ArgumentError, match="no model is there"):
        bridle_hf.probe(model=tmp_path / "nowhere", data=sounds)


CONVERTED = {
    "audio": ({"decoder_num_attention_heads": 16}, {"num_mel_bins": 128}),
    "image": ({"decoder_num_attention_heads": 4}, {}),
    "video": (
        {"decoder_num_attention_heads": 2, "estimator_num_attention_heads": 2},
        {"image_size": 32, "num_frames": 16},
    ),
}


@pytest.mark.parametrize("modality", CONVERTED)
def test_convert(modality, tmp_path, capsys):
    heads, sizes = CONVERTED[modality]
    options = {"num_attention_heads": 4, "estimator_num_attention_heads": 4, **heads, **sizes}
    state = load_file(Path(__file__).parents[1] / "golden" / f"{modality}_rq_state_dict.safetensors")
    # As the authors' code saves it: with the arguments of the run.
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "checkpoint.pth")
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    main(argv=["convert", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out"), "--modality", modality, *words])
    assert str(tmp_path / "out" / "encoder") in capsys.readouterr().out
    for kind in ("encoder", "tokenizer"):
        folder = tmp_path / "out" / kind
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert model.config.num_attention_heads == 4
        assert all(getattr(model.config, name) == value for name, value in sizes.items())
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert metadata_errors(card) == [] and "Converted from `checkpoint.pth`" in card
        if modality == "audio":
            assert (processor.num_mel_bins, processor.max_length) == (128, 1024)
        else:
            assert list(processor.image_mean) == [0.485, 0.456, 0.406]  # of ImageNet, as in the authors' code
