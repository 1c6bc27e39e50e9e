"""TOVA: whose attention decides, over which heads it is averaged, and which entry goes at every step."""

import pytest
import tiny
import torch
from windowed import Drop, best, kept, run

from nanokv import KVCache, generate
from nanokv.cache import LayerCache, Policy
from nanokv.methods.full import Full
from nanokv.methods.tova import TOVA


class Look(Policy):
    """Note the rotated queries (H, T, D) and keys (Hkv, T, D) of a first layer, which nothing forgotten changes."""

    name = "look"

    def __init__(self):
        self.q, self.k = [], []

    def __call__(self, cache, q, pos):
        if cache.layer == 0:
            self.q.append(cache.rope(q, pos)[0].double())
            self.k.append(cache.read()[0][0, :, -q.shape[2] :].double())


def attention(look, t, tokens):
    """Return query t's probabilities over tokens per query head, fp64 (H, n)."""
    q, k = torch.cat(look.q, 1)[:, t], torch.cat(look.k, 1)[:, tokens]
    k = k.repeat_interleave(len(q) // len(k), 0)
    return ((k @ q[..., None])[..., 0] / q.shape[-1] ** 0.5).softmax(-1)


def give(monkeypatch, rows):
    """Make the last query of a prompt pay the attention rows (H, T)."""
    monkeypatch.setattr(LayerCache, "probs", lambda cache, q, pos: torch.tensor(rows)[None, :, None])


@pytest.mark.parametrize("row, protect, keeps", [
    ([0.4, 0.1, 0.3, 0.2], True, {0, 2, 3}),
    ([0.4, 0.2, 0.2, 0.2], True, {0, 1, 3}),
    ([0.4, 0.2, 0.2, 0.2], False, {0, 1, 2}),
    ([0.4, 0.3, 0.2, 0.1], True, {0, 1, 3}),
    ([0.4, 0.3, 0.2, 0.1], False, {0, 1, 2}),
], ids=str)  # fmt: skip
def test_small_examples_of_a_prompt(monkeypatch, row, protect, keeps):
    give(monkeypatch, [row])
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    assert kept(run(m, [TOVA(budget=3, protect_last=protect)], tiny.ids(4))) == {(0, 0): keeps}


def test_a_small_example_of_a_step(monkeypatch):
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    cache = run(m, [TOVA(budget=3)], tiny.ids(3))

    def attend_probs(storage, q, pos):
        assert storage.cache.counts == [4]  # the new entry is attended to, then one goes
        return torch.zeros_like(q), torch.tensor([0.5, 0.1, 0.3, 0.1]).view(1, 1, 1, 4)

    monkeypatch.setattr(Full, "attend_probs", attend_probs)
    tiny.steps(m, cache, tiny.ids(1))
    assert kept(cache) == {(0, 0): {0, 2, 3}}


# Turns red when the average is taken over a group only, or over the queries of a window.
def test_mutation_the_last_query_decides_and_all_heads_have_a_vote(monkeypatch):
    m, text = tiny.model(G=2, n_kv_heads=2, n_layers=1), tiny.ids(5)
    give(monkeypatch, [[0.6, 0.3, 0.1, 0, 0], [0.6, 0.3, 0.1, 0, 0], [0, 0.4, 0.1, 0.5, 0], [0, 0.4, 0.1, 0.5, 0]])
    assert kept(run(m, [TOVA(budget=2)], text)) == {(0, 0): {1, 4}, (0, 1): {1, 4}}
    assert kept(run(m, [TOVA(budget=2, heads="kv_head")], text)) == {(0, 0): {0, 4}, (0, 1): {3, 4}}
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(LayerCache, "probs", lambda c, q, pos: asked.append(pos) or torch.rand(1, 4, q.shape[2], 5))
    run(m, [TOVA(budget=2)], text)
    assert [pos.tolist() for pos in asked] == [[[4]]]


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("options", [{}, {"protect_last": False}, {"heads": "kv_head"}], ids=str)
def test_every_step_equals_a_naive_computation(G, options):
    """In fp64; probabilities of different tokens differ by more than fp32 rounds."""
    m, text, look = tiny.model(G=G, n_layers=1), tiny.ids(130), Look()
    tova = TOVA(budget=30, **options)
    cache, full = KVCache(m, [tova]), KVCache(m, [look])
    tiny.feed(m, full, text)
    alive = [list(range(70)), list(range(70))]
    tiny.feed(m, cache, text[:, :70])
    for t in range(69, 130):
        if t >= 70:
            tiny.steps(m, cache, text[:, t : t + 1])
            alive = [a + [t] for a in alive]
        for h in (0, 1):
            p = attention(look, t, alive[h])
            s = (p if tova.heads == "layer" else p[h * G : h * G + G]).mean(0)
            scores = dict(zip(alive[h], s.tolist(), strict=True))
            if tova.protect_last:
                scores[t] = 2.0
            alive[h] = sorted(best(scores, 30))
        assert kept(cache) == {(0, h): set(alive[h]) for h in (0, 1)}
    assert (alive[0] == alive[1]) == (tova.heads == "layer")


def test_the_two_ways_agree_where_heads_are_copies():
    m = tiny.model()
    for block in m.layers:
        for w in block.attn.qkv.weight.split(block.attn.widths):
            w.copy_(w[:32].repeat(len(w) // 32, 1))
    text = tiny.ids(100)
    a, b = (run(m, [TOVA(budget=30, heads=heads)], text, steps=20) for heads in ("layer", "kv_head"))
    assert kept(a) == kept(b)


def test_all_kv_heads_of_a_layer_hold_the_same_and_nothing_comes_back():
    m, text = tiny.model(n_kv_heads=3, G=2), tiny.ids(60)
    cache, gone = run(m, [TOVA(budget=20)], text), [set(), set()]
    for t in range(60, 130):
        sets = kept(cache)
        for i in (0, 1):
            assert sets[i, 0] == sets[i, 1] == sets[i, 2] and len(sets[i, 0]) == 20 and t - 1 in sets[i, 0]
            assert not gone[i] & sets[i, 0]
            gone[i] = set(range(t)) - sets[i, 0]
        assert cache.layers[0].same  # attention needs one mask for all heads
        tiny.steps(m, cache, tiny.ids(1, seed=t))


@pytest.mark.parametrize("chunk", [1, 7, 33, 149])
def test_chunks_do_not_change_what_is_kept(chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, parts = KVCache(m, "tova(budget=40)"), KVCache(m, "tova(budget=40)")
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    assert kept(one) == kept(parts) and kept(one, 1) == kept(parts, 1)


def test_a_batch_keeps_what_its_sequences_keep():
    m, text, more = tiny.model(), tiny.ids(90, batch=3), tiny.ids(20, batch=3, seed=8)
    cache, pads = KVCache(m, "tova(budget=30)"), [0, 25, 70]
    with cache.prompt(90, pads=pads):
        m(text, cache)
    tiny.steps(m, cache, more)
    for b, n in enumerate(pads):
        alone = run(m, "tova(budget=30)", text[b : b + 1, n:])
        tiny.steps(m, alone, more[b : b + 1])
        assert kept(cache, b) == kept(alone)


def test_where_heads_hold_different_tokens_each_decides_for_itself():
    m, text = tiny.model(), tiny.ids(100)
    drops = [Drop(100, 0, [3, 4, 50, 60]), Drop(100, 1, [5])]
    a, b = (run(m, [*drops, TOVA(budget=30, heads=heads)], text, steps=20) for heads in ("layer", "kv_head"))
    assert kept(a) == kept(b) and a.layers[0].counts == [30, 30]
    drops = [Drop(100, None, [3, 4, 50, 60])]  # the same in all heads
    cache = run(m, [*drops, TOVA(budget=30)], text, steps=20)
    assert all(kept(cache)[i, 0] == kept(cache)[i, 1] for i in (0, 1))


def test_several_tokens_in_one_step():
    m = tiny.model(n_layers=1)
    cache = run(m, "tova(budget=30)", tiny.ids(100))
    with cache.decoding():
        m(tiny.ids(6), cache)
    assert all(len(t) == 30 and 105 in t for t in kept(cache).values())


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
def test_counts_and_prompt_logits(T, budget):
    m, text = tiny.model(), tiny.ids(T)
    for update in (True, False):
        cache = KVCache(m, f"tova(budget={budget},decode_update={update})")
        assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))  # the prompt is read exactly
        assert cache.layers[1].counts == [min(T, budget)] * 2
        tiny.steps(m, cache, tiny.ids(7))
        assert cache.layers[1].counts == [min(T + 7, budget) if update else min(T, budget) + 7] * 2
        tiny.feed(m, cache, tiny.ids(60))
        assert cache.layers[1].counts == [min(T + 67, budget)] * 2


def test_a_budget_that_is_never_reached_changes_nothing():
    m, text = tiny.model(), tiny.ids(60)
    full, cache = KVCache(m), KVCache(m, "tova(budget=60)")
    a, b = (torch.cat([tiny.feed(m, c, text[:, :40]), tiny.steps(m, c, text[:, 40:])], 1) for c in (full, cache))
    assert tiny.rms(b, a) < 2e-6  # steps compute their probabilities, in another order of sums


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, held = tiny.model(context=1024), set()
    cache = KVCache(m, "tova(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            held.add(cache.nbytes)
    assert held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])
def test_the_kept_sets_are_those_of_kvpress(G, T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.TOVAPress(compression_ratio=ratio)
    assert kept(run(m, [TOVA(budget=budget(T, ratio))], text)) == pressed(m, press, text)


@pytest.mark.parametrize("bad", [{"budget": 0}, {"heads": "head"}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"tova: {next(iter(bad))} must be"):
        TOVA(**bad)
