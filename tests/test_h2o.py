"""H2O: what is added up, in which order a step goes, which entries stay, against a dense recomputation."""

import pytest
import tiny
import torch
from windowed import Drop, held, kept, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.layer import LayerCache
from nanokv.methods.h2o import H2O

CARD = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.6, 0.2, 0, 0], [0.1, 0.6, 0.1, 0.2, 0], [0.1, 0.4, 0.1, 0.1, 0.3]]


def pay(monkeypatch, *passes):
    """Let attention in these passes be these rows of probabilities."""
    rows = iter(passes)

    def paid(cache, q, pos, reduce):
        p = torch.tensor(next(rows))
        assert len(p) == q.shape[2] and p.shape[1] == cache.N  # attention comes before forgetting
        return p.sum(0)[None, None]

    monkeypatch.setattr(LayerCache, "paid", paid)


def acc(cache):
    """Return what the only KV head's live entries have received."""
    c = cache.layers[0]
    return c.column("acc")[c.live].tolist()


def test_a_small_example(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    pay(monkeypatch, CARD, CARD, [[0.5, 0.1, 0.1, 0.3]])
    cache = run(m, [H2O(budget=6, recent=2)], tiny.ids(5))
    assert acc(cache) == pytest.approx([1.9, 2.1, 0.4, 0.3, 0.3])
    cache = run(m, [H2O(budget=3, recent=2)], tiny.ids(5))
    assert kept(cache) == {(0, 0): {1, 3, 4}} and acc(cache) == pytest.approx([2.1, 0.3, 0.3])
    tiny.steps(m, cache, tiny.ids(1))
    assert kept(cache) == {(0, 0): {1, 4, 5}} and acc(cache) == pytest.approx([2.6, 0.4, 0.3])


# Turns red when only the last part of the prompt is added up: it favours entry 1, all together entry 0.
def test_mutation_all_queries_of_the_prompt_have_a_vote(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    pay(monkeypatch, [[1.0, 0], [0.9, 0.1]], [[0.2, 0.6, 0.2, 0], [0.2, 0.6, 0.1, 0.1]])
    assert kept(run(m, [H2O(budget=2, recent=1)], tiny.ids(4), chunk=2)) == {(0, 0): {0, 3}}


class Dense:
    """H2O by recomputation: one Python list of entries per layer and KV head, everything in fp64 but the model."""

    def __init__(self, m, budget, n_recent, reduce="mean"):
        self.m, self.budget, self.n_recent, self.reduce = m, budget, n_recent, reduce
        self.rows = [[[] for _ in range(m.config.n_kv_heads)] for _ in m.layers]  # of [token, k, v, acc]
        self.t = 0

    def read(self, ids):
        """Read ids (1, T), after which all but the budget goes; return logits (1, T, vocab)."""
        m, c, T = self.m, self.m.config, ids.shape[1]
        pos = torch.arange(self.t, self.t + T)[None]
        x = m.embed_tokens(ids)
        for block, rows in zip(m.layers, self.rows, strict=True):
            attn, y = block.self_attn, block.input_layernorm(x)
            q, k, v = (p(y).view(1, T, -1, c.head_dim).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = m.rope(q, pos)[0].double(), m.rope(k, pos)[0].double()
            out = torch.zeros(T, c.n_heads, c.head_dim, dtype=torch.float64)
            for h, row in enumerate(rows):
                row += [[self.t + i, k[h, i], v[0, h, i].double(), 0.0] for i in range(T)]
                K, V = (torch.stack([e[n] for e in row]) for n in (1, 2))
                for i in range(T):
                    n = len(row) - T + i + 1
                    heads = range(h * c.group, (h + 1) * c.group)
                    p = torch.stack([(K[:n] @ q[g, i] / c.head_dim**0.5).softmax(0) for g in heads])  # (G, n)
                    out[i, list(heads)] = p @ V[:n]
                    mass = {"mean": p.mean(0), "max": p.amax(0), "sum": p.sum(0)}[self.reduce]
                    for e, a in zip(row[:n], mass.tolist(), strict=True):
                        e[3] += a
                if len(row) > self.budget:
                    old, new = row[: len(row) - self.n_recent], row[len(row) - self.n_recent :]
                    heavy = sorted(old, key=lambda e: -e[3])[: self.budget - self.n_recent]  # stable: the older wins
                    row[:] = [*sorted(heavy, key=lambda e: e[0]), *new]
            x = x + attn.o_proj(out.to(x.dtype).flatten(1)[None])
            x = x + block.mlp(block.post_attention_layernorm(x))
        self.t += T
        return m.lm_head(m.norm(x))

    def kept(self):
        return {(i, h): {e[0] for e in row} for i, rows in enumerate(self.rows) for h, row in enumerate(rows)}


@pytest.mark.parametrize("G, options, dense", [
    (1, {}, (24, 12)),
    (3, {}, (24, 12)),
    (4, {"recent": 0.25, "reduce": "max"}, (24, 6, "max")),
    (3, {"recent": 20, "reduce": "sum"}, (24, 20, "sum")),
    (3, {"recent": 0}, (24, 0)),
    (3, {"budget": 500}, (500, 250)),
], ids=str)  # fmt: skip
def test_a_generation_equals_dense_recomputation(G, options, dense):
    """Prompt, 40 steps, a second prompt, more steps: logits and kept sets, after every step."""
    m = tiny.model(G=G)
    cache, oracle = KVCache(m, [H2O(**({"budget": 24} | options))]), Dense(m, *dense)
    got, want = [], []
    for turn in (0, 1):
        text = tiny.ids(50, seed=turn)
        got.append(tiny.feed(m, cache, text, 17))  # in parts, which the oracle does not know
        want.append(oracle.read(text))
        for i in range(40 if turn == 0 else 10):
            token = tiny.ids(1, seed=100 + i)
            got.append(tiny.steps(m, cache, token))
            want.append(oracle.read(token))
            assert kept(cache) == oracle.kept()
            assert all(len(t) == min(dense[0], oracle.t) for t in kept(cache).values())
    assert tiny.rms(torch.cat(got, 1), torch.cat(want, 1)) < 1e-5  # fp32 against fp64 attention, two layers


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_sums_do_not_depend_on_how_the_prompt_was_cut(reduce, chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, parts = (run(m, [H2O(budget=40, reduce=reduce)], text, chunk=c) for c in (None, chunk))
    assert kept(one) == kept(parts) and kept(one, 1) == kept(parts, 1)
    a, b = one.layers[1].column("acc"), parts.layers[1].column("acc")
    assert tiny.rms(b, a) < 1e-5  # fp32 sums of 150 probabilities in another order, of keys that differ by 1e-6


@pytest.mark.parametrize("T, chunk", [(1, 1), (2, 2), (150, 150), (150, 40)])
def test_mass_is_neither_lost_nor_made(T, chunk):
    """Every query pays 1 to each KV head, on the average over the group."""
    total = run(tiny.model(), "h2o(budget=400)", tiny.ids(T), 20, chunk).layers[1].column("acc").sum(-1)
    assert torch.allclose(total, torch.full((1, 2), T + 20.0), rtol=1e-6)  # fp32 sums of 170 numbers


def test_equal_queries_in_a_group_make_the_reduction_irrelevant():
    m = tiny.model(G=3)
    for block in m.layers:
        q = block.self_attn.q_proj.weight.data.unflatten(0, (2, 3, 32))
        q[:] = q[:, :1].clone()
    a, b, c = (kept(run(m, [H2O(budget=30, reduce=how)], tiny.ids(100), 20)) for how in ("mean", "max", "sum"))
    assert a == b == c


@pytest.mark.parametrize("T", [1, 2, 50])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    within_budget_is_full(tiny.model(), f"h2o(budget={T + 20})", T, 20)


def test_offline_nothing_happens_after_the_prompt():
    m = tiny.model()
    still, moving = (run(m, [H2O(budget=30, online=online)], tiny.ids(100)) for online in (False, True))
    before = kept(still)
    assert before == kept(moving)
    sums = still.layers[1].column("acc")
    tiny.steps(m, still, tiny.ids(25))
    assert kept(still) == {key: t | set(range(100, 125)) for key, t in before.items()}
    assert torch.equal(still.layers[1].column("acc"), torch.nn.functional.pad(sums, (0, 25)))


def test_several_tokens_in_one_step():
    m = tiny.model(n_layers=1)
    cache = run(m, "h2o(budget=30)", tiny.ids(100))
    m(tiny.ids(6), cache, "decode")
    assert all(len(t) == 30 and t >= set(range(91, 106)) for t in kept(cache).values())


def test_rows_of_unequal_length_are_cut_each_for_itself():
    m = tiny.model()
    cache = run(m, [Drop(100, 0, list(range(80))), H2O(budget=30)], tiny.ids(100))  # head 0 falls to 20, head 1 to 30
    assert cache.layers[0].counts == [20, 30]
    tiny.steps(m, cache, tiny.ids(7))
    assert cache.layers[0].counts == [27, 30]
    tiny.steps(m, cache, tiny.ids(7))
    assert cache.layers[0].counts == [30, 30]


def test_a_paused_sequence_pays_nothing_and_loses_nothing():
    m = tiny.model()
    cache = run(m, "h2o(budget=30)", tiny.ids(60, batch=2), steps=5)
    before, sums = kept(cache, 1), _sums(cache, 1)
    tiny.steps(m, cache, torch.tensor([[3, 4, 5], [-1, -1, -1]]))
    tiny.feed(m, cache, torch.stack([tiny.ids(40, seed=3)[0], torch.full((40,), -1)]))
    assert kept(cache, 1) == before and _sums(cache, 1) == sums
    assert all(t & set(range(68, 108)) for t in kept(cache, 0).values())


def _sums(cache, b):
    live = [c.live.expand(2, 2, -1)[b] for c in cache.layers]
    return [c.column("acc")[b][here].tolist() for c, here in zip(cache.layers, live, strict=True)]


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, bytes_held = tiny.model(context=1024), set()
    cache = KVCache(m, "h2o(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            bytes_held.add(held(cache))
    assert bytes_held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 8)}


def test_the_order_of_two_policies():
    """h2o first adds up what all entries got; after streamingllm it sees only what that left."""
    sliding = "streamingllm(budget=40,reindex=False)"
    first, second = (run(tiny.model(), spec, tiny.ids(100)) for spec in (f"h2o(budget=30)+{sliding}",
                                                                        f"{sliding}+h2o(budget=30)"))  # fmt: skip
    sinks_and_window = {0, 1, 2, 3, *range(64, 100)}
    assert all(t <= sinks_and_window for t in kept(second).values())
    assert any(not t <= sinks_and_window for t in kept(first).values())


@pytest.mark.parametrize("other, bound", [
    ("kivi(bits=8,residual=32)", 40), ("streamingllm(budget=30)", 30), ("streamingllm(budget=50,reindex=False)", 40),
])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_beside_other_methods_the_smaller_bound_holds_at_every_step(other, bound, first):
    m = tiny.model()
    cache = run(m, f"h2o(budget=40)+{other}" if first else f"{other}+h2o(budget=40)", tiny.ids(100))
    for t in range(100):
        logits = tiny.steps(m, cache, tiny.ids(1, seed=t))
        assert [c.counts for c in cache.layers] == [[bound] * 2] * 2 and logits.isfinite().all()


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"budget": -3}, {"recent": -0.5}, {"recent": -3}, {"recent": 2.5}, {"recent": float("inf")},
    {"reduce": "median"},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"h2o: {next(iter(bad))} must be"):
        H2O(**bad)


def test_recent_is_a_share_or_a_number():
    assert H2O(budget=5, recent=1.0).n_recent == 1 and H2O(budget=5, recent=0.5).n_recent == 2
    assert H2O(budget=12, recent=12).n_recent == 12
    with pytest.raises(ValueError, match="h2o: budget must be at least 12, the recent entries, got 10"):
        H2O(budget=10, recent=12)
