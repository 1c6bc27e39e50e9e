"""Ada-KV: how a layer's budget is shared out, what is safe, and that ragged rows are stored as such."""

import itertools

import pytest
import tiny
import torch
from windowed import Drop, Spy, best, give_scores, kept, run

from nanokv import KVCache, generate
from nanokv.methods.adakv import AdaKV
from nanokv.methods.snapkv import SnapKV


def uneven(**config):
    """Return a tiny model whose KV heads differ in how sharply they are attended to."""
    m = tiny.model(**config)
    c = m.config
    for block in m.layers:
        q = block.attn.qkv.weight.data[: c.n_heads * c.head_dim].unflatten(0, (c.n_kv_heads, -1))
        q *= torch.linspace(0.3, 1.5, c.n_kv_heads)[:, None, None]
    return m


H0, H1 = [0.30, 0.25, 0.25, 0.20], [0.90, 0.05, 0.03, 0.02]


@pytest.mark.parametrize("variant, alpha, first, second", [
    ("guard", 0.0, {0, 1, 2}, {0}),
    ("guard", 0.5, {0, 1, 2}, {0}),  # the two safe entries are the heads' best, the last two slots go to .25 and .25
    ("guard", 1.0, {0, 1}, {0, 1}),
    ("mix", 0.0, {0, 1, 2}, {0}),
    ("mix", 0.5, {0, 1}, {0, 1}),  # 2.5 and 1.5 are to be rounded
    ("mix", 1.0, {0, 1}, {0, 1}),
    ("kvpress", 0.5, {0, 1, 2}, {0}),  # the window is the one safe entry
    ("kvpress", 1.0, {0, 1}, {0, 1}),
])  # fmt: skip
def test_a_small_example(monkeypatch, variant, alpha, first, second):
    m = tiny.model(G=1, n_kv_heads=2, n_layers=1)
    give_scores(monkeypatch, [H0, H1])
    cache = run(m, [AdaKV(budget=3, window=1, alpha=alpha, kernel=1, variant=variant)], tiny.ids(5))
    assert kept(cache) == {(0, 0): first | {4}, (0, 1): second | {4}}


# Turns red without the safe entries of each head, with other numbers of them, or with those of "kvpress".
def test_mutation_the_worst_head_keeps_its_safe_entries(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=2, n_layers=1)
    give_scores(monkeypatch, [[0.1] * 20, [0.01] * 9 + [0.02, 0.03] + [0.01] * 9])
    counts = {}
    for variant, alpha in itertools.product(("guard", "mix", "kvpress"), (0.0, 0.2, 0.5)):
        cache = run(m, [AdaKV(budget=12, window=2, alpha=alpha, kernel=1, variant=variant)], tiny.ids(22))
        counts[variant, alpha] = [len(t) - 2 for t in kept(cache).values()]
        assert kept(cache)[0, 1] >= (set(), {10}, {9, 10})[min(2, counts[variant, alpha][1])]
    assert counts == {
        ("guard", 0.0): [20, 0], ("guard", 0.2): [18, 2], ("guard", 0.5): [15, 5],
        ("mix", 0.0): [20, 0], ("mix", 0.2): [18, 2], ("mix", 0.5): [15, 5],
        ("kvpress", 0.0): [20, 0], ("kvpress", 0.2): [20, 0], ("kvpress", 0.5): [16, 4],
    }  # fmt: skip


