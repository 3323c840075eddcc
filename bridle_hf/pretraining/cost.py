"""Cost of a recipe: FLOPs of each phase and, under assumed shares of a peak, GPU hours."""

import sys
from dataclasses import dataclass, field

from bridle_hf.common.arguments import parse_arguments
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs


@dataclass
class FlopsArguments:
    """What a recipe does not say."""

    samples: int = field(metadata={"help": "samples of the data set"})
    mfu: list[float] = field(
        default_factory=lambda: [0.2, 0.4], metadata={"help": "assumed shares of the peak that training reaches"}
    )
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "numbers of GPUs"})

    def __post_init__(self):
        if self.samples < 1 or min(self.gpus) < 1 or not all(0 < share <= 1 for share in self.mfu):
            raise ValueError("--samples and --gpus must be at least 1, and --mfu over 0 and at most 1")


# Dense bf16 of an H100 or H200, as its maker gives it.
ASSUMED_PEAK_TFLOPS = 989.0


def main() -> None:
    argv = [*sys.argv[1:], "--data", "-", "--output_dir", "-"]
    args, recipe = parse_arguments(FlopsArguments, PretrainArguments, argv=argv)
    try:
        configs = make_configs(recipe)
        schedule = Schedule(recipe.phases, args.samples / recipe.global_batch_size, recipe.steps_scale)
        flops = ScheduleFlops(schedule, *configs, recipe.masks)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(*flops.lines(recipe.global_batch_size), sep="\n")
    print_cost(flops, recipe.global_batch_size, args, recipe.peak_tflops or ASSUMED_PEAK_TFLOPS)


def print_cost(flops: ScheduleFlops, batch_size: int, args: FlopsArguments, peak_tflops: float) -> None:
    total = flops.left(0) * batch_size
    mean = total / (flops.schedule.total_steps * batch_size)
    print(f"\nall phases: {total:.3g} FLOPs, {flops.schedule.total_steps:,} steps")
    print(f"\nat a peak of {peak_tflops:g} TFLOP/s, of which is reached (assumed):")
    print(f"{'MFU':>6}{'GPU hours':>12}" + "".join(f"{f'days on {gpus}':>14}" for gpus in args.gpus)
          + "".join(f"{f'samples/s on {gpus}':>19}" for gpus in args.gpus))  # fmt: skip
    for share in args.mfu:
        speed = share * peak_tflops * 1e12
        hours = total / speed / 3600
        print(f"{share:6.0%}{hours:12,.0f}" + "".join(f"{hours / 24 / gpus:14,.1f}" for gpus in args.gpus)
              + "".join(f"{gpus * speed / mean:19,.0f}" for gpus in args.gpus))  # fmt: skip
