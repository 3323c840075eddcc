"""Small models of every kind, saved, and what each Auto class makes of them, with or without the package.

Imports `bridle_hf` only inside `save_all`: the rest also runs where there is remote code alone.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForPreTraining,
    AutoProcessor,
    pipeline,
)


RATE = 16000
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
INPUT = {"max_length": 64, "num_mel_bins": 32}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
ESTIMATOR = {"estimator_hidden_size": 16, "estimator_num_hidden_layers": 1, "estimator_num_attention_heads": 2}
CODES = {"num_codebooks": 2, "codebook_size": 8}
OWN_CLASS = {
    "pretraining": AutoModelForPreTraining,
    "base": AutoModel,
    "classifier": AutoModelForAudioClassification,
    "tokenizer": AutoModel,
}


def make_models() -> dict:
    """One model per kind of folder, and a feature extractor that fits them."""
    import bridle_hf

    torch.manual_seed(0)
    config = {**INPUT, **SIZES, **CODES, **DECODER}
    labels = {"id2label": {0: "flute", 1: "oboe", 2: "horn"}, "label2id": {"flute": 0, "oboe": 1, "horn": 2}}
    tokenizer = bridle_hf.BridleTokenizerConfig(**INPUT, **SIZES, **CODES, **ESTIMATOR, code_dim=8)
    models = {
        "pretraining": bridle_hf.BridleForPreTraining(bridle_hf.BridleConfig(**config)),
        "base": bridle_hf.BridleModel(bridle_hf.BridleConfig(**config)),
        "classifier": bridle_hf.BridleForAudioClassification(bridle_hf.BridleConfig(**config, **labels)),
        "tokenizer": bridle_hf.BridleTokenizerModel(tokenizer),
    }
    for model in models.values():
        # A weight that is lost in loading must show: none may keep the value that a new one has.
        for parameter in model.eval().parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return {**models, "feature_extractor": bridle_hf.BridleFeatureExtractor(**INPUT, mean=-3.0, std=2.0)}


def save_all(models: dict, root: Path) -> None:
    """Save each model to `root/<kind>`, with the feature extractor beside it."""
    for kind in OWN_CLASS:
        models[kind].save_pretrained(root / kind)
        models["feature_extractor"].save_pretrained(root / kind)


def clips() -> list[np.ndarray]:
    """Two mono clips of unlike length."""
    generator = np.random.default_rng(0)
    return [(0.1 * generator.standard_normal(samples)).astype(np.float32) for samples in (RATE, RATE // 3)]


@torch.no_grad()
def outputs_of(kind: str, model, inputs: dict) -> dict[str, torch.Tensor]:
    """What a model of a folder of this kind computes, as far as the folder's weights decide it."""
    if kind == "tokenizer":
        codes = model.encode(**inputs)
        return {"codes": codes, "quantized": model.decode(codes), "latents": model.latents(*inputs.values())}
    base = getattr(model, "bridle", model)(**inputs)
    outputs = {"last_hidden_state": base.last_hidden_state, "pooler_output": base.pooler_output}
    mask = torch.arange(base.last_hidden_state.shape[1] - 1).expand(len(base.last_hidden_state), -1) % 3 > 0
    if kind == "pretraining" and type(model).__name__ == "BridleForPreTraining":
        outputs["logits"] = model(**inputs, bool_masked_pos=mask).logits
    if kind == "classifier" and type(model).__name__ == "BridleForAudioClassification":
        outputs["logits"] = model(**inputs).logits
    return outputs


def expected(models: dict) -> dict[str, torch.Tensor]:
    """What [`load_everything`] must return for the models' saved folders."""
    extractor = models["feature_extractor"]
    inputs = extractor(clips(), sampling_rate=RATE, return_tensors="pt")
    results = {}
    for kind, own in OWN_CLASS.items():
        classes = [AutoModel, AutoModelForPreTraining, *([] if kind == "tokenizer" else [OWN_CLASS["classifier"]])]
        for name, value in inputs.items():
            results[f"{kind} {name}"] = value
        for auto_class in classes:
            outputs = outputs_of(kind, models[kind], inputs)
            if auto_class is not own and kind != "tokenizer":
                outputs.pop("logits", None)
            for name, value in outputs.items():
                results[f"{kind} {auto_class.__name__} {name}"] = value
    logits = results["classifier AutoModelForAudioClassification logits"]
    results["pipeline"] = logits[1].softmax(dim=-1).sort(descending=True).values
    return results


