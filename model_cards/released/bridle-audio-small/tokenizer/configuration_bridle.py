"""Configurations of the BRIDLE encoder (`BridleConfig`) and of its tokenizer (`BridleTokenizerConfig`)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


# What the three modalities differ in, as data: the values that a field left at None takes (the reference's ViT-B,
# paper, appendix). Everything else is common.
MODALITY_DEFAULTS = {
    "audio": {
        "num_channels": 1,
        "use_class_token": True,
        "key_bias": True,
        "mask_type": "random",
        "mask_ratio": 0.8,
        "decoder_type": "swin",
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 16,
        "decoder_num_attention_heads": 16,
        "estimator_hidden_size": 768,
        "estimator_num_hidden_layers": 3,
        "estimator_num_attention_heads": 12,
    },
    "image": {
        "num_channels": 3,
        "use_class_token": True,
        "key_bias": True,
        "mask_type": "random",
        "mask_ratio": 0.8,
        "decoder_type": "plain",
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 16,
        "decoder_num_attention_heads": 16,
        "estimator_hidden_size": 768,
        "estimator_num_hidden_layers": 3,
        "estimator_num_attention_heads": 12,
    },
    "video": {
        "num_channels": 3,
        "use_class_token": False,
        "key_bias": False,
        "mask_type": "tube",
        "mask_ratio": 0.9,
        "decoder_type": "plain",
        "decoder_hidden_size": 384,
        "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 6,
        "estimator_hidden_size": 384,
        "estimator_num_hidden_layers": 8,
        "estimator_num_attention_heads": 6,
    },
}

# Names of `masking_bridle.MASKS` that fit a modality's grid.
MASK_TYPES = {
    "audio": ("random", "time_frequency", "mel_band", "block"),
    "image": ("random", "block"),
    "video": ("random", "tube", "block"),
}

FRAME_SHIFT_MS = 10  # from one log-mel frame to the next

# Beyond these, building a model would take all memory, or for ever.
MAX_LAYERS, MAX_SIZE = 1000, 2**20


@strict
class BridleEncoderConfig(PreTrainedConfig):
    r"""
    The fields of the encoder, shared by [`BridleConfig`] and [`BridleTokenizerConfig`]. Fields that default to `None`
    take the modality's value (see `MODALITY_DEFAULTS`).

    Args:
        modality (`str`, *optional*, defaults to `"audio"`):
            What the inputs are: `"audio"`, `"image"` or `"video"`.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the ViT.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Layers of the ViT.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads of each layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the MLP of each layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs, by its name in transformers.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last layer; it grows linearly from 0 at the first.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new class and mask tokens. Linear layers start Xavier-uniform.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06):
            Added to the variance in the norms (in those of Swin layers it is 1e-5).
        patch_size (`int` or pair, *optional*, defaults to 16):
            Patch in (time frames, mel bins) for audio, (height, width) for image and video.
        num_mel_bins (`int`, *optional*, defaults to 128):
            Mel bins of audio.
        max_length (`int`, *optional*, defaults to 1024):
            Frames that a full-length clip of audio has.
        image_size (`int` or pair, *optional*, defaults to 224):
            (height, width) of images and video, in pixels.
        num_channels (`int`, *optional*, defaults to `None`):
            Channels of images and video; audio has 1.
        num_frames (`int`, *optional*, defaults to 16):
            Frames of a video clip.
        frame_sampling (`str`, *optional*, defaults to `"stride"`):
            Which frames of a video the model sees, of loaders and of the pipeline: `"stride"`, every
            `frame_stride`-th around its middle, or `"segments"`, one of each of `num_frames` equal parts of it.
        frame_stride (`int`, *optional*, defaults to 4):
            Frames of a video from one that the model sees to the next, with `frame_sampling="stride"`.
        tubelet_size (`int`, *optional*, defaults to 2):
            Frames of video that one patch spans.
        use_class_token (`bool`, *optional*, defaults to `None`):
            Whether a learned token stands before the patches.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Bias on the query and value projections, and, where `key_bias` is set, too, on the key projection.
        key_bias (`bool`, *optional*, defaults to `None`):
            Bias on the key projection.
        final_layernorm (`bool`, *optional*, defaults to `True`):
            Whether the encoder ends with a norm (converted checkpoints of VideoMAE may have none).
        position_embedding_type (`str`, *optional*, defaults to `"sincos"`):
            `"sincos"`, positions computed for any grid, or `"table"`, a fixed table stored in the checkpoint
            (converted checkpoints whose table is not the one of their grid).
    """

    _auto_class = "AutoConfig"
    # Where a folder's own copy of this code (`trust_remote_code=True`) has the class behind each Auto class.
    # transformers would note the saved class alone, and take one named "...Tokenizer..." for a text tokenizer.
    _auto_map = {}
    # The same of pipelines, by the class of model whose folders have one: its task, and our class for it.
    _custom_pipelines = {}

    modality: Literal["audio", "image", "video"] = "audio"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    patch_size: int | list[int] | tuple[int, int] = 16
    num_mel_bins: int = 128
    max_length: int = 1024
    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int | None = None
    num_frames: int = 16
    frame_sampling: Literal["stride", "segments"] = "stride"
    frame_stride: int = 4
    tubelet_size: int = 2
    use_class_token: bool | None = None
    qkv_bias: bool = True
    key_bias: bool | None = None
    final_layernorm: bool = True
    position_embedding_type: Literal["sincos", "table"] = "sincos"

    def __post_init__(self, **kwargs):
        for name, value in MODALITY_DEFAULTS.get(self.modality, {}).items():
            if hasattr(type(self), name) and getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that cannot be built, naming the field."""
        self._check_sizes(
            "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "patch_size",
            "tubelet_size", "num_channels", "max_length", "num_mel_bins", "num_frames", "frame_stride", "image_size",
        )  # fmt: skip
        if self.modality == "audio" and self.num_channels != 1:
            raise ValueError(f"`num_channels` is {self.num_channels}; log-mel spectrograms of audio have 1")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is '{self.hidden_act}'; give a name that transformers knows, as 'gelu'")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive")
        _check_fraction("attention_probs_dropout_prob", self.attention_probs_dropout_prob)
        _check_fraction("drop_path_rate", self.drop_path_rate)
        self._check_width("hidden_size", "num_attention_heads")
        for name, size, patch in zip(self._axis_names, self.input_size, self.patch_shape):
            if size < 1 or size % patch:
                raise ValueError(f"`{name}` is {size}, which is not a positive multiple of its patch of {patch}")
        if max(math.prod(self.patch_grid), self.patch_dim) > MAX_SIZE:
            raise ValueError(
                f"the input of {self.input_size} has {math.prod(self.patch_grid)} patches of {self.patch_dim} values "
                f"each; a model takes at most {MAX_SIZE} of either"
            )

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, but the config of another kind of model is refused, not read as far as it fits."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is the config of a model of type '{kind}', and {cls.__name__} is of '{cls.model_type}': load "
                "the folder with the class that its config.json names, or with AutoModel"
            )
        if not cls.__module__.startswith("transformers_modules."):
            # Only a folder's own copy of this code has its pipeline there; with the package, it is registered, and
            # transformers would ask to run the copy.
            config_dict = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        """As in transformers, but `auto_map` names all classes that load the folder, whichever was saved, and
        `custom_pipelines` our pipeline, where there is one for it."""
        fields = {**super().to_dict(), "auto_map": dict(self._auto_map)}
        fields.pop("custom_pipelines", None)
        for model_class in set(self._custom_pipelines).intersection(self.architectures or ()):
            task, pipeline_class = self._custom_pipelines[model_class]
            auto_class = f"AutoModelFor{self.modality.capitalize()}Classification"
            fields["custom_pipelines"] = {task: {"impl": pipeline_class, "pt": [auto_class], "type": self.modality}}
        return fields

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            value, most = getattr(self, name), MAX_LAYERS if name.endswith("_layers") else MAX_SIZE
            _check_pair(name, value)
            if not all(1 <= size <= most for size in _pair(value)):
                raise ValueError(f"`{name}` is {value}; it must lie in 1..{most}")

    def _check_width(self, size_name: str, heads_name: str) -> None:
        size, heads = getattr(self, size_name), getattr(self, heads_name)
        if size % heads:
            raise ValueError(f"`{size_name}` is {size}, which is not a positive multiple of `{heads_name}`={heads}")
        if size % 4 and self.modality != "video":
            raise ValueError(f"`{size_name}` is {size}; 2-D sin-cos positions need a multiple of 4")

    @property
    def _axis_names(self) -> tuple[str, str, str]:
        return {
            "audio": ("num_frames", "max_length", "num_mel_bins"),
            "image": ("num_frames", "image_size", "image_size"),
            "video": ("num_frames", "image_size", "image_size"),
        }[self.modality]

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """(frames, height or time, width or mel) of one patch; audio and image span one frame."""
        height, width = _pair(self.patch_size)
        return (self.tubelet_size if self.modality == "video" else 1, height, width)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(frames, height or time, width or mel) of a full-size input."""
        if self.modality == "audio":
            return (1, self.max_length, self.num_mel_bins)
        return (self.num_frames if self.modality == "video" else 1, *_pair(self.image_size))

    @property
    def patch_grid(self) -> tuple[int, ...]:
        """Patches along each axis of a full-size input: (time, mel), (height, width) or (time, height, width)."""
        grid = tuple(size // patch for size, patch in zip(self.input_size, self.patch_shape))
        return grid if self.modality == "video" else grid[1:]

    @property
    def seconds_per_frame(self) -> float | None:
        """Seconds of audio from one patch to the next, as from one frame-level embedding to the next; `None` for
        images and videos, whose rate is not the model's."""
        return self.patch_shape[1] * FRAME_SHIFT_MS / 1000 if self.modality == "audio" else None

    @property
    def patch_dim(self) -> int:
        """Values in one patch, channels included."""
        frames, height, width = self.patch_shape
        return self.num_channels * frames * height * width


