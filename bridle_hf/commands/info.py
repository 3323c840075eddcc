"""Information for bug reports, as `bridle info` shows it: versions, devices and extras, for bug reports."""

import os
import platform
from importlib import metadata

import torch
from packaging.requirements import Requirement

import bridle_hf
from bridle_hf.common.output_folder import git_revision


PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface-hub", "tokenizers", "safetensors",
    "numpy", "scipy", "scikit-learn", "soxr", "soundfile", "librosa", "av", "pillow", "kornia", "matplotlib",
    "pyarrow", "tensorboard", "torchvision", "torchaudio", "torchcodec",
)  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


def info_lines() -> list[str]:
    """One fact a line, as `name: value`."""
    lines = [f"bridle_hf: {bridle_hf.__version__} (git {git_revision() or 'unknown'})"]
    lines += [f"Python: {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name}: {_version(name) or 'not installed'}" for name in PACKAGES]
    lines += [f"CPU cores: {os.cpu_count()}, threads of torch: {torch.get_num_threads()}"]
    lines += [f"GPU {number}: {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        lines.append("GPU: Apple (mps)")
    lines += [f"{name}: {os.environ[name]}" for name in VARIABLES if name in os.environ]
    return [*lines, *_extra_lines()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extra_lines() -> list[str]:
    """Of each extra of the package, what it lacks."""
    try:
        distribution = metadata.distribution("bridle_hf")
    except metadata.PackageNotFoundError:
        return ["extras: unknown, bridle_hf itself is not installed"]
    lines = []
    for extra in sorted(distribution.metadata.get_all("Provides-Extra") or ()):
        needed = [Requirement(text) for text in distribution.requires or ()]
        needed = [entry for entry in needed if entry.marker and entry.marker.evaluate({"extra": extra})]
        missing = [entry.name for entry in needed if entry.name != "bridle_hf" and not _satisfied(entry)]
        lines.append(f"extra {extra}: " + (f"lacks {', '.join(missing)}" if missing else "installed"))
    return lines


def _satisfied(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)
