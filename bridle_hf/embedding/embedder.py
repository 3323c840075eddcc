"""Embedder: recordings, images or videos in, embeddings out, in batches over windows of like length.

Embedder.from_pretrained(DIR_OR_ID).embed(["a.wav", "b.mp3"])  ─►  (2, dim)
"""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from bridle_hf.common.errors import MediaError, reason_of
from bridle_hf.common.length_buckets import length_buckets
from bridle_hf.data.modalities import load_config, load_processor, load_weights
from bridle_hf.embedding.poolings import POOLINGS, POOLINGS_OF, Layers, merge_windows, select_layers
from bridle_hf.embedding.windows import Window, as_media, is_one, make_reader, name_of
from bridle_hf.patching_bridle import INPUT_NAMES, patch_grid_of


logger = logging.getLogger(__name__)

Level = Literal["clip", "frame", "patch"]

# Full-size windows in a batch. More cost a CPU memory, and save it no time.
BATCH_SIZE = {"cpu": 4}
OTHER_BATCH_SIZE = 64
# Batches that are read before the first is run: sorted by length, they hold little padding. Pixels have one size.
BATCHES_AHEAD = {"audio": 8, "image": 1, "video": 1}


@dataclass(frozen=True)
class Embedding:
    """What an input became.

    Args:
        values: (dim,) float32 of a clip, (frames, dim) or (patches, dim); before `dim` an axis of layers for "all".
        times: (frames,) or (patches,) float64, the middle of each in seconds; None for clips and images.
        positions: (patches, axes) int64, the place of each patch along the axes beside time: mel band, or row and
            column.
    """

    values: np.ndarray
    times: np.ndarray | None = None
    positions: np.ndarray | None = None


@dataclass
class _Input:
    """An input on its way: its windows, and what each became."""

    name: str
    windows: list[Window] = field(default_factory=list)  # without their values
    parts: list[np.ndarray | None] = field(default_factory=list)
    missing: int = 0
    is_read: bool = False
    error: MediaError | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or (self.is_read and self.missing == 0)

    def add(self, window: Window) -> int:
        """The place of a window that is to be run."""
        self.windows.append(replace(window, values=None))
        self.parts.append(None)
        self.missing += 1
        return len(self.parts) - 1

    def put(self, place: int, part: np.ndarray) -> None:
        self.parts[place] = part
        self.missing -= 1
        if not np.isfinite(part).all():
            self.error = MediaError(self.name, "its embedding is not finite")


