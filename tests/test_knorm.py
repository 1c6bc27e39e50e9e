"""Key norms: the shortest keys stay, whatever the values, the queries and the positions are."""

import pytest
import tiny
import torch
from windowed import Drop, best, held, kept, read_exactly, rows, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.layer import LayerCache
from nanokv.method import Policy
from nanokv.methods.knorm import Knorm


class Norms(Policy):
    """Note {token: -norm} of each KV head at the end of a prompt, in fp64: {(layer, head, sequence): ...}."""

    def __init__(self):
        self.heads = {}

    def after_prompt(self, cache):
        for b in range(cache.B):
            for h, (tokens, k) in enumerate(rows(cache, b)):
                norms = -k.double().square().sum(-1).sqrt()
                self.heads[cache.layer, h, b] = dict(zip(tokens, norms.tolist(), strict=True))


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


def give(monkeypatch, k, v=None):
    """Make the only KV head hold these keys and values (N, D)."""
    k, v = (t[None, None] for t in (k, k if v is None else v))
    monkeypatch.setattr(LayerCache, "read", lambda cache: (k, v))


# Turns red when the longest keys are kept, or the norm is not that of the key.
def test_mutation_the_shortest_keys_stay(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    norm = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 0.5])
    k = torch.nn.functional.normalize(torch.randn(6, 32), dim=-1) * norm[:, None]
    give(monkeypatch, k, torch.randn(6, 32) / norm[:, None])
    for budget, keeps in ((1, {5}), (3, {1, 3, 5}), (4, {1, 2, 3, 5})):
        assert kept(run(m, [Knorm(budget=budget)], tiny.ids(6))) == {(0, 0): keeps}


def test_equal_norms_keep_the_older_entry(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    give(monkeypatch, torch.eye(32)[:6])
    assert kept(run(m, [Knorm(budget=4)], tiny.ids(6))) == {(0, 0): {0, 1, 2, 3}}


def test_bf16_keys_are_told_apart(monkeypatch):
    """Norms of 8 to 8.03, one bf16 step: in bf16 they would be equal, and the older entries would stay."""
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1, dtype=torch.bfloat16)
    k = torch.full((8, 32), 2**0.5, dtype=torch.bfloat16)
    for i in range(8):
        k[i, : 7 - i] *= 1.01  # the older, the longer
    assert len(set(k.norm(dim=-1).tolist())) < 3
    give(monkeypatch, k)
    assert kept(run(m, [Knorm(budget=3)], tiny.ids(8))) == {(0, 0): {5, 6, 7}}


@pytest.mark.parametrize("G", [1, 3, 4])
def test_the_kept_sets_equal_a_naive_computation(G):
    norms, m = Norms(), tiny.model(G=G)
    cache = run(m, [norms, Knorm(budget=40)], tiny.ids(150, batch=2))
    for (i, h, b), heard in norms.heads.items():
        agree(kept(cache, b)[i, h], best(heard, 40), heard)
    assert len(norms.heads) == 8


def test_with_updates_every_step_forgets_the_longest_key():
    """The keys of a first layer do not depend on what was forgotten; the newest entry competes."""
    m, text, norms = tiny.model(n_layers=1), distinct(100), Norms()
    run(m, [norms], text)
    cache = run(m, [Knorm(budget=30, decode_update=True)], text[:, :60])
    alive = [best({t: norms.heads[0, h, 0][t] for t in range(60)}, 30) for h in (0, 1)]
    for t in range(60, 100):
        tiny.steps(m, cache, text[:, t : t + 1])
        alive = [best({j: norms.heads[0, h, 0][j] for j in alive[h] | {t}}, 30) for h in (0, 1)]
        assert kept(cache) == {(0, h): alive[h] for h in (0, 1)}


def test_hidden_entries_do_not_count():
    norms, drops = Norms(), [Drop(60, 1, [3, 4, 50]), Drop(60, None, [7])]
    cache = run(tiny.model(), [*drops, norms, Knorm(budget=20)], distinct(60))
    for key, tokens in kept(cache).items():
        assert tokens == best(norms.heads[(*key, 0)], 20) and 7 not in tokens


def test_positions_do_not_matter():
    """A rotation keeps lengths: where keys are kept un-rotated and renumbered, the same entries stay."""
    m, text = tiny.model(n_layers=1), distinct(60)
    other = run(m, "streamingllm(budget=300)+knorm(budget=20)", text)
    assert other.renumbers and kept(run(m, "knorm(budget=20)", text)) == kept(other)


@pytest.mark.parametrize("T", [1, 2, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
@pytest.mark.parametrize("update", [True, False])
def test_counts_and_prompt_logits(T, budget, update):
    read_exactly(tiny.model(), f"knorm(budget={budget},decode_update={update})", budget, update, T)


def test_a_budget_that_is_never_reached_changes_no_bit():
    within_budget_is_full(tiny.model(), "knorm(budget=60,decode_update=True)", 40, 20)


@pytest.mark.parametrize("update", [True, False])
def test_layers_that_are_skipped_stay_whole(update):
    m, spec = tiny.model(n_layers=3), f"knorm(budget=20,decode_update={update}"
    cache, every = run(m, f"{spec},skip_layers=2)", tiny.ids(60)), run(m, f"{spec})", tiny.ids(60))
    assert [c.counts for c in cache.layers] == [[60, 60], [60, 60], [20, 20]]
    assert kept(cache)[2, 0] == kept(every)[2, 0]  # the prompt was read exactly
    tiny.steps(m, cache, tiny.ids(9))
    assert [c.counts for c in cache.layers] == [[69, 69], [69, 69], [20, 20] if update else [29, 29]]
    assert cache.methods[0].most(60, 9) == 69


def test_bytes_are_those_of_the_header():
    m = tiny.model(context=1024)
    for spec, whole in (("knorm(budget=320)", 0), ("knorm(budget=320,skip_layers=1)", 1)):
        cache = KVCache(m, spec)
        list(generate(m, cache, tiny.ids(600)[0], 1))
        per_slot = [2 * 32 * 4 + 4 * (i >= whole) for i in (0, 1)]  # what forgets nothing needs no token numbers
        assert held(cache) == sum(2 * (637 if i < whole else 340) * n for i, n in enumerate(per_slot))


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
