"""Few labels: which are drawn; fine-tuning learns, repeats itself, and treats every encoder alike."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle_hf import BridleModel
from bridle_hf.common.errors import NonFiniteError
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.sample import Sample
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.probing.few_labels import FewLabels, classify, draw_labelled, finetune_with


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=200),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.integers(0, 1000),
)
def test_a_share_of_each_class_and_at_least_one(labels, first, second, seed):
    labels, (small, large) = np.array(labels), sorted([first, second])
    few, more = draw_labelled(labels, small, seed), draw_labelled(labels, large, seed)
    for label in np.unique(labels):
        assert (labels[few] == label).sum() == max(1, round(small * (labels == label).sum()))
    assert set(few) <= set(more) and len(set(few)) == len(few)
    assert draw_labelled(labels, small, seed).tolist() == few.tolist()
    assert draw_labelled(labels, 1.0, seed).tolist() == list(range(len(labels)))


def test_another_seed_draws_others():
    labels = np.repeat(np.arange(4), 50)
    assert draw_labelled(labels, 0.1, 0).tolist() != draw_labelled(labels, 0.1, 1).tolist()


class Toy:
    """Samples of two classes that differ in the sign of their mean; remembers what was read."""

    def __init__(self, shape: torch.Size, name: str):
        self.shape, self.name, self.read = shape, name, []
        self.samples = [Sample(str(number)) for number in range(40)]
        self.labels = np.arange(40) % 2

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        number = int(sample.path)
        view = 0 if rng is None else int(rng.integers(1000))
        self.read.append((number, view))
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(1000 * number + view))
        return {self.name: noise + (1 if self.labels[number] else -1)}


@pytest.fixture
def toy(tiny_input, modality) -> Toy:
    return Toy(tiny_input(modality, batch=1).shape[1:], INPUT_NAMES[modality])


RECIPE = FewLabels(steps=12, batch_size=8, learning_rate=3e-3)


def test_it_learns_from_few_and_leaves_the_encoder_as_it_was(tiny_config, toy, modality, tmp_path):
    encoder = BridleModel(tiny_config(modality))
    before = copy.deepcopy(encoder.state_dict())
    labelled = np.arange(10)
    model = finetune_with(encoder, toy.samples, toy.labels, labelled, toy, RECIPE, seed=0)
    assert {number for number, _ in toy.read} == set(labelled), "no other sample is looked at"
    assert len(toy.read) == 12 * 8
    found = classify(model, toy.samples, toy, SkippedFiles(tmp_path / "skipped.jsonl", 40))
    assert (found == toy.labels)[10:].mean() > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    moved = [not torch.equal(before[name], tensor) for name, tensor in model.bridle.state_dict().items()]
    assert sum(moved) > len(moved) / 2, "all of the encoder is trained"


@pytest.mark.parametrize("modality", ["image"])
def test_every_encoder_gets_the_same_order_views_and_head(tiny_config, toy, modality):
    labelled, models, read = np.arange(0, 40, 3), [], []
    for encoder in (BridleModel(tiny_config(modality)), BridleModel(tiny_config(modality))):
        for _ in range(2):
            torch.rand(3)  # whatever was drawn before
            models.append(finetune_with(encoder, toy.samples, toy.labels, labelled, toy, RECIPE, seed=5))
            read.append(toy.read)
            toy.read = []
    assert all(calls == read[0] for calls in read)
    weights = [model.state_dict()["classifier.weight"] for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    still = FewLabels(steps=1, learning_rate=0.0)
    heads = [
        finetune_with(BridleModel(tiny_config(modality)), toy.samples, toy.labels, labelled, toy, still, seed=5)
        for _ in range(2)
    ]
    assert torch.equal(heads[0].classifier.weight, heads[1].classifier.weight)


@pytest.mark.parametrize("modality", ["image"])
def test_fewer_labels_than_a_batch_are_all_in_it(tiny_config, toy, modality):
    finetune_with(BridleModel(tiny_config(modality)), toy.samples, toy.labels, np.arange(5), toy, RECIPE, seed=0)
    steps = [sorted(number for number, _ in toy.read[start : start + 5]) for start in range(0, len(toy.read), 5)]
    assert steps == [[0, 1, 2, 3, 4]] * 12


@pytest.mark.parametrize("modality", ["image"])
def test_what_is_not_finite_ends_it(tiny_config, toy, modality):
    encoder = BridleModel(tiny_config(modality))
    with torch.no_grad():
        encoder.layernorm.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="at step 0"):
        finetune_with(encoder, toy.samples, toy.labels, np.arange(5), toy, RECIPE, seed=0)


@pytest.mark.parametrize("changes", [{"shares": []}, {"shares": [0.1, 1.5]}, {"steps": 0}], ids=str)
def test_wrong_recipes_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        FewLabels(**changes)