class Embedder:
    """A frozen encoder with its processor.

    Args:
        model: a `BridleModel`; put into evaluation mode, and moved to `device` if one is given.
        processor: of the model.
        device: where the model runs.
        batch_size: full-size windows in a batch, and of shorter ones more; 4 on a CPU and 64 elsewhere if not given.
        overlap: fraction of a window that the next one of a long recording or video shares, from 0 to under 1.
        stride: frames of a video from one that the model sees to the next; the config's `frame_stride` if not given.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        device: Any = None,
        batch_size: int | None = None,
        overlap: float = 0.25,
        stride: int | None = None,
    ):
        self.model = (model if device is None else model.to(device)).eval()
        self.config = model.config
        self.batch_size = batch_size or BATCH_SIZE.get(self.model.device.type, OTHER_BATCH_SIZE)
        if self.batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1")
        self.sampling_rate = getattr(processor, "sampling_rate", None)  # Hz, of audio
        self.stride = self.config.frame_stride if stride is None else stride
        self._read = make_reader(self.config, processor, overlap, self.stride)

    def hash_of_weights(self) -> str:
        """What tells this model's embeddings from those of another of the same sizes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls, model: str, device: Any = None, dtype: Any = "auto", **options: Any) -> "Embedder":
        """Load an encoder, or that of a pretraining or classification model, with its processor.

        Args:
            model: folder or Hub id.
            device: a GPU if there is one, if not given.
            dtype: of the weights; "auto": the one they are saved in.
            options: `batch_size`, `overlap`, `stride`, as of the class.

        Raises:
            ValueError: no BRIDLE encoder is there, or not all of its weights.
        """
        config = load_config(str(model))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = load_weights(AutoModel, str(model), dtype=dtype)
        return cls(encoder, load_processor(str(model), config), device, **options)

    def embed(
        self,
        inputs: Any,
        level: Level = "clip",
        layers: Layers = -1,
        pooling: str | None = None,
        *,
        sampling_rate: float | None = None,
        errors: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        """Embed one input or several.

        Args:
            inputs: path, bytes, (array, rate), a mapping as `datasets` has them, a PIL image or an array of pixels;
                or a list or generator of these. Recordings may have any rate, channels and length.
            level: one embedding for each input ("clip"), for each time step ("frame") or for each patch ("patch").
            layers: an index (0: the embedding, -1: the encoder's output), several (concatenated), "mean", or "all"
                (an axis of their own): see `select_layers`.
            pooling: a name of `POOLINGS`, over all patches of a clip or over those of a time step; "mean" if not
                given. Patches are not pooled.
            sampling_rate: of arrays that come without one, in Hz (of videos: frames per second).
            errors: "raise" at an input that cannot be embedded, or "skip" it: it is warned of, and its row is NaN
                (clips) or its entry None.
            progress: show a bar.

        Returns:
            For clips (dim,) or (inputs, dim) float32, with an axis of layers before `dim` for "all"; else an
            [`Embedding`], which has the times, or a list of them.

        Raises:
            MediaError: an input that cannot be read, or whose embedding is not finite.
            ValueError: an unknown level, layer or pooling, or one that does not fit the modality.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors {errors!r}: raise or skip")
        found: list[Embedding | None] = []
        one = is_one(inputs)
        for result in self.iterate([inputs] if one else inputs, level, layers, pooling, sampling_rate, progress):
            if isinstance(result, MediaError):
                if errors == "raise":
                    raise result
                logger.warning("skipped %s", result)
                result = None
            found.append(result)
        if level == "clip":
            missing = np.full(self.shape(level, layers, pooling), np.nan, np.float32)
            rows = [missing if entry is None else entry.values for entry in found]
            found = np.stack(rows) if rows else np.empty((0, *missing.shape), np.float32)
        return found[0] if one else found

    def iterate(
        self,
        inputs: Iterable[Any],
        level: Level = "clip",
        layers: Layers = -1,
        pooling: str | None = None,
        sampling_rate: float | None = None,
        progress: bool = False,
    ) -> Iterator[Embedding | MediaError]:
        """[`Embedder.embed`] of many inputs as they come, one after the other in their order: an `Embedding` for
        each, or why there is none. Holds a few batches of inputs at a time.

        Raises:
            ValueError: as `embed`, before anything is read.
        """
        pool = self._pool(level, layers, pooling)
        self.shape(level, layers, pooling)  # refuses layers that are not there
        return self._iterate(
            tqdm(inputs, unit="input", disable=not progress), pool, level, layers, pooling, sampling_rate
        )

    def encode(
        self,
        sentences: Any,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        **options: Any,
    ) -> Any:
        """Embed clips as sentence-transformers does sentences.

        Args:
            sentences: what [`Embedder.embed`] takes for `inputs`.
            batch_size: for this call, else the embedder's own.
            convert_to_tensor: return a tensor, whatever `convert_to_numpy` says.
            convert_to_numpy: return an array; without it, and without `convert_to_tensor`, a list of tensors.
            normalize_embeddings: give them length 1, so that a dot product is their cosine.
            options: `layers`, `pooling`, `sampling_rate` and `errors` of [`Embedder.embed`].

        Returns:
            (inputs, dim) or, of a single input, (dim,).
        """
        own, self.batch_size = self.batch_size, batch_size or self.batch_size
        try:
            found = torch.from_numpy(self.embed(sentences, progress=show_progress_bar, **options))
        finally:
            self.batch_size = own
        if normalize_embeddings:
            found = torch.nn.functional.normalize(found, dim=-1)
        if convert_to_tensor:
            return found
        return found.numpy() if convert_to_numpy else (found if is_one(sentences) else list(found))

    def shape(self, level: Level = "clip", layers: Layers = -1, pooling: str | None = None) -> tuple[int, ...]:
        """The shape of one embedding: (dim,), or (layers, dim) for "all"."""
        grid = self.config.patch_grid
        states = [torch.zeros(1, math.prod(grid), self.config.hidden_size)] * (self.config.num_hidden_layers + 1)
        own = torch.ones(1, grid[0], dtype=torch.bool)
        features = self._pool(level, layers, pooling)(states, grid, own)
        return tuple(features.shape[{"clip": 1, "frame": 2, "patch": 3}[level] :])

    def _pool(self, level: Level, layers: Layers, pooling: str | None) -> Callable[..., torch.Tensor]:
        """(states, grid, own steps (batch, steps) bool) to (batch, dim), (batch, steps, dim) or (batch, steps, patches
        of a step, dim), with an axis of layers before `dim` for "all"."""
        modality = self.config.modality
        if level not in ("clip", "frame", "patch") or (level == "frame" and modality == "image"):
            raise ValueError(f"level {level!r}: clip, patch" + ("" if modality == "image" else " or frame"))
        known = POOLINGS_OF[modality] if level != "patch" else ()
        if pooling is not None and pooling not in known:
            raise ValueError(f"pooling {pooling!r} of level {level!r}: {', '.join(known) or 'patches are not pooled'}")
        function = POOLINGS[pooling or "mean"]

        def pool_one(tokens: torch.Tensor, grid: Sequence[int], own: torch.Tensor) -> torch.Tensor:
            steps, rest = grid[0], math.prod(grid[1:])
            if level == "clip":
                return function(tokens, grid, own.repeat_interleave(rest, dim=1))
            tokens = tokens.unflatten(1, (steps, rest))
            if level == "patch":
                return tokens
            return function(tokens.flatten(0, 1), (1, *grid[1:]), None).unflatten(0, (-1, steps))

        def pool(states: Sequence[torch.Tensor], grid: Sequence[int], own: torch.Tensor) -> torch.Tensor:
            tokens = select_layers(states, layers)
            if layers == "all":
                return torch.stack([pool_one(layer, grid, own) for layer in tokens.unbind(1)], dim=-2)
            return pool_one(tokens, grid, own)

        return pool

    def _iterate(
        self,
        inputs: Iterable[Any],
        pool: Callable,
        level: Level,
        layers: Layers,
        pooling: str | None,
        sampling_rate: float | None,
    ) -> Iterator[Embedding | MediaError]:
        waiting: deque[_Input] = deque()
        queue: list[tuple[_Input, int, Window]] = []
        steps, most = 0, BATCHES_AHEAD[self.config.modality] * self.batch_size * self.config.patch_grid[0]
        for index, item in enumerate(inputs):
            entry = _Input(name_of(item, index))
            waiting.append(entry)
            try:
                for window in self._read(as_media(item, sampling_rate)):
                    queue.append((entry, entry.add(window), window))
                    steps += window.steps
                    if steps >= most:
                        self._run(queue, pool, level, layers)
                        steps = 0
                entry.is_read = True
            except ValueError as error:
                entry.error = MediaError(entry.name, reason_of(error))
                queue = [place for place in queue if place[0] is not entry]
                steps = sum(window.steps for _, _, window in queue)
            while waiting and waiting[0].is_done:
                yield self._finish(waiting.popleft(), level, pooling)
        self._run(queue, pool, level, layers)
        yield from (self._finish(entry, level, pooling) for entry in waiting)

    def _run(self, queue: list[tuple[_Input, int, Window]], pool: Callable, level: Level, layers: Layers) -> None:
        """Run all windows of the queue, and empty it."""
        taken, most = list(queue), self.batch_size * self.config.patch_grid[0]
        queue.clear()
        for places in length_buckets([window.steps for _, _, window in taken], most):
            batch = [taken[place] for place in places]
            features = self._features([window for _, _, window in batch], pool, layers).numpy()
            for (entry, place, window), row in zip(batch, features):
                first, last = (step - window.first for step in window.own)
                entry.put(place, row if level == "clip" else row[first:last].copy())

    @torch.no_grad()
    def _features(self, windows: list[Window], pool: Callable, layers: Layers) -> torch.Tensor:
        values = torch.nn.utils.rnn.pad_sequence([window.values for window in windows], batch_first=True)
        values = values.to(self.model.device)
        grid = patch_grid_of(values, self.config)
        steps = torch.arange(grid[0], device=values.device)
        inputs = {INPUT_NAMES[self.config.modality]: values}
        if any(window.steps < grid[0] for window in windows):
            lengths = torch.tensor([len(window.values) for window in windows], device=values.device)
            inputs["attention_mask"] = (torch.arange(values.shape[1], device=values.device) < lengths[:, None]).long()
        own = torch.tensor([window.own for window in windows]) - torch.tensor([[window.first] for window in windows])
        own = own.to(values.device)
        last, first = self.config.num_hidden_layers, int(self.config.use_class_token)
        only_last = layers in (-1, last, [-1], [last])
        outputs = self.model(**inputs, output_hidden_states=not only_last)
        states = [None] * last if only_last else [state[:, first:].float() for state in outputs.hidden_states[:last]]
        states.append(outputs.last_hidden_state[:, first:].float())
        return pool(states, grid, (steps >= own[:, :1]) & (steps < own[:, 1:])).cpu()

    def _finish(self, entry: _Input, level: Level, pooling: str | None) -> Embedding | MediaError:
        if entry.error is not None:
            return entry.error
        own = [window.own for window in entry.windows]
        if level == "clip":
            weights = [last - first for first, last in own]
            return Embedding(merge_windows(pooling or "mean", np.stack(entry.parts), weights))
        values, times = np.concatenate(entry.parts), None
        if entry.windows[0].times is not None:
            taken = [slice(first - w.first, last - w.first) for w, (first, last) in zip(entry.windows, own)]
            times = np.concatenate([window.times[part] for window, part in zip(entry.windows, taken)])
        if level == "frame":
            return Embedding(values, times)
        grid = (len(values), *self.config.patch_grid[1:])
        places = np.indices(grid).reshape(len(grid), -1).T
        if times is not None:
            times, places = times[places[:, 0]], places[:, 1:]
        return Embedding(values.reshape(-1, *values.shape[2:]), times, places)