def load_everything(root: str, trust_remote_code: bool, again: Path | None = None) -> dict[str, torch.Tensor]:
    """Load `root/<kind>`, folders or Hub ids, through every Auto class; what comes out, by kind, class and name.

    Args:
        again: Save what was loaded once more, under this folder.
    """
    results = {}
    for kind, own in OWN_CLASS.items():
        name = f"{root}/{kind}"
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        assert type(config).__name__ == ("BridleTokenizerConfig" if kind == "tokenizer" else "BridleConfig")
        extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=trust_remote_code)
        inputs = extractor(clips(), sampling_rate=RATE, return_tensors="pt")
        results.update({f"{kind} {key}": value for key, value in inputs.items()})
        for auto_class in (AutoModel, AutoModelForPreTraining, AutoModelForAudioClassification):
            if kind == "tokenizer" and auto_class is AutoModelForAudioClassification:
                with pytest.raises(ValueError, match="Unrecognized configuration class"):
                    auto_class.from_pretrained(name, trust_remote_code=trust_remote_code)
                continue
            model = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code).eval()
            outputs = outputs_of(kind, model, inputs)
            results.update({f"{kind} {auto_class.__name__} {key}": value for key, value in outputs.items()})
            if again is not None and auto_class is own:
                model.save_pretrained(again / kind)
                extractor.save_pretrained(again / kind)
    results["pipeline"] = pipeline_scores(f"{root}/classifier", trust_remote_code)
    return results


def pipeline_scores(name: str, trust_remote_code: bool) -> torch.Tensor:
    """Scores of the second clip, which the model takes whole, the highest first."""
    classify = pipeline("audio-classification", model=name, trust_remote_code=trust_remote_code)
    answers = classify({"raw": clips()[1], "sampling_rate": RATE})
    assert {answer["label"] for answer in answers} == {"flute", "oboe", "horn"}
    return torch.tensor([answer["score"] for answer in answers])


def save_processors(root: Path) -> None:
    """A config and its processor in a folder for audio, for images of three channels and of one, and for video."""
    import bridle_hf

    sizes = {"audio": INPUT, "image": {"image_size": 32}, "video": {"image_size": 32, "num_frames": 4}}
    for name, fields in {**sizes, "grey": {**sizes["image"], "num_channels": 1}}.items():
        config = bridle_hf.BridleConfig(modality="image" if name == "grey" else name, **fields, **SIZES)
        config.save_pretrained(root / name)
        audio = name == "audio"
        processor = bridle_hf.BridleFeatureExtractor(**INPUT) if audio else bridle_hf.make_image_processor(config)
        processor.save_pretrained(root / name)


def load_processors(root: str, trust_remote_code: bool, again: Path) -> dict[str, str]:
    """Every folder of [`save_processors`] through every Auto class of processors; what each saves, or its error."""
    results = {}
    for name in ("audio", "image", "grey", "video"):
        for auto_class in (AutoProcessor, AutoFeatureExtractor, AutoImageProcessor):
            try:
                processor = auto_class.from_pretrained(f"{root}/{name}", trust_remote_code=trust_remote_code)
            except (ValueError, AttributeError) as error:
                results[f"{name} {auto_class.__name__}"] = f"{type(error).__name__}: {error}"
            else:
                processor.save_pretrained(again / name / auto_class.__name__)
                saved = again / name / auto_class.__name__ / "preprocessor_config.json"
                results[f"{name} {auto_class.__name__}"] = saved.read_text()
    return results


def assert_equal(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same keys, and under each the same numbers."""
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        # To the last bits: kernels may round by where a tensor lies in memory, and the pipeline's clip goes alone.
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6, msg=f"{name} differs")
