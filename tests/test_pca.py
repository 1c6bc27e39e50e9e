"""PCA: the basis, what a projection loses, attention among coordinates, and what is held exactly."""

import pytest
import tiny
import torch

from nanokv import KVCache, generate_batch
from nanokv.attention import reference
from nanokv.cache import Policy
from nanokv.methods.pca import PCA


class Drop(Policy):
    """Forget chosen tokens of chosen KV heads when so many tokens have been read."""

    name = "drop"

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, cache, q, pos):
        now = cache.parent.next_position + q.shape[2]
        for at, head, tokens in self.plan:
            if at == now:
                heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
                gone = torch.isin(cache.token, torch.tensor(tokens, dtype=torch.int32))
                cache.keep(~(gone & (heads == head)))


def prompt(spec, T=120, m=None, chunk=None, **kw):
    """Return model, the cache of a prompt, and the full cache of the same prompt."""
    m = m or tiny.model(**kw)
    cache, full = KVCache(m, spec), KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, tiny.ids(T), chunk)
    return m, cache, full


def kv(full, layer=0):
    """Return keys and values of each row (R, N, D), in fp64."""
    return [t.flatten(0, 1).double() for t in full.layers[layer].read()]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("rank, rank_v, n_sink", [(8, 0, 4), (20, 9, 0), (32, 32, 7)])
def test_bases_are_the_leading_eigenvectors(center, rank, rank_v, n_sink):
    """The test that turns red when means, sinks, the order or the number of eigenvectors are changed."""
    _, cache, full = prompt(f"pca(rank={rank},rank_v={rank_v},n_sink={n_sink},center={center})")
    s = cache.layers[0].storage
    for x, U, mean, r in zip(kv(full), s.bases, s.means, (rank, rank_v or rank), strict=True):
        x = x[:, n_sink:]
        assert U.shape == (2, 32, r) and mean.shape == (2, 1, 32)
        assert (U.mT @ U - torch.eye(r)).abs().max() < 1e-5
        want = x.mean(1, keepdim=True) * center
        assert torch.allclose(mean.double(), want, atol=1e-6)
        _, S, Vh = torch.linalg.svd(x - want, full_matrices=False)
        energy = ((x - want) @ U.double()).square().sum(1)  # (R, r): squared singular values, the largest first
        assert tiny.rms(energy, S[:, :r].square()) < 1e-4
        # the subspace is that of the leading singular vectors; the gap to the next is a few percent, the ridge 1e-6
        P, Q = (b @ b.mT for b in (U.double(), Vh[:, :r].mT))
        assert (P - Q).abs().max() < 1e-3


def test_what_is_lost_is_the_energy_left_out():
    losses = []
    for rank in (2, 4, 8, 16, 24, 31, 32):
        _, cache, full = prompt(f"pca(rank={rank})")
        loss = []
        for x, y in zip(kv(full), kv(cache), strict=True):
            assert torch.equal(x[:, :4], y[:, :4])
            x, y = x[:, 4:], y[:, 4:]
            S = torch.linalg.svdvals(x - x.mean(1, keepdim=True))
            loss.append(float((x - y).square().sum()))
            assert loss[-1] == pytest.approx(float(S[:, rank:].square().sum()), rel=1e-3, abs=1e-6)
        losses.append(loss)
    assert all(b < a for now, then in zip(losses[1:], losses, strict=False) for a, b in zip(then, now, strict=True))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("policy", ["", "streamingllm(budget=400)+"])
def test_full_rank_changes_nothing(center, policy):
    m, text = tiny.model(), tiny.ids(170)
    chunk = 99 if policy else None
    cache, full = KVCache(m, f"{policy}pca(rank=32,center={center})"), KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :140], chunk)
    assert cache.layers[0].storage.fitted == [True, True]
    if policy:  # keys are held un-rotated, so the basis is one of un-rotated keys
        k, _ = (t.flatten(0, 1) for t in cache.layers[0].storage.read())
        assert tiny.rms(m.rope(k[None], torch.arange(140)[None])[0], kv(full)[0]) < 1e-5
    assert tiny.rms(tiny.steps(m, cache, text[:, 140:]), tiny.steps(m, full, text[:, 140:])) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 33, None])
