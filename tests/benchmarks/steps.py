"""Steps of a recipe's phases on random data, for what measures them; and the matrix products that they are made of."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from bridle_hf import BridleConfig
from bridle_hf.common.arguments import parse_command_line
from bridle_hf.data.masked_loader import MaskedLoader
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.flops import ScheduleFlops
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs


class Steps:
    """A recipe's phases, each with a step of so many samples to be called.

    Args:
        recipe: Name or path.
        samples: Of a batch; drawn at random, once.
        depth: Layers of encoder and decoder, instead of the recipe's.
        options: Of `bridle pretrain`, instead of the recipe's.
    """

    def __init__(self, recipe: str, samples: int, depth: tuple[int, int] | None = None, options: Sequence[str] = ()):
        (args,) = parse_command_line(PretrainArguments, argv=[recipe, "--data", "-", "--output_dir", "-", *options])
        if depth is not None:
            args.encoder |= dict(zip(("num_hidden_layers", "decoder_num_hidden_layers"), depth))
        self.configs = make_configs(args)
        self.schedule = Schedule(args.phases, steps_per_epoch=1000.0)
        self.flops = ScheduleFlops(self.schedule, *self.configs, args.masks, args.masks_per_sample)
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.interleaving = Interleaving(accelerator, self.schedule, *self.configs, seed=0)
        # Codes that are nobody's take as long.
        self.interleaving._initialize_codebooks = lambda batches: None
        self.batch = draw_batch(self.configs[0], args.masks, samples, args.masks_per_sample)

    def enter(self, number: int):
        """Set phase `number` up; returns its name and its step, a function of nothing."""
        self.interleaving.enter_phase(number, lambda: ())
        step = self.schedule.starts[number]
        name = f"{self.schedule.phases[number].train} {self.schedule.iteration(number)}"
        return name, lambda: self.interleaving.step(step, self.batch)


def draw_batch(config: BridleConfig, weights: dict[str, float], samples: int, masks_per_sample: int = 1) -> dict:
    """Inputs and masks of a batch; what is in them does not matter to the time that a step takes."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    kind = max(weights, key=weights.get, default=config.mask_type)
    frames, height, width = config.input_size
    shape = {"audio": (height, width), "image": (config.num_channels, height, width)}
    shape = shape.get(config.modality, (frames, config.num_channels, height, width))

    def load(sample, rng):
        return {INPUT_NAMES[config.modality]: torch.randn(shape, generator=generator)}

    loader = MaskedLoader(load, config, {kind: 1.0}, masks_per_sample)
    rows = [loader(None, rng) for _ in range(samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class MatrixProducts(TorchDispatchMode):
    """Notes the matrix products that are done within it: `seconds` tells what they take by themselves."""

    KINDS = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in self.KINDS:
            tensors = tuple((tuple(entry.shape), entry.stride()) for entry in args if isinstance(entry, torch.Tensor))
            self.found[func, tensors] += 1
        return func(*args, **kwargs)

    def flops(self) -> int:
        """A multiplication and an addition as two."""
        total = 0
        for (_, tensors), count in self.found.items():
            (*batch, rows, inner), (*_, columns) = (shape for shape, _ in tensors[-2:])
            total += 2 * count * rows * inner * columns * (batch[0] if batch else 1)
        return total

    def seconds(self, rounds: int = 3) -> float:
        """Of all of them, one after another: the median of each kind and shape, times how often it came."""
        total = 0.0
        for (func, tensors), count in self.found.items():
            given = [_randn_strided(*tensor) for tensor in tensors]
            times = []
            for _ in range(rounds + 1):
                began = time.process_time()
                func(*given)
                times.append(time.process_time() - began)
            total += count * statistics.median(times[1:])
        return total


class Waits(TorchDispatchMode):
    """Counts, in `count`, where a host would wait for a GPU: a value is read, or non-zeros are counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put_", "_index_put_impl_"):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def _randn_strided(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    last = sum((size - 1) * step for size, step in zip(shape, stride))
    return torch.randn(last + 1).as_strided(shape, stride)
