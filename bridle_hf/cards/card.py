"""Model card of a saved folder, `README.md`: from its configuration, its run and measured results.

bridle card OUT/encoder --run OUT/run.json [--repo_id ORG/NAME]
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from bridle_hf.common.output_folder import hub_id
from bridle_hf.configuration_bridle import BridleEncoderConfig
from bridle_hf.data.modalities import load_processor, read_config
from bridle_hf.patching_bridle import INPUT_NAMES


TEMPLATE = Path(__file__).with_name("template.md")
PAPER = "https://arxiv.org/abs/2502.02118"
# Of this machine and this moment, not of the model.
LOCAL_ARGUMENTS = {
    "data", "model", "encoder_from", "tokenizer_from", "label_order", "output_dir", "resume", "overwrite",
    "push_to_hub", "hub_model_id", "hub_private",
}  # fmt: skip


@dataclass
class Result:
    """A measured number: `value` of `metric`; `controls` (name: value) were measured in the same way."""

    metric: str
    value: float
    controls: dict[str, float] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None
    note: str = ""


def write_card(
    folder: str | Path, run: dict[str, Any], results: dict[str, dict] | None = None, repo_id: str | None = None
) -> Path:
    """Write `folder/README.md`.

    Args:
        folder: a `save_pretrained` folder of an encoder, a tokenizer or a classifier, with its processor.
        run: what `run.json` holds: `arguments`, `versions`, `git_revision`, `seed`, `data`, `samples`, `seconds`, of a
            pretraining run also `phases`; the licence of the weights is `arguments["license"]`, else "unknown", and
            what they began as `arguments["model"]` or `["encoder_from"]`, if that is an id of the Hub. Of a
            released checkpoint also `uses`, a paragraph, and `materials`, what its data is made of: mappings of
            `name`, `client`, `licence` and `what`.
        results: what was measured on this model: by name, the fields of a [`Result`]; `run["results"]` if not given.
        repo_id: the name that the card's snippets load; the folder's own name if not given, so that they run as they
            stand in its parent.

    Returns:
        The file written.

    Raises:
        TypeError: a result with a field that [`Result`] does not have.
        ValueError: metadata that the Hub would refuse; a config that cannot be read; or an audio folder without its
            feature extractor.
    """
    folder = Path(folder)
    config = read_config(folder)
    results = run.get("results", {}) if results is None else results
    data_id = _id_in(run, run["data"])
    data_name = data_id or Path(run["data"]).name
    measured = {what: Result(**{"dataset": data_name, **fields}) for what, fields in results.items()}
    kind = kind_of(config)
    repo_id = repo_id or folder.resolve().name
    card_license = run["arguments"].get("license") or "unknown"
    base_model = _base_model(kind, run)
    content = _render(
        metadata=_metadata(config, kind, measured, data_id, repo_id, card_license, base_model).to_yaml(),
        kind=kind,
        config=config,
        classes=_classes(config, kind),
        run=run,
        arguments=json.dumps({k: v for k, v in run["arguments"].items() if k not in LOCAL_ARGUMENTS}, indent=2),
        data_name=data_name,
        results=measured,
        repo_id=repo_id,
        model_name=repo_id.split("/")[-1],
        license=card_license,
        base_model=base_model,
        **_input_facts(folder, config),
    )
    path = folder / "README.md"
    ModelCard(content).save(path)
    return path


def readdress_card(path: Path, repo_id: str, license: str) -> None:
    """Let a card that is there say where it is pushed to, and the licence; whatever else it says, it keeps."""
    card, model_name = ModelCard.load(path), repo_id.split("/")[-1]
    card.data.license = license
    if card.data.eval_results:
        card.data.model_name = model_name
    lines = {
        r"# \S+": f"# {model_name}",
        r'name = ".*"': f'name = "{repo_id}"',
        r"Weights: .*\.": f"Weights: {license}.",
    }
    for line, said in lines.items():
        card.text = re.sub(rf"^{line}$", lambda _, said=said: said, card.text, count=1, flags=re.MULTILINE)
    card.save(path)


def write_converted_card(folder: str | Path, checkpoint: str | Path) -> Path:
    """Write `folder/README.md` of a model that was converted from a checkpoint, which tells nothing of its run."""
    return write_card(folder, {"arguments": {}, "data": "unknown", "converted": Path(checkpoint).name})


def kind_of(config: BridleEncoderConfig) -> str:
    """After the model that was saved: "encoder", "tokenizer" or "classifier"."""
    if config.model_type == "bridle_tokenizer":
        return "tokenizer"
    return "classifier" if config.architectures[0].endswith("Classification") else "encoder"


def pipeline_tag(config: BridleEncoderConfig) -> str | None:
    """The pipeline that the Hub's page of the model shows how to make; `None` where transformers has none that would
    take it: "feature-extraction" is for text."""
    if kind_of(config) == "classifier":
        return f"{config.modality}-classification"
    return "image-feature-extraction" if kind_of(config) == "encoder" and config.modality == "image" else None


def _base_model(kind: str, run: dict[str, Any]) -> str | None:
    """Hub id of the encoder that a model began as, if there was one and it has an id."""
    arguments = run["arguments"]
    began_as = {"classifier": arguments.get("model"), "encoder": arguments.get("encoder_from")}.get(kind)
    return None if began_as is None or arguments.get("from_scratch") else _id_in(run, began_as)


def _id_in(run: dict[str, Any], name: str) -> str | None:
    """`name` if it was an id of the Hub where the run was; of runs that do not say, if it looks like one here."""
    return hub_id(name) if "hub_ids" not in run else name if name in run["hub_ids"] else None


def _metadata(
    config: BridleEncoderConfig,
    kind: str,
    results: dict[str, Result],
    data_id: str | None,
    repo_id: str,
    card_license: str,
    base_model: str | None,
) -> ModelCardData:
    datasets = [result.dataset for result in results.values()]
    evaluations = [
        EvalResult(
            # What an encoder is measured by is a probe: a classifier on its features.
            task_type="feature-extraction" if kind == "tokenizer" else f"{config.modality}-classification",
            task_name=what,
            dataset_type=hub_id(result.dataset) or _slug(result.dataset),
            dataset_name=result.dataset,
            # Results of one set and task type are one entry of the metadata, under the name of the first.
            dataset_config=_slug(what) if datasets.count(result.dataset) > 1 else None,
            dataset_split=result.split,
            metric_type=_slug(result.metric),
            metric_name=result.metric,
            metric_value=result.value,
        )
        for what, result in results.items()
    ]
    return ModelCardData(
        license=card_license,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=pipeline_tag(config),
        tags=["bridle", "self-supervised", config.modality, kind, "arxiv:2502.02118"],
        datasets=[data_id] if data_id else None,
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )


def _classes(config: BridleEncoderConfig, kind: str) -> list[str]:
    """What the card's snippet imports from transformers, the model's class last."""
    if kind == "classifier":
        if config.modality == "audio":
            return ["pipeline"]
        return ["AutoImageProcessor", f"AutoModelFor{config.modality.title()}Classification"]
    return ["AutoFeatureExtractor" if config.modality == "audio" else "AutoImageProcessor", "AutoModel"]


def _input_facts(folder: Path, config: BridleEncoderConfig) -> dict[str, Any]:
    frames, height, width = config.input_size
    shapes = {
        "audio": (height, width),
        "image": (config.num_channels, height, width),
        "video": (frames, config.num_channels, height, width),
    }
    facts = {
        "modality": config.modality,
        "input_name": INPUT_NAMES[config.modality],
        "input_shape": ", ".join(map(str, ("batch", *shapes[config.modality]))),
        "pillow": config.num_channels in (1, 3),
        "patches": math.prod(config.patch_grid),
        "paper": PAPER,
    }
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{folder} has no preprocessor_config.json: save the processor there first")
    facts["processor"] = load_processor(folder, config)
    if config.modality == "audio":
        facts["rate"] = facts["processor"].sampling_rate
    return facts


def _render(**values: Any) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**values)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name.lower()).strip("_")
