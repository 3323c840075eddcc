"""Fine-tuning of a pretrained encoder into a classifier, on `transformers.Trainer`.

    bridle finetune RECIPE --model DIR_OR_ID --data DIR_OR_HUB_ID --output_dir OUT

Takes every option of `TrainingArguments` beside its own. OUT is a `from_pretrained` folder of the classifier with its
processor and model card: `pipeline("audio-classification", OUT)`, or image, or video; beside them stand results.json,
run.json, skipped.jsonl and checkpoints/. Of recordings with strong labels (columns onset and offset), it classifies
every time step, and is measured by the F1 of its events.
"""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    EvalPrediction,
    TrainingArguments,
)

from bridle_hf.cards.arguments import check_publishing
from bridle_hf.cards.card import kind_of, write_card
from bridle_hf.cards.publishing import open_repositories, push
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError, RunError, TooManyBadFiles
from bridle_hf.common.files import write_json
from bridle_hf.common.manifest import CheckpointError
from bridle_hf.common.output_folder import FINETUNING, release, run_record
from bridle_hf.common.signals import StopRequest
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.configuration_bridle import FRAME_SHIFT_MS
from bridle_hf.data.batches import collate, iterate_eval, loader_errors_as_os_errors
from bridle_hf.data.loaders import Load
from bridle_hf.data.modalities import (
    frames_seen,
    kept_options,
    load_config,
    load_processor,
    load_weights,
    make_sample_loader,
)
from bridle_hf.data.sample import Sample
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.augmentation import FULL_LENGTH_FRAMES, RAND_AUGMENT_MAX, TRAINING_LOADERS, TrainingLoader
from bridle_hf.finetuning.cross_validation import begin_folds, run_folds
from bridle_hf.finetuning.events import EvaluationWindows, EventLoader, cut_into_windows
from bridle_hf.finetuning.resume import global_batch_size, prepare_folder
from bridle_hf.finetuning.task import Task, make_task
from bridle_hf.finetuning.trainer import (
    EvaluationSamples,
    FinetuneTrainer,
    TrainingDraws,
    ViewLoader,
    balanced_weights,
)
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments
from bridle_hf.monitoring.flops import warn_of_slow_precision
from bridle_hf.probing.event_metrics import EVENT_METRICS
from bridle_hf.probing.metrics import ClassificationMetric


logger = logging.getLogger(__name__)

