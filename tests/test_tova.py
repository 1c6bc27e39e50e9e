"""TOVA: whose attention decides, over which heads it is averaged, and which entry goes at every step."""

import pytest
import tiny
import torch
from windowed import Drop, best, held, kept, read_exactly, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.attention import reduce_group
from nanokv.layer import LayerCache
from nanokv.method import Policy
from nanokv.methods.tova import TOVA


class Authors(TOVA):
    """The twin whose newest entry competes, as in the authors' code."""

    n_recent = 0


class Heads(TOVA):
    """The twin in which each KV head is judged by its own query heads."""

    def score(self, cache, q, pos):
        return reduce_group(cache.probs(q[:, :, -1:], pos[..., -1:])[:, :, 0], cache.config.n_kv_heads, "mean")


class Look(Policy):
    """Note the queries (H, T, D) and keys (Hkv, T, D) of a first layer, which nothing forgotten changes."""

    def after_part(self, cache, q, pos):
        if cache.layer == 0:
            self.q, self.k = q[0].double(), cache.read()[0][0].double()


def attention(look, t, tokens):
    """Return query t's probabilities over tokens per query head, fp64 (H, n)."""
    k = look.k[:, tokens].repeat_interleave(len(look.q) // len(look.k), 0)
    return ((k @ look.q[:, t, :, None])[..., 0] / k.shape[-1] ** 0.5).softmax(-1)


def give(monkeypatch, rows):
    """Make the last query pay the attention rows (H, N)."""

    def probs(cache, q, pos):
        assert cache.N == len(rows[0]) and q.shape[2] == 1  # attention comes before forgetting
        return torch.tensor(rows)[None, :, None]

    monkeypatch.setattr(LayerCache, "probs", probs)


@pytest.mark.parametrize("row, method, keeps", [
    ([0.4, 0.1, 0.3, 0.2], TOVA, {0, 2, 3}),
    ([0.4, 0.2, 0.2, 0.2], TOVA, {0, 1, 3}),
    ([0.4, 0.2, 0.2, 0.2], Authors, {0, 1, 2}),
    ([0.4, 0.3, 0.2, 0.1], TOVA, {0, 1, 3}),
    ([0.4, 0.3, 0.2, 0.1], Authors, {0, 1, 2}),
], ids=str)  # fmt: skip
def test_small_examples(monkeypatch, row, method, keeps):
    give(monkeypatch, [row])
    m = tiny.model(G=1, n_kv_heads=1, n_layers=1)
    assert kept(run(m, [method(budget=3)], tiny.ids(4))) == {(0, 0): keeps}
    cache = run(m, [method(budget=3)], tiny.ids(3))
    tiny.steps(m, cache, tiny.ids(1))
    assert kept(cache) == {(0, 0): keeps}


# Turns red when the average is taken over a group only, or over the queries of a window.
def test_mutation_the_last_query_decides_and_all_heads_have_a_vote(monkeypatch):
    m, text = tiny.model(G=2, n_kv_heads=2, n_layers=1), tiny.ids(5)
    give(monkeypatch, [[0.6, 0.3, 0.1, 0, 0], [0.6, 0.3, 0.1, 0, 0], [0, 0.4, 0.1, 0.5, 0], [0, 0.4, 0.1, 0.5, 0]])
    assert kept(run(m, [TOVA(budget=2)], text)) == {(0, 0): {1, 4}, (0, 1): {1, 4}}
    assert kept(run(m, [Heads(budget=2)], text)) == {(0, 0): {0, 4}, (0, 1): {3, 4}}
    asked = []
    monkeypatch.setattr(LayerCache, "probs", lambda c, q, pos: asked.append(pos) or torch.rand(1, 4, q.shape[2], 5))
    run(m, [TOVA(budget=2)], text)
    assert [pos.tolist() for pos in asked] == [[[4]]]


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("method", [TOVA, Authors, Heads])
def test_every_step_equals_a_naive_computation(G, method):
    """In fp64; probabilities of different tokens differ by more than fp32 rounds."""
    m, text, look = tiny.model(G=G, n_layers=1), tiny.ids(130), Look()
    run(m, [look], text)
    cache, alive = run(m, [method(budget=30)], text[:, :70]), [list(range(70)), list(range(70))]
    for t in range(69, 130):
        if t >= 70:
            tiny.steps(m, cache, text[:, t : t + 1])
            alive = [a + [t] for a in alive]
        for h in (0, 1):
            p = attention(look, t, alive[h])
            s = (p[h * G : h * G + G] if method is Heads else p).mean(0)
            scores = dict(zip(alive[h], s.tolist(), strict=True))
            if method is not Authors:
                scores[t] = 2.0
            alive[h] = sorted(best(scores, 30))
        assert kept(cache) == {(0, h): set(alive[h]) for h in (0, 1)}
    assert (alive[0] == alive[1]) == (method is not Heads)


def test_the_two_ways_agree_where_heads_are_copies():
    m = tiny.model()
    for block in m.layers:
        for proj in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            w = proj.weight
            w.copy_(w[:32].repeat(len(w) // 32, 1))
    a, b = (run(m, [method(budget=30)], tiny.ids(100), steps=20) for method in (TOVA, Heads))
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
        tiny.steps(m, cache, tiny.ids(1, seed=t))


def test_where_heads_hold_different_tokens_each_decides_for_itself():
    m, text = tiny.model(), tiny.ids(100)
    drops = [Drop(100, 0, [3, 4, 50, 60]), Drop(100, 1, [5])]
    a, b = (run(m, [*drops, method(budget=30)], text, steps=20) for method in (TOVA, Heads))
    assert kept(a) == kept(b) and a.layers[0].counts == [30, 30]
    cache = run(m, [Drop(100, None, [3, 4, 50, 60]), TOVA(budget=30)], text, steps=20)  # the same in all heads
    assert all(kept(cache)[i, 0] == kept(cache)[i, 1] for i in (0, 1))


def test_in_a_batch_each_sequence_decides_whether_its_heads_agree():
    class First(Policy):
        """Forget an entry of the first head of the first sequence."""

        def after_prompt(self, cache):
            mask = torch.ones(cache.B, 2, cache.N, dtype=torch.bool)
            mask[0, 0, 10] = False
            cache.keep(mask)

    m, text, more = tiny.model(), tiny.ids(60, batch=2), tiny.ids(20, seed=77, batch=2)
    cache = run(m, [First(), TOVA(budget=30)], text, steps=20)
    for b, policies in enumerate(([First(), TOVA(budget=30)], [TOVA(budget=30)])):
        alone = run(m, policies, text[b : b + 1])
        tiny.steps(m, alone, more[b : b + 1])
        assert kept(cache, b) == kept(alone)
    assert kept(cache, 0)[0, 0] != kept(cache, 0)[0, 1] and kept(cache, 1)[0, 0] == kept(cache, 1)[0, 1]


def test_several_tokens_in_one_step():
    m, text, look = tiny.model(n_layers=1), tiny.ids(106), Look()
    run(m, [look], text)
    cache = run(m, "tova(budget=30)", text[:, :100])
    alive = sorted(kept(cache)[0, 0] | set(range(100, 106)))
    p = attention(look, 105, alive).mean(0).tolist()  # the last one's
    m(text[:, 100:], cache, "decode")
    want = best(dict(zip(alive, p, strict=True)) | {105: 2.0}, 30)
    assert kept(cache) == {(0, 0): want, (0, 1): want}


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
@pytest.mark.parametrize("online", [True, False])
def test_counts_and_prompt_logits(T, budget, online):
    read_exactly(tiny.model(), f"tova(budget={budget},online={online})", budget, online, T)


def test_a_budget_that_is_never_reached_changes_no_bit():
    within_budget_is_full(tiny.model(), "tova(budget=60)", 40, 20)


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, bytes_held = tiny.model(context=1024), set()
    cache = KVCache(m, "tova(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            bytes_held.add(held(cache))
    assert bytes_held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (131, 0.8), (400, 0.9)])
def test_the_kept_sets_are_those_of_kvpress(G, T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text = tiny.model(G=G), tiny.ids(T)
    press = kvpress.TOVAPress(compression_ratio=ratio)
    assert kept(run(m, [TOVA(budget=budget(T, ratio))], text)) == pressed(m, press, text)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="tova: budget must be at least 1, got 0"):
        TOVA(budget=0)