@strict
class BridleConfig(BackboneConfigMixin, BridleEncoderConfig):
    r"""
    Configuration of [`BridleModel`], [`BridleForPreTraining`], the classifiers and [`BridleBackbone`]: the
    fields of [`BridleEncoderConfig`], and these.

    Args:
        mask_ratio (`float`, *optional*, defaults to `None`):
            Fraction of the patches hidden when [`BridleForPreTraining`] is given no `bool_masked_pos`.
        mask_type (`str`, *optional*, defaults to `None`):
            How they are chosen: a name of `masking_bridle.MASKS` that fits the modality.
        decoder_type (`str`, *optional*, defaults to `None`):
            `"swin"` or `"plain"`, whose layers see all patches, visible and hidden; or `"cross"`, whose hidden patches
            read the encoder's tokens by cross-attention, and not each other (CrossMAE).
        decoder_hidden_size (`int`, *optional*, defaults to `None`):
            Width of the decoder.
        decoder_num_hidden_layers (`int`, *optional*, defaults to `None`):
            Layers of the decoder.
        decoder_num_attention_heads (`int`, *optional*, defaults to `None`):
            Attention heads of each of its layers.
        decoder_intermediate_size (`int`, *optional*, defaults to `None`):
            Width of its MLPs; four times `decoder_hidden_size` if not given.
        decoder_window_size (pair, *optional*, defaults to `(4, 4)`):
            Window of the Swin layers, in patches.
        decoder_window_shift (pair, *optional*, defaults to `(2, 0)`):
            Shift of the window in every second Swin layer.
        decoded_ratio (`float`, *optional*, defaults to 1.0):
            Share of the hidden patches that a `"cross"` decoder decodes while it is trained, drawn for each sample.
        decoder_encoder_layers (`list[int]`, *optional*, defaults to `None`):
            States of the encoder that a `"cross"` decoder reads beside the encoder's output, as indices into
            `hidden_states` (0 is the embedding): each of its layers reads a learned mix. `None`: the output alone.
        num_codebooks (`int`, *optional*, defaults to 4):
            Codes that each patch has.
        codebook_size (`int`, *optional*, defaults to 256):
            Values that each code takes.
        codebook_loss_weights (`list[float]`, *optional*, defaults to `None`):
            Weight of each codebook in the loss; equal if not given.
        target (`str`, *optional*, defaults to `"codes"`):
            What the decoder predicts for hidden patches: `"codes"`, or, by regression and as controls, `"patches"`
            (their own values, as MAE) or `"features"` (what the tokenizer would quantize).
        target_feature_size (`int`, *optional*, defaults to `None`):
            Width of these features, the tokenizer's `code_dim`; for `target="features"` alone.
        visible_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the same loss on the visible patches (V-JEPA 2.1), as a mean of its own beside that of the hidden
            ones; then they are decoded, too, all of them by a cross decoder.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Of the classifiers' single-label cross-entropy.
        patch_dropout (pair of `float`, *optional*, defaults to `(0.0, 0.0)`):
            Fractions of (time or height, mel or width) stripes of patches that the classifiers of whole samples drop
            while training (2-D patch dropout; for video of space alone, for audio of the time that is no padding).
        pooling (`str`, *optional*, defaults to `"mean"`):
            What `pooler_output` and the classifiers see: `"mean"` of the patches, or `"cls"`, the class token.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Stages whose feature maps [`BridleBackbone`] returns, by name (`"stem"`, the embedding, `"stage1"`, ...) or
            by index (0 is the stem); the last layer if neither is given.

    Example:

    ```python
    >>> from bridle_hf import BridleConfig, BridleModel

    >>> config = BridleConfig(modality="audio", hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    >>> model = BridleModel(config)
    ```
    """

    model_type = "bridle"
    _auto_map = {
        "AutoConfig": "configuration_bridle.BridleConfig",
        "AutoBackbone": "modeling_bridle.BridleBackbone",
        "AutoModel": "modeling_bridle.BridleModel",
        "AutoModelForPreTraining": "modeling_bridle.BridleForPreTraining",
        "AutoModelForAudioClassification": "modeling_bridle.BridleForAudioClassification",
        "AutoModelForAudioFrameClassification": "modeling_bridle.BridleForAudioFrameClassification",
        "AutoModelForImageClassification": "modeling_bridle.BridleForImageClassification",
        "AutoModelForVideoClassification": "modeling_bridle.BridleForVideoClassification",
    }
    _custom_pipelines = {
        f"BridleFor{kind}Classification": (
            f"{name.lower()}-classification",
            f"pipeline_bridle.Bridle{name}ClassificationPipeline",
        )
        for kind, name in (("Audio", "Audio"), ("AudioFrame", "Audio"), ("Image", "Image"), ("Video", "Video"))
    }

    mask_ratio: float | None = None
    mask_type: str | None = None
    decoder_type: Literal["swin", "plain", "cross"] | None = None
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_window_size: list[int] | tuple[int, int] = (4, 4)
    decoder_window_shift: list[int] | tuple[int, int] = (2, 0)
    decoded_ratio: float | int = 1.0
    decoder_encoder_layers: list[int] | None = None
    num_codebooks: int = 4
    codebook_size: int = 256
    codebook_loss_weights: list[float | int] | None = None
    target: Literal["codes", "patches", "features"] = "codes"
    target_feature_size: int | None = None
    visible_loss_weight: float | int = 0.0
    label_smoothing: float | int = 0.0
    patch_dropout: list[float | int] | tuple[float | int, float | int] = (0.0, 0.0)
    pooling: Literal["mean", "cls"] = "mean"

    def __post_init__(self, **kwargs):
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size

    def validate_architecture(self):
        super().validate_architecture()
        self._check_sizes(
            "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads",
            "decoder_intermediate_size", "decoder_window_size", "num_codebooks", "codebook_size",
        )  # fmt: skip
        self._check_width("decoder_hidden_size", "decoder_num_attention_heads")
        _check_fraction("label_smoothing", self.label_smoothing)
        _check_pair("decoder_window_shift", self.decoder_window_shift)
        _check_pair("patch_dropout", self.patch_dropout)
        for rate in self.patch_dropout:
            _check_fraction("patch_dropout", rate)
        if self.mask_type not in MASK_TYPES[self.modality]:
            raise ValueError(
                f"`mask_type` is '{self.mask_type}'; for {self.modality} choose from {MASK_TYPES[self.modality]}"
            )
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"`mask_ratio` is {self.mask_ratio}; it must lie between 0 and 1, both excluded")
        if self.codebook_loss_weights is not None and len(self.codebook_loss_weights) != self.num_codebooks:
            raise ValueError(
                f"`codebook_loss_weights` has {len(self.codebook_loss_weights)} entries for `num_codebooks`="
                f"{self.num_codebooks}; give one weight per codebook"
            )
        if not 0.0 < self.decoded_ratio <= 1.0:
            raise ValueError(f"`decoded_ratio` is {self.decoded_ratio}; it must lie over 0 and be at most 1")
        if not 0.0 <= self.visible_loss_weight < math.inf:
            raise ValueError(f"`visible_loss_weight` is {self.visible_loss_weight}; it must not be negative")
        if self.decoder_encoder_layers is not None:
            check_layers("decoder_encoder_layers", self.decoder_encoder_layers, self.num_hidden_layers)
        if self.decoder_type != "cross" and (self.decoded_ratio != 1.0 or self.decoder_encoder_layers is not None):
            raise ValueError(
                f"`decoded_ratio` and `decoder_encoder_layers` are for `decoder_type='cross'`, this is "
                f"'{self.decoder_type}': its layers see all patches, and the encoder's output alone"
            )
        if self.target == "features" and self.target_feature_size is None:
            raise ValueError("`target='features'` needs `target_feature_size`, the tokenizer's `code_dim`")
        if self.decoder_type == "swin" and self.modality == "video":
            raise ValueError("`decoder_type='swin'` works on 2-D grids; use 'plain' for video")
        if self.pooling == "cls" and not self.use_class_token:
            raise ValueError("`pooling='cls'` needs `use_class_token=True`")

    def to_dict(self) -> dict:
        """As in [`BridleEncoderConfig`]; the stages of a backbone alone where they are not the last layer, as if not
        given: it stays the last where the layers become more or fewer."""
        fields = super().to_dict()
        if fields["out_features"] == self.stage_names[-1:]:
            del fields["out_features"], fields["out_indices"]
        return fields

    @property
    def stage_names(self) -> list[str]:
        """What a backbone can return maps of: the embedding, and each layer."""
        # Sizes are checked later than this is asked for.
        return ["stem", *(f"stage{number}" for number in range(1, min(self.num_hidden_layers, MAX_LAYERS) + 1))]

    @property
    def target_shape(self) -> tuple[int, int]:
        """What the decoder predicts for each patch: (codebooks, codes in each), or (1, values of a regression)."""
        if self.target == "codes":
            return (self.num_codebooks, self.codebook_size)
        return (1, self.patch_dim if self.target == "patches" else self.target_feature_size)


