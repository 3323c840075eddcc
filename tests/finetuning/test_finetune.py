"""Tests of training/finetune.py: its parts, and the whole way to `pipeline`, for every modality."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers.forks import in_forks
from helpers.pixels import save_pixel_encoder, write_pixels, write_sample
from helpers.sounds import RATE, save_encoder, sound, tiny_config, write_sounds
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForVideoClassification, pipeline

from bridle_hf import BridleConfig, BridleForAudioClassification
from bridle_hf.commands import main
from bridle_hf.common.arguments import parse_command_line
from bridle_hf.common.signals import StopRequest
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import collate
from bridle_hf.data.loaders import VideoLoader
from bridle_hf.data.modalities import load_processor, make_processor, make_sample_loader
from bridle_hf.data.sample import Sample
from bridle_hf.finetuning import finetune
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.task import Task, split_samples
from bridle_hf.finetuning.trainer import (
    EpochDraws,
    EvaluationSamples,
    FinetuneTrainer,
    TrainingDraws,
    balanced_weights,
    parameter_groups,
)
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments


SHORT = {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": "true"}


@pytest.fixture
def encoder(tmp_path):
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def sounds(tmp_path):
    return write_sounds(tmp_path / "sounds")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def run(encoder, sounds, tmp_path):
    """Runs the command in this process; returns the output folder."""

    def run(**options):
        options = {"model": encoder, "data": sounds, "output_dir": tmp_path / "out", **SHORT, **options}
        argv = []
        for name, value in options.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        main("finetune", argv)
        return options["output_dir"]

    return run


# --- optimizer groups ---


def test_learning_rate_falls_with_depth_and_only_matrices_decay():
    model = BridleForAudioClassification(tiny_config(num_labels=3))
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(of) == len(named), "each in one group"
    expected = {
        "bridle.embeddings.projection.weight": (0.125, 0.1),
        "bridle.embeddings.cls_token": (0.125, 0.0),
        "bridle.layers.0.mlp.fc1.weight": (0.25, 0.1),
        "bridle.layers.1.attention.q_proj.bias": (0.5, 0.0),
        "bridle.layernorm.weight": (1.0, 0.0),
        "fc_norm.bias": (1.0, 0.0),
        "classifier.weight": (1.0, 0.1),
    }
    for name, (rate, decay) in expected.items():
        group = of[id(named[name])]
        assert (group["lr"], group["weight_decay"]) == (rate, decay), name


def test_frozen_parameters_are_left_out():
    model = BridleForAudioClassification(tiny_config(num_labels=3))
    model.bridle.requires_grad_(False)
    groups = parameter_groups(model, 1.0, 0.1, 1.0)
    assert sum(len(group["params"]) for group in groups) == 4


# --- draws ---


def test_balanced_sampling():
    targets = torch.tensor([0] * 90 + [1] * 10)
    weights = balanced_weights(targets)
    assert weights[targets == 0].sum() == pytest.approx(weights[targets == 1].sum())
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert balanced_weights(rows).tolist() == pytest.approx([1 / 2, 1 / 2 + 1 / 3, 1 / 3, 1 / 3])

    samples = [Sample(str(index)) for index in range(100)]
    draws = TrainingDraws(samples, load=None, seed=0, draws_per_epoch=50, weights=weights)
    drawn = np.array([draws.index_of(draw) for draw in range(2000)])
    assert (drawn >= 90).mean() == pytest.approx(0.5, abs=0.05)
    again = TrainingDraws(samples, load=None, seed=0, draws_per_epoch=50, weights=weights)
    assert [again.index_of(draw) for draw in (1999, 3, 700)] == drawn[[1999, 3, 700]].tolist(), "of the draw alone"
    unweighted = TrainingDraws(samples, load=None, seed=0, draws_per_epoch=50)
    assert sorted(unweighted.index_of(draw) for draw in range(100)) == list(range(100))


def test_several_samples_of_an_sample_come_in_a_row():
    samples = [Sample(str(index)) for index in range(5)]
    once = TrainingDraws(samples, None, seed=0, draws_per_epoch=5)
    thrice = TrainingDraws(samples, lambda sample, rng: {"drawn": rng.random()}, 0, 15, draws_per_sample=3)
    assert [thrice.index_of(draw) for draw in range(30)] == [once.index_of(draw // 3) for draw in range(30)]
    assert len({thrice[draw]["drawn"] for draw in range(3)}) == 3, "each with its own random numbers"


def test_epochs_go_on_where_the_last_one_ended():
    sampler = EpochDraws(3)
    assert list(sampler) == [0, 1, 2]
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8] and len(sampler) == 3


# --- what is held out ---


def samples_of(**columns):
    size = len(next(iter(columns.values())))
    return [Sample(str(i), **{name: values[i] for name, values in columns.items()}) for i in range(size)]


def split(samples, **options):
    train, evaluation, test, where = split_samples(
        samples, FinetuneArguments(model="", data="DATA", **options), seed=0
    )
    return *("".join(sample.path for sample in part) for part in (train, evaluation, test)), where


def test_splits():
    samples = samples_of(split=["train", "validation", "test", None])
    assert split(samples) == ("03", "1", "2", "split validation")
    assert split(samples, eval_split="test") == ("03", "2", "", "split test")
    assert split(samples_of(split=["train", "test"])) == ("0", "1", "", "split test")
    with pytest.raises(ValueError, match=r"nothing to evaluate on \(its splits: none\); give --eval_split"):
        split(samples_of(label=["a", "b"]))
    with pytest.raises(ValueError, match=r"nothing to evaluate on \(its splits: \['test', 'train'\]\)"):
        split(samples_of(split=["train", "test"]), eval_split="validation")
    with pytest.raises(ValueError, match="no samples of split 'train'"):
        split(samples_of(split=["test", "test"]))


def test_folds_groups_and_fractions():
    samples = samples_of(fold=["1", "2", "1", "3"], group=["a", "b", "a", "b"])
    assert split(samples, eval_fold=["1"]) == ("13", "02", "", "fold 1")
    assert split(samples, eval_group=["b"]) == ("02", "13", "", "group b")
    train, held_out, _, _ = split(samples, validation_fraction=0.5)
    assert {train, held_out} == {"02", "13"}, "whole groups"
    train, held_out, _, _ = split(samples_of(label=["a", "b"] * 4), validation_fraction=0.25)
    assert len(held_out) == 2 and sum(map(int, held_out)) % 2 == 1, "one of each label"
    train, held_out, _, _ = split(samples_of(labels=[("a",), ("a", "b")] * 4), validation_fraction=0.25)
    assert (len(train), len(held_out)) == (6, 2)
    with pytest.raises(ValueError, match="1 has no group, others have"):
        split(samples_of(group=["a", None, "b", "b"]), validation_fraction=0.5)
    with pytest.raises(ValueError, match="--eval_fold: no samples of fold 9; the folds are"):
        split(samples, eval_fold=["9"])
    with pytest.raises(ValueError, match="--eval_fold and --eval_group both say what to evaluate on"):
        split(samples, eval_fold=["1"], eval_group=["a"])


# --- the whole way ---


def test_single_label_to_pipeline(run, sounds, rng):
    out = run(
        eval_group=["1"], layer_decay=0.9, drop_path_rate=0.1, patch_dropout=[0.34, 0.0], mixup_probability=0.3,
        mel_mask=4, time_mask=64, balanced_sampling="true", label_smoothing_factor=0.1, cache_mb=10,
    )  # fmt: skip
    results, arguments = (json.loads((out / name).read_text()) for name in ("results.json", "run.json"))
    assert results["evaluation"]["accuracy"] == max(entry["accuracy"] for entry in results["history"]) > 0.9
    assert results["samples"] == {"train": 12, "evaluation": 12, "test": 0} and results["evaluated_on"] == "group 1"
    assert arguments["arguments"]["layer_decay"] == 0.9 and arguments["arguments"]["label_smoothing_factor"] == 0.1
    assert arguments["seed"] == 0 and arguments["versions"]["torch"] == torch.__version__
    assert f"{results['evaluation']['accuracy']:.2f}"[:3] in (out / "README.md").read_text()
    classify = pipeline("audio-classification", model=str(out))
    for name in ("tone", "noise"):
        found = classify({"raw": sound(name, rng), "sampling_rate": RATE})
        assert found[0]["label"] == name and len(found) == 2
    assert classify.model.config.id2label == {0: "noise", 1: "tone"}
    assert list((out / "checkpoints").glob("checkpoint-*"))


def test_clips_of_many_lengths_are_evaluated_as_each_alone(tmp_path):
    """They go through the model by length, with little padding; rows and labels stay in their order."""
    torch.manual_seed(0)
    model = BridleForAudioClassification(tiny_config(max_length=160, num_labels=3)).eval()
    lengths, labels = torch.randint(1, 161, (30,)).tolist(), torch.randint(3, (30,))
    values = [torch.nn.functional.pad(torch.randn(length, 32), (0, 0, 0, 160 - length)) for length in lengths]
    samples = [Sample(str(number)) for number in range(30)]

    def load(sample, rng):
        place = int(sample.path)
        return {"input_values": values[place], "attention_mask": (torch.arange(160) < lengths[place]).long()}

    seen, found = [], {}
    evaluated = EvaluationSamples(samples, load, {sample.path: labels[int(sample.path)] for sample in samples})
    training_args = FinetuneTrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=12, report_to="none"
    )
    trainer = FinetuneTrainer(
        model, training_args, train_dataset=evaluated, eval_dataset=evaluated, data_collator=collate, layer_decay=1.0,
        stop=StopRequest(), ledger=SkippedFiles(tmp_path / "skipped.jsonl", 30),
        compute_metrics=lambda output: found.update(logits=output.predictions, labels=output.label_ids) or {},
    )  # fmt: skip
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_values"].shape[:2].numel() // 16), with_kwargs=True
    )
    loss = trainer.evaluate()["eval_loss"]
    assert sum(-(-length // 16) for length in lengths) >= 0.95 * sum(seen)
    with torch.no_grad():
        cut = [clip[None, : -(-length // 16) * 16] for clip, length in zip(values, lengths)]
        alone = torch.cat([model(input_values=clip).logits for clip in cut])
    np.testing.assert_allclose(found["logits"], alone, atol=1e-5)
    assert found["labels"].tolist() == labels.tolist()
    assert abs(loss - float(nn.functional.cross_entropy(alone, labels))) < 1e-5


@pytest.fixture(params=["image", "video"])
def pixels(request, tmp_path):
    """(modality, encoder, data) of images and of videos."""
    modality = request.param
    return modality, save_pixel_encoder(tmp_path / "pixels", modality), write_pixels(tmp_path / "set", modality)


def test_pixels_to_pipeline(run, pixels, tmp_path, rng):
    modality, model, data = pixels
    options = {"model": model, "data": data, "eval_group": ["1"], "cache_mb": 10, "loader.min_crop": 0.5}
    if modality == "video":
        options |= {"eval_clips": 2, "eval_crops": 3, "draws_per_sample": 2, "loader.stride": 1}
    out = run(**options, augment="true", rand_augment=2, random_erasing=0.25, mixup_probability=0.2, mixup_alpha=0.8,
              cutmix_probability=0.2, label_smoothing_factor=0.1, layer_decay=0.9)  # fmt: skip
    results, arguments = (json.loads((out / name).read_text()) for name in ("results.json", "run.json"))
    assert results["evaluation"]["accuracy"] > 0.85 and results["views_per_sample"] == (
        6 if modality == "video" else 1
    )
    assert list(arguments["results"]) == [f"{modality} classification"]
    classify = pipeline(f"{modality}-classification", model=str(out))
    for name in ("dark", "bright"):
        found = classify(write_sample(tmp_path / f"new.{'png' if modality == 'image' else 'mp4'}", name, rng))
        assert found[0]["label"] == name and len(found) == 2
    if modality == "video":
        check_views(out, data, results["evaluation"])


def check_views(out, data, measured):
    """The last evaluation, once more and by hand."""
    model = AutoModelForVideoClassification.from_pretrained(out).eval()
    assert model.config.frame_stride == 1
    load = VideoLoader(load_processor(out, model.config), num_frames=4, stride=1)
    losses, hits = [], []
    for label, name in enumerate(("bright", "dark")):
        for index in (1, 3, 5, 7):
            views = load.views(Sample(f"{data}/{name}_{index}.mp4"), 2, 3)
            with torch.no_grad():
                logits = model(views).logits
            losses.append(torch.nn.functional.cross_entropy(logits, torch.full((6,), label), label_smoothing=0.1))
            hits.append(int(logits.softmax(dim=-1).mean(dim=0).argmax()) == label)
    assert measured["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    assert measured["accuracy"] == np.mean(hits)


def test_options_of_another_modality_are_refused(run, pixels, tmp_path, capsys):
    modality, model, data = pixels

    def fails(message, **options):
        with pytest.raises(SystemExit):
            run(model=model, data=data, eval_group=["1"], **options)
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

    fails(f"--mel_mask is for audio, but --model {model} is for {modality}", mel_mask=3)
    fails("--max_length is for audio", max_length=64)
    fails("loader.strid is not a field", **{"loader.strid": 2})
    fails("loader.min_crop is 'all': expected a value like 0.", **{"loader.min_crop": "all", "augment": "true"})
    fails("--rand_augment changes random views: give --augment too", rand_augment=9)
    fails("--loader.flip changes random views: give --augment too", **{"loader.flip": "false"})
    fails("--cutmix_probability must be at most 0.3", mixup_probability=0.7, cutmix_probability=0.5)
    fails("--eval_clips must be 1 or more" if modality == "video" else "--eval_clips is for video", eval_clips=0)


def test_multi_label_to_pipeline(run, tmp_path, rng):
    names = ("noise", "tone", "noise+click", "tone+click")
    data = write_sounds(tmp_path / "multi", names, per_class=6, multi_label=True)
    options = {"eval_group": ["1"], "mixup_probability": 0.2, "balanced_sampling": "true", "num_train_epochs": 15}
    out = run(data=data, label_column="labels", **options)
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == "mAP" and results["evaluation"]["mAP"] > 0.8 and results["classes"] == 3
    classify = pipeline("audio-classification", model=str(out))
    assert classify.model.config.problem_type == "multi_label_classification"
    found = classify({"raw": sound("tone+click", rng), "sampling_rate": RATE}, top_k=None)
    assert {entry["label"] for entry in found} == {"click", "noise", "tone"}


def test_resume_gives_what_an_unbroken_run_gives(run, tmp_path):
    options = {"eval_group": ["1"], "num_train_epochs": 4, "mixup_probability": 0.5, "drop_path_rate": 0.1}
    options |= {"load_best_model_at_end": "false", "save_total_limit": 9}
    unbroken = run(output_dir=tmp_path / "unbroken", **options)
    broken = run(output_dir=tmp_path / "broken", **options)
    last = max((broken / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    run(output_dir=broken, resume="true", **options)
    first, second = (load_file(folder / "model.safetensors") for folder in (unbroken, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_give_what_one_gives(run, encoder, sounds, tmp_path):
    # Of the 12 to evaluate on 11 can be read: the last batch of 3 is uneven.
    (finetune.Path(sounds) / "tone_1.wav").write_bytes(b"broken")
    options = {"eval_group": 1, "num_train_epochs": 2, "draws_per_epoch": 8, "learning_rate": 1e-3}
    options |= {"mixup_probability": 0.5, "per_device_eval_batch_size": 3, "load_best_model_at_end": "false"}
    one = run(**options)
    argv = ["--model", encoder, "--data", sounds, "--output_dir", str(tmp_path / "two"), "--disable_tqdm", "true"]
    for name, value in {**options, "per_device_train_batch_size": 4}.items():
        argv += [f"--{name}", str(value)]
    in_forks(tmp_path / "log", main, "finetune", argv, processes=2)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    # The gradient of a key's bias is zero but for rounding, which Adam makes as large as any other.
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first if "k_proj.bias" not in name)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, tmp_path / "two")]
    assert results[0]["evaluation"]["accuracy"] == results[1]["evaluation"]["accuracy"]
    assert results[0]["samples"] == results[1]["samples"] == {"train": 12, "evaluation": 11, "test": 0}
    assert results[0]["skipped_files"] == results[1]["skipped_files"] == 1
    assert len((tmp_path / "two" / "skipped.jsonl").read_text().splitlines()) == 1


def test_from_scratch_and_frozen(run, encoder, tmp_path):
    frozen = run(eval_group=["1"], freeze_encoder="true", num_train_epochs=1, output_dir=tmp_path / "frozen")
    scratch = run(eval_group=["1"], from_scratch="true", num_train_epochs=1, learning_rate=0.0, seed=1,
                  output_dir=tmp_path / "scratch")  # fmt: skip
    before = load_file(f"{encoder}/model.safetensors")
    name = "bridle.layers.0.mlp.fc1.weight"
    assert torch.equal(load_file(frozen / "model.safetensors")[name], before[name])
    assert not torch.equal(load_file(scratch / "model.safetensors")[name], before[name])


def test_adapters_change_the_layers_by_few_ranks_and_nothing_else(run, encoder, tmp_path):
    """What is saved is a classifier like any other; a resumed run gives the same one."""
    options = {"eval_group": ["1"], "num_train_epochs": 3, "lora_rank": 2, "load_best_model_at_end": "false"}
    options |= {"save_total_limit": 9}
    out = run(output_dir=tmp_path / "unbroken", **options)
    before, after = load_file(f"{encoder}/model.safetensors"), load_file(out / "model.safetensors")
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    for name in (name for name in after if name.startswith("bridle.")):
        changed = torch.linalg.matrix_rank(after[name] - before[name], tol=1e-4) if after[name].dim() == 2 else 0
        adapted = ".layers." in name and name.endswith("weight") and after[name].dim() == 2
        assert 1 <= changed <= 2 if adapted else torch.equal(after[name], before[name]), name
    assert BridleForAudioClassification.from_pretrained(out).classifier.weight.abs().max() > 0
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    run(output_dir=out, resume="true", **options)
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(out / "model.safetensors").items())


def test_bad_files_are_skipped_and_listed(run, sounds):
    for name in ("noise_0.wav", "tone_1.wav"):  # one to train on, one to evaluate on
        (finetune.Path(sounds) / name).write_bytes(b"broken")
    out = run(eval_group=["1"], num_train_epochs=1)
    skipped = [json.loads(line)["path"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(finetune.Path(path).name for path in skipped) == ["noise_0.wav", "tone_1.wav"]
    assert json.loads((out / "results.json").read_text())["samples"]["evaluation"] == 11


def test_an_absurd_recording_is_no_class_but_skipped(run, sounds):
    """Finite samples whose features are not: an argmax over NaN is class 0."""
    path = finetune.Path(sounds) / "tone_1.wav"
    soundfile.write(path, np.array([0.1, 1e19] * 4000, np.float32), 16000, subtype="FLOAT")
    out = run(eval_group=["1"], num_train_epochs=1)
    (line,) = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(path) and "1e+19" in json.loads(line)["reason"]
    results = json.loads((out / "results.json").read_text())
    assert results["samples"]["evaluation"] == 11 and np.isfinite(results["evaluation"]["loss"])


def test_steps_that_are_not_finite_are_skipped_and_twenty_in_a_row_end_the_run(run, monkeypatch, tmp_path, capsys):
    healthy, calls = nn.functional.cross_entropy, []

    def sick(logits, labels, **options):
        if logits.requires_grad:  # not in evaluation
            calls.append(1)
            if len(calls) in bad:
                logits = logits * float("nan")
        return healthy(logits, labels, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", sick)
    bad = (1, 2)
    out = run(num_train_epochs=4, validation_fraction=0.25)
    results = json.loads((out / "results.json").read_text())
    assert results["skipped_steps"] == 2 and np.isfinite(results["evaluation"]["loss"])
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "model.safetensors").values())

    calls, bad = [], range(1, 10**6)
    with pytest.raises(SystemExit) as caught:
        run(output_dir=tmp_path / "sick", num_train_epochs=30, eval_strategy="no", save_strategy="no",
            load_best_model_at_end="false", validation_fraction=0.25)  # fmt: skip
    assert caught.value.code == 1
    assert "not finite in 20 steps in a row" in capsys.readouterr().err.splitlines()[-1]


def test_errors_before_the_first_step(run, sounds, tmp_path, capsys):
    def fails(message, **options):
        with pytest.raises(SystemExit):
            run(**{"eval_group": ["1"], **options})
        error = capsys.readouterr().err.strip()
        lines = error[error.index("error: ") :].splitlines()  # after the progress bars of saved models
        assert len(lines) == 1 and message in lines[0]

    fails("no samples of group 7", eval_group=["7"])
    fails("both say what to evaluate on", validation_fraction=0.5)
    fails("--mel_mask must be at most 32", mel_mask=33)
    fails("--freeze_encoder leaves nothing for", freeze_encoder="true", layer_decay=0.5)
    fails("--loader_timeout is for loader workers", loader_timeout=5)
    fails("--resume_from_checkpoint: give --resume", resume_from_checkpoint="checkpoint-3")
    fails("--push_to_hub needs --hub_model_id", push_to_hub="true")
    fails("--push_to_hub needs --license", push_to_hub="true", hub_model_id="org/name")
    fails("--hub_model_id is for --push_to_hub", hub_model_id="org/name")
    fails("--hub_strategy: the classifier is pushed once, in the end", hub_strategy="end")
    fails("--hub_token: log in by `hf auth login`", hub_token="hf_secret")
    fails("nowhere: no model is there", model=tmp_path / "nowhere")
    fails("--metric_for_best_model is acc: expected auto, accuracy, loss", metric_for_best_model="acc")
    fails("--validation_fraction is 1.5: expected 0 to 0.99", validation_fraction=1.5)
    fails("--patch_dropout is [0.2]: expected two numbers", patch_dropout=0.2)
    fails("--per_device_train_batch_size must be 1 or more", per_device_train_batch_size=0)
    fails("did you mean 'layer_decay'", layer_deca=0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    fails("is not empty: give --resume to go on, or --overwrite", output_dir=tmp_path / "full")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.json"))

    fails("--cutmix_probability is for image and video", cutmix_probability=0.1)
    metadata = finetune.Path(sounds) / "metadata.csv"
    rows = metadata.read_text().splitlines()
    metadata.write_text("\n".join([rows[0], *rows[1:-1], rows[-1].replace(",tone,", ",whistle,")]))
    fails("label 'whistle' is not among the 2 classes")
    metadata.write_text("\n".join([rows[0], rows[1].replace(",noise,", ",,"), *rows[2:]]))
    fails("has no `label`: every sample needs one here")
    metadata.write_text("\n".join(row for row in rows if ",tone," not in row))
    fails("have one class only (noise)")


def test_the_folder_to_write_must_be_given(capsys):
    with pytest.raises(SystemExit) as caught:
        main("finetune", ["--model", "M", "--data", "D"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --output_dir\n"


def test_label_smoothing_is_refused_for_several_labels(tmp_path):
    labels = SimpleNamespace(multi_label=True)
    args = FinetuneArguments(model="", data="")
    training_args = finetune.FinetuneTrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="--label_smoothing_factor is for one label per sample"):
        finetune.check_arguments(args, training_args, tiny_config(), Task(labels, [], [], [], ""))


RECIPES = finetune.Path(finetune.__file__).parents[1] / "recipes"


@pytest.mark.parametrize("recipe", sorted([*RECIPES.glob("*finetune*.yaml"), *RECIPES.glob("*linear*.yaml")]), ids=str)
def test_recipes_parse(recipe, tmp_path):
    argv = [str(recipe), "--model", "M", "--data", "D", "--output_dir", str(tmp_path), "--bf16", "false"]
    args, training_args = parse_command_line(FinetuneArguments, finetune.FinetuneTrainingArguments, argv=argv)
    assert training_args.num_train_epochs >= 1 and 0 <= training_args.warmup_steps < 1
    assert args.freeze_encoder == ("linear" in recipe.name)
    config = BridleConfig(modality=recipe.name.split("_")[0])
    task = Task(SimpleNamespace(multi_label=False, names=[]), [], [], [], "")
    finetune.check_arguments(args, training_args, config, task)
    make_sample_loader(config, make_processor(config), args.loader, args.augment)


def test_overwrite_removes_what_a_run_left_and_nothing_else(run, tmp_path):
    (tmp_path / "out").mkdir()
    for name, text in {"thesis.txt": "mine", "skipped.jsonl": "", "run.json": '{"kind": "fine-tuning"}'}.items():
        (tmp_path / "out" / name).write_text(text)
    out = run(eval_group=["1"], num_train_epochs=1, overwrite="true")
    assert (out / "thesis.txt").read_text() == "mine" and not (out / "skipped.jsonl").exists()


def test_validation_and_test_split(run, sounds, tmp_path):
    metadata = finetune.Path(sounds) / "metadata.csv"
    header, *rows = metadata.read_text().splitlines()
    splits = ["train", "validation", "test"]
    rows = [f"{row},{splits[index % 3]}" for index, row in enumerate(rows)]
    metadata.write_text("\n".join([f"{header},split", *rows]))
    out = run(num_train_epochs=1)
    results = json.loads((out / "results.json").read_text())
    assert results["samples"] == {"train": 8, "evaluation": 8, "test": 8}
    (state,) = (out / "checkpoints").glob("*/trainer_state.json")
    assert json.loads(state.read_text())["best_metric"] == results["evaluation"]["accuracy"], "not the lowest loss"
    assert results["evaluated_on"] == "split validation" and 0 <= results["test"]["accuracy"] <= 1


def test_a_classifier_of_other_classes_gives_its_encoder_alone(encoder, sounds, tmp_path):
    """As many classes or not, in the same order or not: a head is taken over where all are called alike."""
    saved = BridleForAudioClassification(tiny_config(num_labels=2))
    saved.config.id2label = {0: "noise", 1: "tone"}
    saved.save_pretrained(tmp_path / "classifier")
    shutil.copy(f"{encoder}/preprocessor_config.json", tmp_path / "classifier")
    for names, same in ((["noise", "tone"], True), (["tone", "noise"], False), (["a", "b", "c"], False)):
        task = SimpleNamespace(labels=SimpleNamespace(names=names), kind="single_label", of_events=False)
        args = FinetuneArguments(str(tmp_path / "classifier"), sounds)
        model, _ = finetune.load_model(args, SimpleNamespace(label_smoothing_factor=0.0), task)
        assert model.config.id2label == dict(enumerate(names))
        for name, value in saved.bridle.state_dict().items():
            assert torch.equal(model.bridle.state_dict()[name], value)
        head = model.classifier.weight
        assert head.shape[0] == len(names) and (
            same == (head.shape[0] == 2 and torch.equal(head, saved.classifier.weight))
        )


@pytest.mark.parametrize(
    ("modality", "fields", "said"),
    [
        ("audio", {}, "of longer recordings their middle 0.32 s"),
        ("image", {}, ""),
        ("video", {}, "8 frames around the middle of a video, 4 apart"),
        ("video", {"frame_stride": 2}, "2 apart"),
        ("video", {"frame_sampling": "segments"}, "one frame of each of 8 equal parts of a video"),
    ],
)
def test_the_card_says_which_part_was_measured(modality, fields, said):
    found = finetune._part_measured(BridleConfig(modality=modality, max_length=32, num_frames=8, **fields))
    assert said in found and bool(said) == bool(found)
