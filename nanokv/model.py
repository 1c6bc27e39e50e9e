"""The decoder, read top to bottom: config, RMSNorm, RoPE, attention, SwiGLU, block, model.

One class covers Llama 2/3, Mistral, SmolLM2, Qwen2 and Qwen3: they differ by a few switches of `Config`. Modules are
named as in the hub's checkpoints, so that loading one is `load_state_dict`. The attention layer calls its cache three
times and knows nothing else about it; everything this project is about happens behind those three calls (layer.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Describe one model. Sizes are counts, `context` is in tokens, `windows` holds one entry per layer."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    context: int
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type": "linear" | "llama3" | "factors", ...}, or None
    tied: bool = True  # the output projection is the embedding matrix
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False
    qk_norm: bool = False  # Qwen3
    windows: tuple = ()  # sliding window of each layer in tokens (None: sees everything); () means no layer has one
    eos: tuple = ()  # token ids that end a text
    name: str = "llama"

    @property
    def group(self) -> int:
        """Return G, the number of query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, or None."""
        return self.windows[layer] if self.windows else None


class RMSNorm(nn.Module):
    """Scale x (..., E) to unit root mean square, in fp32, then by a learnt gain."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class RoPE:
    """Rotate pairs of channels (i, i + D/2) by the angle position * frequency_i.

    A dot product of two rotated vectors depends on their distance only, which is why a cache may renumber its entries
    as long as it keeps their keys un-rotated. Source: arXiv 2104.09864; scaling as in Llama 3.1.
    """

    def __init__(self, config: Config, device=None):
        D = config.head_dim
        exponent = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D  # real on the meta device too
        inv = 1.0 / config.rope_theta**exponent
        self.inv_freq = _scale(inv, config.rope_scaling).to(device)  # (D/2,)
        self.cos = self.sin = self.inv_freq.new_empty(0, D)
        self.reserve(64)

    def reserve(self, n: int) -> None:
        """Make sure that positions 0..n-1 have their angles; tables grow with use."""
        if n > len(self.cos):
            n = 1 << (n - 1).bit_length()
            angle = torch.arange(n, device=self.inv_freq.device).float()[:, None] * self.inv_freq  # (n, D/2)
            self.cos, self.sin = (t.repeat(1, 2) for t in (angle.cos(), angle.sin()))  # (n, D)

    def to(self, device) -> "RoPE":
        """Move the tables to a device, in place."""
        self.inv_freq, self.cos, self.sin = (t.to(device) for t in (self.inv_freq, self.cos, self.sin))
        return self

    def __call__(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rotate x (B, H, T, D) by pos, integers (B, T), or (B, Hkv, T) where KV heads differ."""
        pos = pos[:, None] if pos.dim() == 2 else pos
        if 1 < pos.shape[1] < x.shape[1]:  # the query heads of a group share their KV head's positions
            pos = pos.repeat_interleave(x.shape[1] // pos.shape[1], 1)
        cos, sin = self.cos[pos].to(x.dtype), self.sin[pos].to(x.dtype)  # (B, 1 or H, T, D)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin


def _scale(inv: Tensor, scaling: dict | None) -> Tensor:
    if not scaling:
        return inv
    if scaling["type"] == "factors":  # a GGUF file stores llama3 scaling as its effect, a divisor per frequency
        return inv / torch.tensor(scaling["factors"], device="cpu")
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return inv / factor
    # llama3: long wavelengths are stretched by the factor, short ones kept, those between blended linearly
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * inv / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv / factor + blend * inv


class Attention(nn.Module):
    """Grouped-query attention whose past lives in the cache."""

    def __init__(self, c: Config, rope: RoPE):
        super().__init__()
        self.rope, self.head_dim = rope, c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.hidden, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, pos: Tensor, cache) -> Tensor:
        """Attend from x (B, T, E) at positions pos (B, T) to everything `cache` (a LayerCache) remembers."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or Hkv, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        pos = cache.append(k, v, x, pos)  # remember
        o = cache.attend(self.rope(q, pos), pos)  # look back: (B, H, T, D)
        cache.compress(q, pos)  # forget, then pack
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, c: Config, rope: RoPE):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden, c.eps), Attention(c, rope)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden, c.eps), MLP(c)

    def forward(self, x: Tensor, pos: Tensor, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), pos, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama-family language model. `model(ids, cache)` reads new tokens and returns their logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.rope = config, RoPE(config, "cpu")  # computed, even while weights are not there yet
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config, self.rope) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, cache, phase: str | None = None, last: bool = False) -> Tensor:
        """Read ids (B, T), -1 where a sequence reads nothing, after what `cache` (a KVCache) holds; return logits.

        Logits are (B, T, vocab), or with `last` those of the last position, (B, 1, vocab). phase: "prompt", of which
        more is to come, "last", a prompt's last part, "decode", or "draft", after which `cache.accept` decides. None:
        one token per sequence after others is a step, and anything else a whole prompt.
        """
        pos = cache.begin(self, ids, phase)  # (B, T)
        x = self.embed_tokens(ids.to(pos.device).clamp(min=0))  # (B, T, E)
        for i, block in enumerate(self.layers):
            if (came := cache.plan.before_layer(cache, i, x, pos)) is None:
                continue  # this layer is not asked
            x, pos = came
            x = block(x, pos, cache.layers[i])
            x, pos = cache.plan.after_layer(cache, i, x, pos)
        cache.end()
        return self.lm_head(self.norm(x[:, -1:] if last else x))
