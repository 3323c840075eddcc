"""
What watching a run costs, as a share of the step time, probes off: the same steps of a recipe with the monitor and
without it. Run:

    python tests/benchmarks/bench_monitoring.py [--recipe audio_demo] [--pairs 100]

Watched are the norms of the gradients by part, how often each code is the encoder's target, the sums on the device,
the row of metrics.jsonl, the progress bar and TensorBoard. Steps with and without take turns, so that a busy machine
slows both; a row is written every `log_every` watched steps, as in a run. Reported, per phase: what a watched step
takes longer than the unwatched one beside it (the median over pairs), and a row's median / log_every, as a share of
the median unwatched step, with a 95% interval.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from steps import draw_batch

from bridle_hf.common.arguments import parse_command_line
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops
from bridle_hf.monitoring.metrics_log import MetricsLog
from bridle_hf.monitoring.monitor import Monitor
from bridle_hf.monitoring.trackers import start_tracker
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs


DEMO = Path(__file__).parents[2] / "bridle_hf" / "recipes" / "audio_demo.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(DEMO))
    parser.add_argument("--pairs", type=int, default=100, help="steps of each kind, per phase")
    options = parser.parse_args()
    (args,) = parse_command_line(PretrainArguments, argv=[options.recipe, "--data", "-", "--output_dir", "-"])
    configs = make_configs(args)
    schedule = Schedule(args.phases, steps_per_epoch=1000.0)
    flops = ScheduleFlops(schedule, *configs, args.masks)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=folder)
        start_tracker(accelerator, Path(folder), None)
        interleaving = Interleaving(accelerator, schedule, *configs, seed=0, micro_batch_size=args.micro_batch_size)
        batch = draw_batch(configs[0], args.masks, args.global_batch_size)
        print(
            f"{'phase':>14}{'step (ms)':>12}{'watched (+ms)':>14}{'row (ms)':>10}{'overhead':>10}{'95% interval':>18}"
        )
        for number, phase in enumerate(schedule.phases):
            interleaving.enter_phase(number, lambda: iter([batch] * 100))
            log = MetricsLog(Path(folder) / "metrics.jsonl")
            monitor = Monitor(log, accelerator, flops, 1.0, schedule.starts[number], args.global_batch_size)
            times = measure(interleaving, monitor, batch, schedule, number, options.pairs, args.log_every)
            monitor.bar.leave = False
            monitor.close()
            print_row(f"{phase.train} {schedule.iteration(number)}", times, args.log_every)
        accelerator.end_training()


def measure(interleaving, monitor, batch, schedule, number, pairs, log_every):
    """Seconds of each unwatched step, each watched one and each row."""
    times = {"unwatched": [], "watched": [], "row": []}
    nothing = torch.zeros(())

    def unwatched():
        with (
            mock.patch("bridle_hf.interleaving.interleaving.gradient_norms", whole_norm),
            mock.patch.object(interleaving, "_count", lambda *unused: nothing),
        ):
            interleaving.step(step, batch)

    def watched():
        monitor.done = step
        monitor.update(interleaving.step(step, batch), time.monotonic(), 0.0)

    position = {"phase": number, "kind": schedule.phases[number].train, "iteration": schedule.iteration(number)}
    step = schedule.starts[number]
    for pair in range(pairs + 3):
        # Which of the two comes first changes from pair to pair.
        for kind in (unwatched, watched)[:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            kind()
            if interleaving.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if pair >= 3:  # the first are to warm up
                times[kind.__name__].append(time.perf_counter() - start)
        if pair % log_every == log_every - 1:
            start = time.perf_counter()
            monitor.flush(pair + 1, position, {"encoder": 1e-3, "tokenizer": 1e-3}, 0)
            times["row"].append(time.perf_counter() - start)
    return times


def whole_norm(model, side):
    """What clipping needs by itself."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {side: torch.nn.utils.get_total_norm(gradients)}


def print_row(name, times, log_every):
    unwatched, row = statistics.median(times["unwatched"]), statistics.median(times["row"])
    more = sorted(watched - alone for watched, alone in zip(times["watched"], times["unwatched"]))
    overheads = [(between + row / log_every) / unwatched for between in (statistics.median(more), *interval(more))]
    columns = f"{1e3 * unwatched:12.1f}{1e3 * statistics.median(more):14.2f}{1e3 * row:10.1f}"
    print(f"{name:>14}{columns}{overheads[0]:10.2%}{overheads[1]:11.2%} to {overheads[2]:.2%}", flush=True)


def interval(values):
    """Of 95%, for the median of sorted `values` of any distribution: the binomial's, by its normal approximation."""
    half = math.ceil(0.98 * math.sqrt(len(values)))
    return values[max(len(values) // 2 - half, 0)], values[min(len(values) // 2 + half, len(values) - 1)]


if __name__ == "__main__":
    main()
