"""HEAR's functions (hear-eval and suites like it): scene and timestamp embeddings of batches of sounds.

    hear-eval ... bridle_hf.embedding.hear --model DIR_OR_ID

See https://hearbenchmark.com/hear-api.html. The model is an [`Embedder`] with the sizes that HEAR asks for.
"""

import numpy as np
import torch

from bridle_hf.embedding.embedder import Embedder


class HearModel(torch.nn.Module):
    """An embedder as HEAR takes it: audio at `sample_rate` Hz, embeddings of these sizes."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder = embedder
        self.encoder = embedder.model  # so that `.to(device)` moves it
        self.sample_rate: int = embedder.sampling_rate
        (self.scene_embedding_size,) = embedder.shape("clip")
        (self.timestamp_embedding_size,) = embedder.shape("frame")


def load_model(model_file_path: str = "") -> HearModel:
    """The model of a folder or Hub id.

    Raises:
        ValueError: no path is given, or no BRIDLE encoder of audio is there.
    """
    if not model_file_path:
        raise ValueError("give the folder or Hub id of a BRIDLE encoder as the model's path")
    embedder = Embedder.from_pretrained(model_file_path)
    if embedder.config.modality != "audio":
        raise ValueError(f"{model_file_path} is a model of {embedder.config.modality}: HEAR is for audio")
    return HearModel(embedder)


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """(sounds, samples) at the model's rate to (sounds, scene_embedding_size), on the model's device.

    Raises:
        ValueError: audio of other dimensions. MediaError: shorter than a frame, or not finite.
    """
    return torch.from_numpy(model.embedder.embed(_clips(audio, model))).to(model.encoder.device)


def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(sounds, samples) to embeddings (sounds, timestamps, timestamp_embedding_size) and timestamps (sounds,
    timestamps), the middle of each in milliseconds.

    Raises:
        ValueError: audio of other dimensions. MediaError: shorter than a frame, or not finite.
    """
    found = model.embedder.embed(_clips(audio, model), level="frame")
    embeddings = np.stack([entry.values for entry in found])
    times = 1000 * np.stack([entry.times for entry in found]).astype(np.float32)
    return tuple(torch.from_numpy(array).to(model.encoder.device) for array in (embeddings, times))


def _clips(audio: torch.Tensor, model: HearModel) -> list[tuple[torch.Tensor, int]]:
    if audio.dim() != 2:
        raise ValueError(f"audio has shape {tuple(audio.shape)}: give (sounds, samples)")
    return [(clip, model.sample_rate) for clip in audio.cpu()]
