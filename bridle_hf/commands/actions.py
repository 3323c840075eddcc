"""Actions of the commands, by their names: what each does and prints. Each imports the rooms that it needs."""

import logging
from pathlib import Path
from typing import Any

from bridle_hf.commands.arguments import CardArguments, ConvertArguments, ReportArguments
from bridle_hf.common.errors import ArgumentError
from bridle_hf.common.files import read_json
from bridle_hf.common.recipes import list_recipes


def pretrain(args: Any) -> None:
    from transformers.utils.logging import disable_progress_bar

    from bridle_hf.pretraining.pretrain import run_pretraining

    disable_progress_bar()
    _log()
    made = run_pretraining(args)
    for line in made if args.dry_run else ():
        print(line)


def finetune(args: Any, training_args: Any) -> None:
    from accelerate import PartialState

    from bridle_hf.finetuning.finetune import result_line, run_finetuning

    _log()
    made = run_finetuning(args, training_args)
    if made.results and PartialState().is_main_process:
        where = f"classifiers are in {made.output_dir}/fold_*" if args.folds else f"classifier is in {made.output_dir}"
        print(f"{result_line(made.results)}; the {where}")


def probe(args: Any) -> None:
    from bridle_hf.probing.probe import probe_lines, run_probing

    _log()
    print(*probe_lines(run_probing(args)), sep="\n")


def embed(args: Any) -> None:
    from bridle_hf.embedding.embed import run_embedding

    _log()
    if made := run_embedding(args):  # by one of several processes
        print("{rows} rows of {samples} files in {output}; {skipped} skipped".format(**made))
        if made["skipped"]:
            print(f"why: {made['output']}.skipped.jsonl")


def search(args: Any) -> None:
    from bridle_hf.embedding.search import search, search_lines

    print(*search_lines(search(args)), sep="\n")


def prepare(args: Any) -> None:
    from bridle_hf.data.layouts.prepare import run_preparing

    _log()
    print("{path}: {samples} rows, {classes} classes, {splits} splits, {folds} folds".format(**run_preparing(args)))


def shard(args: Any) -> None:
    from bridle_hf.data.shards.writer import make_shards

    _log()
    made = make_shards(args)
    print("{samples} of {found} samples in {shards} shards in {output_dir}".format(**made))


def card(args: CardArguments) -> None:
    from bridle_hf.cards.card import write_card

    try:
        run = read_json(Path(args.run))
        if run is None:
            raise ArgumentError(f"--run {args.run}: No such file")
        if not isinstance(run, dict):
            raise ArgumentError(f"--run {args.run} is not the record of a run")
        print(write_card(args.folder, run, repo_id=args.repo_id))
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"{args.run} lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ArgumentError(what) from error


def push(args: Any) -> None:
    from bridle_hf.cards.publishing import run_pushing

    print(*run_pushing(args), sep="\n")


def convert(args: ConvertArguments) -> None:
    from bridle_hf.cards.card import write_converted_card
    from bridle_hf.convert_bridle_original_to_hf import convert_checkpoint, holds_original, read_checkpoint
    from bridle_hf.convert_relatives_to_bridle import convert_relative_checkpoint

    fields = {name: value for name, value in vars(args).items() if value is not None}
    checkpoint, folder = fields.pop("checkpoint"), Path(fields.pop("output_dir"))
    try:
        found = read_checkpoint(checkpoint) if Path(checkpoint).is_file() else checkpoint
        if original := isinstance(found, dict) and holds_original(found):
            if "modality" not in fields:
                raise ValueError(f"{checkpoint} is of the authors' code: give --modality")
            convert_checkpoint(found, folder, **fields)
        elif left := convert_relative_checkpoint(found, folder, **fields):
            print(f"left: {', '.join(left)}")
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    made = [folder / name for name in (("encoder", "tokenizer") if original else ("encoder",))]
    for path in made:
        write_converted_card(path, checkpoint)
    print(f"wrote {' and '.join(map(str, made))}")


def export(args: Any) -> None:
    from bridle_hf.exporting.export import export_line, run_export

    print(export_line(run_export(args)))


def flops(args: Any, recipe: Any) -> None:
    from bridle_hf.pretraining.cost import cost_lines

    try:
        print(*cost_lines(args, recipe), sep="\n")
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def report(args: ReportArguments) -> None:
    from bridle_hf.monitoring.report import write_report

    if not (Path(args.output_dir) / "metrics.jsonl").exists():
        raise ArgumentError(f"{args.output_dir} holds no metrics.jsonl: give the output folder of a run")
    try:
        print(write_report(args.output_dir))
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error


def demo(args: Any) -> None:
    if args.serve is None:
        from bridle_hf.demos.demo import run_demo as lines_of
    else:
        from bridle_hf.demos.page import serve as lines_of
    for line in lines_of(args):
        print(line, flush=True)


def study(args: Any) -> None:
    from bridle_hf.study.report import write_report
    from bridle_hf.study.study import run_study

    _log()
    if not args.report:
        run_study(args)
    print(write_report(args))


def recipes() -> None:
    for name, line in list_recipes().items():
        print(f"{name:<24}{line}")


def info() -> None:
    from bridle_hf.commands.info import info_lines

    print(*info_lines(), sep="\n")


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
