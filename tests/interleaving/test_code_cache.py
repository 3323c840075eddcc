"""The code cache: what it gives is what was put in, of the same input and tokenizer, and nothing else."""

import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridle_hf import BridleTokenizerModel
from bridle_hf.data.masked_loader import MaskedLoader
from bridle_hf.data.sample import Sample
from bridle_hf.interleaving.code_cache import CodeCache


@pytest.fixture
def tokenizer(tiny_tokenizer_config) -> BridleTokenizerModel:
    torch.manual_seed(0)
    return BridleTokenizerModel(tiny_tokenizer_config("audio", num_soft_codes=2))


def draw(cache: CodeCache, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cache_size(cache), (count, *cache.shape), generator=generator)


def cache_size(cache: CodeCache) -> int:
    return np.iinfo(cache.dtype).max + 1


@pytest.mark.parametrize(("size", "bytes_"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_records_are_as_small_as_the_codebook_allows(tiny_tokenizer_config, tmp_path, size, bytes_):
    with torch.device("meta"):
        tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio", codebook_size=size))
    cache = CodeCache(tmp_path, tokenizer.to_empty(device="cpu"), "no")
    assert cache.record_size == 12 + bytes_ * np.prod(cache.shape)
    highest = torch.full((1, *cache.shape), size - 1)
    cache.write([3], [-5], highest)
    assert torch.equal(cache.read([3], [-5]), highest)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(-(2**63), 2**63 - 1)), max_size=30), st.data())
def test_what_was_written_last_is_what_is_read(tmp_path_factory, tiny_tokenizer_config, entries, data):
    cache = CodeCache(tmp_path_factory.mktemp("codes"), BridleTokenizerModel(tiny_tokenizer_config("audio")), "no")
    known = {}
    for number, (index, fingerprint) in enumerate(entries):
        codes = draw(cache, 1, number)
        cache.write([index], [fingerprint], codes)
        known[index] = fingerprint, codes
    for index in range(21):
        fingerprint, codes = known.get(index, (0, None))
        found = cache.read([index], [fingerprint])
        assert (found is None) == (codes is None) and (codes is None or torch.equal(found, codes))
        assert cache.read([index], [fingerprint ^ 1]) is None, "of another input"
    if known:
        indices = data.draw(st.permutations(sorted(known)))
        found = cache.read(indices, [known[index][0] for index in indices])
        assert torch.equal(found, torch.cat([known[index][1] for index in indices]))
        assert cache.read([*indices, 25], [*(known[index][0] for index in indices), 0]) is None


def test_codes_of_cut_inputs(tokenizer, tmp_path):
    cache = CodeCache(tmp_path, tokenizer, "no")
    codes = draw(cache, 2)
    cache.write([0, 1], [7, 8], codes[:, :5])
    found = cache.read([0, 1], [7, 8])
    assert torch.equal(found[:, :5], codes[:, :5]) and not found[:, 5:].any()


def test_a_damaged_record_is_a_missing_one(tokenizer, tmp_path):
    cache = CodeCache(tmp_path, tokenizer, "no")
    cache.write([0, 1, 2], [4, 5, 6], draw(cache, 3))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(cache.record_size):
        damaged = bytearray(whole)
        damaged[cache.record_size + place] ^= 16
        path.write_bytes(damaged)
        cache = CodeCache(tmp_path, tokenizer, "no")
        assert cache.read([1], [5]) is None and cache.read([0, 2], [4, 6]) is not None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        cache = CodeCache(tmp_path, tokenizer, "no")
        assert (cache.read([0], [4]) is None) == (length < cache.record_size) and cache.read([2], [6]) is None


def test_another_tokenizer_has_codes_of_its_own(tokenizer, tmp_path):
    """By a bit of a weight, by its config, or by precision; what another left is removed."""
    codes = draw(cache := CodeCache(tmp_path, tokenizer, "no"), 1)
    cache.write([0], [1], codes)
    assert torch.equal(CodeCache(tmp_path, tokenizer, "no").read([0], [1]), codes)
    assert CodeCache(tmp_path, tokenizer, "bf16").read([0], [1]) is None
    cache.write([0], [1], codes)
    for name in ("quantizer.codebooks", "projection.0.weight"):
        with torch.no_grad():
            flat = tokenizer.state_dict()[name].view(-1)
            flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
        cache = CodeCache(tmp_path, tokenizer, "no")
        assert cache.read([0], [1]) is None
        cache.write([0], [1], codes)
    tokenizer.config.layer_norm_eps *= 2
    assert CodeCache(tmp_path, tokenizer, "no").read([0], [1]) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_that_write_and_die_leave_records_or_none(tokenizer, tmp_path):
    cache = CodeCache(tmp_path, tokenizer, "no")
    codes = draw(cache, 40)
    children = []
    for first in range(4):
        child = os.fork()
        if child == 0:
            own = CodeCache(tmp_path, tokenizer, "no")
            while True:
                for index in range(first, 40, 2):  # each record is written by two of them
                    own.write([index], [index], codes[index : index + 1])
        children.append(child)
    found = set()
    try:
        for _ in range(2000):
            for index in range(40):
                record = cache.read([index], [index])
                assert record is None or torch.equal(record[0], codes[index])
                found |= {index} if record is not None else set()
            if len(found) == 40:
                break
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for index in range(40):
        record = cache.read([index], [index])
        assert record is None or torch.equal(record[0], codes[index])
    assert len(found) == 40


def test_a_fingerprint_tells_inputs_apart(tiny_config):
    def fingerprint(values: torch.Tensor, frames: int = 96) -> int:
        loaded = {"input_values": values, "attention_mask": (torch.arange(96) < frames).long()}
        loader = MaskedLoader(lambda sample, rng: loaded, tiny_config("audio"), {}, fingerprint=True)
        return int(loader(Sample("a.wav"), np.random.default_rng(int(torch.randint(99, ()))))["fingerprint"])

    values = torch.randn(96, 64)
    assert fingerprint(values) == fingerprint(values.clone()), "whatever else is drawn"
    other = values.clone()
    other[95, 63] = torch.nextafter(other[95, 63], torch.tensor(9.0))
    assert len({fingerprint(values), fingerprint(other), fingerprint(values, 90)}) == 3
