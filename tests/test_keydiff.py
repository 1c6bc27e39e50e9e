"""KeyDiff: the cosine with the mean direction, what is cut when, and the loop over blocks."""

import itertools

import pytest
import tiny
import torch
from windowed import Drop, best, kept, run

from nanokv import KVCache, generate
from nanokv.cache import LayerCache, Policy
from nanokv.methods.keydiff import KeyDiff


def scores(k, tokens):
    """Return {token: minus the cosine of its key with the mean of unit keys}, of keys k (n, D), in fp64."""
    units = [x / float(x.square().sum()) ** 0.5 for x in k.double()]
    mean = sum(units) / len(units)
    size = float(mean.square().sum()) ** 0.5
    return {t: -float((u * mean).sum()) / size for t, u in zip(tokens, units, strict=True)}


class Look(Policy):
    """Note what each KV head holds at the end of a prompt: {(layer, head, sequence): (keys, tokens)}."""

    name = "look"

    def __init__(self):
        self.heads = {}

    def __call__(self, cache, q, pos):
        if cache.phase == "last":
            k, heads = cache.read()[0], cache.config.n_kv_heads
            token, live = (t.expand(cache.B, heads, -1) for t in (cache.token, cache.live))
            for b, h in itertools.product(range(cache.B), range(heads)):
                here = live[b, h]
                self.heads[cache.layer, h, b] = k[b, h, here].clone(), token[b, h, here].tolist()


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
    assert want == {(0, 0): best(scores(keys, range(9)), 4)}
    for i in range(9):
        longer = keys.clone()
        longer[i] *= 50
        give(monkeypatch, longer.tolist())
        assert kept(run(one, [KeyDiff(budget=4)], tiny.ids(9))) == want


def test_equal_keys_keep_the_older_entry(monkeypatch, one):
    give(monkeypatch, [[1.0, 0.0]] * 6)
    assert kept(run(one, [KeyDiff(budget=4)], tiny.ids(6))) == {(0, 0): {0, 1, 2, 3}}


@pytest.mark.parametrize("n_sink, window", [(0, 0), (4, 0), (0, 8), (4, 8), (10, 30)])
def test_the_kept_sets_equal_a_naive_computation(n_sink, window):
    look, m = Look(), tiny.model()
    cache = run(m, [look, KeyDiff(budget=40, n_sink=n_sink, window=window)], tiny.ids(150, batch=2))
    for (i, h, b), (k, tokens) in look.heads.items():
        must = {*range(n_sink), *range(150 - window, 150)}
        rest = {t: s for t, s in scores(k, tokens).items() if t not in must}
        assert kept(cache, b)[i, h] == must | best(rest, 40 - n_sink - window)


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
            s = scores(look.heads[0, h, 0][0][tokens], tokens)
            new = {t} if t >= 70 else set()  # the newest entry of a step stays
            alive[h] = new | best({j: x for j, x in s.items() if j not in new}, 30 - len(new))
        assert kept(cache) == {(0, h): alive[h] for h in (0, 1)}


@pytest.mark.parametrize("block", [1, 13, 30, 100])
def test_blocks_equal_a_naive_computation(block):
    m, text, look = tiny.model(n_layers=1), tiny.ids(140), Look()
    run(m, [look], text)
    cache, alive, most = KVCache(m, [KeyDiff(budget=30, block=block)]), {0: [], 1: []}, 0
    with cache.prompt(140):
        for at in range(0, 140, block):
            m(text[:, at : at + block], cache)
            for h in (0, 1):
                tokens = [*alive[h], *range(at, min(140, at + block))]
                most = max(most, len(tokens))
                alive[h] = sorted(best(scores(look.heads[0, h, 0][0][tokens], tokens), 30))
            assert kept(cache) == {(0, h): set(alive[h]) for h in (0, 1)}
    assert most <= 30 + block


def test_a_block_as_long_as_the_prompt_is_one_cut():
    m, text = tiny.model(), tiny.ids(100)
    a, b = run(m, "keydiff(budget=30,block=100)", text), run(m, "keydiff(budget=30)", text)
    assert kept(a) == kept(b) and a.chunk == 100 and b.chunk is None