@strict
class BridleTokenizerConfig(BridleEncoderConfig):
    r"""
    Configuration of [`BridleTokenizerModel`]: the fields of [`BridleEncoderConfig`], and these.

    Args:
        tokenizer_type (`str`, *optional*, defaults to `"self_distilled"`):
            `"random_projection"`, a frozen random projection of the patches (iteration 0); `"self_distilled"`, a
            trained encoder that predicts a teacher's features (iterations above 0); or `"kmeans"`, residual k-means on
            a frozen encoder's features, each of their numbers standardised (`code_dim` is then its `hidden_size`).
        code_dim (`int`, *optional*, defaults to 256):
            Width of the codes of the residual quantizer.
        num_codebooks (`int`, *optional*, defaults to 4):
            Its codebooks; with 1 it is VQ.
        codebook_size (`int`, *optional*, defaults to 256):
            Codes in each of them.
        independent_codebooks (`bool`, *optional*, defaults to `False`):
            Each codebook quantizes a part of the latents of its own, `code_dim / num_codebooks` wide, in place of what
            the ones before it left over. After a random projection these are independent projections (BEST-RQ).
        codebook_normalization (`str`, *optional*, defaults to `"input"`):
            What is l2-normalised: `"input"`, the latents (or the part of each codebook) once; `"level"`, the residual
            at every level, for lookup and EMA alone (the reference implementation); or `"none"`.
        unit_norm_codes (`bool`, *optional*, defaults to `False`):
            Whether the codes are re-normalised after each EMA step.
        ema_decay (`float`, *optional*, defaults to 0.99):
            Decay of the codebooks' moving averages.
        ema_update (`str`, *optional*, defaults to `"count"`):
            `"count"`: codes are the ratio of the moving averages of vector sums and counts. Two rules of the reference
            implementation: `"direction"`, codes move towards the unit vector of their batch mean (audio, images); and
            `"smoothed_count"`, as `"count"` with Laplace-smoothed counts (video). With
            `codebook_normalization="level"`, both take the residual from the moved codes.
        dead_code_threshold (`float`, *optional*, defaults to 0.2):
            A code whose moving count falls under this fraction of the expected one is re-seeded from current vectors;
            0 switches re-seeding off.
        num_soft_codes (`int`, *optional*, defaults to 1):
            How many of the nearest codes are targets, with equal weight.
        commitment_weight (`float`, *optional*, defaults to 0.25):
            `beta` of the codebook loss.
        normalize_target_patches (`bool`, *optional*, defaults to `True`):
            Whether each patch is normalised on its own before the random projection.
        add_position_to_projection (`bool`, *optional*, defaults to `False`):
            Whether the position is added to a patch before the random projection (the reference implementation).
        teacher_layers (`list[int]`, *optional*, defaults to `None`):
            Encoder layers that teach the tokenizer, as indices into `hidden_states` (0 is the embedding); the
            standardised mean of several. `None`: the encoder's output.
        center_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher's mean at each position, measured at the start of a tokenizer phase, is taken off: what
            could be told from the place alone teaches nothing.
        teacher_hidden_size (`int`, *optional*, defaults to `None`):
            Width of the teacher; `hidden_size` if not given.
        estimator_hidden_size (`int`, *optional*, defaults to `None`):
            Width of the estimator of the teacher's features.
        estimator_num_hidden_layers (`int`, *optional*, defaults to `None`):
            Its layers.
        estimator_num_attention_heads (`int`, *optional*, defaults to `None`):
            Attention heads of each of them.
        estimator_intermediate_size (`int`, *optional*, defaults to `None`):
            Width of its MLPs; four times `estimator_hidden_size` if not given.
    """

    model_type = "bridle_tokenizer"
    _auto_map = {
        "AutoConfig": "configuration_bridle.BridleTokenizerConfig",
        "AutoModel": "modeling_bridle_tokenizer.BridleTokenizerModel",
        "AutoModelForPreTraining": "modeling_bridle_tokenizer.BridleTokenizerModel",
    }

    tokenizer_type: Literal["random_projection", "self_distilled", "kmeans"] = "self_distilled"
    code_dim: int = 256
    num_codebooks: int = 4
    codebook_size: int = 256
    independent_codebooks: bool = False
    codebook_normalization: Literal["input", "level", "none"] = "input"
    unit_norm_codes: bool = False
    ema_decay: float = 0.99
    ema_update: Literal["count", "smoothed_count", "direction"] = "count"
    dead_code_threshold: float | int = 0.2
    num_soft_codes: int = 1
    commitment_weight: float | int = 0.25
    normalize_target_patches: bool = True
    add_position_to_projection: bool = False
    teacher_layers: list[int] | None = None
    center_teacher: bool = False
    teacher_hidden_size: int | None = None
    estimator_hidden_size: int | None = None
    estimator_num_hidden_layers: int | None = None
    estimator_num_attention_heads: int | None = None
    estimator_intermediate_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.estimator_intermediate_size is None:
            self.estimator_intermediate_size = 4 * self.estimator_hidden_size
        if self.teacher_hidden_size is None:
            self.teacher_hidden_size = self.hidden_size

    def validate_architecture(self):
        super().validate_architecture()
        self._check_sizes(
            "estimator_hidden_size", "estimator_num_hidden_layers", "estimator_num_attention_heads",
            "estimator_intermediate_size", "code_dim", "num_codebooks", "codebook_size", "teacher_hidden_size",
        )  # fmt: skip
        self._check_width("estimator_hidden_size", "estimator_num_attention_heads")
        _check_fraction("ema_decay", self.ema_decay)
        if not 1 <= self.num_soft_codes <= self.codebook_size:
            raise ValueError(f"`num_soft_codes` is {self.num_soft_codes}; it must lie in 1..{self.codebook_size}")
        _check_fraction("dead_code_threshold", self.dead_code_threshold)
        if self.tokenizer_type == "kmeans" and self.center_teacher:
            raise ValueError("`center_teacher` is for a tokenizer that is trained; k-means standardises features")
        if self.independent_codebooks and self.code_dim % self.num_codebooks:
            raise ValueError(
                f"`code_dim` is {self.code_dim}; with `independent_codebooks` it must be a multiple of "
                f"`num_codebooks`={self.num_codebooks}"
            )
        if self.independent_codebooks and self.codebook_normalization == "level":
            raise ValueError(
                "`codebook_normalization='level'` is for residuals; choose another for independent codebooks"
            )
        if not 0.0 <= self.commitment_weight < math.inf:
            raise ValueError(f"`commitment_weight` is {self.commitment_weight}; it must not be negative")

    @property
    def moves_codes_within_chain(self) -> bool:
        """The reference's RQ moves a level's codes before it takes the residual; all else moves all levels at last."""
        return self.ema_update != "count" and self.codebook_normalization == "level"


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def check_layers(name: str, layers: list[int], depth: int) -> None:
    """Raise a `ValueError` unless `layers` are indices into the `hidden_states` of an encoder of `depth` layers."""
    if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
        raise ValueError(f"{name} is {layers}: expected some of 0 (the embedding) to {depth}")


def _check_pair(name: str, value) -> None:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError(f"`{name}` is {value}; give a pair")


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` is {value}; it must lie in [0, 1)")


__all__ = ["BridleConfig", "BridleTokenizerConfig"]
