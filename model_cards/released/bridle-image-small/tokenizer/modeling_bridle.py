"""Models: the BRIDLE encoder, its pretraining head and the classifiers (audio, image, video; arXiv 2502.02118)."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bridle import BridleConfig, BridleEncoderConfig
from .decoder_bridle import BridleDecoder, BridleLayerMix
from .encoder_bridle import BridleAttention, BridleDropPath, BridleLayer, BridleSwinAttention, eager_config
from .masking_bridle import chosen_patches, draw_share, make_mask
from .patching_bridle import (
    INPUT_NAMES,
    BridleEmbeddings,
    BridlePositions,
    check_mask_shape,
    check_patch_shape,
    mask_rows,
    patch_attention_mask,
    patch_grid_of,
    select_input,
)


@dataclass
class BridleForPreTrainingOutput(ModelOutput):
    """Output of [`BridleForPreTraining`].

    Args:
        loss: mean cross-entropy over decoded patches and codebooks, a scalar; where `labels` were given. Where the
            target is no code, the mean squared error. With `config.visible_loss_weight`, so many times `visible_loss`
            is added.
        visible_loss: the same over the visible patches; where the loss has it.
        logits: (batch, patches, num_codebooks, codebook_size), laid out on the grid; 0 at patches that were not
            decoded; where the target is no code, the predicted values (batch, patches, 1, values).
            A cross decoder decodes hidden patches alone; the others all patches, or, while training with `labels`, the
            hidden ones, which the loss is over; and the visible ones, where it is over them, too.
        accuracy: (num_codebooks,), share of decoded patches whose code was predicted; where `labels` were given and
            are codes.
        bool_masked_pos: (batch, patches) bool, the mask that was used.
        bool_decoded_pos: (batch, patches) bool, the hidden patches that the loss and the accuracy are over.
    """

    loss: torch.FloatTensor | None = None
    visible_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    accuracy: torch.FloatTensor | None = None
    bool_masked_pos: torch.BoolTensor | None = None
    bool_decoded_pos: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# Fields of a config that say how large an input is; and those arguments of `from_pretrained` that say where a file is.
SIZES = ("image_size", "num_frames", "max_length", "num_mel_bins")
_HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip

# The parts of the models, in the order in which they are told of.
PARTS = ("layers", "embeddings", "decoder", "projection", "estimator")


class BridlePreTrainedModel(PreTrainedModel):
    config: BridleEncoderConfig
    config_class = BridleConfig
    base_model_prefix = "bridle"
    # Of any modality; a model calls it by its own modality's name, see `__init__`.
    main_input_name = "inputs"
    # `forward` takes any keyword (for the attention), which `Trainer` would read as "divides its loss by
    # `num_items_in_batch` itself". Ours are means: it averages them over micro batches and processes.
    accepts_loss_kwargs = False
    # Set here, not by `register_for_auto_class`: saving then copies the code in a process that runs such a copy, too.
    _auto_class = "AutoModel"
    input_modalities = ("audio", "image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BridleEmbeddings", "BridleLayer", "BridleSwinLayer", "BridleCrossLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BridleLayer, "attentions": BridleAttention}
    _input_embed_layer = "projection"

    def __init__(self, config: BridleEncoderConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.main_input_name = INPUT_NAMES[config.modality]
        self.input_modalities = (config.modality,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers; and a stored table of positions goes to the sizes that are asked for.

        `image_size`, `num_frames`, `max_length` and `num_mel_bins` may be others than the checkpoint's, by name or in
        `config`: see [`~BridlePreTrainedModel.resize`].
        """
        sizes = {name: kwargs.pop(name) for name in SIZES if name in kwargs}
        if isinstance(config, BridleEncoderConfig):
            sizes = {name: getattr(config, name) for name in SIZES} | sizes
        if not sizes or pretrained_model_name_or_path is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
        if isinstance(config, BridleEncoderConfig):
            config = copy.deepcopy(config)
            for name in SIZES:
                setattr(config, name, getattr(saved, name))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).resize(**sizes)
        return loaded

    def resize(self, **sizes: int | list[int] | tuple[int, int]) -> None:
        """Take inputs of other sizes from now on; tables of positions go to their grid.

        A table that is computed is computed anew. A stored one is interpolated (bicubic, of videos trilinear), or, for
        recordings that are shorter, cut.

        Args:
            sizes: `image_size`, `num_frames`, `max_length` or `num_mel_bins`, as in the config.

        Raises:
            ValueError: a name or a size that cannot be.
        """
        if unknown := set(sizes) - set(SIZES):
            raise ValueError(f"{sorted(unknown)} are not sizes of an input; give some of {', '.join(SIZES)}")
        tried = copy.deepcopy(self.config)
        for name, size in sizes.items():
            setattr(tried, name, size)
        tried.validate_architecture()
        for name, size in sizes.items():
            setattr(self.config, name, size)
        for module in self.modules():
            if isinstance(module, BridlePositions):
                module.resize(self.config.patch_grid)

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by the part of the model that they belong to, of those of `PARTS` that it has."""
        raise NotImplementedError

    def freeze_unseen_biases(self) -> None:
        """Freeze the biases that a softmax does not see: those of keys, and the last of a Swin position bias.

        Their gradient is rounding noise, of which an optimizer such as Adam would make full steps.
        """
        for module in self.modules():
            if isinstance(module, BridleAttention | BridleSwinAttention) and module.unseen_bias is not None:
                module.unseen_bias.requires_grad_(False)

    def place_in_batch(self, rows: torch.Tensor, of: int) -> None:
        """Tell stochastic depth that the next inputs are these rows, (batch,) int64, of a batch of `of`.

        What is drawn for a sample then does not depend on how the batch is cut.
        """
        for module in self.modules():
            if isinstance(module, BridleDropPath):
                module.rows = rows, of

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform linear layers (MAE), unit norms, small normal tokens; also every buffer."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BridlePositions):
            module.reset()
        elif isinstance(module, BridleEmbeddings) and module.cls_token is not None:
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, BridleDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, BridleLayerMix):
            init.constant_(module.weight, 1.0 / module.weight.shape[1])
        elif isinstance(module, BridleSwinAttention):
            init.ones_(module.tau)


class BridleModel(BridlePreTrainedModel):
    """The encoder: a ViT that sees the visible patches alone. The same for audio, image and video."""

    # What a pretraining folder and a classifier's hold beside the encoder.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier", r"^fc_norm\."]

    def __init__(self, config: BridleEncoderConfig):
        super().__init__(config)
        self.embeddings = BridleEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            BridleLayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * index / last,
            )
            for index in range(config.num_hidden_layers)
        )
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = norm if config.final_layernorm else nn.Identity()
        self.post_init()

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {
            "embeddings": list(self.embeddings.parameters()),
            "layers": [*self.layers.parameters(), *self.layernorm.parameters()],
        }

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_visible: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode the visible patches.

        Args:
            inputs: the modality's input by position; or give it by its name:
            input_values: (batch, frames, mel bins) of audio.
            pixel_values: (batch, channels, height, width) of images.
            pixel_values_videos: (batch, frames, channels, height, width) of video.
            attention_mask: (batch, frames) of audio, 1 = real, 0 = padding at the end.
            bool_masked_pos: (batch, patches) bool, True = hidden from the encoder; or (batch, masks, patches): then
                every output has batch * masks rows, those of a sample in a row.
            interpolate_pos_encoding: of an input of another size than the config's, take the positions between those
                of the config's grid (bicubic, of videos trilinear), as ViT's models do, and not those computed for its
                own. A recording that is shorter than the config's has the first of them.
            num_visible: how many patches each mask leaves visible, where all leave as many; then they need not be
                counted, for which a host would wait for its GPU.

        Returns:
            `last_hidden_state` (batch, [class] + visible patches in grid order, hidden), and `pooler_output`
            (batch, hidden): the mean over the real patches, or the class token (`config.pooling`).

        Raises:
            ValueError: not exactly one input, one of another modality, or of a shape that does not fit.
        """
        values = select_input(self.config, inputs, input_values, pixel_values, pixel_values_videos)
        hidden_states, real = self.embeddings(
            values, attention_mask, bool_masked_pos, interpolate_pos_encoding, num_visible
        )
        config = eager_config(self.config) if kwargs.get("output_attentions") else self.config
        mask = create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=real)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._pool(hidden_states, real)
        )

    def _pool(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        if getattr(self.config, "pooling", "mean") == "cls":
            return hidden_states[:, 0]
        first = int(self.config.use_class_token)
        return mean_over_real(hidden_states[:, first:], None if real is None else real[:, first:])


def mean_over_real(hidden_states: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, hidden) -> (batch, hidden), the mean over tokens that `real` (batch, tokens) marks."""
    if real is None:
        return hidden_states.mean(dim=1)
    weights = real.to(hidden_states.dtype)[:, :, None]
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


class BridleForPreTraining(BridlePreTrainedModel):
    """The encoder with a decoder that predicts the tokenizer's codes of masked patches (the encoder phase)."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: BridleConfig):
        super().__init__(config)
        self.bridle = BridleModel(config)
        self.decoder = BridleDecoder(config)
        # Codebooks that the loss is over, the first ones; a loop may let the others join later.
        self.levels_in_loss = config.num_codebooks
        self.post_init()

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {**self.bridle.parameters_by_part(), "decoder": list(self.decoder.parameters())}

    @can_return_tuple
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        bool_decoded_pos: torch.Tensor | None = None,
        num_visible: int | None = None,
        num_decoded: int | None = None,
        **kwargs,
    ) -> BridleForPreTrainingOutput:
        """Predict codes.

        Args:
            inputs, attention_mask, input_values, pixel_values, pixel_values_videos: as in [`BridleModel.forward`].
            bool_masked_pos: (batch, patches) bool, True = hidden; drawn by `config.mask_type` and `config.mask_ratio`
                if not given. Or (batch, masks, patches), several masks of each sample: every output then has
                batch * masks rows, those of a sample in a row, and loss and accuracy are over all of them.
            labels: codes (batch, patches, num_codebooks) int64, or (batch, patches, num_codebooks, k): k equally
                weighted targets ("soft codes"); `accuracy` compares with the first. Of a model whose `config.target`
                is no code: (batch, patches, values) float.
            bool_decoded_pos: of the shape of `bool_masked_pos`, bool, the hidden patches whose codes are predicted and
                make the loss; if not given, all of them, or, while a cross decoder is trained, the share
                `config.decoded_ratio`, drawn.
            num_visible, num_decoded: how many patches each mask leaves visible, and how many each row decodes, where
                all are alike; then they need not be counted, for which a host would wait for its GPU.

        Raises:
            ValueError: as [`BridleModel.forward`]; or masks or labels that do not fit the input.
        """
        values = select_input(self.config, inputs, input_values, pixel_values, pixel_values_videos)
        grid = patch_grid_of(values, self.config)
        real = None if attention_mask is None else patch_attention_mask(attention_mask, self.config)
        if bool_masked_pos is None:
            bool_masked_pos = self._draw_masks(len(values), grid, real).to(values.device)
        options = {**kwargs, "num_visible": num_visible}
        encoded, read = self._encode(values, attention_mask, bool_masked_pos, options)
        if bool_decoded_pos is not None:
            check_mask_shape("bool_decoded_pos", bool_decoded_pos, len(values), grid)
            bool_decoded_pos = mask_rows(bool_decoded_pos.bool(), real)
        bool_masked_pos = mask_rows(bool_masked_pos.bool(), real)
        masks = len(bool_masked_pos) // len(values)
        real = None if real is None else real.repeat_interleave(masks, dim=0)
        decoded = self._decoded(bool_masked_pos, bool_decoded_pos)
        chosen, number, visible = decoded, num_decoded, None
        if labels is not None and self.config.visible_loss_weight:
            visible = ~bool_masked_pos if real is None else ~bool_masked_pos & real
            chosen, number = decoded | visible, num_decoded and num_visible and num_decoded + num_visible
        wanted = chosen_patches(chosen, number) if self._decodes_chosen_alone(labels) else None
        rows = self.decoder(read, bool_masked_pos, real, grid, wanted, num_visible)
        loss = visible_loss = accuracy = None
        if labels is not None:
            check_patch_shape("labels", labels, len(values), grid)
            labels, places = labels.repeat_interleave(masks, dim=0), None
            if wanted is not None:
                places, _ = wanted
                labels = labels[torch.arange(len(labels), device=labels.device)[:, None], places]
            loss, accuracy = self._loss(rows, labels, decoded if places is None else decoded.gather(1, places))
            if visible is not None:
                visible_loss, _ = self._loss(rows, labels, visible if places is None else visible.gather(1, places))
                loss = loss + self.config.visible_loss_weight * visible_loss
        return BridleForPreTrainingOutput(
            loss=loss,
            visible_loss=visible_loss,
            logits=rows if wanted is None else _on_grid(rows, *wanted, chosen.shape[1]),
            accuracy=accuracy,
            bool_masked_pos=bool_masked_pos,
            bool_decoded_pos=decoded,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _encode(
        self, values: torch.Tensor, attention_mask: torch.Tensor | None, masked: torch.Tensor, options: dict
    ) -> tuple[BaseModelOutputWithPooling, list[torch.Tensor]]:
        """The encoder's output, and what of its states the decoder reads."""
        layers = self.config.decoder_encoder_layers
        if layers is None:
            encoded = self.bridle(values, attention_mask, masked, **options)
            return encoded, [encoded.last_hidden_state]
        asked = options.get("output_hidden_states", self.config.output_hidden_states)
        encoded = self.bridle(values, attention_mask, masked, **{**options, "output_hidden_states": True})
        read = [*(encoded.hidden_states[layer] for layer in layers), encoded.last_hidden_state]
        if not asked:
            encoded.hidden_states = None
        return encoded, read

    def _decoded(self, masked: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """(batch, patches) bool, the hidden patches that the loss is over."""
        if given is not None:
            return masked & given
        return draw_share(masked, self.config.decoded_ratio) if self.training else masked

    def _decodes_chosen_alone(self, labels: torch.Tensor | None) -> bool:
        return self.config.decoder_type == "cross" or (self.training and labels is not None)

    def _draw_masks(self, batch: int, grid: tuple[int, ...], real: torch.Tensor | None) -> torch.Tensor:
        """One mask per sample, each over the real steps along the first axis of the grid."""
        steps = [grid[0]] * batch if real is None else real.view(-1, *grid).flatten(2)[..., 0].sum(1).tolist()
        if 0 in steps:
            raise ValueError(f"`attention_mask` marks no frame of clip {steps.index(0)} as real; leave the clip out")
        masks = [
            make_mask(self.config.mask_type, (step, *grid[1:]), self.config.mask_ratio, padded_grid=grid)
            for step in steps
        ]
        return torch.stack(masks)

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross-entropy and accuracy, or squared error, of the `valid` (batch, some) of `logits` (batch, some, ...).

        By weights: to choose the rows, a host would wait until its GPU has counted them.
        """
        if self.config.target != "codes":
            _, values = self.config.target_shape
            if labels.shape[2:] != (values,):
                raise ValueError(
                    f"`labels` must be (batch, patches, {values}) for target='{self.config.target}', got "
                    f"{tuple(labels.shape)}"
                )
            errors = F.mse_loss(logits[:, :, 0].float(), labels.float(), reduction="none")
            return _mean_over_valid(errors, valid).mean(), None
        if labels.dim() == 3:
            labels = labels[..., None]
        if labels.dim() != 4 or labels.shape[2] != self.config.num_codebooks:
            raise ValueError(
                f"`labels` must be (batch, patches, {self.config.num_codebooks} codebooks[, soft codes]), got "
                f"{tuple(labels.shape)}"
            )
        if not is_integer(labels):
            raise ValueError(f"`labels` are {labels.dtype}; give codes, which are integers")
        # What stands beside what is decoded need not be a code.
        logits, labels = logits.float(), labels.long().masked_fill(~valid[:, :, None, None], 0)
        log_likelihood = _mean_over_valid(logits.log_softmax(dim=-1).gather(-1, labels).mean(dim=-1), valid)
        weights = self.config.codebook_loss_weights
        if self.levels_in_loss < self.config.num_codebooks:
            weights = (weights or [1.0] * self.config.num_codebooks)[: self.levels_in_loss]
            weights = [*weights, *[0.0] * (self.config.num_codebooks - len(weights))]
        if weights is not None:
            weights = logits.new_tensor(weights)
            log_likelihood = log_likelihood * weights / weights.mean()
        accuracy = _mean_over_valid((logits.argmax(dim=-1) == labels[..., 0]).float(), valid)
        return -log_likelihood.mean(), accuracy


def _mean_over_valid(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(batch, some, dim) -> (dim,)"""
    return values.masked_fill(~valid[:, :, None], 0.0).sum(dim=(0, 1)) / valid.sum()


def _on_grid(rows: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor, patches: int) -> torch.Tensor:
    """(batch, some, ...) laid out as (batch, `patches`, ...), 0 elsewhere."""
    shape = (*indices.shape, *[1] * (rows.dim() - 2))
    grid = rows.new_zeros(len(rows), patches, *rows.shape[2:])
    # Where a row has fewer patches than another, its index points at one that is not chosen: that stays 0.
    return grid.scatter_(1, indices.view(shape).expand_as(rows), rows.masked_fill(~valid.view(shape), 0.0))


_FORMER_NORM = {r"^classifier_norm\.": "fc_norm."}


def _rename_former_norm(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}classifier_norm.")]:
        state_dict[name.replace("classifier_norm.", "fc_norm.")] = state_dict.pop(name)


class BridleForClassification(BridlePreTrainedModel):
    """The encoder with a linear head on the mean of its patches. What the three classifiers share."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]
    modality: str
    output_class: type[ModelOutput]

    def __init__(self, config: BridleConfig):
        if config.modality != self.modality:
            raise ValueError(f"{type(self).__name__} needs `modality='{self.modality}'`, got '{config.modality}'")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bridle = BridleModel(config)
        # MAE's name. Not `layernorm`: loading an encoder, transformers drops `bridle.` wherever that fits, too.
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.register_load_state_dict_pre_hook(_rename_former_norm)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; a checkpoint that has `fc_norm` under its former name loads, too."""
        renamed = key_mapping is None
        loaded = super().from_pretrained(*args, key_mapping=_FORMER_NORM if renamed else key_mapping, **kwargs)
        if renamed:
            # transformers would save it under the former name again.
            (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = None
        return loaded

    @can_return_tuple
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        **kwargs,
    ) -> ModelOutput:
        """Classify.

        Args:
            inputs, attention_mask, input_values, pixel_values, pixel_values_videos: as in [`BridleModel.forward`].
            labels: (batch,) or (batch, 1) integers for one label per sample; (batch, num_labels) float for soft
                targets (mixup; with `config.problem_type="single_label_classification"`); (batch, num_labels) of any
                type for several labels per sample (`"multi_label_classification"`, assumed of float and bool).
                Regression where `num_labels` is 1.

        Returns:
            `loss` where `labels` were given, and `logits` (batch, num_labels).

        Raises:
            ValueError: as [`BridleModel.forward`]; or labels of a type or shape that the problem does not have.
        """
        values = select_input(self.config, inputs, input_values, pixel_values, pixel_values_videos)
        outputs = self.bridle(values, attention_mask, self._dropped_patches(values, attention_mask), **kwargs)
        logits = self.classifier(self.fc_norm(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem = self.config.problem_type
        if problem is None:
            numbers = "single_label_classification" if is_integer(labels) else "multi_label_classification"
            problem = numbers if self.num_labels > 1 else "regression"
        labels = _fit_labels(labels, problem, logits)
        if problem == "single_label_classification":
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        return self.loss_function(labels, logits.float(), self.config)

    def _dropped_patches(self, values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """While training, hide whole stripes of patches along each of the last two axes (`config.patch_dropout`)."""
        if not self.training or not any(self.config.patch_dropout):
            return None
        grid = patch_grid_of(values, self.config)
        real = torch.ones(len(values), *grid[-2:], dtype=torch.bool, device=values.device)
        if attention_mask is not None:
            real = patch_attention_mask(attention_mask, self.config).unflatten(1, grid)
        time, mel = self.config.patch_dropout
        dropped = _drawn_stripes(real[:, :, 0], time)[:, :, None] | _drawn_stripes(real[:, 0], mel)[:, None]
        return dropped.flatten(1).repeat(1, math.prod(grid[:-2]))


def _drawn_stripes(real: torch.Tensor, rate: float) -> torch.Tensor:
    """(batch, stripes) bool: `rate` of those that are `real`, at random, and as many others as make rows alike."""
    size, number = real.shape[1], real.sum(dim=1, keepdim=True)
    order = torch.rand(real.shape, device=real.device).masked_fill(~real, -1).argsort(dim=1, descending=True)
    places = order.argsort(dim=1)  # the real ones first
    drawn = (number * rate).long()
    return (places < drawn) | (places >= size - (int(size * rate) - drawn))


def is_integer(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers of classes or codes: integers of any width."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _fit_labels(labels: torch.Tensor, problem: str, logits: torch.Tensor) -> torch.Tensor:
    """Labels in the type and shape that the loss of a problem takes.

    Raises:
        ValueError: it is not beyond doubt which.
    """
    one_each, several = labels.shape in ((len(logits),), (len(logits), 1)), labels.shape == logits.shape
    if problem == "single_label_classification":
        if is_integer(labels) and one_each:
            return labels.reshape(-1).long()
        if labels.is_floating_point() and several:
            return labels
        expected = f"({len(logits)},) integers, or {tuple(logits.shape)} float"
    else:
        if several or (one_each and logits.shape[1] == 1):
            return labels.reshape(logits.shape).float()  # half precision would round what is to be learned
        expected = f"{tuple(logits.shape)} numbers"
    raise ValueError(
        f"`labels` are {labels.dtype} of shape {tuple(labels.shape)}; for problem_type='{problem}' give {expected}"
    )


class BridleForAudioClassification(BridleForClassification):
    """Classifier of recordings: see [`BridleForClassification`]."""

    _auto_class = "AutoModelForAudioClassification"
    modality = "audio"
    output_class = SequenceClassifierOutput

    def pipeline(self, feature_extractor: Any, **options: Any) -> Any:
        """What `pipeline("audio-classification")` gives for this model: see [`BridleAudioClassificationPipeline`]."""
        # The import has transformers save the pipeline's file with any model of this file, and find it there.
        from .pipeline_bridle import BridleAudioClassificationPipeline

        return BridleAudioClassificationPipeline(model=self, feature_extractor=feature_extractor, **options)

    def of_steps(self) -> "BridleForAudioFrameClassification":
        """A classifier of every time step with the same weights, as what both kinds of folders hold has one form."""
        model = BridleForAudioFrameClassification(self.config).to(self.device, self.dtype)
        model.load_state_dict(self.state_dict())
        return model.train(self.training)


class BridleForAudioFrameClassification(BridleForClassification):
    """Classifier of every time step of a recording: the encoder with a linear head on the mean of a step's patches.

    Steps are `config.seconds_per_frame` long. The head has the names of [`BridleForAudioClassification`]'s, whose
    checkpoints load.
    """

    _auto_class = "AutoModelForAudioFrameClassification"
    modality = "audio"
    output_class = TokenClassifierOutput

    @can_return_tuple
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Classify every step.

        Args:
            inputs, attention_mask, input_values: as in [`BridleModel.forward`].
            labels: (batch, steps) integers for one label per step, where -100 does not count; or (batch, steps,
                num_labels) of any type for several (sound events; float and soft with
                `config.problem_type="single_label_classification"`). Padding does not count.

        Returns:
            `loss` where `labels` were given, and `logits` (batch, steps, num_labels), padding included.

        Raises:
            ValueError: as [`BridleModel.forward`]; or labels of a type or shape that do not fit.
        """
        values = select_input(self.config, inputs, input_values)
        grid = patch_grid_of(values, self.config)
        outputs = self.bridle(values, attention_mask, **kwargs)
        tokens = outputs.last_hidden_state[:, int(self.config.use_class_token) :]
        logits = self.classifier(self.fc_norm(tokens.unflatten(1, grid).mean(dim=2)))
        loss = None
        if labels is not None:
            real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            if attention_mask is not None:
                real = patch_attention_mask(attention_mask, self.config).unflatten(1, grid)[..., 0]
            loss = self._loss_of_steps(logits, labels, real)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss_of_steps(self, logits: torch.Tensor, labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Of the steps that are `real` (batch, steps) and have a label."""
        one_each, several = labels.shape == logits.shape[:2] and is_integer(labels), labels.shape == logits.shape
        if not one_each and not several:
            raise ValueError(
                f"`labels` are {labels.dtype} of shape {tuple(labels.shape)}; give {tuple(logits.shape[:2])} "
                f"integers, or {tuple(logits.shape)}"
            )
        counted = real & (labels != -100) if one_each else real
        if self.config.problem_type is None:  # as of a classifier of whole samples, for whoever reads the scores
            self.config.problem_type = ("single" if one_each else "multi") + "_label_classification"
        problem = self.config.problem_type
        logits, labels = logits[counted].float(), _fit_labels(labels[counted], problem, logits[counted])
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return (F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits)(logits, labels)


class BridleForImageClassification(BridleForClassification):
    """Classifier of images: see [`BridleForClassification`]."""

    _auto_class = "AutoModelForImageClassification"
    modality = "image"
    output_class = ImageClassifierOutput

    def pipeline(self, image_processor: Any, **options: Any) -> Any:
        """What `pipeline("image-classification")` gives for this model: see [`BridleImageClassificationPipeline`]."""
        from .pipeline_bridle import BridleImageClassificationPipeline

        return BridleImageClassificationPipeline(model=self, image_processor=image_processor, **options)


class BridleForVideoClassification(BridleForClassification):
    """Classifier of video clips: see [`BridleForClassification`]."""

    _auto_class = "AutoModelForVideoClassification"
    modality = "video"
    output_class = ImageClassifierOutput

    def pipeline(self, image_processor: Any, **options: Any) -> Any:
        """What `pipeline("video-classification")` gives for this model: see [`BridleVideoClassificationPipeline`]."""
        from .pipeline_bridle import BridleVideoClassificationPipeline

        return BridleVideoClassificationPipeline(model=self, image_processor=image_processor, **options)


class BridleBackbone(BackboneMixin, BridlePreTrainedModel):
    """The encoder as the backbone of dense tasks, as segmentation, detection and depth; of images and audio.

    `config.out_features` or `config.out_indices` say which stages it returns the feature maps of. A folder is opened
    by this class: transformers' `AutoBackbone.from_pretrained` takes ids of the Hub alone.
    """

    _auto_class = "AutoBackbone"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier", r"^fc_norm\."]

    def __init__(self, config: BridleConfig):
        if len(config.patch_grid) != 2:
            raise ValueError(f"{type(self).__name__} is for images and audio, got a config of {config.modality}")
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.bridle = BridleModel(config)
        self.post_init()

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return self.bridle.parameters_by_part()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Encode an input of any size that patches divide; positions of another grid are interpolated.

        Args:
            inputs, attention_mask, input_values, pixel_values: as in [`BridleModel.forward`].

        Returns:
            `feature_maps`, one for each stage of `config.out_features`: (batch, hidden, height, width), in patches;
            of audio (batch, hidden, time, mel). All go through the encoder's final norm, so that the last layer's is
            `last_hidden_state` of [`BridleModel`].

        Raises:
            ValueError: as [`BridleModel.forward`].
        """
        values = select_input(self.config, inputs, input_values, pixel_values)
        outputs = self.bridle(values, attention_mask, **{"interpolate_pos_encoding": True, **kwargs})
        grid, first = patch_grid_of(values, self.config), int(self.config.use_class_token)
        maps = tuple(
            self.bridle.layernorm(state)[:, first:].transpose(1, 2).unflatten(2, grid)
            for stage, state in zip(self.stage_names, outputs.hidden_states)
            if stage in self.out_features
        )
        return BackboneOutput(feature_maps=maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


__all__ = [
    "PARTS",
    "BridleBackbone",
    "BridleForAudioClassification",
    "BridleForAudioFrameClassification",
    "BridleForImageClassification",
    "BridleForPreTraining",
    "BridleForPreTrainingOutput",
    "BridleForVideoClassification",
    "BridleModel",
    "BridlePreTrainedModel",
]
