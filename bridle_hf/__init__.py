"""BRIDLE (arXiv 2502.02118) for the Hugging Face ecosystem; importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
from transformers.utils import is_vision_available

from .configuration_bridle import BridleConfig, BridleTokenizerConfig
from .feature_extraction_bridle import BridleFeatureExtractor
from .image_processing_bridle import BridleImageProcessor, make_image_processor
from .modeling_bridle import (
    BridleForAudioClassification,
    BridleForImageClassification,
    BridleForPreTraining,
    BridleForVideoClassification,
    BridleModel,
)
from .modeling_bridle_tokenizer import BridleTokenizerModel, teacher_hidden_states


__version__ = "0.1.0"

AutoConfig.register("bridle", BridleConfig, exist_ok=True)
AutoConfig.register("bridle_tokenizer", BridleTokenizerConfig, exist_ok=True)
AutoModel.register(BridleConfig, BridleModel, exist_ok=True)
AutoModel.register(BridleTokenizerConfig, BridleTokenizerModel, exist_ok=True)
AutoModelForPreTraining.register(BridleConfig, BridleForPreTraining, exist_ok=True)
AutoModelForPreTraining.register(BridleTokenizerConfig, BridleTokenizerModel, exist_ok=True)
AutoModelForAudioClassification.register(BridleConfig, BridleForAudioClassification, exist_ok=True)
AutoModelForImageClassification.register(BridleConfig, BridleForImageClassification, exist_ok=True)
AutoModelForVideoClassification.register(BridleConfig, BridleForVideoClassification, exist_ok=True)
AutoFeatureExtractor.register(BridleConfig, BridleFeatureExtractor, exist_ok=True)
if is_vision_available():  # audio needs no Pillow
    # One class for both backends: a working torchvision changes nothing for it.
    backends = {"torchvision": BridleImageProcessor, "pil": BridleImageProcessor}
    AutoImageProcessor.register(BridleConfig, image_processor_classes=backends, exist_ok=True)
    # Every pipeline also looks for a video processor, and would ask to run remote code where it knows of no entry.
    VIDEO_PROCESSOR_MAPPING.register(BridleConfig, {"torchvision": None}, exist_ok=True)

__all__ = [
    "BridleConfig",
    "BridleFeatureExtractor",
    "BridleForAudioClassification",
    "BridleForImageClassification",
    "BridleForPreTraining",
    "BridleForVideoClassification",
    "BridleImageProcessor",
    "BridleModel",
    "BridleTokenizerConfig",
    "BridleTokenizerModel",
    "make_image_processor",
    "teacher_hidden_states",
]