# What opens a classifier, by modality.
AUTO_MODELS = {
    "audio": AutoModelForAudioClassification,
    "image": AutoModelForImageClassification,
    "video": AutoModelForVideoClassification,
}
# The linear layers of an encoder's blocks, beside which adapters lie.
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# Options that fit some modalities alone.
OPTIONS_OF = {
    ("audio",): ("max_length", "mean", "std", "mel_mask", "time_mask"),
    ("image", "video"): ("rand_augment", "random_erasing", "cutmix_probability"),
    ("video",): ("eval_clips", "eval_crops"),
}
# Of `TrainingArguments`, whose Trainer would push checkpoints, or its output folder as it is.
OTHER_HUB_OPTIONS = {
    "hub_token": "log in by `hf auth login`, or set HF_TOKEN",
    "hub_private_repo": "give --hub_private",
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), "the classifier is pushed once, in the end"),
}
# What is not known of single time steps, or would move them.
OF_WHOLE_RECORDINGS = ("augment", "mixup_probability", "patch_dropout", "balanced_sampling")


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning has made: a `from_pretrained` folder, and what results.json holds.

    Of all folds, `output_dir` holds a folder for each. `results` is `None` where a signal ended the run before its
    last step: `resume=True` goes on.
    """

    output_dir: Path
    results: dict[str, Any] | None


def finetune(recipe: str | None = None, **options: Any) -> FinetuneResult:
    """Fine-tune a pretrained encoder into a classifier: `finetune(model=DIR, data=DIR, output_dir=OUT)`.

    Args:
        recipe: name of a recipe of the package (`bridle recipes` lists them) or path of a YAML file.
        options: the fields of [`FinetuneArguments`] and of `transformers.TrainingArguments`; a mapping changes the
            recipe's entry by entry.

    Raises:
        ArgumentError: arguments, data or output folder are not fit to start; nothing has been trained yet. It is a
            `ValueError`.
        RunError: training had begun and could not go on. It is a `RuntimeError`.
    """
    return run_finetuning(*make_arguments(FinetuneArguments, FinetuneTrainingArguments, recipe=recipe, values=options))


def run_finetuning(args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> FinetuneResult:
    """[`finetune`], with its arguments."""
    if args.folds:
        return _run_all_folds(args, training_args)
    transformers.set_seed(training_args.seed)
    precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "no"
    warn_of_slow_precision(precision, training_args.device)
    out, arguments = Path(training_args.output_dir), resolved_arguments(args, training_args)
    try:
        config = load_config(args.model)
        task = make_task(args, config, training_args.seed)
        check_arguments(args, training_args, config, task)
        model, processor = load_model(args, training_args, task)
        adapters = add_adapters(model.bridle, args.lora_rank) if args.lora_rank else None
        loaders = make_loaders(args, model.config, processor, task)
        repositories = {}
        if training_args.push_to_hub and PartialState().is_main_process:
            model_id = training_args.hub_model_id
            repositories = open_repositories(FINETUNING, model_id, args.license, args.hub_private)
        training_args.push_to_hub = False  # of the Trainer
        # Nothing that could refuse the arguments follows --overwrite's deletion.
        run = run_record(
            FINETUNING, arguments, args.data, training_args.seed, samples=len(task.train),
            global_batch_size=global_batch_size(training_args), task=task.describe(),
        )  # fmt: skip
        lock, checkpoint = prepare_folder(out, args, training_args, run)
        trainer = make_trainer(args, training_args, task, model, processor, loaders, out / "skipped.jsonl")
    except (ValueError, OSError, TooManyBadFiles, CheckpointError) as error:
        # Everything up to here is about arguments and data: one line says what is wrong.
        raise ArgumentError(str(error)) from error
    results = None
    try:
        if train(trainer, checkpoint):
            seconds = trainer.clock.seconds
            if adapters is not None:
                adapters.merge_and_unload()
            results = evaluate(trainer, task, loaders.final, args.eval_clips * args.eval_crops)
            if trainer.is_world_process_zero():
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
                processor.save_pretrained(out)
                write_outputs(out, run, model.config, results, seconds)
    except (OSError, SafetensorError) as error:  # a full disk is either, by who writes
        raise RunError(f"{error}; mend this (output_dir is {out}), and --resume goes on") from error
    release(lock)
    if results is not None:
        push(out, repositories, args.license)
    return FinetuneResult(out, results)


def _run_all_folds(args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> FinetuneResult:
    out = Path(training_args.output_dir)
    try:
        folds = begin_folds(args, training_args, resolved_arguments(args, training_args))
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    try:
        return FinetuneResult(out, run_folds(args, training_args, folds, lambda *own: run_finetuning(*own).results))
    except OSError as error:
        raise RunError(f"{error}; mend this (output_dir is {out}), and --resume goes on") from error


# --- What is asked for ---


def check_arguments(
    args: FinetuneArguments, training_args: FinetuneTrainingArguments, config: Any, task: Task
) -> None:
    """Refuse what cannot work, before the first step.

    Raises:
        ValueError: naming the option.
    """
    unset = {entry.name: entry.default for entry in fields(args)}
    for modalities, names in OPTIONS_OF.items():
        for name in names if config.modality not in modalities else ():
            if getattr(args, name) != unset[name]:
                suited = " and ".join(modalities)
                raise ValueError(f"--{name} is for {suited}, but --model {args.model} is for {config.modality}")
    _check_training_arguments(training_args, task)
    check_publishing(training_args.push_to_hub, training_args.hub_model_id, args.hub_private, args.license)
    for name in OF_WHOLE_RECORDINGS if task.of_events else ():
        if np.any(getattr(args, name)):
            raise ValueError(f"--{name} is for labels of whole recordings, and these have strong ones: leave it out")
    if args.loader_timeout and not training_args.dataloader_num_workers:
        raise ValueError("--loader_timeout is for loader workers: give --dataloader_num_workers 1 or more")
    if training_args.remove_unused_columns or not 0 < args.layer_decay <= 1:
        raise ValueError("--remove_unused_columns must be false, --layer_decay in (0, 1]")
    _check_augmentation(args, config)
    if args.freeze_encoder and (args.drop_path_rate or args.layer_decay != 1 or args.from_scratch):
        raise ValueError("--freeze_encoder leaves nothing for --drop_path_rate, --layer_decay or --from_scratch to do")
    if args.lora_rank and (args.freeze_encoder or args.from_scratch):
        raise ValueError("--lora_rank adapts a pretrained encoder: leave out --freeze_encoder and --from_scratch")


def _check_training_arguments(training_args: FinetuneTrainingArguments, task: Task) -> None:
    if training_args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint: give --resume, which takes the newest checkpoint of --output_dir")
    if training_args.restore_callback_states_from_checkpoint:
        raise ValueError("--restore_callback_states_from_checkpoint: --resume restores what a run needs by itself")
    for name, instead in OTHER_HUB_OPTIONS.items():
        if getattr(training_args, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise ValueError(f"--{name}: {instead}")
    if training_args.label_smoothing_factor and task.labels.multi_label:
        raise ValueError("--label_smoothing_factor is for one label per sample, but these samples have several")
    if not 0 <= training_args.label_smoothing_factor < 1:
        raise ValueError(f"--label_smoothing_factor is {training_args.label_smoothing_factor}: expected 0 to below 1")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(training_args, name)}")
    best, measured = training_args.metric_for_best_model, [*task.metrics, "loss"]
    if best is not None and best != "auto" and best.removeprefix("eval_") not in measured:
        raise ValueError(f"--metric_for_best_model is {best}: expected auto, {', '.join(measured)}")


def _check_augmentation(args: FinetuneArguments, config: Any) -> None:
    ranges = {
        "mixup_probability": 1, "cutmix_probability": 1 - args.mixup_probability, "random_erasing": 1,
        "rand_augment": RAND_AUGMENT_MAX, "mel_mask": config.num_mel_bins, "time_mask": FULL_LENGTH_FRAMES,
    }  # fmt: skip
    for name, most in ranges.items():
        if not 0 <= getattr(args, name) <= most:
            raise ValueError(f"--{name} must be at most {most:g} and not negative, got {getattr(args, name)}")
    for name in ("draws_per_sample", "eval_clips", "eval_crops"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    random_views = [name for name in ("min_crop", "flip") if name in args.loader]
    if not args.augment and (args.rand_augment or random_views):
        name = "rand_augment" if args.rand_augment else f"loader.{random_views[0]}"
        raise ValueError(f"--{name} changes random views: give --augment too")


# --- Model ---


def load_model(args: FinetuneArguments, training_args: FinetuneTrainingArguments, task: Task) -> tuple[nn.Module, Any]:
    """The classifier, with pretrained weights unless from scratch, and its processor.

    Raises:
        ValueError: no model is there, or its weights are not finite.
    """
    config = load_config(args.model)
    others = kind_of(config) == "classifier" and list(config.id2label.values()) != task.labels.names
    config.id2label = dict(enumerate(task.labels.names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = f"{task.kind}_classification"
    config.drop_path_rate, config.patch_dropout = args.drop_path_rate, args.patch_dropout
    # The model smooths, mixed targets too; the Trainer's own smoother would take class numbers only.
    config.label_smoothing, training_args.label_smoothing_factor = training_args.label_smoothing_factor, 0.0
    auto_model = AutoModelForAudioFrameClassification if task.of_events else AUTO_MODELS[config.modality]
    processor = load_processor(args.model, config)
    for name in ("max_length", "mean", "std"):
        if getattr(args, name) is not None:
            setattr(processor, name, getattr(args, name))
    config.max_length = getattr(processor, "max_length", config.max_length)
    config.validate_architecture()
    if args.from_scratch:
        model = auto_model.from_config(config)
    else:
        if others:
            logger.info("the classes are not those of the classifier %s: the head is made anew", args.model)
            model = auto_model.from_config(config)
            model.bridle.load_state_dict(load_weights(AutoModel, args.model, config=config).state_dict())
        else:
            model = load_weights(auto_model, args.model, config=config)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"--model {args.model}: {name} is not finite: take another checkpoint")
    if args.freeze_encoder:
        model.bridle.requires_grad_(False)
    return model, processor


def add_adapters(encoder: nn.Module, rank: int) -> Any:
    """Freeze an encoder and put an adapter beside each linear layer of its blocks, in place.

    Args:
        encoder: a `BridleModel`.
        rank: of the adapters, which are scaled by 2.

    Returns:
        peft's tuner: its `merge_and_unload()` makes of both, in place, an encoder as it was.

    Raises:
        ArgumentError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ArgumentError("--lora_rank needs peft: pip install 'bridle_hf[lora]'") from error
    encoder.requires_grad_(False)
    return LoraModel(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED), "default")


