"""Long texts: on the default model past its context, and many thousands of tokens on a tiny one."""

import gc

import psutil
import pytest
import tiny
import torch

from nanokv import KVCache, generate


def _prose(tokenizer, n):
    from pydoc_data.topics import topics

    ids = tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics)))
    assert len(ids) >= n
    return ids[:n]


def _held(cache):
    """Return the bytes that the layers hold; the list of the tokens read, 4 bytes each, grows beside them."""
    out = sum(row["held"] for row in cache.ledger()["layers"])
    assert 0 <= cache.nbytes - out - 4 * cache.next_position[0] <= cache.next_position[0] // 2 + 64
    return out


@pytest.mark.slow
def test_six_thousand_tokens_in_a_cache_of_1024(smollm2):
    """The ledger is the header's formula after the prompt and stays so for a thousand further tokens."""
    model, tokenizer = smollm2
    cache, held = KVCache(model, "streamingllm(budget=1024)"), []
    for i, _ in enumerate(generate(model, cache, _prose(tokenizer, 6000), 1001)):
        if i % 50 == 0:
            held.append(_held(cache))
    S, Hkv, D = 1024 + 1024 // 16, 3, 64
    assert cache.next_position == [7000]
    assert set(held) == {30 * S * Hkv * (2 * D * 4 + 4)}
    assert cache.live_positions(29, 2).tolist() == [0, 1, 2, 3, *range(5980, 7000)]


@pytest.mark.slow
def test_text_past_the_context_stays_predictable(smollm2):
    """Prose far beyond 8,192 positions is predicted as well as prose within them, given as much to look back on."""
    model, tokenizer = smollm2
    text = torch.tensor([_prose(tokenizer, 9500)])
    losses = {}
    for name, first in (("within", 2000), ("beyond", 0)):
        cache = KVCache(model, "streamingllm(budget=1024)")
        for at in range(first, 9500, 255):
            part = text[:, at : at + 255]
            logits = model(part, cache, "prompt")
            if at >= 8500:
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:])
                losses.setdefault(name, []).append(loss)
        assert cache.next_position == [9500 - first]
    within, beyond = (float(torch.stack(losses[k]).mean()) for k in ("within", "beyond"))
    # without renumbering this model's loss on these tokens is above 5 nats; a cache of 1,024 entries costs about 2.4
    assert beyond < 3 and abs(beyond - within) < 0.15, (within, beyond)


SOAK = ["streamingllm(budget=64)", "h2o(budget=64)+kivi(bits=4,residual=32)", "keepkv(budget=64)"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SOAK)
def test_twenty_thousand_tokens_on_a_tiny_model(spec):
    """Bytes, process memory and positions stay flat, and the output finite."""
    n = 20_000
    m = tiny.model(n_layers=1, n_kv_heads=2, G=1, head_dim=32, context=n + 64)
    cache, token = KVCache(m, spec), torch.tensor([[7]])
    tiny.feed(m, cache, tiny.ids(20), 10)
    held, memory, process = [], [], psutil.Process()
    for i in range(n):
        logits = m(token, cache)[0, -1]
        token = ((token * 31 + i) % 101) if i % 3 else logits.argmax().view(1, 1)
        if i % 1000 == 999:
            assert logits.isfinite().all() and cache.layers[0].n_live <= 64
            gc.collect()
            held.append(_held(cache))
            memory.append(process.memory_info().rss)
    c = cache.layers[0]
    assert cache.next_position == [n + 20] and cache.live_positions(0, 0)[-1] == n + 19
    assert int(c.rank.max()) == c.n_live - 1 and (
        not c.renumbers or int(c.pos.expand_as(c.live)[c.live].max()) == c.n_live - 1
    )
    # kivi's bytes swing with its residual window and hidden entries: within the first quarter all has been seen
    assert max(held[5:]) <= 1.1 * max(held[:5])
    assert memory[-1] < memory[4] + 8 * 2**20  # RoPE's table has its full size from the start
