"""Random eviction: which lots are drawn, that every entry has the same chance, and that nothing else decides."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from windowed import Drop, held, kept, read_exactly, run

from nanokv.methods.random import Random


def lots(seed=0, layer=0, counts=(20,), heads=1, layers=4):
    """Return what a policy draws for rows of these lengths, (B, heads, longest), 0 beyond a row's end."""
    n, place = torch.tensor(counts).view(-1, heads, 1), torch.arange(max(counts))
    fake = SimpleNamespace(config=SimpleNamespace(n_kv_heads=heads, n_layers=layers), layer=layer, counts=list(counts),
                           n_live=max(counts), n_rows=len(counts), B=len(counts) // heads, device="cpu",
                           rank=torch.where(place < n, place, -1))  # fmt: skip
    return torch.where(place < n, Random(budget=1, seed=seed).score(fake, None, None), 0.0)


# Turns red when the choice is not uniform: where old or new entries, or those of small rank, have a better chance.
def test_mutation_every_entry_has_the_same_chance():
    times = torch.zeros(20)
    for seed in range(2000):
        times[lots(seed)[0, 0].topk(5).indices] += 1
    # 2000 draws with probability 1/4 each: mean 500, standard deviation 19.4; five of them
    assert (times - 500).abs().max() < 97


def test_every_layer_head_and_seed_draws_for_itself():
    rows = torch.cat([lots(seed, layer, (20, 20, 20), 3)[0] for seed in range(3) for layer in range(4)])
    assert len({tuple(row.tolist()) for row in rows}) == len(rows) == 36
    # 20 numbers each: a correlation of 0.75 by chance has a probability of 1e-4, and there are 630 pairs
    assert (torch.corrcoef(rows) - torch.eye(36)).abs().max() < 0.85
    m, text = tiny.model(), tiny.ids(150)
    sets = kept(run(m, "random(budget=40)", text))
    assert len(set(map(frozenset, sets.values()))) == 4
    assert sets == kept(run(m, "random(budget=40,seed=0)", text)) != kept(run(m, "random(budget=40,seed=1)", text))


def test_a_sequence_draws_in_a_batch_as_alone():
    both = lots(counts=(20, 20, 7, 9), heads=2)
    assert torch.equal(both[0], lots(counts=(20, 20), heads=2)[0])
    assert torch.equal(both[1, :, :9], lots(counts=(7, 9), heads=2)[0])


def test_what_is_kept_depends_on_the_number_of_live_entries_alone():
    m = tiny.model()
    plain = kept(run(m, "random(budget=20)", tiny.ids(60)))
    assert plain == kept(run(tiny.model(seed=5), "random(budget=20)", tiny.ids(60, seed=9)))
    gone = [3, 4, 50]
    cache = run(m, [Drop(63, None, gone), Random(budget=20)], tiny.ids(63))
    left = [t for t in range(63) if t not in gone]
    assert kept(cache) == {key: {left[i] for i in ranks} for key, ranks in plain.items()}


@pytest.mark.parametrize("T", [1, 2, 9, 40, 41, 90])
@pytest.mark.parametrize("budget", [1, 8, 40])
def test_counts_and_prompt_logits(T, budget):
    read_exactly(tiny.model(), f"random(budget={budget})", budget, False, T)


def test_bytes_are_those_of_the_header():
    m = tiny.model(context=1024)
    assert held(run(m, "random(budget=320)", tiny.ids(600))) == 2 * (320 + 20) * 2 * (2 * 32 * 4 + 4)


@pytest.mark.parametrize("bad", [{"budget": 0}, {"seed": -1}, {"seed": 1_000_000}], ids=str)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=f"random: {next(iter(bad))} must be"):
        Random(**bad)