# --- Training ---


@dataclass(frozen=True)
class Loaders:
    """What reads samples: to train on, to evaluate on after an epoch, and to evaluate on in the end."""

    training: TrainingLoader | EventLoader
    epoch: Load
    final: Load


def make_loaders(args: FinetuneArguments, config: Any, processor: Any, task: Task) -> Loaders:
    """The loaders that the arguments ask for; what the model keeps of their options is written into its config.

    Raises:
        ValueError: arguments that the modality's loader does not take.
    """
    load, random_load = (
        make_sample_loader(config, processor, args.loader, augment, args.cache_mb << 20)
        for augment in (False, args.augment)
    )
    for name, value in kept_options(config.modality, args.loader).items():
        setattr(config, name, value)
    if task.of_events:
        events = EventLoader(load, config, task.labels.names, args)
        return Loaders(events, events, events)
    training_loader = TRAINING_LOADERS[config.modality]
    return Loaders(
        training_loader(random_load, task.train, task.targets, len(task.labels.names), args),
        load,
        ViewLoader(load, args.eval_clips, args.eval_crops) if args.eval_clips * args.eval_crops > 1 else load,
    )


def make_trainer(
    args: FinetuneArguments,
    training_args: FinetuneTrainingArguments,
    task: Task,
    model: nn.Module,
    processor: Any,
    loaders: Loaders,
    skipped_path: Path,
) -> FinetuneTrainer:
    """The trainer; files of the samples to evaluate on are read once here, so that all evaluations see the same ones.

    Raises:
        TooManyBadFiles: more than 10% of them cannot be read.
    """
    ledger = SkippedFiles(skipped_path, len(task.train) + len(task.evaluation) + len(task.test), shared=True)
    if task.of_events:
        task.evaluation, task.test = (
            cut_into_windows(samples, loaders.final, ledger) for samples in (task.evaluation, task.test)
        )
    # By the loader that reads the most of a file.
    task.evaluation = readable(task.evaluation, loaders.final, ledger, training_args.dataloader_num_workers)
    task.test = readable(task.test, loaders.final, ledger, training_args.dataloader_num_workers)
    draws = TrainingDraws(
        task.train,
        loaders.training,
        training_args.seed,
        args.draws_per_epoch or len(task.train) * args.draws_per_sample,
        balanced_weights(task.labels.encode(task.train)) if args.balanced_sampling else None,
        args.draws_per_sample,
    )
    if training_args.metric_for_best_model == "auto":
        training_args.metric_for_best_model = task.metrics[0]
    metric = ClassificationMetric(config_name=task.kind, keep_in_memory=True)

    def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
        if task.of_events:
            return trainer.evaluated.measure(outputs.predictions)
        return metric.compute(predictions=outputs.predictions, references=outputs.label_ids.astype(np.int64))

    trainer = FinetuneTrainer(
        model=model,
        args=training_args,
        train_dataset=draws,
        eval_dataset=evaluation_set(task, task.evaluation, loaders.epoch, model.config),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
        layer_decay=args.layer_decay,
        ledger=ledger,
        stop=StopRequest(),
        loader_timeout=args.loader_timeout,
    )
    return trainer