def test_the_prompt_is_read_exactly_and_then_projected(chunk):
    m, text = tiny.model(), tiny.ids(100)
    cache, full, whole = KVCache(m, "pca(rank=12)"), KVCache(m), KVCache(m, "pca(rank=12)")
    assert tiny.rms(tiny.feed(m, cache, text, chunk), tiny.feed(m, full, text)) < 2e-6
    tiny.feed(m, whole, text)
    s = cache.layers[0].storage
    assert s.first.n == [4, 4] and s.old.n == [96, 96] and s.new.n == [0, 0]
    for a, b in zip(cache.layers[1].read(), whole.layers[1].read(), strict=True):
        assert tiny.rms(a, b) < 1e-4  # the same subspace, but for fp32 in the keys
    new = tiny.steps(m, cache, tiny.ids(1, seed=9))
    assert tiny.rms(new, tiny.steps(m, full, tiny.ids(1, seed=9))) > 1e-3  # and the next token sees the projection


@pytest.mark.parametrize("rank, rank_v", [(16, 0), (8, 24), (32, 5)])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_attention_among_coordinates_equals_the_reference(rank, rank_v, T):
    m, cache, _ = prompt(f"pca(rank={rank},rank_v={rank_v})", G=4)
    with cache.decoding():
        m(tiny.ids(T), cache)
    c = cache.layers[1]
    q, pos = torch.randn(1, 8, T, 32), torch.arange(120, 120 + T)[None]
    calls = []
    c.read = lambda: calls.append(1)
    got = c.attend(q, pos)
    del c.read
    assert not calls  # no key or value was rebuilt
    assert tiny.rms(got, reference(q, *c.read(), c.mask(pos))) < 1e-5


@pytest.mark.parametrize("n_sink", [0, 4])
def test_the_mean_of_the_keys_counts_only_beside_exact_ones(n_sink):
    m, cache, _ = prompt(f"pca(rank=20,n_sink={n_sink})")
    c = cache.layers[1]
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[120]])
    before = c.attend(q, pos)
    c.storage.means[0] = c.storage.means[0] + torch.randn(2, 1, 32)
    after = c.attend(q, pos)
    assert tiny.rms(after, reference(q, *c.read(), c.mask(pos))) < 1e-5
    assert (tiny.rms(after, before) < 1e-5) == (n_sink == 0)


def test_scores_are_divided_by_the_root_of_head_dim():
    m, cache, full = prompt("pca(rank=32,rank_v=8)")
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[120]])
    _, cache8, _ = prompt("pca(rank=8,rank_v=8)", m=m)
    for c in (cache, cache8):
        layer = c.layers[0]
        k, v = layer.read()
        p = ((q.view(2, 3, 32) @ k[0].mT) / 32**0.5).softmax(-1)
        assert tiny.rms(layer.attend(q, pos).view(2, 3, 32), p @ v[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank, rank_v, n_sink, T", [(16, 0, 4, 120), (8, 20, 0, 51), (16, 16, 4, 20)])
def test_the_ledger_equals_the_formula(rank, rank_v, n_sink, T, dtype):
    m, cache, _ = prompt(f"pca(rank={rank},rank_v={rank_v},n_sink={n_sink})", T, dtype=dtype)
    if T > 20:
        assert tiny.steps(m, cache, tiny.ids(30)).isfinite().all()
    r, n = rank + (rank_v or rank), T + (30 if T > 20 else 0)
    exact = n_sink if T > 20 else n
    for row in cache.ledger()["layers"]:
        assert row["payload"] == 2 * (n - exact) * r * dtype.itemsize
        assert row["residual"] == 2 * exact * 64 * dtype.itemsize
        assert row["constants"] == 2 * 32 * (r + 2) * 4
        assert row["held"] == row["payload"] + row["residual"] + row["unused"] and row["columns"] == 0
        assert row["unused"] <= 2 * (max(16, n // 16) * max(r, 64 * (T == 20)) + 16 * 64 + 64) * dtype.itemsize


def test_a_short_text_is_held_exactly_until_it_can_span_a_subspace():
    m, text = tiny.model(), tiny.ids(60)
    cache, full = KVCache(m, "pca(rank=16)"), KVCache(m)
    s = []
    for t in range(60):
        for c in (cache, full):
            c.out = m(text[:, t : t + 1], c)
        s.append(list(cache.layers[0].storage.fitted))
        if t < 21:
            assert tiny.rms(cache.out, full.out) < 1e-5
    assert s == [[False] * 2] * 20 + [[True] * 2] * 40
    assert cache.layers[0].storage.old.n == [56, 56]


def test_a_second_prompt_keeps_the_basis_and_is_read_exactly():
    m, cache, _ = prompt("pca(rank=12)")
    s = cache.layers[0].storage
    before = [t.clone() for t in (*s.bases, *s.means)]
    tiny.steps(m, cache, tiny.ids(5, seed=3))
    clone = cache.clone()
    with cache.prompt(40):
        a = [m(tiny.ids(40, seed=4)[:, :25], cache)]
        assert s.old.n == [121, 121] and s.new.n == [25, 25]  # not projected before the prompt has ended
        a.append(m(tiny.ids(40, seed=4)[:, 25:], cache))
    b = tiny.feed(m, clone, tiny.ids(40, seed=4), 9)
    assert tiny.rms(b, torch.cat(a, 1)) < 1e-5 and all(
        torch.equal(x, y) for x, y in zip(before, (*s.bases, *s.means), strict=True)
    )
    assert s.old.n == [161, 161] and s.new.n == [0, 0]


@pytest.mark.parametrize("rank", [12, 32])
def test_heads_that_keep_different_tokens(rank):
    plan = [(100, 0, list(range(10, 60))), (110, 1, [5, 101, 102]), (112, 0, [111])]
    m = tiny.model()
    cache, full = KVCache(m, [Drop(plan), PCA(rank=rank)]), KVCache(m, [Drop(plan)])
    text = tiny.ids(120)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :100])
        c.out = tiny.steps(m, c, text[:, 100:])
    c = cache.layers[0]
    assert c.counts == [120 - 51, 120 - 3] and not c.equal and c.storage.old.n == [n - 4 for n in c.n_slots]
    for h in (0, 1):
        assert torch.equal(cache.live_positions(0, h), full.live_positions(0, h))
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[120]])
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-5
    if rank == 32:
        assert tiny.rms(cache.out, full.out) < 1e-4
    assert cache.ledger()["layers"][0]["payload"] == (sum(c.n_slots) - 8) * 2 * rank * 4


