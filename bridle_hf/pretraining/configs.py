"""The configs of both models of a run, from its recipe."""

from typing import Any

from transformers import PreTrainedConfig

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.common.arguments import check_name
from bridle_hf.configuration_bridle import BridleEncoderConfig, check_layers
from bridle_hf.data.modalities import load_config
from bridle_hf.interleaving.codebook_initialization import kmeans_config
from bridle_hf.pretraining.arguments import PretrainArguments


# What an encoder must have in common with the one that it starts from, and what it takes from it if it does not say.
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "qkv_bias", "key_bias", "use_class_token", "final_layernorm", "patch_size", "tubelet_size", "num_channels",
    "position_embedding_type",
)  # fmt: skip
_GRID = ("image_size", "num_frames", "max_length", "num_mel_bins")


def make_configs(args: PretrainArguments) -> tuple[BridleConfig, BridleTokenizerConfig]:
    """Configs of both sides; what the tokenizer shares with the encoder and does not name, it takes from it.

    Raises:
        ValueError: an unknown or wrong field, codebooks that differ between the two, or an encoder of other sizes
            than the one that it shall start from.
    """
    fields = {"modality": args.modality, **args.encoder}
    if "features" in {fields.get("target"), *(phase.get("target") for phase in args.phases)}:
        fields["target_feature_size"] = args.tokenizer.get("code_dim", BridleTokenizerConfig.code_dim)
    targets = {fields.get("target", "codes"), *(phase.get("target") or "codes" for phase in args.phases)}
    if args.levels_join_at and targets != {"codes"}:
        raise ValueError("--levels_join_at is for target: codes; patches and features have no levels")
    if args.levels_join_at and not (fields.get("codebook_loss_weights") or [1])[0]:
        raise ValueError("--levels_join_at: the first of encoder.codebook_loss_weights is 0, so that no level is left")
    given = None
    if args.encoder_from:
        given = load_config(args.encoder_from, "--encoder_from")
        fields = {name: getattr(given, name) for name in (*_SIZES, *_GRID)} | fields
    encoder = _make_config(BridleConfig, "encoder", fields)
    if encoder.modality != args.modality:
        raise ValueError(f"encoder.modality is {encoder.modality}, but modality is {args.modality}: they must agree")
    for name in ("modality", *_SIZES) if given is not None else ():
        ours, theirs = (_plain(getattr(config, name)) for config in (encoder, given))
        if ours != theirs:
            raise ValueError(f"encoder.{name} is {ours}, but that of --encoder_from is {theirs}: leave it out")
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
    if tokenizer.tokenizer_type == "random_projection":
        raise ValueError("tokenizer.tokenizer_type: describe the self-distilled one; iteration 0 follows from it")
    if tokenizer.tokenizer_type == "kmeans":
        kmeans_config(encoder, tokenizer)
        if encoder.target_feature_size is not None:
            raise ValueError("tokenizer.tokenizer_type is kmeans: target: features is for the self-distilled one")
    return encoder, tokenizer


def _plain(value: Any) -> Any:
    """A pair of equal numbers is one number, as in `patch_size`."""
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value


def _make_config(config_class: type, name: str, fields: dict[str, Any]) -> Any:
    known = config_class().to_dict()
    for key in fields:
        check_name(name, key, known)
    try:
        return config_class(**fields)
    except Exception as error:
        # huggingface_hub's strict dataclasses raise their own errors, over several lines.
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
