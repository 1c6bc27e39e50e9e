"""H2O: what is added up, in which order a step goes, which entries stay, against a dense recomputation."""

import pytest
import tiny
import torch
from windowed import Drop, kept

from nanokv import KVCache, generate
from nanokv.cache import Policy
from nanokv.methods.full import Full
from nanokv.methods.h2o import H2O


class Acc(Policy):
    """Note the accumulated mass of one head's live entries at every call."""

    name = "acc"

    def __init__(self):
        self.seen = []

    def __call__(self, cache, q, pos):
        live = cache.live.expand(1, cache.config.n_kv_heads, -1)
        self.seen.append(cache.column("acc")[live].tolist())


CARD = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.6, 0.2, 0, 0], [0.1, 0.6, 0.1, 0.2, 0], [0.1, 0.4, 0.1, 0.1, 0.3]]


def pay(monkeypatch, *passes):
    """Let attention in a prompt's passes be these rows of probabilities."""
    rows = iter(passes)
    monkeypatch.setattr(
        Full,
        "attend_and_sum",
        lambda storage, q, pos, how: (torch.zeros_like(q), torch.tensor(next(rows)).sum(0)[None, None]),
    )


def test_a_small_example(monkeypatch):
    m, acc = tiny.model(G=1, n_kv_heads=1, n_layers=1), Acc()
    pay(monkeypatch, CARD, CARD)
    cache = KVCache(m, [H2O(budget=6, recent=2), acc])
    tiny.feed(m, cache, tiny.ids(5))
    assert acc.seen[-1] == pytest.approx([1.9, 2.1, 0.4, 0.3, 0.3])

    cache = KVCache(m, [H2O(budget=3, recent=2), acc])
    tiny.feed(m, cache, tiny.ids(5))
    assert kept(cache) == {(0, 0): {1, 3, 4}} and acc.seen[-1] == pytest.approx([2.1, 0.3, 0.3])

    def attend_probs(storage, q, pos):
        assert storage.cache.counts == [4]  # attention comes before forgetting
        p = torch.tensor([0.5, 0.1, 0.1, 0.3]).view(1, 1, 1, 4)
        return torch.zeros_like(q), p

    monkeypatch.setattr(Full, "attend_probs", attend_probs)
    tiny.steps(m, cache, tiny.ids(1))
    assert kept(cache) == {(0, 0): {1, 4, 5}} and acc.seen[-1] == pytest.approx([2.6, 0.4, 0.3])


