"""Key norms: the shortest keys stay, whatever the values, the queries and the positions are."""

import itertools

import pytest
import tiny
import torch
from windowed import Drop, best, kept, run

from nanokv import KVCache, generate
from nanokv.cache import LayerCache, Policy
from nanokv.methods.knorm import Knorm


class Norms(Policy):
    """Note {token: -norm} of each KV head at the end of a prompt, computed in fp64 from the cache's keys."""

    name = "norms"

    def __init__(self):
        self.heads = {}

    def __call__(self, cache, q, pos):
        if cache.phase == "last":
            k, heads = cache.read()[0].double(), cache.config.n_kv_heads
            token, live = (t.expand(cache.B, heads, -1) for t in (cache.token, cache.live))
            for b, h in itertools.product(range(cache.B), range(heads)):
                norm = -k[b, h].square().sum(-1).sqrt()
                here = live[b, h]
                pairs = zip(token[b, h, here].tolist(), norm[here].tolist(), strict=True)
                self.heads[cache.layer, h, b] = dict(pairs)


def agree(mine, theirs, norms):
    """Assert that sets are equal but for ties: a token that comes twice has, in a first layer, keys of equal norm.

    A rotation in fp32 changes a norm by about 1e-7 of its size.
    """
    assert len(mine) == len(theirs)
    tied = [norms[t] for t in mine ^ theirs]
    assert not tied or min(tied) > max(tied) * (1 + 1e-5)  # they are negative


def distinct(n, batch=1):
    """Return n ids, all different, (batch, n)."""
    rng = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(101, generator=rng)[:n] for _ in range(batch)])


# Turns red when the longest keys are kept, or the norm is not that of the key.
def test_mutation_the_shortest_keys_stay(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    norm = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 0.5])
    k = torch.nn.functional.normalize(torch.randn(6, 32), dim=-1) * norm[:, None]
    v = torch.randn(6, 32) / norm[:, None]
    monkeypatch.setattr(LayerCache, "read", lambda cache: (k[None, None], v[None, None]))
    for budget, keeps in ((1, {5}), (3, {1, 3, 5}), (4, {1, 2, 3, 5})):
        assert kept(run(m, [Knorm(budget=budget)], tiny.ids(6))) == {(0, 0): keeps}


def test_equal_norms_keep_the_older_entry(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    k = torch.eye(32)[:6]
    monkeypatch.setattr(LayerCache, "read", lambda cache: (k[None, None], k[None, None]))
    assert kept(run(m, [Knorm(budget=4)], tiny.ids(6))) == {(0, 0): {0, 1, 2, 3}}


def test_bf16_keys_are_told_apart(monkeypatch):
    """Norms of 8 to 8.03, one bf16 step: in bf16 they would be equal, and the older entries would stay."""
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1, dtype=torch.bfloat16)
    k = torch.full((8, 32), 2**0.5, dtype=torch.bfloat16)
    for i in range(8):
        k[i, : 7 - i] *= 1.01  # the older, the longer
    assert len(set(k.norm(dim=-1).tolist())) < 3
    monkeypatch.setattr(LayerCache, "read", lambda cache: (k[None, None], k[None, None]))
    assert kept(run(m, [Knorm(budget=3)], tiny.ids(8))) == {(0, 0): {5, 6, 7}}


@pytest.mark.parametrize("G", [1, 3, 4])
def test_the_kept_sets_equal_a_naive_computation(G):
    norms, m = Norms(), tiny.model(G=G)
    cache = run(m, [norms, Knorm(budget=40)], tiny.ids(150, batch=2))
    for i, h, b in norms.heads:
        agree(kept(cache, b)[i, h], best(norms.heads[i, h, b], 40), norms.heads[i, h, b])


def test_hidden_entries_and_padding_do_not_count():
    m, norms = tiny.model(), Norms()
    cache = run(m, [Drop(60, 1, [3, 4, 50]), Drop(60, None, [7]), norms, Knorm(budget=20)], distinct(60))
    for key, tokens in kept(cache).items():
        assert tokens == best(norms.heads[(*key, 0)], 20) and 7 not in tokens
    cache, text = KVCache(m, "knorm(budget=20)"), distinct(60, batch=2)
    with cache.prompt(60, pads=[0, 25]):
        m(text, cache)
    assert kept(cache, 1) == kept(run(m, "knorm(budget=20)", text[1:, 25:]))


def test_positions_do_not_matter():
    """A rotation keeps lengths: where keys are kept un-rotated and renumbered, the same entries stay."""
    m, text = tiny.model(n_layers=1), distinct(60)
    one = run(m, "knorm(budget=20)", text)
    other = KVCache(m, "streamingllm(budget=300)+knorm(budget=20)")
    tiny.feed(m, other, text)
    assert other.renumbers and kept(one) == kept(other)


@pytest.mark.parametrize("chunk", [1, 7, 33, 149])
def test_chunks_do_not_change_what_is_kept(chunk):
    m = tiny.model(vocab=151)  # no token comes twice: its keys in the first layer would be equal but for roundings
    text = torch.stack([torch.randperm(151, generator=torch.Generator().manual_seed(s))[:150] for s in (1, 2)])
    one, parts = KVCache(m, "knorm(budget=40)"), KVCache(m, "knorm(budget=40)")
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    assert kept(one) == kept(parts) and kept(one, 1) == kept(parts, 1)


@pytest.mark.parametrize("T", [1, 2, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
def test_counts_and_prompt_logits(T, budget):
    m, text = tiny.model(), tiny.ids(T)
    cache = KVCache(m, f"knorm(budget={budget})")
    assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))  # the prompt is read exactly
    before = kept(cache)
    assert all(len(t) == min(T, budget) for t in before.values())
    tiny.steps(m, cache, tiny.ids(7))
    assert kept(cache) == {key: tokens | set(range(T, T + 7)) for key, tokens in before.items()}
    tiny.feed(m, cache, tiny.ids(60))
    assert cache.layers[1].counts == [min(T + 67, budget)] * 2


def test_layers_that_are_skipped_stay_whole():
    m = tiny.model(n_layers=3)
    cache = run(m, "knorm(budget=20,skip_layers=2)", tiny.ids(60))
    assert [c.counts for c in cache.layers] == [[60, 60], [60, 60], [20, 20]]
    assert kept(cache)[2, 0] == kept(run(m, "knorm(budget=20)", tiny.ids(60)))[2, 0]  # the prompt was read exactly


def test_bytes_are_those_of_the_header():
    m = tiny.model(context=1024)
    cache = KVCache(m, "knorm(budget=320)")
    list(generate(m, cache, tiny.ids(600)[0], 1))
    assert cache.nbytes == 2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])
def test_the_kept_sets_are_those_of_kvpress(G, T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text, norms = tiny.model(G=G), tiny.ids(T), Norms()
    mine = kept(run(m, [norms, Knorm(budget=budget(T, ratio))], text))
    for key, theirs in pressed(m, kvpress.KnormPress(compression_ratio=ratio), text).items():
        agree(mine[key], theirs, norms.heads[(*key, 0)])
    text = distinct(90)  # no ties
    press = kvpress.KnormPress(compression_ratio=ratio)
    assert kept(run(m, [Knorm(budget=budget(90, ratio))], text)) == pressed(m, press, text)


@pytest.mark.parametrize("bad", [{"budget": 0}, {"skip_layers": -1}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"knorm: {next(iter(bad))} must be"):
        Knorm(**bad)
