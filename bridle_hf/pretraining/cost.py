"""Cost of a recipe: FLOPs of each phase and, under assumed shares of a peak, GPU hours."""

from bridle_hf.data.modalities import make_processor
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops
from bridle_hf.pretraining.arguments import FlopsArguments, PretrainArguments
from bridle_hf.pretraining.configs import load_teacher, make_configs, make_first_tokenizer_config


# Dense bf16 of an H100 or H200, as its maker gives it.
ASSUMED_PEAK_TFLOPS = 989.0


def cost_lines(args: FlopsArguments, recipe: PretrainArguments) -> list[str]:
    """What a recipe takes, to be printed.

    Raises:
        ValueError: the recipe's models or its schedule cannot be.
    """
    encoder, tokenizer = make_configs(recipe)
    kmeans = tokenizer.tokenizer_type == "kmeans"
    schedule = Schedule(recipe.phases, args.samples / recipe.global_batch_size, recipe.steps_scale, kmeans)
    teacher = load_teacher(recipe, encoder, make_processor(encoder, recipe.processor))
    first = make_first_tokenizer_config(recipe, schedule, tokenizer, teacher)
    flops = ScheduleFlops(
        schedule, encoder, tokenizer, recipe.masks, recipe.masks_per_sample, recipe.tokenizer_patch_dropout,
        first, None if teacher is None else teacher.flops,
    )  # fmt: skip
    lines, total = flops.lines(recipe.global_batch_size), flops.left(0) * recipe.global_batch_size
    peak_tflops, mean = recipe.peak_tflops or ASSUMED_PEAK_TFLOPS, flops.left(0) / schedule.total_steps
    lines += ["", f"all phases: {total:.3g} FLOPs, {schedule.total_steps:,} steps"]
    lines += ["", f"at a peak of {peak_tflops:g} TFLOP/s, of which is reached (assumed):"]
    lines.append(f"{'MFU':>6}{'GPU hours':>12}" + "".join(f"{f'days on {gpus}':>14}" for gpus in args.gpus)
                 + "".join(f"{f'samples/s on {gpus}':>19}" for gpus in args.gpus))  # fmt: skip
    for share in args.mfu:
        speed = share * peak_tflops * 1e12
        hours = total / speed / 3600
        lines.append(f"{share:6.0%}{hours:12,.0f}" + "".join(f"{hours / 24 / gpus:14,.1f}" for gpus in args.gpus)
                     + "".join(f"{gpus * speed / mean:19,.0f}" for gpus in args.gpus))  # fmt: skip
    return lines