def test_sequences_of_a_batch_have_their_own_bases():
    m = tiny.model()
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (70, 41, 6)]
    together = list(generate_batch(m, KVCache(m, "pca(rank=12)"), prompts, 30))
    for b, p in enumerate(prompts):
        alone = list(generate_batch(m, KVCache(m, "pca(rank=12)"), [p], 30))
        assert [t for (t,) in alone] == [row[b] for row in together]


def test_it_is_saved_with_its_bases(tmp_path):
    m, cache, _ = prompt("pca(rank=12)")
    cache.save(tmp_path / "c")
    again = KVCache.load(tmp_path / "c", m)
    assert torch.equal(tiny.steps(m, cache, tiny.ids(9)), tiny.steps(m, again, tiny.ids(9)))


def test_directions_that_the_prompt_does_not_span_do_not_depend_on_rounding():
    m, text, bases = tiny.model(), tiny.ids(60, vocab=9), []  # 9 different values in layer 0, for a rank of 16
    for noise in (0.0, 1e-7):
        cache = KVCache(m, "pca(rank=16)")
        with cache.prompt(60):
            m(text[:, :59], cache)
            x = cache.layers[0].storage.new.data["x"]
            x *= 1 + noise * torch.randn(x.shape)
            m(text[:, 59:], cache)
        bases.append(cache.layers[0].storage.bases[1])
    U, V = bases
    assert not torch.equal(U, V) and (U @ U.mT - V @ V.mT).abs().max() < 1e-3


def test_streaming_rotates_after_rebuilding():
    m = tiny.model()
    cache = KVCache(m, "streamingllm(budget=60)+pca(rank=20)")
    for part in tiny.ids(130).split(10, 1):
        tiny.feed(m, cache, part)
    tiny.steps(m, cache, tiny.ids(9))
    c = cache.layers[1]
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[59]])
    assert any(c.storage.old.n)
    assert tiny.rms(c.attend(q, pos), reference(q, *c.read(), c.mask(pos))) < 1e-6


def test_bad_parameters_are_refused():
    for bad in ({"rank": 0}, {"rank_v": -1}, {"n_sink": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PCA(**bad)
    with pytest.raises(NotImplementedError, match="rank 40 is above the model's head_dim 32"):
        KVCache(tiny.model(), "pca(rank=20,rank_v=40)")
