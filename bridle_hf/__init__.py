"""BRIDLE (arXiv 2502.02118) for the Hugging Face ecosystem; importing this registers it with the Auto classes.

`pretrain`, `finetune`, `probe` and `embed` do what the commands of these names do, and `Embedder` what `embed` needs;
the rooms that hold them are imported when they are asked for.
"""

import importlib
import itertools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_bridle import BridleConfig, BridleTokenizerConfig
    from .embedding.embed import embed
    from .embedding.embedder import Embedder
    from .feature_extraction_bridle import BridleFeatureExtractor
    from .finetuning.finetune import finetune
    from .image_processing_bridle import BridleImageProcessor, BridleVideoProcessor, make_image_processor
    from .modeling_bridle import (
        BridleBackbone,
        BridleForAudioClassification,
        BridleForAudioFrameClassification,
        BridleForImageClassification,
        BridleForPreTraining,
        BridleForVideoClassification,
        BridleModel,
    )
    from .modeling_bridle_tokenizer import BridleTokenizerModel, teacher_features
    from .pipeline_bridle import (
        BridleAudioClassificationPipeline,
        BridleImageClassificationPipeline,
        BridleVideoClassificationPipeline,
    )
    from .pretraining.pretrain import pretrain
    from .probing.probe import probe


__version__ = "0.1.0"

__all__ = [
    "BridleAudioClassificationPipeline",
    "BridleBackbone",
    "BridleConfig",
    "BridleFeatureExtractor",
    "BridleForAudioClassification",
    "BridleForAudioFrameClassification",
    "BridleForImageClassification",
    "BridleForPreTraining",
    "BridleForVideoClassification",
    "BridleImageClassificationPipeline",
    "BridleImageProcessor",
    "BridleModel",
    "BridleTokenizerConfig",
    "BridleTokenizerModel",
    "BridleVideoClassificationPipeline",
    "BridleVideoProcessor",
    "Embedder",
    "embed",
    "finetune",
    "make_image_processor",
    "pretrain",
    "probe",
    "teacher_features",
]
# Files of training/ in a checkout.
_SCRIPTS = ("demo.py", "finetune.py", "flops.py", "pretrain.py", "probe.py", "report.py", "shard.py")
# What is found in the rooms.
_FUNCTIONS = {
    "Embedder": "embedding.embedder",
    "embed": "embedding.embed",
    "finetune": "finetuning.finetune",
    "pretrain": "pretraining.pretrain",
    "probe": "probing.probe",
}


def load() -> None:
    """Import the models and register them with the Auto classes; called again, it changes nothing."""
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoFeatureExtractor,
        AutoImageProcessor,
        AutoModel,
        AutoModelForAudioClassification,
        AutoModelForAudioFrameClassification,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
        AutoModelForVideoClassification,
    )
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
    from transformers.pipelines import PIPELINE_REGISTRY
    from transformers.utils import is_vision_available

    from .configuration_bridle import BridleConfig, BridleTokenizerConfig
    from .feature_extraction_bridle import BridleFeatureExtractor
    from .image_processing_bridle import (  # noqa: F401 (a public name)
        BridleImageProcessor,
        BridleVideoProcessor,
        make_image_processor,
    )
    from .modeling_bridle import (
        BridleBackbone,
        BridleForAudioClassification,
        BridleForAudioFrameClassification,
        BridleForImageClassification,
        BridleForPreTraining,
        BridleForVideoClassification,
        BridleModel,
    )
    from .modeling_bridle_tokenizer import BridleTokenizerModel, teacher_features  # noqa: F401 (a public name)
    from .pipeline_bridle import (
        BridleAudioClassificationPipeline,
        BridleImageClassificationPipeline,
        BridleVideoClassificationPipeline,
    )

    AutoConfig.register("bridle", BridleConfig, exist_ok=True)
    AutoConfig.register("bridle_tokenizer", BridleTokenizerConfig, exist_ok=True)
    AutoBackbone.register(BridleConfig, BridleBackbone, exist_ok=True)
    AutoModel.register(BridleConfig, BridleModel, exist_ok=True)
    AutoModel.register(BridleTokenizerConfig, BridleTokenizerModel, exist_ok=True)
    AutoModelForPreTraining.register(BridleConfig, BridleForPreTraining, exist_ok=True)
    AutoModelForPreTraining.register(BridleTokenizerConfig, BridleTokenizerModel, exist_ok=True)
    AutoModelForAudioClassification.register(BridleConfig, BridleForAudioClassification, exist_ok=True)
    AutoModelForAudioFrameClassification.register(BridleConfig, BridleForAudioFrameClassification, exist_ok=True)
    AutoModelForImageClassification.register(BridleConfig, BridleForImageClassification, exist_ok=True)
    AutoModelForVideoClassification.register(BridleConfig, BridleForVideoClassification, exist_ok=True)
    AutoFeatureExtractor.register(BridleConfig, BridleFeatureExtractor, exist_ok=True)
    # Of models of other kinds, it makes transformers' own.
    PIPELINE_REGISTRY.supported_tasks["audio-classification"]["impl"] = BridleAudioClassificationPipeline
    PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = BridleImageClassificationPipeline
    PIPELINE_REGISTRY.supported_tasks["video-classification"]["impl"] = BridleVideoClassificationPipeline
    if is_vision_available():  # audio needs no Pillow
        # One class for both backends: a working torchvision changes nothing for it.
        backends = {"torchvision": BridleImageProcessor, "pil": BridleImageProcessor}
        AutoImageProcessor.register(BridleConfig, image_processor_classes=backends, exist_ok=True)
        # A config has one class, whatever its modality; that of a tokenizer is free. Folders name theirs.
        backends = {"torchvision": BridleVideoProcessor, "pil": BridleVideoProcessor}
        AutoImageProcessor.register(BridleTokenizerConfig, image_processor_classes=backends, exist_ok=True)
        # Every pipeline also looks for a video processor, and would ask to run remote code where it knows of no entry.
        VIDEO_PROCESSOR_MAPPING.register(BridleConfig, {"torchvision": None}, exist_ok=True)
    globals().update({name: value for name, value in locals().items() if name in __all__})


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        # Not kept: `bridle_hf.probe` must stay what a test or a user puts in its room.
        return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)
    if name in __all__:
        load()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _starts_a_command() -> bool:
    """Whether this process runs one of our commands, which reads its arguments before it loads anything large.

    These are the script `bridle`, `python -m bridle_hf.ROOM`, and the files of a checkout's `training/`; in what is
    not recognised, all is loaded as ever. A worker process repeats the command line of its parent, but is none.
    """
    if multiprocessing.parent_process() is not None or not getattr(sys, "argv", None):
        return False
    script = Path(sys.argv[0])
    if sys.argv[0] == "-m":  # the module that it names is still being looked for
        words = sys.orig_argv
        return any(word == "-m" and name.startswith("bridle_hf.") for word, name in itertools.pairwise(words))
    training = Path(__file__).resolve().parents[1] / "training"
    return script.name in ("bridle", "bridle.exe") or (script.name in _SCRIPTS and script.resolve().parent == training)


if _starts_a_command():
    # libgomp's threads spin long while they wait, which costs dearly beside a busy process; not to spin at all costs a
    # tenth where nothing else runs (tests/benchmarks/bench_busy_machine.py). It reads this once, when torch loads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
else:
    load()
