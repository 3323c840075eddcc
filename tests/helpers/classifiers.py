"""The classifier of each modality."""

from bridle_hf import BridleForAudioClassification, BridleForImageClassification, BridleForVideoClassification


CLASSIFIERS = {
    "audio": BridleForAudioClassification,
    "image": BridleForImageClassification,
    "video": BridleForVideoClassification,
}
