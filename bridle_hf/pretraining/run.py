"""One pretraining run: what it is made of, its steps, and what it leaves in OUT."""

import itertools
import json
import logging
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from bridle_hf import BridleForPreTraining, BridleModel, BridleTokenizerModel
from bridle_hf.cards.card import write_card
from bridle_hf.cards.publishing import open_repositories
from bridle_hf.common.errors import NonFiniteError
from bridle_hf.common.files import write_json
from bridle_hf.common.output_folder import PRETRAINING, hash_of_names, prepare, release, run_record
from bridle_hf.common.signals import StopRequest
from bridle_hf.common.skipped import SkippedFiles, SkippedSteps
from bridle_hf.data.batches import (
    DrawDataset,
    GlobalBatches,
    Sample,
    collate,
    iterate_eval,
    loader_errors_as_os_errors,
    make_loader,
    train_batches,
    without_interruptions,
)
from bridle_hf.data.finding import find_asked
from bridle_hf.data.loaders import MixtureLoader
from bridle_hf.data.masked_loader import MaskedLoader
from bridle_hf.data.modalities import (
    load_processor,
    load_weights,
    make_processor,
    make_sample_loader,
    pixel_statistics,
)
from bridle_hf.data.normalization import measure_normalization
from bridle_hf.data.sample import spread
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops, find_peak
from bridle_hf.monitoring.metrics_log import MetricsLog
from bridle_hf.monitoring.monitor import Monitor
from bridle_hf.monitoring.report import write_report
from bridle_hf.monitoring.trackers import start_tracker
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import save_checkpoint
from bridle_hf.pretraining.configs import load_teacher, make_configs, make_first_tokenizer_config
from bridle_hf.pretraining.evaluation import (
    check_probes,
    draw_example,
    evaluate_tokenizer,
    probe_accuracies,
    probe_samples,
)
from bridle_hf.pretraining.processes import Rank0, asked_to_shard, make_accelerator
from bridle_hf.pretraining.resume import check_unchanged, load_newest_of_all, plain


logger = logging.getLogger(__name__)

# Clips that the tokenizer is evaluated on at the end of a phase: enough for each of 256 codes to come up.
EVALUATED_CLIPS = 1000


def start(args: PretrainArguments) -> "Run":
    """The run, ready for its first step."""
    accelerator = make_accelerator(args)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return Run(args, accelerator)


