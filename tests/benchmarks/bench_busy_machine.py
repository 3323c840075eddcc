"""
Steps of training beside a busy process, by how OpenMP's threads wait for each other: libgomp's default (they spin
long, then sleep), a short spin (GOMP_SPINCOUNT), none (OMP_WAIT_POLICY=passive). Run:

    python tests/benchmarks/bench_busy_machine.py [--rounds 7] [--spins 1000 10000]

A process of each kind takes its turn on the same cores, so many steps each: first with nothing beside it, then beside
one that computes without end. Reported, for the audio demo's encoder step and for a ViT-B (forward and backward, two
clips): samples/s, medians over rounds, and the ratio to the default, round by round.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time


STEPS = {"demo": 10, "vit_b": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--spins", type=int, nargs="*", default=[1000, 10000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--steps", nargs="+", choices=sorted(STEPS), default=list(STEPS))
    parser.add_argument("--worker", choices=sorted(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    settings = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
    settings |= {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in options.spins}
    print(f"{'step':>8}{'machine':>9}{'waiting':>14}{'samples/s':>12}{'ratio':>8}{'lowest to highest':>20}")
    for model in options.steps:
        workers = {name: start(model, variables) for name, variables in settings.items()}
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            for worker in workers.values():
                ask(worker)  # warm up
            for machine, signal_ in (("idle", signal.SIGSTOP), ("busy", signal.SIGCONT)):
                busy.send_signal(signal_)
                report(model, machine, [measure(workers, number) for number in range(options.rounds)])
        finally:
            for process in (*workers.values(), busy):
                process.kill()


def measure(workers, number):
    """Samples/s of a turn of each; who comes first changes from round to round."""
    names = list(workers)
    first = number % len(names)
    return {name: ask(workers[name]) for name in names[first:] + names[:first]}


def start(model, variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--worker", model]
    return subprocess.Popen(
        command, env=environment | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker):
    """Samples/s of one turn of a worker."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def report(model, machine, rounds):
    for name in rounds[0]:
        ratios = sorted(entry[name] / entry["default"] for entry in rounds)
        speed, spread = statistics.median(entry[name] for entry in rounds), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{model:>8}{machine:>9}{name:>14}{speed:12.2f}{statistics.median(ratios):8.2f}{spread:>20}", flush=True)


def work(model):
    step, samples = {"demo": demo_step, "vit_b": vit_step}[model]()
    for _ in sys.stdin:
        begin = time.perf_counter()
        for _ in range(STEPS[model]):
            step()
        print(STEPS[model] * samples / (time.perf_counter() - begin), flush=True)


def demo_step():
    import torch
    from transformers.models.auto import AutoModelForPreTraining

    from bridle_hf import BridleConfig
    from bridle_hf.common.arguments import parse_command_line
    from bridle_hf.masking_bridle import make_mask
    from bridle_hf.pretraining.arguments import PretrainArguments
    from bridle_hf.pretraining.configs import make_configs

    (args,) = parse_command_line(PretrainArguments, argv=["audio_demo", "--data", "-", "--output_dir", "-"])
    config: BridleConfig = make_configs(args)[0]
    model = AutoModelForPreTraining.from_config(config)
    optimizer, size = torch.optim.AdamW(model.parameters()), args.global_batch_size
    masks = torch.stack([make_mask("mel_band", config.patch_grid, config.mask_ratio) for _ in range(size)])
    inputs = torch.randn(size, config.max_length, config.num_mel_bins)
    labels = torch.randint(config.codebook_size, (size, masks.shape[1], config.num_codebooks))

    def step():
        model(inputs, bool_masked_pos=masks, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, size


def vit_step():
    import torch

    from bridle_hf import BridleConfig, BridleModel

    config = BridleConfig(modality="audio")
    model = BridleModel(config)
    inputs = torch.randn(2, config.max_length, config.num_mel_bins)

    def step():
        model(inputs).pooler_output.sum().backward()
        model.zero_grad()

    return step, 2


if __name__ == "__main__":
    main()
