"""The residual quantizer against vector-quantize-pytorch, scikit-learn, scipy, literal numpy, and a second process."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from bridle_hf import BridleTokenizerConfig, BridleTokenizerModel
from bridle_hf.quantization_bridle import BridleResidualQuantizer, codebook_usage, count_codes, kmeans


EMA_UPDATES = ["count", "smoothed_count", "direction"]
EXACT = {"atol": 1e-5, "rtol": 0.0}


def make_quantizer(**fields) -> BridleResidualQuantizer:
    sizes = {"code_dim": 8, "num_codebooks": 3, "codebook_size": 16, "codebook_normalization": "none"}
    return BridleResidualQuantizer(BridleTokenizerConfig(**{**sizes, **fields}))


def state(quantizer: BridleResidualQuantizer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in quantizer.named_buffers()}


# Lookup


@pytest.mark.parametrize("levels", range(1, 9))
def test_codes_and_sums_equal_the_oracle_library(levels):
    ours = make_quantizer(num_codebooks=levels, codebook_size=64, code_dim=24).eval()
    oracle = ResidualVQ(dim=24, num_quantizers=levels, codebook_size=64, kmeans_init=False).eval()
    for level, layer in enumerate(oracle.layers):
        # Each level at the scale of what is left for it, so that all of them matter.
        ours.codebooks[level].normal_().mul_(0.7**level)
        layer._codebook.embed.copy_(ours.codebooks[level][None])
    latents = torch.randn(4, 500, 24)
    expected, codes, _ = oracle(latents)
    output = ours(latents.flatten(0, 1))
    assert torch.equal(output.codes, codes.flatten(0, 1))
    torch.testing.assert_close(output.quantized, expected.flatten(0, 1), **EXACT)
    torch.testing.assert_close(ours.decode(output.codes), expected.flatten(0, 1), **EXACT)


def test_independent_codebooks_are_as_many_quantizers_side_by_side():
    """Each on its own slice of the vectors: codes, sums, gradient and EMA steps are those of one codebook alone."""
    fields = {"codebook_normalization": "input", "commitment_weight": 1.0}
    ours = make_quantizer(code_dim=24, independent_codebooks=True, **fields)
    alone = [make_quantizer(code_dim=8, num_codebooks=1, **fields) for _ in range(3)]
    vectors = torch.randn(2000, 24)
    torch.manual_seed(0)
    ours.initialize(vectors)
    for q, quantizer in enumerate(alone):
        quantizer.codebooks.copy_(ours.codebooks[q : q + 1, :, 8 * q : 8 * q + 8])
    for _ in range(3):
        latents = torch.randn(300, 24, requires_grad=True)
        output, expected = ours(latents), [one(part) for one, part in zip(alone, latents.split(8, dim=1))]
        assert torch.equal(output.codes, torch.cat([one.codes for one in expected], dim=1))
        torch.testing.assert_close(output.quantized, torch.cat([one.quantized for one in expected], dim=1), **EXACT)
        (gradient,) = torch.autograd.grad(output.loss, latents, retain_graph=True)
        (whole,) = torch.autograd.grad(sum(one.loss for one in expected), latents)
        torch.testing.assert_close(gradient * 9, whole, **EXACT)  # means over 3 codebooks, and over 24 values for 8
    for q, quantizer in enumerate(alone):
        torch.testing.assert_close(ours.codebooks[q, :, 8 * q : 8 * q + 8], quantizer.codebooks[0], **EXACT)
        assert ours.codebooks[q].count_nonzero() <= ours.codebooks[q, :, 8 * q : 8 * q + 8].numel()


@torch.no_grad()
def test_one_codebook_is_vector_quantization():
    quantizer = make_quantizer(num_codebooks=1).eval()
    latents = torch.randn(200, 8)
    nearest = torch.cdist(latents, quantizer.codebooks[0]).argmin(dim=1)
    output = quantizer(latents)
    assert torch.equal(output.codes[:, 0], nearest)
    torch.testing.assert_close(output.quantized, quantizer.codebooks[0][nearest], **EXACT)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 16), st.integers(0, 1000))
def test_soft_codes_are_the_nearest_and_the_chain_follows_the_first(levels, count, seed):
    torch.manual_seed(seed)
    quantizer = make_quantizer(num_codebooks=levels, num_soft_codes=count).eval()
    residual = torch.randn(50, 8)
    output = quantizer(residual)
    for level in range(levels):
        distances = torch.cdist(residual, quantizer.codebooks[level])
        nearest = distances.topk(count, dim=1, largest=False).indices
        assert torch.equal(output.codes[:, level], nearest[:, 0])
        if count > 1:
            assert torch.equal(output.soft_codes[:, level], nearest)
        residual = residual - quantizer.codebooks[level][nearest[:, 0]]


@pytest.mark.parametrize("normalization", ["none", "input", "level"])
def test_normalization_rules(normalization):
    quantizer = make_quantizer(codebook_normalization=normalization).eval()
    latents = 5 * torch.randn(100, 8)
    output = quantizer(latents)
    residual = torch.nn.functional.normalize(latents, dim=1) if normalization == "input" else latents
    for level, codes in enumerate(output.codes.unbind(1)):
        looked_up = torch.nn.functional.normalize(residual, dim=1) if normalization == "level" else residual
        assert torch.equal(codes, torch.cdist(looked_up, quantizer.codebooks[level]).argmin(dim=1))
        residual = residual - quantizer.codebooks[level][codes]
    torch.testing.assert_close(output.quantized, quantizer.decode(output.codes), **EXACT)


def test_straight_through_gradient_is_the_identity():
    quantizer = make_quantizer().eval()
    latents = torch.randn(20, 8, requires_grad=True)
    upstream = torch.randn(20, 8)
    quantizer(latents).quantized.backward(upstream)
    assert torch.equal(latents.grad, upstream)


def test_loss_and_its_gradient():
    quantizer = make_quantizer(commitment_weight=0.3).eval()
    latents = torch.randn(20, 8, requires_grad=True)
    output = quantizer(latents)
    codes = [quantizer.codebooks[level][output.codes[:, level]] for level in range(3)]
    residuals = [latents - sum(codes[:level]) for level in range(3)]
    errors = [(residual - code).pow(2).mean() for residual, code in zip(residuals, codes)]
    torch.testing.assert_close(output.loss, 1.3 * sum(errors) / 3)
    # The first term moves nothing: codes are moved by EMA.
    (expected,) = torch.autograd.grad(0.3 * sum(errors) / 3, latents)
    (actual,) = torch.autograd.grad(output.loss, latents)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True])
def test_float32_under_autocast(training):
    exact, autocast = (make_quantizer(codebook_size=64, code_dim=32) for _ in range(2))
    autocast.load_state_dict(exact.state_dict())
    latents = torch.randn(500, 32)
    expected = exact.train(training)(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = autocast.train(training)(latents)
    assert torch.equal(output.codes, expected.codes)
    assert output.quantized.dtype == output.loss.dtype == torch.float32
    assert torch.equal(output.quantized, expected.quantized) and torch.equal(autocast.codebooks, exact.codebooks)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_float32_in_a_model_of_half_precision(cast):
    quantizer = make_quantizer()
    before = state(quantizer)
    module = torch.nn.ModuleList([quantizer])
    getattr(module, cast)(*([torch.bfloat16] if cast == "to" else []))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
    assert quantizer.codebooks.dtype == torch.float32
    assert quantizer(torch.randn(4, 8).bfloat16()).codes.shape == (4, 3)


@pytest.mark.parametrize("shape", [(0, 8), (4, 7), (2, 4, 8)])
def test_latents_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="latents"):
        make_quantizer()(torch.randn(shape))


# Moving the codes


@pytest.mark.parametrize("fields", [{}, {"codebook_normalization": "level", "ema_update": "direction"}])
def test_nothing_moves_in_eval(fields):
    quantizer = make_quantizer(**fields).eval()
    before = state(quantizer)
    quantizer(torch.randn(100, 8))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())


def test_ema_equals_the_literal_formula():
    """van den Oord et al. 2017, appendix: N_k, m_k and e_k = m_k / N_k, in float64."""
    quantizer = make_quantizer(num_codebooks=2, ema_decay=0.9, dead_code_threshold=0.0).train()
    codes = quantizer.codebooks.double().numpy()
    batches = [torch.randn(300, 8) for _ in range(5)]
    count = np.full((2, 16), 300 / 16)
    total = codes * (300 / 16)
    for batch in batches:
        residual = batch.double().numpy()
        new_codes = codes.copy()
        for level in range(2):
            distances = ((residual[:, None] - codes[level][None]) ** 2).sum(-1)
            chosen = distances.argmin(1)
            for k in range(16):
                members = residual[chosen == k]
                count[level, k] = 0.9 * count[level, k] + 0.1 * len(members)
                total[level, k] = 0.9 * total[level, k] + 0.1 * members.sum(0)
            new_codes[level] = total[level] / count[level][:, None]
            residual = residual - codes[level][chosen]
        codes = new_codes
        quantizer(batch)
    np.testing.assert_allclose(quantizer.codebooks.numpy(), codes, atol=1e-5)
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), count, atol=1e-4)
    np.testing.assert_allclose(quantizer.cluster_sum.numpy(), total, atol=1e-4)


def test_smoothed_counts_equal_the_oracle_library():
    ours = make_quantizer(num_codebooks=1, ema_update="smoothed_count", dead_code_threshold=0.0).train()
    oracle = VectorQuantize(dim=8, codebook_size=16, decay=0.99, threshold_ema_dead_code=0, kmeans_init=False).train()
    sizes = 10 * torch.rand(16)
    sizes[:2] = 1e-6  # as good as dead: their counts are what smoothing is for
    for (codes, size, total) in (
        (ours.codebooks, ours.cluster_size, ours.cluster_sum),
        (oracle._codebook.embed, oracle._codebook.cluster_size, oracle._codebook.embed_avg),
    ):  # fmt: skip
        codes.copy_(ours.codebooks)
        size.copy_(sizes)
        total.copy_(ours.codebooks * sizes[:, None])
    for _ in range(5):
        latents = torch.randn(200, 8)
        assert torch.equal(ours(latents).codes[:, 0], oracle(latents[None])[1][0])
    torch.testing.assert_close(ours.codebooks, oracle._codebook.embed, **EXACT)
    torch.testing.assert_close(ours.cluster_size, oracle._codebook.cluster_size, **EXACT)


@pytest.mark.parametrize("ema_update", EMA_UPDATES)
def test_unit_norm_codes_stay_of_unit_norm(ema_update):
    quantizer = make_quantizer(unit_norm_codes=True, codebook_normalization="input", ema_update=ema_update).train()
    for _ in range(3):
        quantizer(torch.randn(100, 8))
    torch.testing.assert_close(quantizer.codebooks.norm(dim=-1), torch.ones(3, 16))


@pytest.mark.parametrize("batch", [64, 1024])
def test_a_dead_code_is_reseeded_at_the_same_step_for_any_batch(batch):
    quantizer = make_quantizer(num_codebooks=1, codebook_size=4, ema_decay=0.9, dead_code_threshold=0.2).train()
    latents = torch.randn(batch, 8)
    quantizer.codebooks[0, 1:] = 0.1 * torch.randn(3, 8)
    quantizer.codebooks[0, 0] = 1000.0
    # Nobody chooses it: its count decays as 0.9^t, under 0.2 at t = 16.
    steps = math.ceil(math.log(0.2) / math.log(0.9))
    for step in range(1, steps + 1):
        output = quantizer(latents)
        assert output.usage.reseeded.tolist() == [int(step == steps)]
    assert (latents == quantizer.codebooks[0, 0]).all(dim=1).any(), "re-seeded from a current vector"
    torch.testing.assert_close(quantizer.cluster_size[0, 0], torch.tensor(batch / 4))
    torch.testing.assert_close(quantizer.cluster_sum[0, 0], batch / 4 * quantizer.codebooks[0, 0])
    assert quantizer(latents).usage.reseeded.tolist() == [0], "its statistics are fresh"


def test_a_vector_keeps_the_code_it_chose_while_codes_are_reseeded():
    # The reference's rule moves codes within the chain: a dead code must not be replaced under those who chose it.
    quantizer = make_quantizer(
        codebook_normalization="level", ema_update="direction", dead_code_threshold=0.9, ema_decay=0.5
    ).train()
    latents = torch.randn(64, 8)
    reseeded = 0
    for _ in range(5):
        error = quantizer(latents).usage
        reseeded += int(error.reseeded.sum())
        # A nearest unit code at an angle under 60 degrees of a vector longer than 1 always shortens it.
        assert (error.quantization_error < 1).all()
    assert reseeded > 0


def test_no_churn_on_a_stationary_distribution():
    quantizer = make_quantizer(num_codebooks=2, ema_decay=0.99)
    quantizer.initialize(torch.randn(2048, 8))
    quantizer.train()
    assert sum(int(quantizer(torch.randn(512, 8)).usage.reseeded.sum()) for _ in range(150)) == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from(["none", "input", "level"]),
    st.sampled_from(EMA_UPDATES),
    st.booleans(),
    st.sampled_from([0.0, 1e-20, 1.0, 1e10]),
)
def test_nothing_becomes_nan(normalization, ema_update, unit_norm_codes, scale):
    quantizer = make_quantizer(
        codebook_normalization=normalization, ema_update=ema_update, unit_norm_codes=unit_norm_codes, ema_decay=0.5
    ).train()
    for _ in range(12):
        output = quantizer(scale * torch.randn(3, 8))
    assert all(torch.isfinite(buffer).all() for buffer in quantizer.buffers())
    assert torch.isfinite(output.quantized).all() and not output.usage.quantization_error.isnan().any()


@pytest.mark.parametrize("name", ["none", "input", "level"])
def test_an_update_moves_the_codes_as_a_forward_does(name):
    torch.manual_seed(0)
    latents = [torch.randn(100, 8) + step for step in range(4)]
    moved, updated = (make_quantizer(ema_decay=0.8, dead_code_threshold=0.5, **CASES[name]).train() for _ in range(2))
    updated.load_state_dict(moved.state_dict())
    updated.update_in_forward = False
    for step, batch in enumerate(latents):
        torch.manual_seed(step)
        expected = moved(batch).usage.reseeded
        torch.manual_seed(step)
        assert torch.equal(updated.update([updated(batch).statistics]), expected)
        for buffer, value in state(moved).items():
            assert torch.equal(state(updated)[buffer], value), "bit for bit"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from(["count", "direction"]))
def test_codebooks_do_not_depend_on_how_a_batch_is_cut(sizes, ema_update):
    """Of whole numbers, whose sums are exact in any order: bit for bit."""
    torch.manual_seed(sum(sizes))
    whole, cut = (make_quantizer(dead_code_threshold=0.9, ema_update=ema_update).train() for _ in range(2))
    for quantizer in (whole, cut):
        quantizer.update_in_forward = False
        quantizer.codebooks.copy_(
            torch.randint(-9, 9, whole.codebooks.shape, generator=torch.Generator().manual_seed(1))
        )
    latents = torch.randint(-20, 20, (sum(sizes), 8)).float()
    for quantizer, parts in ((whole, [latents]), (cut, latents.split(sizes))):
        torch.manual_seed(0)
        quantizer.update([quantizer(part).statistics for part in parts])
    for buffer, value in state(whole).items():
        assert torch.equal(state(cut)[buffer], value)


# k-means


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_kmeans_is_as_good_as_scikit_learn(spread):
    """On a Gaussian, and on a mixture of 16 that overlap."""
    centres = spread * torch.randn(16, 8)
    vectors = centres[torch.randint(len(centres), (2048,))] + torch.randn(2048, 8)
    found = kmeans(vectors, 16, 20)
    inertia = float(torch.cdist(vectors, found).min(dim=1).values.pow(2).sum())
    best = KMeans(16, n_init=4, random_state=0).fit(vectors.numpy()).inertia_
    assert inertia < 1.05 * best


def test_kmeans_fills_empty_clusters():
    vectors = torch.cat([torch.zeros(500, 2), torch.eye(2), 5 * torch.eye(2)])
    found = kmeans(vectors, 5, 20)
    assert torch.cdist(vectors, found).min(dim=1).values.max() < 1e-5


def test_initialize_refuses_too_few_vectors():
    quantizer = make_quantizer()
    with pytest.raises(ValueError, match="at least 512 vectors, got 511"):
        quantizer.initialize(torch.randn(511, 8))
    assert not quantizer.initialized
    quantizer.initialize(torch.randn(512, 8))
    assert quantizer.initialized


def test_quantization_error_falls_at_every_level_after_initialize():
    quantizer = make_quantizer(num_codebooks=6)
    latents = torch.randn(4096, 8)
    quantizer.initialize(latents)
    errors = quantizer.eval()(latents).usage.quantization_error
    assert (errors.diff() < 0).all() and errors[0] < 1
    expected = (latents - quantizer.decode(quantizer(latents).codes)).pow(2).sum() / latents.pow(2).sum()
    torch.testing.assert_close(errors[-1], expected)


# Usage


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 500), st.integers(0, 1000))
def test_usage_against_scipy(codebook_size, levels, vectors, seed):
    codes = np.random.default_rng(seed).integers(0, codebook_size, (vectors, levels))
    counts = count_codes(torch.from_numpy(codes), codebook_size)
    usage = codebook_usage(counts)
    for level in range(levels):
        expected = np.bincount(codes[:, level], minlength=codebook_size)
        entropy = scipy.stats.entropy(expected)
        assert counts[level].tolist() == expected.tolist()
        assert usage.used_fraction[level] == pytest.approx((expected > 0).mean())
        assert usage.perplexity[level] == pytest.approx(math.exp(entropy), rel=1e-5)
        assert usage.normalized_entropy[level] == pytest.approx(entropy / math.log(codebook_size), abs=1e-5)


# Saving


def test_buffers_survive_saving_bit_by_bit(tiny_tokenizer_config, tmp_path):
    tokenizer = BridleTokenizerModel(tiny_tokenizer_config("audio"))
    tokenizer.quantizer.initialize(torch.randn(512, 8))
    tokenizer.quantizer.train()(torch.randn(100, 8))
    tokenizer.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = BridleTokenizerModel.from_pretrained(tmp_path, dtype=dtype)
        expected = state(tokenizer.quantizer)
        for name, buffer in loaded.quantizer.named_buffers():
            assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name])
        if dtype == torch.float32:
            # Not saved, computed anew.
            assert torch.equal(loaded.estimator.positions.table, tokenizer.estimator.positions.table)


# Two processes

CASES = {
    "none": {},
    "input": {"codebook_normalization": "input", "unit_norm_codes": True},
    "level": {"codebook_normalization": "level", "ema_update": "direction"},
    "smoothed": {"codebook_normalization": "level", "ema_update": "smoothed_count"},
}


def train_quantizer(name: str, rows: slice) -> dict[str, torch.Tensor]:
    """k-means, then EMA steps that re-seed codes, on some rows of fixed batches."""
    data = torch.Generator().manual_seed(1)
    quantizer = make_quantizer(codebook_size=8, ema_decay=0.8, dead_code_threshold=0.5, **CASES[name])
    torch.manual_seed(2)
    quantizer.initialize(torch.randn(300, 8, generator=data)[rows])
    steps, reseeded = [state(quantizer)], []
    for step in range(6):
        batch = torch.randn(100, 8, generator=data) + 0.5 * step
        output = quantizer.train()(batch[rows])
        reseeded.append(output.usage.reseeded)
        steps.append(state(quantizer) | {"codes": output.codes})
    return {"steps": steps, "reseeded": torch.stack(reseeded)}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Rank 1 has fewer rows, and another state of the random generator.
    torch.manual_seed(rank)
    rows = [slice(0, 63), slice(63, None)][rank]
    torch.save({name: train_quantizer(name, rows) for name in CASES}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_rank, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_hold_the_same_codebooks_and_those_of_one_process(two_ranks, name):
    first, second = (result[name] for result in two_ranks)
    alone = train_quantizer(name, slice(None))
    assert torch.equal(first["reseeded"], alone["reseeded"]) and int(alone["reseeded"].sum()) > 0
    for ours, theirs, whole in zip(first["steps"], second["steps"], alone["steps"]):
        for buffer in ("codebooks", "cluster_size", "cluster_sum", "initialized"):
            assert torch.equal(ours[buffer], theirs[buffer]), "bit for bit"
        torch.testing.assert_close(ours["codebooks"], whole["codebooks"], atol=1e-6, rtol=0)
        if "codes" in whole:
            assert torch.equal(torch.cat([ours["codes"], theirs["codes"]]), whole["codes"])
