"""One layer's cache: slots, columns, forgetting, what methods see, what recorders are told, cutting and copying."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_for_tests import Diary, MergesOldest

from nanokv import KVCache
from nanokv.entries import HIDDEN
from nanokv.method import Policy


def filled(lengths=(30,), policies="full", **options):
    """Return a cache that has read texts of these lengths, and its first layer."""
    m = tiny.model(**({"dtype": torch.float64} | options))
    cache = KVCache(m, policies)
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in lengths]
    m(torch.tensor([[-1] * (max(lengths) - len(t)) + t for t in texts]), cache)
    cache.layers[0].reads = [1] * cache.B  # as in the middle of a pass: who reads nothing forgets nothing
    return m, cache, cache.layers[0]


def live(layer):
    """Return the live tokens of each row."""
    token = layer.token.expand(layer.B, layer.config.n_kv_heads, -1).flatten(0, 1)
    return [[t for t in row if t != HIDDEN] for row in token.tolist()]


# What there is


def test_slots_are_numbered_only_when_they_must_be():
    m, cache, layer = filled()
    assert not layer.slots.data and layer.token.shape == (1, 1, 30) and layer.rank.tolist() == [[list(range(30))]]
    layer.keep(layer.token != 7)
    assert live(layer) == [[*range(7), *range(8, 30)]] * 2 and layer.counts == [29, 29] and layer.n_slots == [30, 30]
    assert layer.rank[0, 0].tolist() == [*range(7), -1, *range(7, 29)]
    tiny.steps(m, cache, tiny.ids(3))
    assert live(layer) == [[*range(7), *range(8, 33)]] * 2


def test_rows_of_unequal_length():
    _, _, layer = filled((30, 4))
    assert layer.n_slots == [30, 30, 4, 4] and layer.N == 30 and layer.n_live == 30
    assert live(layer) == [list(range(30))] * 2 + [list(range(4))] * 2
    between = layer.between(1, 2)
    assert between.sum(-1).flatten().tolist() == [27, 27, 1, 1] and bool(between[1, 0, 1])
    assert bool(layer.live[0].all()) and layer.live[1].sum(-1).tolist() == [4, 4]


def test_hidden_entries_are_unseen_at_once_and_reclaimed_later():
    m, cache, layer = filled((64,))
    layer.keep(layer.token >= 10)
    q = torch.randn(1, 6, 1, 32, dtype=torch.float64)
    p = layer.probs(q, torch.tensor([[64]]))
    assert layer.N == 64 and not p[..., :10].any() and torch.allclose(p.sum(-1), torch.ones(1, 6, 1))
    layer.keep(layer.token >= 20)
    tiny.steps(m, cache, tiny.ids(1))
    assert layer.N == 45 and layer.n_live == 45 and layer.moved == 1
    k, v = layer.read()
    assert k.shape == (1, 2, 45, 32) and k.shape == v.shape


def test_columns_follow_their_entries():
    m, cache, layer = filled((40, 25))
    layer.set_column("number", torch.arange(40).float().expand(2, 2, -1), fill=-1)
    layer.keep((layer.token % 2 == 0) | (torch.arange(2).view(1, 2, 1) == 1))
    tiny.steps(m, cache, tiny.ids(2, batch=2))
    tiny.steps(m, cache, torch.tensor([[3], [-1]]))
    number, token = layer.column("number"), layer.token
    old = [token[b] < n for b, n in ((0, 40), (1, 25))]
    for b in range(2):
        assert torch.equal(number[b][old[b]], token[b][old[b]].float())
        assert set(number[b][(token[b] != HIDDEN) & ~old[b]].tolist()) == {-1.0}
    assert layer.column("other", 5.0).unique().tolist() == [5.0]
    for name in ("number", "other", "token"):
        layer.drop_column(name)
    assert not layer.slots.data and not layer.fills


# Forgetting


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**16))
def test_keeping_the_best_is_what_sorting_would_do(seed):
    rng = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(0, n + 1, (1,), generator=rng))  # noqa: E731
    _, _, layer = filled((24, 10))
    layer.keep(torch.rand(2, 2, 24, generator=rng) < 0.8)
    before = live(layer)
    score = torch.randint(0, 5, (2, 2, 24), generator=rng).float()  # with ties
    score[0, 0, 3], score[1, 1, 2] = float("nan"), torch.inf
    goal = [pick(20) for _ in range(4)] if pick(1) else pick(20)
    first, last = pick(3), pick(3)
    layer.keep_best(score, goal, first, last)
    goals = goal if isinstance(goal, list) else [goal] * 4
    for row, n, s, got in zip(before, goals, score.flatten(0, 1).tolist(), live(layer), strict=True):
        free = row[first : len(row) - last]
        order = sorted(free, key=lambda t: (s[t] if s[t] == s[t] else -torch.inf, -t))
        gone = order[: max(0, len(row) - n)]
        assert got == [t for t in row if t not in gone]
    assert layer.counts == [len(row) for row in live(layer)]


def test_runs_are_dropped_for_each_row():
    _, _, layer = filled((24, 10))
    layer.drop_run(2, [5, 0, 100, 3])
    assert live(layer) == [[0, 1, *range(7, 24)], list(range(24)), [0, 1], [0, 1, *range(5, 10)]]


def test_sequences_that_read_nothing_keep_theirs():
    m, cache, layer = filled((24, 10))
    layer.reads = [1, 0]
    layer.keep(layer.token > 8)
    layer.keep_best(-layer.rank.float(), 3)
    assert live(layer) == [[9, 10, 11]] * 2 + [list(range(10))] * 2


# What methods see


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_what_queries_pay_is_the_dense_sum(how):
    m, cache, layer = filled((200, 90), dtype=torch.float32, G=3)
    layer.keep(layer.token % 5 != 1)
    q, pos = torch.randn(2, 6, 150, 32), torch.arange(50, 200).expand(2, -1)
    p = layer.probs(q, pos).unflatten(1, (2, 3))
    want = {"mean": p.mean(2), "max": p.amax(2), "sum": p.sum(2)}[how].sum(2)
    assert tiny.rms(layer.paid(q, pos, how), want) < 1e-6 and p.dtype is torch.float32


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_observed_queries_do_not_depend_on_parts(chunk):
    seen = []

    class Look(Policy):
        observes = 12

        def after_prompt(self, cache):
            seen.append(cache.observed(12))

    m = tiny.model(dtype=torch.float64)
    tiny.feed(m, KVCache(m, Look()), tiny.ids(40))
    cache = KVCache(m, Look())
    tiny.feed(m, cache, tiny.ids(40), chunk)
    for (q, pos), (want, at) in zip(seen[2:], seen[:2], strict=True):
        assert q.shape == (1, 6, 12, 32) and torch.equal(pos, at) and pos[0].tolist() == list(range(28, 40))
        assert tiny.rms(q, want) < 1e-12
    assert all(layer.tail is None for layer in cache.layers)  # given back once the prompt has ended


def test_observed_queries_of_a_short_prompt_beside_a_long_one():
    class Look(Policy):
        observes = 12

        def after_prompt(self, cache):
            seen.append(cache.observed(12))

    seen: list = []
    filled((30, 5), Look())
    q, pos = seen[0]
    assert pos.tolist() == [list(range(18, 30)), [-1] * 7 + list(range(5))]
    assert q.shape == (2, 6, 12, 32)


def test_merged_entries_weigh_as_their_bias_says():
    m, cache, layer = filled((20,))
    bias = torch.randn(1, 2, 20)
    layer.set_column("bias", bias)
    q, pos = torch.randn(1, 6, 1, 32, dtype=torch.float64), torch.tensor([[20]])
    k, v = layer.read()
    logits = (q.unflatten(1, (2, 3)) @ k.unsqueeze(2).mT)[:, :, :, 0] / 32**0.5 + bias[:, :, None]
    want = (logits.softmax(-1) @ v).flatten(1, 2)[:, :, None]
    assert tiny.rms(layer.attend(q, pos), want) < 1e-6
    assert tiny.rms(layer.probs(q, pos)[:, :, 0], logits.flatten(1, 2).softmax(-1)) < 1e-6


# Who watches


def test_recorders_are_told_what_happens_and_cost_nothing_else():
    m = tiny.model(dtype=torch.float64)
    cache, plain = KVCache(m, MergesOldest()), KVCache(m, MergesOldest())
    diary = cache.recorder = Diary()
    for layer in cache.layers:
        layer.recorder = diary
    got = [torch.cat([tiny.feed(m, c, tiny.ids(9), 5), tiny.steps(m, c, tiny.ids(1))], 1) for c in (cache, plain)]
    assert torch.equal(*got)
    o = lambda i, T: ("attended", i, (1, 6, T, 32))  # noqa: E731
    merged = lambda i: ("merged", i, [[[0], [0]]], [[[1], [1]]])  # noqa: E731
    part, last = [o(0, 5), o(1, 5), ("passed", "prompt")], [o(0, 4), merged(0), o(1, 4), merged(1), ("passed", "last")]
    assert diary.told == part + last + [o(0, 1), o(1, 1), ("passed", "decode")]
    assert cache.live_positions(0, 0).tolist() == list(range(1, 10))


def test_merging_overwrites_what_is_read():
    m, cache, layer = filled((9,), MergesOldest())
    full = filled((9,))[2]
    (k, v), (k0, v0) = layer.read(), full.read()
    assert layer.n_live == 8
    assert torch.allclose(k[:, :, -8], k0[:, :, :2].mean(2)) and torch.allclose(v[:, :, -8], v0[:, :, :2].mean(2))
    assert torch.equal(k[:, :, -7:], k0[:, :, -7:])


def test_writing_skips_negative_slots():
    _, _, layer = filled((9,))
    k, v = (t.clone() for t in layer.read())
    new = torch.ones(1, 2, 2, 32, dtype=torch.float64)
    layer.write(torch.tensor([[[3, -1], [-1, 5]]]), new, 2 * new)
    k[0, 0, 3], k[0, 1, 5], v[0, 0, 3], v[0, 1, 5] = 1, 1, 2, 2
    assert torch.equal(layer.read()[0], k) and torch.equal(layer.read()[1], v)


# Cutting, copying, and the whole cache


@pytest.mark.parametrize("spec", ["full", "kivi(group=16, residual=64)", "pca(rank=32, least=40)"])
def test_a_cache_cut_shorter_is_one_that_has_read_less(spec):
    m = tiny.model(dtype=torch.float64)
    cut, less = KVCache(m, spec), KVCache(m, spec)
    for cache in (cut, less):
        tiny.feed(m, cache, tiny.ids(40))
    tiny.steps(m, cut, tiny.ids(9, seed=5))
    cut.truncate(40)
    assert cut.next_position == [40] and cut.ids[0].tolist() == tiny.ids(40)[0].tolist()
    more = tiny.ids(12, seed=6)
    assert tiny.rms(tiny.steps(m, cut, more), tiny.steps(m, less, more)) < 1e-6
    cut.truncate(1000)
    assert cut.next_position == [52]


def test_cutting_is_refused_in_words():
    m = tiny.model()
    for spec, n, words in (
        ("h2o(budget=20)", 30, "only a cache that forgets nothing"),
        ("kivi(group=16, residual=16)", 10, "kivi has packed entries that would have to go"),
    ):
        cache = KVCache(m, spec)
        tiny.feed(m, cache, tiny.ids(40))
        with pytest.raises(NotImplementedError, match=words):
            cache.truncate(n)
        assert cache.next_position == [40] and tiny.steps(m, cache, tiny.ids(2)).isfinite().all()
    with pytest.raises(ValueError, match="0 tokens or more, not to -1"):
        KVCache(m).truncate(-1)


SPECS = ["full", "kivi(group=16, residual=16)", "pca(rank=16, least=20)", "snapkv(budget=16, window=4)+adakv",
         "h2o(budget=16)+kivi(group=16, residual=16)", "streamingllm(budget=20)", "xquant(group=16)",
         "cake(budget=16, window=4)", "keepkv(budget=16)"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_one_read_prefix_becomes_a_batch(spec):
    m = tiny.model(dtype=torch.float64)
    cache, one = KVCache(m, spec), KVCache(m, spec)
    for c in (cache, one):
        tiny.feed(m, c, tiny.ids(60))
        tiny.steps(m, c, tiny.ids(3))
    cache.expand(3)
    assert cache.next_position == [63] * 3 and len(cache.ids) == 3
    more = torch.stack([tiny.ids(20, seed=s)[0] for s in range(3)])
    got = tiny.steps(m, cache, more)
    for b in range(3):
        alone = one.clone()
        assert tiny.rms(got[b : b + 1], tiny.steps(m, alone, more[b : b + 1])) < 1e-6
        assert cache.live_positions(1, 1, b).tolist() == alone.live_positions(1, 1).tolist()
    with pytest.raises(ValueError, match="one sequence can be expanded to 1 or more, not 3 to 2"):
        cache.expand(2)


def test_an_interrupted_pass_is_noticed():
    m, cache, layer = filled((9,))
    layer.attend = lambda q, pos: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        m(tiny.ids(1), cache)
    del layer.attend
    with pytest.raises(RuntimeError, match="a pass was interrupted"):
        m(tiny.ids(1), cache)
    cache.reset()
    assert m(tiny.ids(4), cache).isfinite().all() and cache.next_position == [4]


def test_a_cache_that_is_gone_frees_its_memory():
    import gc
    import weakref

    m = tiny.model()
    cache = KVCache(m, "snapkv(budget=16, window=4)+adakv+pca(rank=8, least=12)")
    tiny.feed(m, cache, tiny.ids(40))
    gc.collect()
    gc.disable()
    try:
        memory = weakref.ref(cache.layers[0])
        del cache
        assert memory() is None  # no circle of references holds it
    finally:
        gc.enable()


def test_the_whole_is_the_sum_of_its_layers_and_the_tokens():
    _, cache, _ = filled((30, 4))
    ledger = cache.ledger()
    assert cache.nbytes == sum(row["held"] for row in ledger["layers"]) + cache._ids.data["id"].nbytes
    assert ledger["total"]["payload"] == 34 * 2 * 2 * 2 * 32 * 8 == ledger["total"]["full"]
    assert [t.tolist() for t in cache.ids] == [tiny.ids(n, seed=n)[0].tolist() for n in (30, 4)]