class Run:
    """One pretraining run: its folder, data, models and monitor.

    Raises:
        ValueError: arguments, data or output folder are not fit to start; nothing has been trained yet.
    """

    def __init__(self, args: PretrainArguments, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.rank_0 = Rank0(accelerator)
        self.out = Path(args.output_dir)
        self.samples = self._find_samples()
        self.encoder_config, self.tokenizer_config = make_configs(args)
        self.encoder_from = None
        if args.encoder_from:
            self.encoder_from = load_weights(BridleModel, args.encoder_from, dtype=torch.float32)
        self.schedule = self._make_schedule(len(self.samples))
        self.tokenizer_from = None
        if args.tokenizer_from:
            self.tokenizer_from = load_weights(BridleTokenizerModel, args.tokenizer_from, dtype=torch.float32)
        self.processor = make_processor(self.encoder_config, self._processor_fields())
        teacher = load_teacher(args, self.encoder_config, self.processor)
        self.first_tokenizer = make_first_tokenizer_config(args, self.schedule, self.tokenizer_config, teacher)
        # Not the teacher itself: its memory is freed when it has taught.
        self.teacher = {} if teacher is None else {"name": teacher.name, "model_type": teacher.model_type}
        self.teacher_flops = None if teacher is None else teacher.flops
        self.dataset = self._make_dataset()
        self._sampler(0)  # raises if the processes cannot share a batch
        self.repositories: dict[str, str] = {}
        if args.push_to_hub and accelerator.is_main_process:
            self.repositories = open_repositories(PRETRAINING, args.hub_model_id, args.license, args.hub_private)
        # Nothing that could refuse the arguments follows --overwrite's deletion.
        self.lock = None
        inputs = {name: getattr(args, name) for name in ("data", "encoder_from", "tokenizer_from")}
        inputs["tokenizer.teacher"] = args.tokenizer.get("teacher")
        if accelerator.is_main_process:
            self.lock = prepare(self.out, PRETRAINING, inputs, args.resume, args.overwrite)
        self.rank_0.wait()
        self.ledger = SkippedFiles(self.out / "skipped.jsonl", len(self.samples), shared=True)
        self.skipped_steps = SkippedSteps()
        self.data_changes: list[dict[str, Any]] = []
        state = load_newest_of_all(self.out, self.rank_0) if args.resume else None
        self.scheduled_samples = len(self.samples)
        if state is not None:
            self._check_unchanged(state)
        self.interleaving = Interleaving(
            accelerator,
            self.schedule,
            self.encoder_config,
            self.tokenizer_config,
            seed=args.seed,
            micro_batch_size=args.micro_batch_size,
            adam_betas=args.adam_betas,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            gradient_checkpointing=args.gradient_checkpointing,
            compile_layers=args.compile,
            shard=asked_to_shard() and accelerator.num_processes > 1,
            encoder_from=self.encoder_from,
            code_cache=self.out / "codes" if args.code_cache else None,
            bucket_by_length=args.bucket_by_length,
            encoder_ema=args.encoder_ema,
            levels_join_at=args.levels_join_at,
            tokenizer_from=self.tokenizer_from,
            teacher=teacher,
        )
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.first_step = self._resume(state)
        self.monitor = self._make_monitor()

    # --- Before the first step ---

    def _make_schedule(self, samples: int) -> Schedule:
        args, kmeans = self.args, self.tokenizer_config.tokenizer_type == "kmeans"
        return Schedule(args.phases, samples / args.global_batch_size, args.steps_scale, kmeans)

    def _find_samples(self) -> list[Sample]:
        args = self.args
        samples = find_asked(args, args.modality)
        kept = [sample for sample in samples if sample.group not in set(args.exclude_groups)]
        if unknown := set(args.exclude_groups) - {sample.group for sample in samples}:
            raise ValueError(f"exclude_groups: no sample is of group {', '.join(sorted(unknown))}")
        if len(kept) < 2:
            left = f"{kept[0].path} alone is left" if kept else "no samples are left"
            raise ValueError(f"{args.data}: {left}, of at least 2; check split and exclude_groups")
        if args.probe_every:
            check_probes(kept, args.probe_samples, self.accelerator.is_main_process)
        return kept

    def _processor_fields(self) -> dict[str, Any]:
        """Those of the recipe; what it does not name is as the models to start from have seen it.

        Raises:
            ValueError: the tokenizer to start from would see other inputs; statistics both named and measured.
        """
        args, fields = self.args, dict(self.args.processor)
        if args.measure_normalization and (named := {"mean", "std"} & set(fields)):
            raise ValueError(
                f"processor.{min(named)} is named, but measure_normalization measures it: give one of them, as "
                "--measure_normalization false"
            )
        if args.encoder_from:
            seen = self._inputs_of(args.encoder_from)
            fields = {**seen, **fields}
            if args.measure_normalization:
                logger.warning(
                    "inputs are normalised as measured on %s, not with the mean %.3f and std %.3f that the weights of "
                    "--encoder_from have seen; --measure_normalization false keeps these",
                    args.data, seen["mean"], seen["std"],
                )  # fmt: skip
        if args.tokenizer_from:
            for name, value in self._inputs_of(args.tokenizer_from).items():
                if fields.setdefault(name, value) != value:
                    raise ValueError(
                        f"processor.{name} is {fields[name]}, but the codes of --tokenizer_from are those of inputs "
                        f"with {value}: give --processor.{name} {value}"
                    )
            if args.measure_normalization:
                raise ValueError(
                    "--tokenizer_from: its codes are those of inputs with its own statistics: give "
                    "--measure_normalization false"
                )
        if args.measure_normalization and not fields.get("do_normalize", True):
            raise ValueError("measure_normalization: inputs are not normalised, as processor.do_normalize is false")
        return fields

    def _inputs_of(self, model: str) -> dict[str, Any]:
        """Fields of a processor that makes inputs as those that a saved model has seen.

        Raises:
            ValueError: no processor of a run does.
        """
        known = load_processor(model, self.encoder_config)
        if self.args.modality == "audio":
            return {name: getattr(known, name) for name in ("mean", "std", "sampling_rate", "do_normalize")}
        try:
            mean, std = pixel_statistics(known.to_dict(), self.encoder_config.num_channels)
        except ValueError as error:
            raise ValueError(f"{model} {error}") from error
        return {"image_mean": list(mean), "image_std": list(std)}

    def _measure_normalization(self) -> None:
        """On rank 0, for all."""
        measured = [None]
        if self.accelerator.is_main_process:
            measured = [measure_normalization(self.samples, self.processor, self.ledger)]
        self.rank_0.wait()
        self.processor.mean, self.processor.std = broadcast_object_list(measured)[0]

    def _make_dataset(self) -> DrawDataset:
        args, config = self.args, self.encoder_config
        self.load = make_sample_loader(config, self.processor, args.loader, args.augment, args.cache_mb << 20)
        load = MixtureLoader(self.load, self.samples, args.mixture) if args.mixture else self.load
        return DrawDataset(
            self.samples,
            MaskedLoader(
                load, config, args.masks, args.masks_per_sample, args.code_cache, args.tokenizer_patch_dropout
            ),
            seed=args.seed,
        )

    def _check_unchanged(self, state: dict[str, Any]) -> None:
        """[`check_unchanged`]; the schedule stays as long as it was, wherever epochs say how long that is."""
        args = self.args
        self.scheduled_samples, self.data_changes = check_unchanged(
            args, self.out, {"samples": len(self.samples), "names_of_samples": self.names_of_samples}, state
        )
        self.schedule = self._make_schedule(self.scheduled_samples)

    def _resume(self, state: dict[str, Any] | None) -> int:
        """Go back to a checkpoint, if there is one; returns the first step to do."""
        if state is None:
            if self.accelerator.is_main_process:
                self.ledger.output_path.unlink(missing_ok=True)  # files may have been mended since
            self.rank_0.wait()
            if self.args.measure_normalization:
                self._measure_normalization()
            return 0
        self.interleaving.load_state_dict(state, state["step"])
        self.skipped_steps.load_state_dict(state.get("skipped_among_the_last", []))
        if state["normalization"] is not None:
            self.processor.mean, self.processor.std = state["normalization"]
        self.seconds, self.cpu_seconds = state["seconds"], state.get("cpu_seconds", 0.0)
        if self.accelerator.is_main_process:
            self.ledger.load_state_dict(state["skipped"])
        self.rank_0.wait()
        logger.info("resuming after step %d of %d", state["step"], self.schedule.total_steps)
        return state["step"]

    @cached_property
    def names_of_samples(self) -> str:
        """Hash of the names of the samples and their order, wherever the data lie."""
        return hash_of_names([sample.path for sample in self.samples])

    def _make_monitor(self) -> Monitor:
        log, args, resumed_from = None, self.args, self.first_step if self.args.resume else None
        configs = self.encoder_config, self.tokenizer_config
        self.flops = ScheduleFlops(
            self.schedule, *configs, args.masks, args.masks_per_sample, args.tokenizer_patch_dropout,
            self.first_tokenizer, self.teacher_flops,
        )  # fmt: skip
        self.peak = find_peak(args.peak_tflops, self.accelerator.device, args.mixed_precision)
        if self.accelerator.is_main_process:
            self._write_run_json()  # first: it says whose folder it is
            log = MetricsLog(self.out / "metrics.jsonl", resumed_from)
        start_tracker(self.accelerator, self.out, resumed_from)
        return Monitor(log, self.accelerator, self.flops, self.peak["tflops"], self.first_step,
                       args.global_batch_size, self.seconds)  # fmt: skip

    # --- The run ---

    def train(self, stop: StopRequest) -> bool:
        """All steps from the first to the last, with checkpoints and reports on the way.

        Returns:
            Whether the last step has been done; `False` if a signal ended the run, with a checkpoint, before that.
        """
        schedule, args = self.schedule, self.args
        batches, done = self.batches(self.first_step), self.first_step
        started, cpu_started = time.monotonic(), time.process_time()
        stops = stop.is_made(self.accelerator)
        while done < schedule.total_steps and not stops:
            step, number = done, schedule.phase_number(done)
            asked = time.monotonic()
            # Before a phase makes models anew: where the loader fails, those of the step before are saved.
            batch = self._next(batches, done)
            waited = time.monotonic() - asked
            if step == schedule.starts[number]:
                self.interleaving.enter_phase(number, lambda step=step: self.peek(step))
            elif schedule.fits(step):
                self.interleaving.fit_tokenizer(step, lambda step=step: self.peek(step))
            metrics = self._step(step, batch)
            self.monitor.update(metrics, asked, waited)
            done = step + 1
            ends = self.interleaving.is_over(step, metrics)
            stops = stop.is_made(self.accelerator)
            saves = ends or stops or any(every and done % every == 0 for every in (args.save_every, args.keep_every))
            if saves or done % args.log_every == 0:
                self._flush(done)
            self.seconds += time.monotonic() - started
            self.cpu_seconds += time.process_time() - cpu_started
            started, cpu_started = time.monotonic(), time.process_time()
            if ends:
                self._end_phase(number, done)
            if args.probe_every and (done % args.probe_every == 0 or done == schedule.total_steps):
                self._probe(done)
            if args.report_every and done % args.report_every == 0:
                self._report()
            if saves:
                self._save(done)
                # A signal during evaluation or save needs no further step.
                stops = stops or stop.is_made(self.accelerator)
        self.monitor.close()
        if done < schedule.total_steps:
            logger.warning("stopped after step %d of %d: --resume goes on", done, schedule.total_steps)
            self._end()
        return done == schedule.total_steps

    def _flush(self, done: int) -> None:
        position = self._position(self.schedule.phase_number(done - 1))
        self.monitor.flush(done, position, self._rates(done - 1), self.interleaving.skipped_steps)

    def _next(self, batches: Iterator[dict[str, Any]], done: int) -> dict[str, Any]:
        """The next batch; where the loader fails, what has been done so far is saved before the run ends.

        Raises:
            OSError: a worker died, or took too long.
        """
        try:
            with loader_errors_as_os_errors(self.args.loader_timeout):
                return next(batches)
        except OSError:
            # Of several processes the others are in a step: they cannot save with this one.
            if self.accelerator.num_processes == 1 and done > 0:
                self._flush(done)
                self._save(done)
            raise

    def _step(self, step: int, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        files = [self.samples[index].path for index in batch["index"].tolist()]
        try:
            metrics = self.interleaving.step(step, batch)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. The last batch of this process was: {', '.join(files)}") from error
        # A step that is left out has no metrics.
        self.skipped_steps.update(step, not metrics, files)
        return metrics

    def batches(self, first_step: int) -> Iterator[dict[str, Any]]:
        pin_memory = self.accelerator.device.type == "cuda"
        sampler = self._sampler(0 if self.args.overfit_one_batch else first_step)
        loader = make_loader(
            self.dataset, sampler, num_workers=self.args.num_workers, pin_memory=pin_memory,
            timeout=self.args.loader_timeout,
        )  # fmt: skip
        batches = without_interruptions(train_batches(loader, self.ledger))
        return itertools.repeat(next(batches)) if self.args.overfit_one_batch else batches

    def _sampler(self, first_step: int) -> GlobalBatches:
        accelerator = self.accelerator
        return GlobalBatches(
            self.args.global_batch_size, accelerator.process_index, accelerator.num_processes, first_step
        )

    def peek(self, step: int) -> Iterator[dict[str, Any]]:
        """The batches from `step` on, read beside the run."""
        for draws in self._sampler(step):
            batch = collate([self.dataset[draw] for draw in draws])
            self.ledger.update(batch["skipped"])
            yield batch

    def _position(self, number: int) -> dict[str, Any]:
        phase = self.schedule.phases[number]
        return {"phase": number, "kind": phase.train, "iteration": self.schedule.iteration(number)}

    def _rates(self, step: int) -> dict[str, float]:
        return dict(zip(("encoder", "tokenizer"), self.schedule.learning_rates(step)))

    def _end_phase(self, number: int, done: int) -> None:
        """Save the models, look at them, and tell; rank 0 does it."""
        models = self.interleaving.whole_models()
        if self.accelerator.is_main_process:
            position = self._position(number)
            name = f"phase {number} ({position['kind']} {position['iteration']})"
            row = {"event": "phase_end", "step": done, **position, "cpu_seconds": round(self.cpu_seconds, 1)}
            row |= {"steps": self.schedule.lengths[number], "full_steps": self.schedule.full_lengths[number]}
            self.monitor.event(row | {"tokenizer": self._evaluate(*models)})
            loaded = self.dataset[self.schedule.starts[number]]
            draw_example(*models, self.processor, loaded, self.out / "figures", name)
            self._save_models(self.out, *models)
            if self.args.keep_iterations:
                self._save_models(self.out / "iterations" / f"{number}_{self.schedule.phases[number].train}", *models)
        self.rank_0.wait()

    def _evaluate(self, encoder: BridleForPreTraining, tokenizer: BridleTokenizerModel) -> dict[str, Any]:
        examples = spread(self.samples, EVALUATED_CLIPS)
        found = iterate_eval(examples, self.load, 64, self.ledger, self.args.num_workers)
        batches = ({**batch, "files": [examples[index].path for index in indices]} for indices, batch in found)
        return evaluate_tokenizer(tokenizer, self.interleaving.teach(encoder), batches)

    def _probe(self, done: int) -> None:
        """Probe the encoder, on labels if there are any; rank 0 does it."""
        samples = probe_samples(self.samples, self.args.probe_samples)
        encoder, device = self.interleaving.whole_models()[0], self.accelerator.device
        if samples and self.accelerator.is_main_process:
            found = probe_accuracies(encoder, samples, self.load, self.ledger, device, self.args.seed)
            self.monitor.event({"step": done, **found})
        self.rank_0.wait()

    def _save(self, done: int) -> None:
        state = self.interleaving.state_dict()
        if self.accelerator.is_main_process:
            measured = [self.processor.mean, self.processor.std] if self.args.measure_normalization else None
            state |= {
                "arguments": plain(self.args), "samples": len(self.samples),
                "names_of_samples": self.names_of_samples, "skipped": self.ledger.state_dict(),
                "normalization": measured, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
                "scheduled_samples": self.scheduled_samples, "data_changes": self.data_changes,
                "skipped_among_the_last": self.skipped_steps.state_dict(),
            }  # fmt: skip
            save_checkpoint(self.out / "checkpoints", done, state, self.args.keep_last, self.args.keep_every)
        self.rank_0.wait()

    def _save_models(self, folder: Path, encoder: BridleForPreTraining, tokenizer: BridleTokenizerModel) -> None:
        for name, model in (("encoder", encoder), ("tokenizer", tokenizer)):
            model.save_pretrained(folder / name)
            self.processor.save_pretrained(folder / name)

    def _report(self) -> None:
        if self.accelerator.is_main_process:
            self._write_run_json()
            write_report(self.out)

    def finish(self) -> None:
        """The models with their cards, run.json and the report of the finished run."""
        self.skipped_steps.check_whole_run(self.interleaving.skipped_steps, self.schedule.total_steps)
        models = self.interleaving.whole_models()
        if self.accelerator.is_main_process:
            self._save_models(self.out, *models)
            self._report()
            run = json.loads((self.out / "run.json").read_text(encoding="utf-8"))
            for name in ("encoder", "tokenizer"):
                write_card(self.out / name, run)
        self._end()

    def _end(self) -> None:
        self.accelerator.end_training()
        release(self.lock)

    def _write_run_json(self) -> None:
        args = self.args
        more = {"data_changes": self.data_changes} if self.data_changes else {}
        if self.teacher:
            more["teacher"] = self.teacher
        write_json(self.out / "run.json", run_record(
            PRETRAINING, plain(args), args.data, args.seed, modality=args.modality, samples=len(self.samples),
            phases=self.schedule.describe(), processes=self.accelerator.num_processes, peak=self.peak,
            seconds=round(self.seconds, 1), **more,
        ))  # fmt: skip