# Turns red when only the last part of the prompt is added up: it favours entry 1, all together entry 0.
def test_mutation_all_queries_of_the_prompt_have_a_vote(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    pay(monkeypatch, [[1.0, 0], [0.9, 0.1]], [[0.2, 0.6, 0.2, 0], [0.2, 0.6, 0.1, 0.1]])
    cache = KVCache(m, [H2O(budget=2, recent=1)])
    tiny.feed(m, cache, tiny.ids(4), chunk=2)
    assert kept(cache) == {(0, 0): {0, 3}}


class Dense:
    """H2O by recomputation: one Python list of entries per layer and KV head, everything in fp64 but the model."""

    def __init__(self, m, budget, n_recent, reduce="mean", normalize=False, n_sink=0):
        self.m, self.budget, self.n_recent, self.reduce = m, budget, n_recent, reduce
        self.normalize, self.n_sink = normalize, n_sink
        self.rows = [[[] for _ in range(m.config.n_kv_heads)] for _ in m.layers]  # of [token, k, v, acc, queries]
        self.t = 0

    def read(self, ids):
        """Read ids (1, T), after which all but the budget goes; return logits (1, T, vocab)."""
        m, c, T = self.m, self.m.config, ids.shape[1]
        pos = torch.arange(self.t, self.t + T)[None]
        x = m.embed(ids)
        for block, rows in zip(m.layers, self.rows, strict=True):
            y = block.attn.qkv(block.attn_norm(x)).split(block.attn.widths, -1)
            q, k, v = (z.view(1, T, -1, c.head_dim).transpose(1, 2) for z in y)
            q, k = m.rope(q, pos)[0].double(), m.rope(k, pos)[0].double()
            out = torch.zeros(T, c.n_heads, c.head_dim, dtype=torch.float64)
            for h, row in enumerate(rows):
                row += [[self.t + i, k[h, i], v[0, h, i].double(), 0.0, 0] for i in range(T)]
                K, V = (torch.stack([e[n] for e in row]) for n in (1, 2))
                for i in range(T):
                    n = len(row) - T + i + 1
                    heads = range(h * c.group, (h + 1) * c.group)
                    p = torch.stack([(K[:n] @ q[g, i] / c.head_dim**0.5).softmax(0) for g in heads])  # (G, n)
                    out[i, list(heads)] = p @ V[:n]
                    mass = {"mean": p.mean(0), "max": p.amax(0), "sum": p.sum(0)}[self.reduce]
                    for e, a in zip(row[:n], mass.tolist(), strict=True):
                        e[3] += a
                        e[4] += 1
                self._cut(row)
            x = x + block.attn.o(out.to(x.dtype).flatten(1)[None])
            x = x + block.ffn(block.ffn_norm(x))
        self.t += T
        return m.head(m.norm(x))

    def _cut(self, row):
        if len(row) > self.budget:
            middle = row[self.n_sink : len(row) - self.n_recent]
            middle.sort(key=lambda e: -e[3] / (e[4] if self.normalize else 1))  # stable: the older wins
            chosen = middle[: self.budget - self.n_recent - self.n_sink]
            row[:] = [*row[: self.n_sink], *sorted(chosen, key=lambda e: e[0]), *row[len(row) - self.n_recent :]]

    def kept(self):
        return {(i, h): {e[0] for e in row} for i, rows in enumerate(self.rows) for h, row in enumerate(rows)}


@pytest.mark.parametrize("G, options, dense", [
    (1, {}, (24, 12)),
    (3, {}, (24, 12)),
    (4, {"recent": 0.25, "reduce": "max"}, (24, 6, "max")),
    (3, {"recent": 20, "reduce": "sum"}, (24, 20, "sum")),
    (3, {"normalize": True}, (24, 12, "mean", True, 4)),
    (3, {"normalize": True, "n_sink": 0, "recent": 0}, (24, 0, "mean", True, 0)),
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
            assert all(len(t) == min(dense[0], cache.next_position) for t in kept(cache).values())
    assert tiny.rms(torch.cat(got, 1), torch.cat(want, 1)) < 1e-5  # fp32 against fp64 attention, two layers


@pytest.mark.parametrize("options", [{}, {"reduce": "max"}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_chunks_do_not_change_what_is_kept(options, chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, parts = (KVCache(m, [H2O(budget=40, **options)]) for _ in range(2))
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    for b in (0, 1):
        assert kept(one, b) == kept(parts, b)
    a, b = one.layers[1].column("acc"), parts.layers[1].column("acc")
    assert tiny.rms(b, a) < 1e-5  # fp32 sums of 150 probabilities in another order, of keys that differ by 1e-6


def test_mass_is_neither_lost_nor_made():
    """Every query pays 1 to each KV head, on the average over the group."""
    m = tiny.model()
    for T, chunk in ((1, 1), (2, 2), (150, 150), (150, 40)):
        cache = KVCache(m, "h2o(budget=400)")
        tiny.feed(m, cache, tiny.ids(T), chunk)
        tiny.steps(m, cache, tiny.ids(20))
        total = cache.layers[1].column("acc").sum(-1)
        assert torch.allclose(total, torch.full((1, 2), T + 20.0), rtol=1e-6)  # fp32 sums of 170 numbers


def test_equal_queries_in_a_group_make_the_reduction_irrelevant():
    m = tiny.model(G=3)
    for block in m.layers:
        q = block.attn.qkv.weight.data[: 6 * 32].unflatten(0, (2, 3, 32))
        q[:] = q[:, :1].clone()
    found = []
    for reduce in ("mean", "max", "sum"):
        cache = KVCache(m, [H2O(budget=30, reduce=reduce)])
        tiny.feed(m, cache, tiny.ids(100))
        tiny.steps(m, cache, tiny.ids(20))
        found.append(kept(cache))
    assert found[0] == found[1] == found[2]


def test_sinks_and_recent_entries_are_always_there():
    m = tiny.model()
    cache = KVCache(m, [H2O(budget=12, recent=0.5, normalize=True, n_sink=3)])
    tiny.feed(m, cache, tiny.ids(50))
    for t in range(50, 90):
        must = {0, 1, 2, *range(t - 6, t)}
        assert all(tokens >= must and len(tokens) == 12 for tokens in kept(cache).values())
        tiny.steps(m, cache, tiny.ids(1, seed=t))


@pytest.mark.parametrize("T", [1, 2, 50])
def test_a_budget_that_is_never_reached_changes_nothing(T):
    m, text = tiny.model(), tiny.ids(T + 20)
    full, cache = KVCache(m), KVCache(m, f"h2o(budget={T + 20})")
    a, b = (torch.cat([tiny.feed(m, c, text[:, :T]), tiny.steps(m, c, text[:, T:])], 1) for c in (full, cache))
    assert tiny.rms(b, a) < 2e-6  # fp32; where attention is added up it takes another path through softmax


def test_without_updates_nothing_happens_after_the_prompt():
    m = tiny.model()
    still, moving = KVCache(m, [H2O(budget=30, decode_update=False)]), KVCache(m, [H2O(budget=30)])
    for c in (still, moving):
        tiny.feed(m, c, tiny.ids(100))
    assert kept(still) == kept(moving)
    before = kept(still)
    tiny.steps(m, still, tiny.ids(25))
    assert kept(still) == {key: t | set(range(100, 125)) for key, t in before.items()}
    assert not still.needs_probs and still.layers[0].step_probs is None


def test_several_tokens_in_one_step():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, "h2o(budget=30)")
    tiny.feed(m, cache, tiny.ids(100))
    with cache.decoding():
        m(tiny.ids(6), cache)
    assert all(len(t) == 30 and t >= set(range(91, 106)) for t in kept(cache).values())


def test_batches_and_ragged_rows():
    m, text = tiny.model(), tiny.ids(100, batch=3)
    cache = KVCache(m, "h2o(budget=30)")
    tiny.feed(m, cache, text)
    tiny.steps(m, cache, text[:, :20])
    for b in range(3):
        alone = KVCache(m, "h2o(budget=30)")
        tiny.feed(m, alone, text[b : b + 1])
        tiny.steps(m, alone, text[b : b + 1, :20])
        assert kept(cache, b) == kept(alone)
    cache = KVCache(m, [Drop(100, 0, list(range(80))), H2O(budget=30)])  # head 0 falls to 20 entries, head 1 to 30
    tiny.feed(m, cache, text[:1])
    assert cache.layers[0].counts == [20, 30]
    tiny.steps(m, cache, tiny.ids(7))
    assert cache.layers[0].counts == [27, 30]


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, held = tiny.model(context=1024), set()
    cache = KVCache(m, "h2o(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            held.add(cache.nbytes)
    S = 320 + 20
    assert held == {2 * S * 2 * (2 * 32 * 4 + 8)}


@pytest.mark.parametrize("spec, bound", [
    ("h2o(budget=40)+kivi(bits=8,residual=32)", 40),
    ("h2o(budget=40)+streamingllm(budget=30)", 30),
    ("streamingllm(budget=30)+h2o(budget=40)", 30),
    ("h2o(budget=30)+streamingllm(budget=40,reindex=False)", 30),
    ("streamingllm(budget=40,reindex=False)+h2o(budget=30)", 30),
])  # fmt: skip
def test_long_texts_with_other_methods(spec, bound):
    m = tiny.model()
    cache = KVCache(m, spec)
    tiny.feed(m, cache, tiny.ids(100), min(100, cache.chunk or 100))
    for t in range(300):
        logits = tiny.steps(m, cache, tiny.ids(1, seed=t))
        assert all(n <= bound for c in cache.layers for n in c.counts)
    assert logits.isfinite().all() and cache.layers[0].counts == [bound] * 2


def test_the_order_of_two_policies():
    """h2o first adds up what all entries got; after streamingllm it sees only what that left."""
    m, text = tiny.model(), tiny.ids(100)
    first, second = (KVCache(m, spec) for spec in ("h2o(budget=30)+streamingllm(budget=40,reindex=False)",
                                                   "streamingllm(budget=40,reindex=False)+h2o(budget=30)"))  # fmt: skip
    for c in (first, second):
        tiny.feed(m, c, text)
    sinks_and_window = {0, 1, 2, 3, *range(64, 100)}
    assert all(t <= sinks_and_window for t in kept(second).values())
    assert any(not t <= sinks_and_window for t in kept(first).values())


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"budget": -3}, {"recent": -0.5}, {"recent": 2.5}, {"n_sink": -1}, {"reduce": "median"},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"h2o: {next(iter(bad))} must be"):
        H2O(**bad)


def test_budgets_too_small_for_what_must_stay():
    with pytest.raises(ValueError, match="budget must be at least 12"):
        H2O(budget=10, recent=12)
    with pytest.raises(ValueError, match="budget must be at least 9"):
        H2O(budget=8, recent=5, normalize=True)
    assert H2O(budget=5, recent=1.0).n_recent == 1 and H2O(budget=5, recent=0.5).n_recent == 2
