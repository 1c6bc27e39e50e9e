"""The window without sinks: what it holds after every step, and that streamingllm without sinks is the same."""

import pytest
import tiny
import torch
from windowed import held, kept, run, within_budget_is_full

from nanokv import KVCache, generate
from nanokv.methods.window import Window


def newest(cache):
    """Return the tokens that live, if they are the same in all layers and KV heads."""
    (tokens,) = set(map(frozenset, kept(cache).values()))
    return tokens


# Turns red when any first token is kept, or any newest one is not.
@pytest.mark.parametrize("T", [1, 9, 10, 11, 100])
def test_mutation_the_newest_entries_and_no_others(T):
    m = tiny.model()
    cache = run(m, [Window(budget=10)], tiny.ids(T))
    for t in range(T, T + 12):
        assert newest(cache) == set(range(max(0, t - 10), t))
        assert cache.ahead() == max(0, 10 - t)
        tiny.steps(m, cache, tiny.ids(1, seed=t))


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_same_as_streamingllm_without_sinks(chunk):
    m, text, out, ledgers = tiny.model(), tiny.ids(150, batch=2), [], []
    for spec in ("window(budget=24)", "streamingllm(budget=24,n_sink=0,reindex=False)"):
        cache = KVCache(m, spec)
        out.append(torch.cat([tiny.feed(m, cache, text[:, :100], chunk), tiny.steps(m, cache, text[:, 100:])], 1))
        ledgers.append(cache.ledger())
    assert torch.equal(*out) and ledgers[0] == ledgers[1]


def test_the_prompt_is_read_exactly_and_steps_see_budget_entries():
    """Keys of a first layer do not depend on what was forgotten, so reading 16 tokens afresh gives the same."""
    m, text = tiny.model(n_layers=1), tiny.ids(90)
    cache = KVCache(m, "window(budget=16)")
    assert torch.equal(tiny.feed(m, cache, text[:, :60]), m(text[:, :60], KVCache(m)))
    for t in range(60, 90):
        want = m(text[:, t - 15 : t + 1], KVCache(m))[:, -1]  # from position 0: distances are the same
        assert tiny.rms(m(text[:, t : t + 1], cache)[:, -1], want) < 1e-5  # fp32, other angles and order of sums


@pytest.mark.parametrize("n", [2, 10, 13])
def test_several_tokens_in_one_step(n):
    m = tiny.model()
    cache = run(m, "window(budget=10)", tiny.ids(40))
    m(tiny.ids(n), cache, "decode")
    assert newest(cache) == set(range(30 + n, 40 + n))


def test_a_paused_sequence_loses_nothing():
    m = tiny.model()
    cache = run(m, "window(budget=10)", tiny.ids(40, batch=2))
    tiny.steps(m, cache, torch.tensor([[3, 4, 5], [-1, -1, -1]]))
    assert set(map(frozenset, kept(cache, 0).values())) == {frozenset(range(33, 43))}
    assert set(map(frozenset, kept(cache, 1).values())) == {frozenset(range(30, 40))}


@pytest.mark.parametrize("T", [1, 31, 32])
def test_a_budget_that_is_never_reached_changes_no_bit(T):
    within_budget_is_full(tiny.model(), f"window(budget={T + 5})", T, 5)


def test_bytes_are_those_of_the_header_and_stay_flat():
    m, bytes_held = tiny.model(context=1024), set()
    cache = KVCache(m, "window(budget=320)")
    for i, _ in enumerate(generate(m, cache, tiny.ids(600)[0], 60)):
        if i:
            bytes_held.add(held(cache))
    assert bytes_held == {2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)}


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