def evaluation_set(task: Task, samples: list[Any], load: Load, config: Any) -> EvaluationSamples | EvaluationWindows:
    """`samples`, or windows of them, to evaluate on."""
    if task.of_events:
        return EvaluationWindows(samples, load, config)
    return EvaluationSamples(samples, load, task.targets)


def train(trainer: FinetuneTrainer, checkpoint: str | None) -> bool:
    """Train, from a checkpoint on if there is one.

    Returns:
        Whether the last step has been done; `False` if a signal ended the run, with a checkpoint, before that.
    """
    with trainer.stop_and_resume.stop, loader_errors_as_os_errors(trainer.loader_timeout):
        trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if trainer.stop_and_resume.stopped:
        logger.warning("stopped after step %d of %d: --resume goes on", state.global_step, state.max_steps)
    return not trainer.stop_and_resume.stopped


def readable(samples: list[Sample], load: Load, ledger: SkippedFiles, num_workers: int) -> list[Sample]:
    """The samples that can be read, of which each process tries its share; the others go to `ledger`."""
    # Views of whole videos are large.
    batch_size = 2 if isinstance(load, ViewLoader) else 64
    with PartialState().split_between_processes(list(range(len(samples)))) as own:
        found = iterate_eval([samples[place] for place in own], load, batch_size, ledger, num_workers) if own else ()
        kept = [own[index] for indices, _ in found for index in indices]
    return [samples[place] for place in gather_object(kept)]


