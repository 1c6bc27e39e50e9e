"""The window without sinks: what it holds after every step, and that streamingllm without sinks is the same."""

import pytest
import tiny
import torch
from windowed import kept, run

from nanokv import KVCache, generate
from nanokv.methods.window import Window


# Turns red when any first token is kept, or any newest one is not.
def test_mutation_the_newest_entries_and_no_others():
    m = tiny.model()
    for T in (1, 9, 10, 11, 100):
        cache = run(m, [Window(budget=10)], tiny.ids(T))
        for t in range(T, T + 12):
            assert set(map(frozenset, kept(cache).values())) == {frozenset(range(max(0, t - 10), t))}
            tiny.steps(m, cache, tiny.ids(1, seed=t))


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_same_as_streamingllm_without_sinks(chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, other = KVCache(m, "window(budget=24)"), KVCache(m, "streamingllm(budget=24,n_sink=0,reindex=False)")
    for c in (one, other):
        c.out = torch.cat([tiny.feed(m, c, text[:, :100], chunk), tiny.steps(m, c, text[:, 100:])], 1)
    assert torch.equal(one.out, other.out) and one.ledger() == other.ledger()


def test_the_prompt_is_read_exactly_and_steps_see_budget_entries():
    """Keys of a first layer do not depend on what was forgotten, so reading 16 tokens afresh gives the same."""
    m, text = tiny.model(n_layers=1), tiny.ids(90)
    cache, full = KVCache(m, "window(budget=16)"), KVCache(m)
    assert torch.equal(tiny.feed(m, cache, text[:, :60]), tiny.feed(m, full, text[:, :60]))
    for t in range(60, 90):
        short = KVCache(m)
        with short.prompt(16):  # the last 16 tokens, each where it was in the text
            short.next_position = t - 15
            want = m(text[:, t - 15 : t + 1], short)[:, -1]
        assert tiny.rms(m(text[:, t : t + 1], cache)[:, -1], want) < 1e-5  # fp32, another order of sums


def test_chunks_do_not_change_what_is_kept():
    m, text = tiny.model(), tiny.ids(100)
    one, parts = KVCache(m, "window(budget=30)"), KVCache(m, "window(budget=30)")
    assert tiny.rms(tiny.feed(m, parts, text, 7), tiny.feed(m, one, text)) < 1e-5
    assert kept(one) == kept(parts) == {key: set(range(70, 100)) for key in kept(one)}


@pytest.mark.parametrize("n", [2, 10, 13])
def test_several_tokens_in_one_step(n):
    m = tiny.model()
    cache = run(m, "window(budget=10)", tiny.ids(40))
    with cache.decoding():
        m(tiny.ids(n), cache)
    assert set(map(frozenset, kept(cache).values())) == {frozenset(range(30 + n, 40 + n))}


def test_padding_does_not_count():
    m, text = tiny.model(), tiny.ids(50, batch=2)
    cache = KVCache(m, "window(budget=20)")
    with cache.prompt(50, pads=[0, 35]):
        m(text, cache)
    assert set(map(frozenset, kept(cache, 0).values())) == {frozenset(range(30, 50))}
    assert set(map(frozenset, kept(cache, 1).values())) == {frozenset(range(15))}


@pytest.mark.parametrize("T", [1, 31, 32])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    m, text = tiny.model(), tiny.ids(T + 5)
    full, cache = KVCache(m), KVCache(m, f"window(budget={T + 5})")
    for c in (full, cache):
        c.out = torch.cat([tiny.feed(m, c, text[:, :T]), tiny.steps(m, c, text[:, T:])], 1)
    assert torch.equal(full.out, cache.out)


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, held = tiny.model(context=1024), set()
    cache = KVCache(m, "window(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            held.add(cache.nbytes)
    assert held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.8)])
def test_the_kept_sets_are_those_of_kvpress(T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text = tiny.model(), tiny.ids(T)
    press = kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=0)
    assert kept(run(m, [Window(budget=budget(T, ratio))], text)) == pressed(m, press, text)


@pytest.mark.parametrize("budget", [0, -1])
def test_bad_parameters_are_refused(budget):
    with pytest.raises(ValueError, match="window: budget must be"):
        Window(budget=budget)
