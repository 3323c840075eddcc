"""The configs of both models of a run, from its recipe."""

from typing import Any

from transformers import PreTrainedConfig

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.common.arguments import check_name
from bridle_hf.configuration_bridle import BridleEncoderConfig, check_layers
from bridle_hf.pretraining.arguments import PretrainArguments


def make_configs(args: PretrainArguments) -> tuple[BridleConfig, BridleTokenizerConfig]:
    """Configs of both sides; what the tokenizer shares with the encoder and does not name, it takes from it.

    Raises:
        ValueError: an unknown or wrong field, or codebooks that differ between the two.
    """
    fields = {"modality": args.modality, **args.encoder}
    if "features" in {fields.get("target"), *(phase.get("target") for phase in args.phases)}:
        fields["target_feature_size"] = args.tokenizer.get("code_dim", BridleTokenizerConfig.code_dim)
    encoder = _make_config(BridleConfig, "encoder", fields)
    if encoder.modality != args.modality:
        raise ValueError(f"encoder.modality is {encoder.modality}, but modality is {args.modality}: they must agree")
    own = set(PreTrainedConfig().to_dict())
    shared = (set(BridleEncoderConfig().to_dict()) | {"num_codebooks", "codebook_size"}) - own
    fields = {name: value for name, value in encoder.to_dict().items() if name in shared}
    fields |= {"teacher_hidden_size": encoder.hidden_size, **args.tokenizer}
    tokenizer = _make_config(BridleTokenizerConfig, "tokenizer", fields)
    for name in ("modality", "num_codebooks", "codebook_size", "patch_grid", "patch_shape"):
        ours, theirs = getattr(encoder, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(f"tokenizer.{name} is {theirs}, but encoder.{name} is {ours}: they must agree")
    if tokenizer.teacher_layers is not None:
        check_layers("tokenizer.teacher_layers", tokenizer.teacher_layers, encoder.num_hidden_layers)
    if tokenizer.center_teacher and {"alternate", "joint"} & {phase.get("train") for phase in args.phases}:
        raise ValueError(
            "tokenizer.center_teacher is for phases that train the tokenizer alone, not alternate or joint"
        )
    if tokenizer.tokenizer_type != "self_distilled":
        raise ValueError("tokenizer.tokenizer_type: describe the self-distilled one; iteration 0 follows from it")
    return encoder, tokenizer


def _make_config(config_class: type, name: str, fields: dict[str, Any]) -> Any:
    known = config_class().to_dict()
    for key in fields:
        check_name(name, key, known)
    try:
        return config_class(**fields)
    except Exception as error:
        # huggingface_hub's strict dataclasses raise their own errors, over several lines.
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