# --- Results ---


def evaluate(trainer: FinetuneTrainer, task: Task, load: Load, views_per_sample: int) -> dict[str, Any]:
    """What results.json holds: the final model's figures, how they came about, and the history."""
    name, config = task.metrics[0], trainer.model.config
    history = [
        {"epoch": entry["epoch"], **_measured(entry, "eval", task)}
        for entry in trainer.state.log_history
        if f"eval_{name}" in entry
    ]
    is_best = trainer.args.load_best_model_at_end
    results = {
        "metric": name,
        "evaluation": _measured(trainer.evaluate(evaluation_set(task, task.evaluation, load, config)), "eval", task),
        "evaluated_on": task.held_out,
        # A best epoch chosen on the very samples that it is measured on flatters itself: say so.
        "epoch": "the best, chosen on the same samples" if is_best else "the last",
        "views_per_sample": views_per_sample,
        "samples": {
            part: len({sample.path for sample in getattr(task, part)}) for part in ("train", "evaluation", "test")
        },
        "classes": len(task.labels.names),
        "skipped_files": len(trainer.ledger.state_dict()),
        "skipped_steps": trainer.skip_non_finite.skipped_steps,
        "history": history,
    }
    if task.test:
        test_set = evaluation_set(task, task.test, load, config)
        results["test"] = _measured(trainer.evaluate(test_set, metric_key_prefix="test"), "test", task)
    return results


def _measured(found: dict[str, float], prefix: str, task: Task) -> dict[str, float]:
    """Metrics and loss out of what the Trainer measured."""
    return {name: found[f"{prefix}_{name}"] for name in (*task.metrics, "loss") if f"{prefix}_{name}" in found}


def resolved_arguments(args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> dict[str, Any]:
    """Our own arguments, and those of `TrainingArguments` that are not at the values it has by itself."""
    # It sets up the processes anew: as they were.
    same = {"use_cpu": training_args.use_cpu, "ddp_backend": training_args.ddp_backend}
    stock = TrainingArguments(output_dir=training_args.output_dir, **same).to_dict()
    ours = {entry.name for entry in fields(FinetuneTrainingArguments) if entry.name in vars(FinetuneTrainingArguments)}
    given = {k: v for k, v in training_args.to_dict().items() if k in ours or v != stock[k]}
    return json.loads(json.dumps(vars(args) | given, default=str))


def write_outputs(out: Path, run: dict[str, Any], config: Any, results: dict[str, Any], seconds: float) -> None:
    """results.json, run.json and the model card."""
    note = f"epoch: {results['epoch']}"
    if results["views_per_sample"] > 1:
        note += f"; {results['views_per_sample']} views per sample"
    elif results["metric"] not in EVENT_METRICS:
        note += _part_measured(config)
    measured = {
        "metric": results["metric"],
        "value": results["evaluation"][results["metric"]],
        "split": results["evaluated_on"],
        "note": note,
    }
    what = "sound event detection" if results["metric"] in EVENT_METRICS else f"{config.modality} classification"
    run = run | {"seconds": round(seconds, 1), "results": {what: measured}}
    write_json(out / "results.json", results)
    write_json(out / "run.json", run)
    write_card(out, run)


def _part_measured(config: Any) -> str:
    """Of a sample that is longer than the model's input, the part that one view shows."""
    if config.modality == "audio":
        seconds = config.max_length * FRAME_SHIFT_MS / 1000
        return f"; of longer recordings their middle {seconds:.2f} s"
    if config.modality == "image":
        return ""
    return f"; {frames_seen(config)}"


def result_line(results: dict[str, Any]) -> str:
    """The final model's metric, of what results.json holds; of several folds its mean and deviation."""
    if deviation := results.get("deviation"):
        value = f"{results['evaluation'][results['metric']]:.4f} (deviation {deviation[results['metric']]:.4f})"
        return f"{results['metric']} {value} on {results['evaluated_on']}"
    return f"{results['metric']} {results['evaluation'][results['metric']]:.4f} on {results['evaluated_on']}"