def shared_out(heads, b, window, alpha, variant):
    """Share b entries per head out by the card's words: heads is a list of {token: score}; return lists of tokens."""
    total = b * len(heads)
    flat = {(t, h): s for h, head in enumerate(heads) for t, s in head.items()}
    if variant == "mix":
        free = [sum(h == x for _, x in best(flat, total)) for h in range(len(heads))]
        want = [(1 - alpha) * c + int(alpha * b) for c in free]
        caps = [int(w) for w in want]
        while sum(caps) < total:  # largest remainders first; then, as floor(alpha * b) may leave more, again
            rest = {}  # (next entry of the head, head): remainder, so that equal ones go to the older entry
            for h, head in enumerate(heads):
                if left := sorted(head, key=lambda t, head=head: (-head[t], t))[caps[h] :]:
                    rest[left[0], h] = want[h] - caps[h]
            caps[best(rest, 1).pop()[1]] += 1
        return [best(head, c) for head, c in zip(heads, caps, strict=True)]
    g = int(alpha * b) if variant == "guard" else max(0, int(alpha * (b + window)) - window)
    safe = [best(head, g) for head in heads]
    others = {(t, h): s for (t, h), s in flat.items() if t not in safe[h]}
    extra = best(others, total - sum(map(len, safe)))
    return [safe[h] | {t for t, x in extra if x == h} for h in range(len(heads))]


@pytest.mark.parametrize("G, Hkv", [(1, 4), (3, 2), (4, 3)])
@pytest.mark.parametrize("variant", ["guard", "mix", "kvpress"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.37, 0.8])
def test_the_kept_sets_equal_a_naive_computation(G, Hkv, variant, alpha):
    m = uneven(G=G, n_kv_heads=Hkv)
    spy, ada = Spy(8, 5), AdaKV(budget=40, window=8, alpha=alpha, kernel=5, variant=variant)
    cache = run(m, [spy, ada], tiny.ids(150))
    for i in (0, 1):
        heads, new = zip(*spy.heads[i].values(), strict=True)
        want = shared_out(heads, 32, 8, alpha, variant)
        assert [kept(cache)[i, h] for h in range(Hkv)] == [w | n for w, n in zip(want, new, strict=True)]
        counts = cache.layers[i].counts
        assert sum(counts) == 40 * Hkv and max(counts) <= 150
        g = max(0, int(alpha * 40) - 8) if variant == "kvpress" else int(alpha * 32)
        assert min(counts) >= 8 + g and max(counts) <= Hkv * 40 - (Hkv - 1) * (8 + g)
        assert len(set(counts)) > 1  # otherwise this test shows nothing


@pytest.mark.parametrize("T", [1, 2, 8, 9, 40, 41, 42, 90])
@pytest.mark.parametrize("variant", ["guard", "mix", "kvpress"])
def test_the_sum_is_exact(T, variant):
    m = tiny.model(G=1, n_kv_heads=3)
    text = tiny.ids(T)
    for budget, window, alpha in itertools.product((1, 7, 40), (1, 8), (0.0, 0.13, 0.5)):
        cache = KVCache(m, [AdaKV(budget=budget, window=window, alpha=alpha, variant=variant)])
        logits = tiny.feed(m, cache, text)
        for c in cache.layers:
            assert sum(c.counts) == 3 * min(T, budget)
        assert all(t >= set(range(max(0, T - min(window, budget)), T)) for t in kept(cache).values())
    assert torch.equal(logits, m(text, KVCache(m)))  # the prompt is read exactly


@pytest.mark.parametrize("variant", ["guard", "mix", "kvpress"])
def test_all_safe_is_snapkv(variant):
    m, text = tiny.model(), tiny.ids(150)
    snap = run(m, [SnapKV(budget=40, window=8)], text)
    assert kept(run(m, [AdaKV(budget=40, window=8, alpha=1.0, variant=variant)], text)) == kept(snap)


def test_a_free_allocation_keeps_the_most_mass():
    for seed in range(5):
        m, text, spy = uneven(seed=seed, G=2, n_kv_heads=3), tiny.ids(150, seed=seed), Spy(8)
        even = kept(run(m, [spy, SnapKV(budget=30, window=8)], text))
        free = kept(run(m, [AdaKV(budget=30, window=8, alpha=0.0)], text))
        for i in (0, 1):
            mass = [sum(s for h in range(3) for t, s in spy.heads[i][0, h][0].items() if t in sets[i, h])
                    for sets in (free, even)]  # fmt: skip
            assert mass[0] > mass[1]


