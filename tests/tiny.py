"""Small random models and the numbers tests compare with."""

import torch

from nanokv.model import Config, Decoder


def model(
    G=3, n_kv_heads=2, head_dim=32, n_layers=2, context=512, seed=0, dtype=torch.float32, vocab=101, **config
) -> Decoder:
    """Return a random decoder whose attention is neither flat nor one-hot."""
    torch.manual_seed(seed)
    heads = G * n_kv_heads
    c = Config(n_layers, heads, n_kv_heads, head_dim, 64, 96, vocab, context, **({"tied": False} | config))
    m = Decoder(c).eval().requires_grad_(False)
    for block in m.layers:
        for proj in (block.self_attn.q_proj, block.self_attn.k_proj):
            proj.weight.mul_(6.0)  # logits with a standard deviation of about 2
    m.lm_head.weight.mul_(6.0)
    return m.to(dtype)


def ids(n, seed=1, vocab=101, batch=1) -> torch.Tensor:
    """Return random token ids (batch, n)."""
    return torch.randint(0, vocab, (batch, n), generator=torch.Generator().manual_seed(seed))


def rms(a, b) -> float:
    """Return the error of a relative to the root mean square of b."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def feed(m, cache, tokens, chunk=None) -> torch.Tensor:
    """Read tokens (B, T) as one prompt, in parts of `chunk`; return all logits."""
    *parts, end = tokens.split(chunk or cache.chunk or tokens.shape[1], 1)
    return torch.cat([*(m(part, cache, "prompt") for part in parts), m(end, cache, "last")], 1)


def steps(m, cache, tokens) -> torch.Tensor:
    """Read tokens (B, T) one at a time, as generated text; return all logits."""
    return torch.cat([m(tokens[:, i : i + 1], cache, "decode") for i in range(tokens.shape[1])], 1)
