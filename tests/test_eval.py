"""The commands that measure, on a tiny model: what they say is what the caches hold."""

import json

import pytest
import tiny
import torch

from nanokv import KVCache
from nanokv.eval import compare, speed


def test_the_full_cache_is_exact_and_a_tiny_one_is_worst():
    m, ids = tiny.model(), tiny.ids(220)
    full, four, two, few = (compare.measure(m, s, ids, 180) for s in ("full", "kivi(bits=4,residual=32)",
                            "kivi(bits=2,residual=32)", "streamingllm(budget=5)"))  # fmt: skip
    assert full["kl"] < 1e-9 and full["same"] == 1
    assert full["kl"] < four["kl"] < two["kl"] < few["kl"]
    assert four["full"] == 2 * 2 * 220 * 2 * 32 * 4 and two["held"] < four["held"] < full["held"]


def test_speed_measures_ours_and_transformers_on_the_same_weights():
    m = tiny.model()
    field = speed.contestants(m, ["full", "streamingllm(budget=16)"], ["sdpa"])
    ids = tiny.ids(30)
    ours, peer = field[0], field[-1]
    ours.prefill(ids), peer.prefill(ids)
    with torch.no_grad():
        theirs = peer.model(tiny.ids(1), past_key_values=peer.cache).logits[:, -1]
    assert tiny.rms(m(tiny.ids(1), ours.cache)[:, -1], theirs) < 1e-5
    records = speed.measure(field, [20, 40], rounds=2, repeats=1, vocab=101)
    assert len(records) == 6 and all(r["step_s"] > 0 and r["prefill_s"] > 0 for r in records)
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(40))
    tiny.steps(m, cache, tiny.ids(7))
    assert next(r for r in records if r["name"] == "full" and r["context"] == 40)["cache_bytes"] == cache.nbytes
    assert "transformers (sdpa)" in [r["name"] for r in records] and json.dumps(records)
    table = speed.table(records, 1000, 1e9, "transformers (sdpa)", "title")
    assert table.row_count == 6


@pytest.mark.parametrize("module", [compare, speed])
def test_a_bad_spec_is_refused_in_one_line(module, capsys, monkeypatch):
    monkeypatch.setattr("weights.load", lambda *a, **k: (tiny.model(), None))
    monkeypatch.setattr(compare, "prose", lambda tokenizer, n: tiny.ids(n))
    code = module.main(["nonsense"])
    err = capsys.readouterr().err
    assert code == 2 and "unknown method 'nonsense'" in err and len(err.splitlines()) == 1
