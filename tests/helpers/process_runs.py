"""Runs of pretraining in the processes that a launcher started: `torchrun process_runs.py FOLDER RUNS`.

RUNS is JSON: lists [name, recipe, step after whose checkpoint to stop or null, options]. A run's output is
FOLDER/name; what rank r saw is added to FOLDER/name_r.pt, a list with one entry for each start of the run:
`codebooks` (hashes of the rank's own, after k-means and after every step), `codes` and `index` (of each step's
samples, in their order), `sharded` (whether it held a part of the weights) and `state`, the last one.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

import bridle_hf.pretraining.run
from bridle_hf.common.arguments import parse_command_line
from bridle_hf.interleaving.interleaving import Interleaving
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.pretrain import run_pretraining
from bridle_hf.pretraining.run import Run


class StoppedError(Exception):
    """The run has come to where it was to stop."""


class Observed(Interleaving):
    """Notes what each step sees and leaves."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {"codebooks": [], "codes": {}, "index": {}}
        self.now = 0

    def enter_phase(self, *args):
        super().enter_phase(*args)
        self.note_codebooks()

    def step(self, step, batch):
        self.now = step
        self.seen["index"][step] = batch["index"].tolist()
        metrics = super().step(step, batch)
        if step in self.seen["codes"]:
            self.seen["codes"][step] = [codes for _, codes in sorted(self.seen["codes"][step], key=lambda row: row[0])]
        self.note_codebooks()
        return metrics

    def note_codebooks(self):
        hashes = hashlib.sha256()
        for buffer in self.unwrapped_tokenizer.quantizer.buffers():
            hashes.update(buffer.numpy().tobytes())
        self.seen["codebooks"].append(hashes.hexdigest())

    def _count(self, codes, part):
        rows = [row[:number] for row, number in zip(codes, part.num_real)]
        self.seen["codes"][self.now] = [*self.seen["codes"].get(self.now, []), *zip(part.samples, rows)]
        return super()._count(codes, part)


class ObservedRun(Run):
    """Writes what was seen; stops where it is asked to."""

    stop_after: int | None = None

    def _save(self, done):
        super()._save(done)
        if done == self.stop_after:
            self.write()
            raise StoppedError

    def finish(self):
        self.write()
        super().finish()

    def write(self):
        path = self.out.parent / f"{self.out.name}_{self.accelerator.process_index}.pt"
        entries = torch.load(path, weights_only=True) if path.exists() else []
        models = self.interleaving.encoder, self.interleaving.tokenizer
        sharded = any(isinstance(parameter, DTensor) for model in models for parameter in model.parameters())
        last = {"sharded": sharded, "state": self.interleaving.state_dict()}
        torch.save([*entries, self.interleaving.seen | last], path)


def do(folder: Path, runs: list) -> None:
    """All runs, one after the other, in this process."""
    torch.set_num_threads(1)
    bridle_hf.pretraining.run.Interleaving, bridle_hf.pretraining.run.Run = Observed, ObservedRun
    # They take most of the time of so small a run, and nothing of it depends on them.
    bridle_hf.pretraining.run.draw_example = bridle_hf.pretraining.run.write_report = lambda *args: None
    # One process group for all runs.
    bridle_hf.pretraining.run.Accelerator.end_training = lambda accelerator: None
    for name, recipe, stop_after, options in runs:
        ObservedRun.stop_after = stop_after
        words = [str(folder / f"{recipe}.yaml"), "--data", str(folder / "data")]
        words += ["--output_dir", str(folder / name), *options]
        with contextlib.suppress(StoppedError):
            run_pretraining(*parse_command_line(PretrainArguments, argv=words))
        AcceleratorState._reset_state()


if __name__ == "__main__":
    do(Path(sys.argv[1]), json.loads(sys.argv[2]))
