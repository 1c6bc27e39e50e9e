"""KeyDiff: the cosine with the mean direction, what is cut when, and the authors' loop over blocks."""

import pytest
import tiny
import torch
from windowed import Drop, best, held, kept, read_exactly, rows, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.layer import LayerCache
from nanokv.method import Policy
from nanokv.methods.keydiff import KeyDiff


class Blocks(KeyDiff):
    """The authors' twin: a prompt is read in blocks, each followed by a cut."""

    def __init__(self, budget, block):
        super().__init__(budget)
        self.chunk = block

    def after_part(self, cache, q, pos):
        if cache.phase == "prompt":
            self.after_prompt(cache)


class Look(Policy):
    """Note what each KV head holds at the end of a prompt: {(layer, head, sequence): (tokens, keys)}."""

    def __init__(self):
        self.heads = {}

    def after_prompt(self, cache):
        for b in range(cache.B):
            self.heads |= {(cache.layer, h, b): held for h, held in enumerate(rows(cache, b))}


def scores(tokens, k):
    """Return {token: minus the cosine of its key with the mean of unit keys}, of keys k (n, D), in fp64."""
    units = [x / float(x.square().sum()) ** 0.5 for x in k.double()]
    mean = sum(units) / len(units)
    size = float(mean.square().sum()) ** 0.5
    return {t: -float((u * mean).sum()) / size for t, u in zip(tokens, units, strict=True)}


def give(monkeypatch, keys):
    """Make the only KV head hold these keys, filled up with zeros."""
    k = torch.nn.functional.pad(torch.tensor(keys), (0, 32 - len(keys[0])))[None, None]
    monkeypatch.setattr(LayerCache, "read", lambda cache: (k, k))


@pytest.fixture
def one():
    return tiny.model(G=1, n_kv_heads=1, n_layers=1)


@pytest.mark.parametrize("budget, keeps", [(1, {2}), (2, {0, 2}), (3, {0, 2, 3})])
def test_a_small_example(monkeypatch, one, budget, keeps):
    """The anchor is (.747, .302), and cosines with it are .927, .963, .375 and .960."""
    give(monkeypatch, [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.1]])
    assert kept(run(one, [KeyDiff(budget=budget)], tiny.ids(4))) == {(0, 0): keeps}


# Turns red when the mean is of the keys and not of unit keys, or when dot products stand for cosines.
def test_mutation_long_keys_count_no_more_than_short_ones(monkeypatch, one):
    keys = torch.randn(9, 32, generator=torch.Generator().manual_seed(2)) + 1
    give(monkeypatch, keys.tolist())
    want = kept(run(one, [KeyDiff(budget=4)], tiny.ids(9)))
    assert want == {(0, 0): best(scores(range(9), keys), 4)}
    for i in range(9):
        longer = keys.clone()
        longer[i] *= 50
        give(monkeypatch, longer.tolist())
        assert kept(run(one, [KeyDiff(budget=4)], tiny.ids(9))) == want


def test_equal_keys_keep_the_older_entry(monkeypatch, one):
    give(monkeypatch, [[1.0, 0.0]] * 6)
    assert kept(run(one, [KeyDiff(budget=4)], tiny.ids(6))) == {(0, 0): {0, 1, 2, 3}}


def test_the_kept_sets_equal_a_naive_computation():
    look = Look()
    cache = run(tiny.model(), [look, KeyDiff(budget=40)], tiny.ids(150, batch=2))
    for (i, h, b), heard in look.heads.items():
        assert kept(cache, b)[i, h] == best(scores(*heard), 40)
    assert len(look.heads) == 8


def test_every_step_equals_a_naive_computation():
    """The keys of a first layer do not depend on what was forgotten; the mean is taken anew at every step."""
    m, text, look = tiny.model(n_layers=1), tiny.ids(130), Look()
    run(m, [look], text)
    cache, alive = run(m, [KeyDiff(budget=30)], text[:, :70]), {h: set(range(70)) for h in (0, 1)}
    for t in range(69, 130):
        if t >= 70:
            tiny.steps(m, cache, text[:, t : t + 1])
        for h in (0, 1):
            tokens = sorted(alive[h] | {t})
            s = scores(tokens, look.heads[0, h, 0][1][tokens])
            new = {t} if t >= 70 else set()  # the newest entry of a step stays
            alive[h] = new | best({j: x for j, x in s.items() if j not in new}, 30 - len(new))
        assert kept(cache) == {(0, h): alive[h] for h in (0, 1)}


