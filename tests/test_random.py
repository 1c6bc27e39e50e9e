"""Random eviction: which lots are drawn, that every entry has the same chance, and that nothing else decides."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from windowed import Drop, kept, run

from nanokv import KVCache
from nanokv.methods.random import Random


def lots(seed=0, layer=0, counts=(20,), heads=1, layers=4):
    """Return what a policy draws for rows of these lengths."""
    config = SimpleNamespace(n_kv_heads=heads, n_layers=layers)
    n_rows = len(counts)
    fake = SimpleNamespace(config=config, layer=layer, counts=list(counts), n_live=max(counts), n_rows=n_rows)
    fake.B = n_rows // heads
    return Random(budget=1, seed=seed)._draw(fake)


# Turns red when the choice is not uniform: where old or new entries, or those of small rank, have a better chance.
def test_mutation_every_entry_has_the_same_chance():
    times = torch.zeros(20)
    for seed in range(2000):
        times[lots(seed)[0, 0].topk(5).indices] += 1
    # 2000 draws with probability 1/4 each: mean 500, standard deviation 19.4; five of them
    assert (times - 500).abs().max() < 97


def test_every_layer_head_and_seed_draws_for_itself():
    rows = [lots(seed, layer, (20, 20, 20), 3)[0] for seed in range(3) for layer in range(4)]
    rows = torch.cat(rows)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows) == 36
    # 20 numbers each: a correlation of 0.75 by chance has a probability of 1e-4, and there are 630 pairs
    assert (torch.corrcoef(rows) - torch.eye(36)).abs().max() < 0.85
    m, text = tiny.model(), tiny.ids(150)
    sets = kept(run(m, "random(budget=40)", text))
    assert len(set(map(frozenset, sets.values()))) == 4
    assert sets == kept(run(m, "random(budget=40,seed=0)", text)) != kept(run(m, "random(budget=40,seed=1)", text))


def test_a_sequence_draws_in_a_batch_as_alone():
    assert torch.equal(lots(counts=(20, 20, 7, 9), heads=2)[0], lots(counts=(20, 20), heads=2)[0])
    assert torch.equal(lots(counts=(20, 20, 7, 9), heads=2)[1, :, :9], lots(counts=(7, 9), heads=2)[0])
    m, text = tiny.model(), tiny.ids(90, batch=3)
    cache = KVCache(m, "random(budget=40)")
    pads = [0, 29, 80]
    with cache.prompt(90, pads=pads):
        m(text, cache)
    for b, n in enumerate(pads):
        assert kept(cache, b) == kept(run(m, "random(budget=40)", text[b : b + 1, n:]))


def test_what_is_kept_depends_on_the_number_of_live_entries_alone():
    m = tiny.model()
    plain = kept(run(m, "random(budget=20)", tiny.ids(60)))
    assert plain == kept(run(tiny.model(seed=5), "random(budget=20)", tiny.ids(60, seed=9)))
    gone = [3, 4, 50]
    cache = KVCache(m, [Drop(63, None, gone), Random(budget=20)])
    tiny.feed(m, cache, tiny.ids(63))
    left = [t for t in range(63) if t not in gone]
    assert kept(cache) == {key: {left[i] for i in ranks} for key, ranks in plain.items()}


@pytest.mark.parametrize("chunk", [1, 7, 33, 149])
def test_chunks_do_not_change_what_is_kept(chunk):
    m, text = tiny.model(), tiny.ids(150, batch=2)
    one, parts = KVCache(m, "random(budget=40)"), KVCache(m, "random(budget=40)")
    tiny.feed(m, one, text)
    tiny.feed(m, parts, text, chunk)
    assert kept(one) == kept(parts) and kept(one, 1) == kept(parts, 1)


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
def test_counts_and_prompt_logits(T, budget):
    m, text = tiny.model(), tiny.ids(T)
    cache = KVCache(m, f"random(budget={budget})")
    assert torch.equal(tiny.feed(m, cache, text), m(text, KVCache(m)))  # the prompt is read exactly
    assert cache.layers[1].counts == [min(T, budget)] * 2
    before = kept(cache)
    tiny.steps(m, cache, tiny.ids(7))
    assert kept(cache) == {key: tokens | set(range(T, T + 7)) for key, tokens in before.items()}
    tiny.feed(m, cache, tiny.ids(60))
    assert cache.layers[1].counts == [min(T + 67, budget)] * 2


def test_bytes_are_those_of_the_header():
    m = tiny.model(context=1024)
    assert run(m, "random(budget=320)", tiny.ids(600)).nbytes == 2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)


@pytest.mark.parametrize("T, ratio", [(60, 0.5), (131, 0.3), (400, 0.9)])
def test_as_many_as_kvpress_keeps(T, ratio):
    kvpress = pytest.importorskip("kvpress")
    from test_kvpress import budget, pressed

    m, text = tiny.model(), tiny.ids(T)
    theirs = pressed(m, kvpress.RandomPress(compression_ratio=ratio, seed=0), text)
    mine = kept(run(m, [Random(budget=budget(T, ratio))], text))
    assert {key: len(t) for key, t in mine.items()} == {key: len(t) for key, t in theirs.items()}


@pytest.mark.parametrize("bad", [{"budget": 0}, {"seed": -1}, {"seed": 1_000_000}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"random: {next(iter(bad))} must be"):
        Random(**bad)
