"""PCA: the basis, what a projection loses, attention among coordinates, and what is held exactly."""

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.attention import reference
from nanokv.method import At
from nanokv.methods.pca import PCA
from nanokv.packed import Packed


def prompt(m, spec, T=140, chunk=None):
    """Return the cache of a prompt, and the full cache of the same prompt."""
    cache, full = KVCache(m, spec), KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, tiny.ids(T), chunk)
    return cache, full


def spec(rank, rank_v=0, n_sink=4, residual=16, least=0):
    return [PCA(rank, rank_v, least), Packed(n_sink=n_sink, residual=residual)]


def kv(cache, layer=0):
    """Return keys and values of each row (R, N, D), in fp64."""
    return [t.flatten(0, 1).double() for t in cache.layers[layer].read()]


def test_the_leading_direction_of_a_small_example():
    x = torch.tensor([[3.0, 4.0, 0.0], [-6.0, -8.0, 0.0], [0.0, 0.0, 1.0]])  # X^T X: 125 along (.6, .8, 0), 1 along z
    U = PCA(rank=2).fit(x, "k", At(0, [0], [0]))
    assert U.shape == (3, 2) and torch.allclose(U.abs(), torch.tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]]), atol=1e-6)
    assert PCA(rank=2, rank_v=1).fit(x, "v", At(0, [0], [0])).shape == (3, 1)


# Turns red when sinks have a say in the basis, or when the order or the number of eigenvectors is changed.
@pytest.mark.parametrize("rank, rank_v, n_sink", [(8, 0, 4), (20, 9, 0), (32, 32, 7)])
def test_mutation_bases_are_the_leading_singular_vectors(rank, rank_v, n_sink):
    m = tiny.model()
    cache, full = prompt(m, spec(rank, rank_v, n_sink))
    for which, x, r in zip("kv", kv(full), (rank, rank_v or rank), strict=True):
        U = torch.stack(cache.layers[0].storage.U[which])
        assert U.shape == (2, 32, r) and (U.mT @ U - torch.eye(r)).abs().max() < 1e-5
        _, S, Vh = torch.linalg.svd(x[:, n_sink:], full_matrices=False)
        energy = (x[:, n_sink:] @ U.double()).square().sum(1)  # (R, r): squared singular values, the largest first
        assert tiny.rms(energy, S[:, :r].square()) < 1e-4
        P, Q = (b @ b.mT for b in (U.double(), Vh[:, :r].mT))
        assert (P - Q).abs().max() < 1e-3  # gaps between singular values are a few percent


def test_what_is_lost_is_the_energy_left_out():
    m, losses = tiny.model(), []
    for rank in (2, 4, 8, 16, 24, 31, 32):
        cache, full = prompt(m, spec(rank, residual=0))
        loss = []
        for x, y in zip(kv(full), kv(cache), strict=True):
            assert torch.equal(x[:, :4], y[:, :4])
            S = torch.linalg.svdvals(x[:, 4:])
            loss.append(float((x - y).square().sum()))
            assert loss[-1] == pytest.approx(float(S[:, rank:].square().sum()), rel=1e-3, abs=1e-6)
        losses.append(loss)
    assert all(b < a for now, then in zip(losses[1:], losses, strict=False) for a, b in zip(then, now, strict=True))


@pytest.mark.parametrize("policy", ["", "streamingllm(budget=400)+"])
def test_full_rank_changes_nothing(policy):
    m, text = tiny.model(), tiny.ids(190)
    cache, full = KVCache(m, f"{policy}pca(rank=32)"), KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :160], 80)
    assert sum(cache.layers[0].storage.old["k"].n) == 2 * (160 - 4 - 64)
    if policy:  # keys are held un-rotated, so the basis is one of un-rotated keys
        k, _ = cache.layers[0].storage.read()
        assert tiny.rms(m.rope(k[None], torch.arange(160)[None])[0], kv(full)[0]) < 1e-5
    assert tiny.rms(tiny.steps(m, cache, text[:, 160:]), tiny.steps(m, full, text[:, 160:])) < 1e-4


@pytest.mark.parametrize("rank, rank_v", [(16, 0), (8, 24), (32, 5)])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_among_coordinates_equals_the_reference(rank, rank_v, T):
    m = tiny.model(G=4)
    cache, _ = prompt(m, spec(rank, rank_v))
    m(tiny.ids(T), cache, "draft")
    c = cache.layers[1]
    q, pos, calls = torch.randn(1, 8, T, 32), torch.arange(140, 140 + T)[None], []
    c.storage.read = lambda: calls.append(1)
    got = c.attend(q, pos)
    del c.storage.read
    assert not calls  # no key or value was rebuilt
    assert tiny.rms(got, reference(q, *c.read(), c.additive_mask(pos))) < 1e-5


