"""
Where a step's time goes, per phase, by part of the model and by kind of operation, as a picture and a table. Run:

    python tests/benchmarks/profile_steps.py [--recipe audio_base] [--samples 1] [--out runs/profile]

Measured by torch's profiler: the time of operations, on a CUDA device that of its kernels. A backward counts to the
part whose forward it belongs to. Beside it, how often the host of a GPU would wait for it in a step (where a tensor's
value is read, or boolean indexing counts), and how many operations it issues.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from steps import Steps, Waits
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function


matplotlib.use("Agg")

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "attention": ("scaled_dot_product", "softmax", "flash"),
    "norms": ("layer_norm", "vector_norm", "normalize"),
    "activations": ("gelu", "tanh", "relu", "threshold"),
    "optimizer": ("adamw",),
    "copies": ("copy", "cat", "clone", "contiguous", "gather", "scatter", "index", "roll", "pad", "stack", "fill"),
    "search for the nearest code": ("argmin", "topk"),
}
SHOWN = "part: "


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="audio_base")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/profile"), help="folder of profile.png and profile.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, phases = Steps(options.recipe, options.samples), {}
    for number in range(len(steps.schedule.phases)):
        name, step = steps.enter(number)
        mark_parts(steps.interleaving)
        step()
        phases[name] = measure(step)
        print_phase(name, phases[name])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "profile.json").write_text(json.dumps(phases, indent=1), encoding="utf-8")
    draw(phases, f"{options.recipe}, batch of {options.samples}", options.out / "profile.png")


def mark_parts(interleaving):
    """Let the profiler see which part of which model an operation belongs to."""
    for side in ("encoder", "tokenizer"):
        model = getattr(interleaving, f"unwrapped_{side}")
        for path, module in model.named_children():
            name = {"bridle": "encoder", "encoder": "tokenizer"}.get(path, path)
            if not hasattr(module, "_marked"):
                module._marked = True
                module.forward = _marked(module.forward, name)
    interleaving._update = _marked(interleaving._update, "optimizer and norms of gradients")


def _marked(function, name):
    def call(*args, **kwargs):
        with record_function(SHOWN + name):
            return function(*args, **kwargs)

    return call


def measure(step):
    """Milliseconds by part and by kind of operation; waits and operations of the step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        step()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    part_of_forward = {}
    for event in events:
        if event.sequence_nr >= 0 and "Backward" not in event.name and (part := part_above(event)):
            part_of_forward.setdefault(event.sequence_nr, part)
    parts, kinds, counts = Counter(), Counter(), Counter()
    for event in events:
        if event.name.startswith(SHOWN):
            continue
        milliseconds = (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e3
        parts[part_above(event) or part_of_backward(event, part_of_forward)] += milliseconds
        kinds[kind_of(event)] += milliseconds
        counts["operations"] += event.name.startswith("aten::")
    with Waits() as waits:
        step()
    counts["waits"] = waits.count
    return {"parts": dict(parts.most_common()), "kinds": dict(kinds.most_common()), **counts}


def part_above(event):
    """Of the marks around an operation, the innermost."""
    while event is not None:
        if event.name.startswith(SHOWN):
            return event.name.removeprefix(SHOWN)
        event = event.cpu_parent
    return None


def part_of_backward(event, part_of_forward):
    while event is not None:
        if event.sequence_nr in part_of_forward:
            return part_of_forward[event.sequence_nr]
        event = event.cpu_parent
    return "the rest"


def kind_of(event):
    """By the names of the operation and of those that it is a part of."""
    name = event.name.removeprefix("aten::").lower()
    for kind, stems in KINDS.items():
        if any(name.lstrip("_").startswith(stem) or (len(stem) > 5 and stem in name) for stem in stems):
            return kind
    return "elementwise and the rest"


def print_phase(name, found):
    total = sum(found["parts"].values())
    print(f"{name}: {total:.0f} ms, {found['operations']} operations, the host waits {found['waits']} times")
    for by in ("parts", "kinds"):
        print(
            "  " + ", ".join(f"{key} {value / total:.1%}" for key, value in found[by].items() if value > total / 200)
        )


def draw(phases, title, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 0.9 * len(phases) + 2.4), sharey=True, layout="constrained")
    for axis, by in zip(axes, ("parts", "kinds")):
        names = list(dict.fromkeys(name for found in phases.values() for name in found[by]))
        left = [0.0] * len(phases)
        for index, name in enumerate(names):
            shares = [100 * found[by].get(name, 0.0) / sum(found[by].values()) for found in phases.values()]
            axis.barh(list(phases), shares, left=left, label=name, color=plt.get_cmap("tab20")(index))
            for row, (start, share) in enumerate(zip(left, shares)):
                if share >= 4:
                    axis.text(start + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=9)
            left = [start + share for start, share in zip(left, shares)]
        axis.set_xlabel(f"share of the step's time (%), by {'part' if by == 'parts' else 'kind of operation'}")
        axis.set_xlim(0, 100)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    axes[0].invert_yaxis()
    totals = ", ".join(f"{name} {sum(found['parts'].values()) / 1e3:.2g} s" for name, found in phases.items())
    figure.suptitle(f"Where a step's time goes: {title} ({totals})", fontsize=11)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