def test_equal_heads_get_equal_shares(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=3, n_layers=1)
    give_scores(monkeypatch, [torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist()] * 3)
    for variant, kernel in itertools.product(("guard", "mix", "kvpress"), (1, 7)):  # 7: whole runs of equal scores
        cache = run(m, [AdaKV(budget=20, window=4, variant=variant, kernel=kernel)], tiny.ids(44))
        assert cache.layers[0].counts == [20, 20, 20]


@pytest.mark.parametrize("T", [1, 2, 33, 100])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    m, text = tiny.model(), tiny.ids(T + 5)
    full, cache = KVCache(m), KVCache(m, f"adakv(budget={T})")
    for c in (full, cache):
        c.out = torch.cat([tiny.feed(m, c, text[:, :T]), tiny.steps(m, c, text[:, T:])], 1)
    assert torch.equal(full.out, cache.out)


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_chunks_and_batches_do_not_change_what_is_kept(chunk):
    m, text = uneven(), tiny.ids(150, batch=2)
    one = run(m, "adakv(budget=40)", text)
    parts = KVCache(m, "adakv(budget=40)")
    tiny.feed(m, parts, text, chunk)
    alone = [run(m, "adakv(budget=40)", row[None]) for row in text]
    for b in (0, 1):
        assert kept(one, b) == kept(parts, b) == kept(alone[b])


@pytest.mark.parametrize("variant", ["guard", "mix"])
def test_a_second_prompt_shares_ragged_rows_out_again(variant):
    m, spy, ada = uneven(), Spy(8, 5), AdaKV(budget=30, window=8, kernel=5, variant=variant)
    cache = KVCache(m, [spy, Drop(112, 0, [99, 100, 101]), ada])
    tiny.feed(m, cache, tiny.ids(100))
    tiny.steps(m, cache, tiny.ids(15, seed=2))  # three entries of one head are hidden on the way
    assert not cache.layers[0].equal or not cache.layers[1].equal
    tiny.feed(m, cache, tiny.ids(20, seed=3))
    for i in (0, 1):
        heads, new = zip(*spy.heads[i].values(), strict=True)
        want = shared_out(heads, 22, 8, 0.2, variant)
        assert [kept(cache)[i, h] for h in (0, 1)] == [w | n for w, n in zip(want, new, strict=True)]
        assert sum(cache.layers[i].counts) == 60


def test_rows_are_stored_ragged():
    m = uneven(context=1024, n_kv_heads=3, G=1)
    cache = run(m, "adakv(budget=300,alpha=0.1)", tiny.ids(700))
    want = 0
    for c in cache.layers:
        assert len(set(c.counts)) > 1 and sum(c.counts) == 900
        want += sum((n + max(16, n // 16)) * (2 * 32 * 4 + 4) for n in c.counts)
    assert cache.nbytes == want
    assert cache.ledger()["total"]["payload"] == 2 * 900 * 2 * 32 * 4


def test_with_kivi_the_same_entries_stay_and_text_goes_on():
    m = uneven()
    alone, cache = (KVCache(m, f"adakv(budget=60){more}") for more in ("", "+kivi(bits=8,residual=32)"))
    a, b = (list(generate(m, c, tiny.ids(100)[0], 2)) for c in (alone, cache))
    assert a[0] == b[0]  # the first token sees the exact prompt
    strip = [{key: {t for t in tokens if t < 100} for key, tokens in kept(c).items()} for c in (alone, cache)]
    assert strip[0] == strip[1]
    start = [c.counts for c in cache.layers]
    for n in range(1, 301):
        logits = tiny.steps(m, cache, tiny.ids(1, seed=n))
        assert [c.counts for c in cache.layers] == [[x + n for x in row] for row in start]
    assert logits.isfinite().all()


@pytest.mark.parametrize("bad", [
    {"budget": 0}, {"window": 0}, {"alpha": -0.1}, {"alpha": 1.1}, {"kernel": 2}, {"pooling": "min"},
    {"reduce": "median"}, {"variant": "even"},
], ids=str)  # fmt: skip
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"adakv: {next(iter(bad))} must be"):
        AdaKV(**bad)
