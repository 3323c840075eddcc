"""The configs of both models of a run, from its recipe."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from bridle_hf import BridleConfig, BridleTokenizerConfig
from bridle_hf.common.arguments import check_name
from bridle_hf.configuration_bridle import BridleEncoderConfig, check_layers
from bridle_hf.data.modalities import kept_options, load_config
from bridle_hf.interleaving.codebook_initialization import kmeans_config
from bridle_hf.interleaving.interleaving import first_tokenizer_config, taught_tokenizer_config
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.interleaving.teacher import Teacher
from bridle_hf.pretraining.arguments import PretrainArguments


# What an encoder must have in common with the one that it starts from, and what it takes from it if it does not say.
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "qkv_bias", "key_bias", "use_class_token", "final_layernorm", "patch_size", "tubelet_size", "num_channels",
    "position_embedding_type",
)  # fmt: skip
_GRID = ("image_size", "num_frames", "frame_sampling", "frame_stride", "max_length", "num_mel_bins")
# The same of a tokenizer: whose weights have shapes by it, or whose codes would be others.
_OF_TOKENIZER = (
    *_SIZES, "num_mel_bins", "code_dim", "num_codebooks", "codebook_size", "independent_codebooks",
    "codebook_normalization", "unit_norm_codes", "normalize_target_patches", "add_position_to_projection",
    "estimator_hidden_size", "estimator_num_hidden_layers", "estimator_num_attention_heads",
    "estimator_intermediate_size",
)  # fmt: skip
# What of it holds for the encoder that predicts its codes, too.
_OF_BOTH = ("patch_size", "tubelet_size", "num_channels", "num_codebooks", "codebook_size")


def make_configs(args: PretrainArguments) -> tuple[BridleConfig, BridleTokenizerConfig]:
    """Configs of both sides; what the tokenizer shares with the encoder and does not name, it takes from it.

    Raises:
        ValueError: an unknown or wrong field, codebooks that differ between the two, or a model of other sizes
            than the one that it shall start from.
    """
    fields, coded = {"modality": args.modality, **args.encoder}, None
    for name, value in kept_options(args.modality, args.loader).items():
        if fields.setdefault(name, value) != value:
            raise ValueError(f"encoder.{name} is {fields[name]}, but the loader's is {value}: give one of them")
    if args.tokenizer_from:
        coded = load_config(args.tokenizer_from, "--tokenizer_from", kind="tokenizer")
        if coded.tokenizer_type == "kmeans":
            raise ValueError("--tokenizer_from: its codes are of k-means on an encoder, which a run can't start from; "
                             "give a self-distilled one or a random projection")  # fmt: skip
        fields = {name: getattr(coded, name) for name in (*_OF_BOTH, *_GRID)} | fields
    if "features" in {fields.get("target"), *(phase.get("target") for phase in args.phases)}:
        fields["target_feature_size"] = args.tokenizer.get("code_dim", BridleTokenizerConfig.code_dim)
    targets = {fields.get("target", "codes"), *(phase.get("target") or "codes" for phase in args.phases)}
    if args.levels_join_at and targets != {"codes"}:
        raise ValueError("--levels_join_at is for target: codes; patches and features have no levels")
    if args.levels_join_at and not (fields.get("codebook_loss_weights") or [1])[0]:
        raise ValueError("--levels_join_at: the first of encoder.codebook_loss_weights is 0, so that no level is left")
    if args.masks and fields.get("mask_type", next(iter(args.masks))) not in args.masks:
        raise ValueError(
            f"encoder.mask_type is {fields['mask_type']}, but the masks are drawn by `masks`: give --masks "
            f"'{{{fields['mask_type']}: 1.0}}'"
        )
    if len(args.masks) == 1:  # the model's own masks, where it is given none, are then those of its training
        fields.setdefault("mask_type", next(iter(args.masks)))
    given = None
    if args.encoder_from:
        given = load_config(args.encoder_from, "--encoder_from")
        fields = {name: getattr(given, name) for name in (*_SIZES, *_GRID)} | fields
    encoder = _make_config(BridleConfig, "encoder", fields)
    if encoder.modality != args.modality:
        raise ValueError(f"encoder.modality is {encoder.modality}, but modality is {args.modality}: they must agree")
    if given is not None:
        _check_agree("encoder", encoder, "--encoder_from", given, ("modality", *_SIZES))
    common = set(PreTrainedConfig().to_dict())
    shared = (set(BridleEncoderConfig().to_dict()) | {"num_codebooks", "codebook_size"}) - common
    fields = {name: value for name, value in encoder.to_dict().items() if name in shared}
    if coded is not None:
        fields |= {name: getattr(coded, name) for name in _OF_TOKENIZER}
    own = {name: value for name, value in args.tokenizer.items() if name != "teacher"}
    fields |= {"teacher_hidden_size": encoder.hidden_size, **own}
    tokenizer = _make_config(BridleTokenizerConfig, "tokenizer", fields)
    if coded is not None:
        _check_agree("tokenizer", tokenizer, "--tokenizer_from", coded, ("modality", *_OF_TOKENIZER))
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
    for number, phase in enumerate(args.phases):
        if phase.get("until") and (phase.get("target") or encoder.target) != "codes":
            raise ValueError(
                f"phases[{number}]: until is for phases with target: codes; encoder.target is {encoder.target}"
            )
    if args.code_cache and not any(
        phase.get("train") == "encoder" and (phase.get("target") or encoder.target) == "codes" for phase in args.phases
    ):
        raise ValueError("code_cache is for phases of train: encoder, with target: codes; there is none")
    kmeans = tokenizer.tokenizer_type == "kmeans"
    if args.tokenizer_patch_dropout and (kmeans or all(phase.get("train") == "encoder" for phase in args.phases)):
        raise ValueError("tokenizer_patch_dropout is for phases that train the tokenizer; there is none")
    if tokenizer.tokenizer_type == "random_projection":
        raise ValueError("tokenizer.tokenizer_type: describe the self-distilled one; iteration 0 follows from it")
    if kmeans:
        kmeans_config(encoder, tokenizer)
        if args.tokenizer.get("teacher") is not None:
            raise ValueError(
                "tokenizer.teacher: it teaches a tokenizer that is trained, and tokenizer.tokenizer_type is kmeans: "
                "leave one of them out"
            )
        if encoder.target_feature_size is not None:
            raise ValueError("tokenizer.tokenizer_type is kmeans: target: features is for the self-distilled one")
    return encoder, tokenizer


def make_first_tokenizer_config(
    args: PretrainArguments, schedule: Schedule, tokenizer: BridleTokenizerConfig, teacher: Teacher | None
) -> BridleTokenizerConfig | None:
    """That of `--tokenizer_from`, on the run's grid, or of the tokenizer that a given teacher teaches; else `None`.

    Args:
        tokenizer: of the tokenizers that learn from the run's encoder.

    Raises:
        ValueError: no phase would use it, or one would go on with it for an encoder of another width.
    """
    if teacher is not None:
        return _taught(schedule, tokenizer, teacher)
    if not args.tokenizer_from:
        return None
    first = first_tokenizer_config(tokenizer, load_config(args.tokenizer_from, "--tokenizer_from", kind="tokenizer"))
    distilled = first.tokenizer_type == "self_distilled"
    if schedule.phases[0].trains_tokenizer and not (distilled and schedule.phases[0].start == "continue"):
        raise ValueError(
            "--tokenizer_from: the first phase trains a fresh tokenizer, and the given one would not be used: "
            + ("give that phase start: continue" if distilled else "begin with a phase that trains the encoder alone")
        )
    _check_continued(schedule, [tokenizer] * len(schedule.phases), first if distilled else None)
    return first


def load_teacher(args: PretrainArguments, encoder: BridleConfig, processor: Any) -> Teacher | None:
    """`tokenizer.teacher`, if one is given.

    Raises:
        ValueError: as [`Teacher`]; or it lacks `tokenizer.teacher_layers`.
    """
    name = args.tokenizer.get("teacher")
    if name is None:
        return None
    if args.tokenizer_from:
        raise ValueError("--tokenizer_from and tokenizer.teacher both make the first tokenizer: give one of them")
    if not isinstance(name, str):
        raise ValueError(f"tokenizer.teacher is {name!r}: give a folder or Hub id")
    teacher = Teacher(name, encoder, processor)
    teacher.check_layers(args.tokenizer.get("teacher_layers"))
    return teacher


def _taught(schedule: Schedule, tokenizer: BridleTokenizerConfig, teacher: Teacher) -> BridleTokenizerConfig:
    if not schedule.before_encoder:
        raise ValueError(
            "tokenizer.teacher teaches before an encoder is trained, and the first phase trains one: begin with "
            "{train: tokenizer, ...}"
        )
    first = taught_tokenizer_config(tokenizer, teacher)
    learned = [first if number < schedule.before_encoder else tokenizer for number in range(len(schedule.phases))]
    _check_continued(schedule, learned, None)
    return first


def _check_continued(
    schedule: Schedule, configs: Sequence[BridleTokenizerConfig], current: BridleTokenizerConfig | None
) -> None:
    """Raise a `ValueError` where a phase would train a tokenizer on to features of another width.

    Args:
        configs: of the tokenizer that each phase would train anew.
        current: of the one before the first phase; `None`: none that can be trained on.
    """
    for number, (phase, config) in enumerate(zip(schedule.phases, configs)):
        if not schedule.trains_tokenizer(number):
            continue
        if phase.start == "fresh" or current is None:
            current = config
        elif current.teacher_hidden_size != config.teacher_hidden_size:
            raise ValueError(
                f"phases[{number}] goes on with a tokenizer that estimates features {current.teacher_hidden_size} "
                f"wide, and its teacher's are {config.teacher_hidden_size} wide: give it start: fresh"
            )


def _check_agree(section: str, config: Any, argument: str, given: Any, names: tuple[str, ...]) -> None:
    """Raise a `ValueError` where fields of a section differ from those of the model that `argument` gives."""
    for name in names:
        ours, theirs = (_plain(getattr(entry, name)) for entry in (config, given))
        if ours != theirs:
            raise ValueError(f"{section}.{name} is {ours}, but that of {argument} is {theirs}: leave it out")


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
