"""Released checkpoints, each from nothing: data rendered, pretraining, float16, what it is measured by, its card."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForPreTraining

from bridle_hf.cards.card import write_card
from bridle_hf.common.errors import ArgumentError, RunError, nearest
from bridle_hf.common.files import read_json, write_json
from bridle_hf.data.modalities import load_processor, load_weights
from bridle_hf.pretraining.pretrain import pretrain
from bridle_hf.release.arguments import ReleaseArguments
from bridle_hf.release.drawings import make_drawings
from bridle_hf.release.materials import DRAWINGS, FLITE, FLUID, GENERAL, RECORDINGS, Material
from bridle_hf.release.measuring import MEASURED, measure
from bridle_hf.release.motion import make_motion
from bridle_hf.release.sounds import make_sounds


logger = logging.getLogger(__name__)

LICENCE = "mit"


@dataclass(frozen=True)
class Release:
    """A checkpoint that is given away.

    Args:
        make_data: the folder that it is pretrained on, made once, below a folder for caches.
        uses: what it is for, and what it is not for.
    """

    modality: str
    recipe: str
    make_data: Callable[[str | None], str]
    materials: tuple[Material, ...]
    uses: str


RELEASES = {
    "bridle-audio-small": Release(
        "audio",
        "audio_release",
        make_sounds,
        (FLUID, GENERAL, RECORDINGS, FLITE),
        "For short sounds, a second or so at a time: instruments, drums, keywords in noise. Not for what none of its "
        "materials holds: the sounds of streets, homes and nature; conversations; mixed music.",
    ),
    "bridle-image-small": Release(
        "image",
        "image_release",
        make_drawings,
        (DRAWINGS,),
        "For small pictures of single things: icons, drawings, signs, characters, in colour or grey. Not for "
        "photographs, of which none was seen.",
    ),
    "bridle-video-small": Release(
        "video",
        "video_release",
        make_motion,
        (DRAWINGS,),
        "For how drawn things move in a few frames: where they go, turn, grow, fall, bounce. Not for films of people, "
        "nature or anything else that a camera sees.",
    ),
}


def make_releases(args: ReleaseArguments) -> Iterator[str]:
    """Make the checkpoints one after the other, going on where an earlier call was; yields a line on each.

    Raises:
        ArgumentError: there is no such checkpoint. RunError: a package cannot be fetched; or as of pretraining.
    """
    for name in args.names:
        if name not in RELEASES:
            raise ArgumentError(f"--names: no checkpoint '{name}'{nearest(name, RELEASES)}")
    for name in args.names or RELEASES:
        release, out = RELEASES[name], Path(args.output_dir) / name
        try:
            data = release.make_data(args.cache_dir)
        except RuntimeError as error:  # a package that cannot be fetched
            raise RunError(f"{name}: {error}") from error
        logger.info("%s: data in %s", name, data)
        run = pretrain(
            release.recipe, data=data, output_dir=str(out / "pretraining"), resume=True, steps_scale=args.steps_scale
        )
        if not run.finished:
            yield f"{name}: stopped; the same command goes on"
            return
        folder = Path(args.checkpoints_dir) / name
        export(run.output_dir, folder)
        results = measure_all(folder, release.modality, out, args.cache_dir)
        write_cards(folder, run.output_dir, release, results)
        yield f"{name}: {folder}"


def export(run: Path, folder: Path) -> None:
    """The encoder of a run, and its tokenizer in `folder/tokenizer`, in float16, each with its processor.

    Their configs ask for float32: half the bytes to keep and to load, and nothing computed in half precision, which
    flips codes and is slow on CPUs.
    """
    for part, place in {"encoder": folder, "tokenizer": folder / "tokenizer"}.items():
        model = load_weights(AutoModelForPreTraining, str(run / part))
        model.half().save_pretrained(place)
        load_processor(run / part, model.config).save_pretrained(place)
        write_json(place / "config.json", {**read_json(place / "config.json"), "dtype": "float32"})


def measure_all(folder: Path, modality: str, out: Path, cache_dir: str | None) -> dict[str, dict[str, float]]:
    """Every task of the modality, by name, see [`measure`]; those of these very weights in `out/measured.json` are not
    measured again."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    known = read_json(out / "measured.json") or {}
    results = known["tasks"] if known.get("weights") == weights else {}
    for name, measured in MEASURED[modality].items():
        if name not in results:
            results[name] = measure(folder, measured, cache_dir, out / "skipped.jsonl")
            logger.info("%s: %s", name, results[name])
            write_json(out / "measured.json", {"weights": weights, "tasks": results})
    return results


def write_cards(folder: Path, run: Path, release: Release, results: dict[str, dict[str, float]]) -> None:
    """Cards of the encoder, with what was measured, and of the tokenizer."""
    record = read_json(run / "run.json")
    record["arguments"]["license"] = LICENCE
    record["materials"] = [
        {"name": f"{material.package.name} {material.package.version}", "client": material.package.client,
         "licence": material.licence, "what": material.what}
        for material in release.materials
    ]  # fmt: skip
    record["uses"] = release.uses
    write_card(folder, record, {name: as_result(name, scores) for name, scores in results.items()})
    write_card(folder / "tokenizer", record, {}, repo_id=f"{folder.name}/tokenizer")


def as_result(name: str, scores: dict[str, float]) -> dict[str, Any]:
    """A task's scores as a card takes them."""
    controls = {control: score for control, score in scores.items() if control != "encoder"}
    return {
        "metric": "accuracy",
        "value": scores["encoder"],
        "controls": controls,
        "dataset": name.split(":")[0],
        "note": "frozen, region_mean_std/gate/linear; nothing of this set was trained on",
    }