@pytest.mark.parametrize("block", [1, 13, 30, 100, 140])
def test_the_authors_blocks_equal_a_naive_computation(block):
    m, text, look = tiny.model(n_layers=1), tiny.ids(140), Look()
    run(m, [look], text)
    cache, alive = KVCache(m, [Blocks(30, block)]), {0: [], 1: []}
    for at in range(0, 140, block):
        m(text[:, at : at + block], cache, "prompt" if at + block < 140 else "last")
        for h in (0, 1):
            tokens = [*alive[h], *range(at, min(140, at + block))]
            alive[h] = sorted(best(scores(tokens, look.heads[0, h, 0][1][tokens]), 30))
        assert kept(cache) == {(0, h): set(alive[h]) for h in (0, 1)}
    if block == 140:
        assert kept(cache) == kept(run(m, "keydiff(budget=30)", text))


def test_hidden_entries_have_no_part_in_the_mean():
    look, drops = Look(), [Drop(60, 1, [3, 4, 50]), Drop(60, None, [7, 8, 9])]
    cache = run(tiny.model(), [*drops, look, KeyDiff(budget=20)], tiny.ids(60))
    for key, tokens in kept(cache).items():
        assert tokens == best(scores(*look.heads[(*key, 0)]), 20) and not tokens & {7, 8, 9}


@pytest.mark.parametrize("n", [6, 20, 35])
def test_several_tokens_in_one_step(n):
    cache = run(tiny.model(n_layers=1), "keydiff(budget=20)", tiny.ids(60))
    cache.model(tiny.ids(n), cache, "decode")
    assert all(len(t) == 20 and t >= set(range(60 + n - min(n, 20), 60 + n)) for t in kept(cache).values())


def test_under_a_plan_each_head_stays_at_its_number():
    m = tiny.model()
    for block in m.layers:
        q = block.self_attn.k_proj.weight.data.unflatten(0, (2, -1))
        q += torch.tensor([0.0, 0.5])[:, None, None]  # the second head's keys point the same way
    cache = run(m, "keydiff(budget=30)+adakv", tiny.ids(100))
    counts = [c.counts for c in cache.layers]
    assert all(sum(n) == 60 for n in counts) and any(n[0] != n[1] for n in counts)
    tiny.steps(m, cache, tiny.ids(20, seed=2))
    assert [c.counts for c in cache.layers] == counts


@pytest.mark.parametrize("T", [1, 2, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
@pytest.mark.parametrize("online", [True, False])
def test_counts_and_prompt_logits(T, budget, online):
    read_exactly(tiny.model(), f"keydiff(budget={budget},online={online})", budget, online, T)


def test_a_budget_that_is_never_reached_changes_no_bit():
    within_budget_is_full(tiny.model(), "keydiff(budget=60)", 40, 20)


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, bytes_held = tiny.model(context=1024), set()
    cache = KVCache(m, "keydiff(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            bytes_held.add(held(cache))
    assert bytes_held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("T, ratio", [(130, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])
def test_the_kept_sets_are_those_of_kvpress(G, T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text, n = tiny.model(G=G), tiny.ids(T), budget(T, ratio)
    press = kvpress.KeyDiffPress(compression_ratio=ratio)
    assert kept(run(m, [KeyDiff(budget=n)], text)) == pressed(m, press, text)
    # its blocks are cut from the keys of a prompt read exactly, which only a first layer's are here, and the first cut
    # comes after `budget` tokens and a block, as here if blocks divide the budget
    assert n % 13 == 0
    m = tiny.model(G=G, n_layers=1)
    cache = run(m, [Blocks(n, 13)], text)
    assert kept(cache) == pressed(m, kvpress.BlockPress(press, block_size=13), text)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="keydiff: budget must be at least 1, got 0"):
        KeyDiff(budget=0)