def test_scores_are_divided_by_the_root_of_head_dim():
    m = tiny.model()
    cache, _ = prompt(m, spec(8))
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[140]])
    k, v = cache.layers[0].read()
    p = ((q.view(2, 3, 32) @ k[0].mT) / 32**0.5).softmax(-1)
    assert tiny.rms(cache.layers[0].attend(q, pos).view(2, 3, 32), p @ v[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank, rank_v, n_sink, residual, T", [
    (16, 0, 4, 64, 140), (8, 20, 0, 10, 100), (16, 16, 4, 64, 60),
])  # fmt: skip
def test_the_ledger_equals_the_formula(rank, rank_v, n_sink, residual, T, dtype):
    m = tiny.model(dtype=dtype)
    cache, _ = prompt(m, spec(rank, rank_v, n_sink, residual), T)
    n, r, width = T, rank + (rank_v or rank), dtype.itemsize
    if T > 60:
        assert tiny.steps(m, cache, tiny.ids(30)).isfinite().all()
        n += 30
    exact = n_sink + residual if T > 60 else n
    for row in cache.ledger()["layers"]:
        assert row["payload"] == 2 * (n - exact) * r * width and row["residual"] == 2 * exact * 64 * width
        assert row["constants"] == (2 * 32 * r * 4 if T > 60 else 0)
        assert row["held"] == row["payload"] + row["residual"] + row["unused"] and row["columns"] == 0
        assert 0 <= row["unused"] <= 2 * (max(16, n // 16) * (r + 64) + 16 * 64) * width


def test_a_basis_is_made_from_enough_entries_and_again_from_twice_as_many():
    m, text = tiny.model(), tiny.ids(150)
    cache, full, bases, lengths = KVCache(m, spec(8, residual=10)), KVCache(m), [], []
    for t in range(150):
        for c in (cache, full):
            c.out = m(text[:, t : t + 1], c)
        s = cache.layers[0].storage
        bases.append(s.U["k"][0])
        lengths.append(s.old["k"].n[0])
        if t < 37:
            assert torch.equal(cache.out, full.out)  # held as `full` holds it
    made = [t + 1 for t in range(150) if bases[t] is not None and (t == 0 or bases[t] is not bases[t - 1])]
    assert made == [4 + 32 + 1, 74, 148]
    assert lengths == [0] * 36 + [t - 14 for t in range(37, 151)]


def test_a_second_turn_no_longer_wants_for_what_the_first_did_not_span():
    m, text, errors = tiny.model(), tiny.ids(230), []
    for learns in (False, True):
        PCA.learns = learns
        try:
            cache, full = prompt(m, spec(24, residual=16, least=30), 40)
            tiny.feed(m, cache, text[:, 40:220])
            tiny.feed(m, full, text[:, 40:220])
            errors.append(tiny.rms(tiny.steps(m, cache, text[:, 220:]), tiny.steps(m, full, text[:, 220:])))
        finally:
            PCA.learns = True
    assert errors[1] < 0.9 * errors[0], errors


def test_with_kivi_the_coordinates_are_quantised():
    m = tiny.model()
    (a, _), (b, _) = (prompt(m, f"pca(rank=12)+kivi(bits={bits},residual=32)") for bits in (2, 8))
    s = b.layers[0].storage
    assert s.old["k"]["scale"].shape[-1] == 12 and s.old["v"]["code"].shape[-1] == 12
    plain, _ = prompt(m, spec(12, n_sink=0, residual=32))
    errors = [tiny.rms(kv(c)[1], kv(plain)[1]) for c in (a, b)]  # of values; keys have a window of another length
    assert 0 < errors[1] < 0.05 * errors[0]


def test_bad_parameters_are_refused():
    for bad in ({"rank": 0}, {"rank_v": -1}, {"least": -1}):
        with pytest.raises(ValueError, match=f"pca: {next(iter(bad))} must be"):
            PCA(**bad)
    with pytest.raises(NotImplementedError, match="rank 40 is above head_dim 32"):
        KVCache(tiny.model(), "pca(rank=20,rank_v=40)")
    with pytest.raises(NotImplementedError, match="full packs nothing"):
        KVCache(tiny.model(), "pca+full")
