"""The baseline: it holds exactly what the model made, and nothing but that."""

import pytest
import tiny
import torch

from nanokv import KVCache


@pytest.mark.parametrize("T", [1, 16, 17, 255, 500])
def test_ledger_equals_the_formula(T):
    m = tiny.model()
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(T), 64)
    slot = 2 * 32 * 4
    for row in cache.ledger()["layers"]:
        assert row["payload"] == row["full"] == row["read"] == 2 * T * slot  # KV heads
        assert 0 <= row["unused"] <= 2 * max(16, T // 16) * slot and row["held"] == row["payload"] + row["unused"]


def test_it_holds_rotated_keys_and_values_in_order():
    m = tiny.model(n_layers=1)
    seen, cache = [], KVCache(m)
    layer = cache.layers[0]
    append = layer.append
    layer.append = lambda k, v, x, pos: (seen.append((k.clone(), v.clone())), append(k, v, x, pos))[1]
    tiny.feed(m, cache, tiny.ids(40), 7)
    k, v = (torch.cat(t, 2) for t in zip(*seen, strict=True))
    assert torch.equal(layer.read()[1], v)
    assert torch.equal(layer.read()[0], m.rope(k, torch.arange(40)[None]))
    assert not torch.equal(layer.read()[0], k)