def test_blocks_bound_the_memory_of_a_prompt():
    m, text, most = tiny.model(context=1024), tiny.ids(1000)[0], []
    cache = KVCache(m, "keydiff(budget=64,block=16)")
    watch = lambda n: most.append(max(max(c.n_slots) for c in cache.layers))  # noqa: E731
    assert len(list(generate(m, cache, text, 20, progress=watch))) == 20
    assert max(most) == 64 and len(most) == 63  # after each part; its own 16 come on top while it is read
    assert cache.layers[1].counts == [64, 64]


def test_hidden_entries_and_padding_have_no_part_in_the_mean():
    m, look = tiny.model(), Look()
    cache = run(m, [Drop(60, 1, [3, 4, 50]), Drop(60, None, [7, 8, 9]), look, KeyDiff(budget=20)], tiny.ids(60))
    for key, tokens in kept(cache).items():
        assert tokens == best(scores(*look.heads[(*key, 0)]), 20) and not tokens & {7, 8, 9}
    cache, text, more = KVCache(m, "keydiff(budget=20)"), tiny.ids(60, batch=3), tiny.ids(9, batch=3, seed=5)
    with cache.prompt(60, pads=[0, 25, 50]):
        m(text, cache)
    tiny.steps(m, cache, more)
    for b, n in enumerate((0, 25, 50)):
        alone = run(m, "keydiff(budget=20)", text[b : b + 1, n:])
        tiny.steps(m, alone, more[b : b + 1])
        assert kept(cache, b) == kept(alone)


def test_blocks_refuse_padding():
    cache = KVCache(tiny.model(), "keydiff(budget=20,block=8)")
    with pytest.raises(NotImplementedError, match="equal length"), cache.prompt(60, pads=[0, 25]):
        pass


@pytest.mark.parametrize("chunk", [1, 7, 33, 149])
def test_chunks_do_not_change_what_is_kept(chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, parts = KVCache(m, "keydiff(budget=40)"), KVCache(m, "keydiff(budget=40)")
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    assert kept(one) == kept(parts) and kept(one, 1) == kept(parts, 1)


@pytest.mark.parametrize("n", [6, 20, 35])
def test_several_tokens_in_one_step(n):
    cache = run(tiny.model(n_layers=1), "keydiff(budget=20,n_sink=2)", tiny.ids(60))
    with cache.decoding():
        cache.model(tiny.ids(n), cache)
    new = min(n, 18)
    assert all(len(t) == 20 and t >= {0, 1, *range(60 + n - new, 60 + n)} for t in kept(cache).values())


@pytest.mark.parametrize("T", [1, 2, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
def test_counts_and_prompt_logits(T, budget):
    m, text = tiny.model(), tiny.ids(T)
    for update in (True, False):
        cache = KVCache(m, f"keydiff(budget={budget},decode_update={update})")
        assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))  # the prompt is read exactly
        assert cache.layers[1].counts == [min(T, budget)] * 2
        tiny.steps(m, cache, tiny.ids(7))
        assert cache.layers[1].counts == [min(T + 7, budget) if update else min(T, budget) + 7] * 2
        tiny.feed(m, cache, tiny.ids(60))
        assert cache.layers[1].counts == [min(T + 67, budget)] * 2


@pytest.mark.parametrize("block", [0, 128])
def test_bytes_are_those_of_the_header_and_stay_flat(block):
    m, held = tiny.model(context=1024), set()
    cache = KVCache(m, f"keydiff(budget=320,block={block})")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            held.add(cache.nbytes)
    assert held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


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
    m, cache = tiny.model(G=G, n_layers=1), KVCache(tiny.model(G=G, n_layers=1), [KeyDiff(budget=n, block=13)])
    tiny.feed(m, cache, text, 13)
    assert kept(cache) == pressed(m, kvpress.BlockPress(press, block_size=13), text)


@pytest.mark.parametrize("bad", [{"budget": 0}, {"block": -1}, {"n_sink": -1}, {"window": -1}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"keydiff: {next(iter(bad))} must be"):
        KeyDiff(**bad)
    with pytest.raises(ValueError, match="budget must be at least 12, the sinks and the window"):
        KeyDiff(budget=11, n_sink=4, window=8)
