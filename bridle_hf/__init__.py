"""BRIDLE (arXiv 2502.02118) for the Hugging Face ecosystem; importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
)

from .configuration_bridle import BridleConfig, BridleTokenizerConfig
from .feature_extraction_bridle import BridleFeatureExtractor
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

__all__ = [
    "BridleConfig",
    "BridleFeatureExtractor",
    "BridleForAudioClassification",
    "BridleForImageClassification",
    "BridleForPreTraining",
    "BridleForVideoClassification",
    "BridleModel",
    "BridleTokenizerConfig",
    "BridleTokenizerModel",
    "teacher_hidden_states",
]
