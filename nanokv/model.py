"""The decoder, read top to bottom: config, RMSNorm, RoPE, attention, SwiGLU, block, model.

One class covers Llama 2/3, Mistral, SmolLM2, Qwen2 and Qwen3: they differ by a few switches of `Config`. The attention
layer calls its cache three times and knows nothing else about it; everything this project is about happens behind
those three calls (nanokv/cache.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokv import kernels


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


class Light(nn.Module):
    """A module whose call costs no more than its work for one token.

    Hooks of its own are looked for, and nothing else is; what is in it is found without nn.Module's search.
    """

    def __call__(self, *args, **kwargs):
        heard = self._forward_hooks or self._forward_pre_hooks
        return super().__call__(*args, **kwargs) if heard else self.forward(*args, **kwargs)

    def __getattr__(self, name: str):
        parameters = self.__dict__.get("_parameters", {})
        return parameters[name] if name in parameters else super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        self.__dict__.pop(name, None)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)


class RMSNorm(Light):
    """Scale x (..., E) to unit root mean square, in fp32, then by a learnt gain."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps
        self._eps = torch.tensor(eps, dtype=torch.float32, device="cpu")  # with it an operation begins sooner

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # x / sqrt(mean(x^2) + eps) * weight
        wide = x if x.element_size() > 2 else x.float()  # CPUs have no fused kernel of it
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        y = wide * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (y if wide is x else y.to(x.dtype)) * self.weight

    def after(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + delta (..., E) and that normalised."""
        if kernels.small(x):
            return kernels.launch("rmsnorm", x, delta, self.weight, self.eps)
        x = x + delta
        return x, self(x)


class RoPE:
    """Rotate pairs of channels (i, i + D/2) by the angle position * frequency_i.

    A dot product of two rotated vectors depends on their distance only, which is why a cache may renumber its entries
    as long as it keeps their keys un-rotated. Source: arXiv 2104.09864; scaling as in Llama 3.1.
    """

    def __init__(self, config: Config, device=None):
        D = config.head_dim
        inv = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
        self.inv_freq = _scale_frequencies(inv, config.rope_scaling).to(device)  # (D/2,)
        self._table = None  # cosines and signed sines of positions 0..n-1, (2, n, D)
        self._halves = None
        self._last = [(None, None, None)] * 2  # what was asked for last, by tensor and by slice
        self.reserve(config.context)

    def reserve(self, n: int) -> None:
        """Make sure that positions 0..n-1 have their angles."""
        if self._table is None or n > self._table.shape[1]:
            n = 1 << (n - 1).bit_length() if self._table is not None else n
            angle = torch.arange(n, device=self.inv_freq.device).float()[:, None] * self.inv_freq  # (n, D/2)
            cos, sin = angle.cos(), angle.sin()
            self._table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])

    def tables(self, pos: Tensor | slice, dtype=torch.float32) -> tuple[Tensor, Tensor]:
        """Return the cosines and signed sines of integer positions, (B, 1 or Hkv, T, D) each."""
        range_ = isinstance(pos, slice)
        if range_:
            pos = (pos.start, pos.stop)
        key, dt, out = self._last[range_]  # tensors of positions are never changed in place
        if dt is dtype and (key is pos or range_ and key == pos):  # the layers of one step ask for the same positions
            return out
        table = self._table[:, None, None, pos[0] : pos[1]] if range_ else self._table[:, pos]
        table = table if table.dim() == 5 else table.unsqueeze(2)
        out = tuple(table.to(dtype).unbind(0))
        self._last[range_] = (pos, dtype, out)
        return out

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions 0..n-1 as a kernel wants them, fp32 (n, D / 2) each."""
        if self._halves is None or len(self._halves[0]) < self._table.shape[1]:
            D = self._table.shape[-1]
            self._halves = self._table[0, :, : D // 2].contiguous(), self._table[1, :, D // 2 :].contiguous()
        return self._halves

    def __call__(self, x: Tensor, pos: Tensor | slice) -> Tensor:
        """Rotate x (B, H, T, D) by pos: integers (B, T), (B, Hkv, T) where KV heads differ, or a slice of positions."""
        cos, sin = self.tables(pos, x.dtype)  # (B, 1 or Hkv, T, D)
        if 1 < cos.shape[1] < x.shape[1]:  # the query heads of a group share their KV head's positions
            cos, sin = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (cos, sin))
        # (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of x, which rolling by D/2 exchanges
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def _scale_frequencies(inv: Tensor, scaling: dict | None) -> Tensor:
    if not scaling:
        return inv
    if scaling["type"] == "factors":  # a GGUF file stores llama3 scaling as its effect, a divisor per frequency
        return inv / torch.tensor(scaling["factors"])
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return inv / factor
    # llama3: long wavelengths are stretched by the factor, short ones kept, those between blended linearly
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * inv / (2 * math.pi)  # full turns in the old context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv / factor + blend * inv


class Linear(Light):
    """x W^T + b. A product with one row is bound by reading W, which is laid out so that a CPU reads it quickly."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.columns = False  # of W lie one behind the other, not its rows
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        for p in self.parameters():
            nn.init.uniform_(p, -(n_in**-0.5), n_in**-0.5)

    def arrange(self, device: torch.device) -> None:
        """Lay W out by columns if it is for a CPU and its rows are short; shape and values stay.

        A product with a short row is over before the processor has begun to read ahead.
        """
        w, (n_out, n_in) = self.weight, self.weight.shape
        fits = w.dtype == torch.bfloat16 or (w.element_size() > 2 and n_out > n_in)
        self.columns = AVX and device.type == "cpu" and n_in < SHORT and fits
        if self.columns:
            w.data = w.data.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, rows = self.weight, self.bias, x.numel() // x.shape[-1]
        by_hand = rows == 1 if x.element_size() == 2 else self.columns and 1 < rows < 4
        if not by_hand or not x.is_cpu or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        if rows > 1:  # still quicker row by row
            y = torch.bmm(x.reshape(rows, 1, -1), weight.t().expand(rows, -1, -1))
        elif self.columns and x.dtype is torch.bfloat16:
            y = _sum_columns(weight, x.view(-1))
        else:
            y = torch.mv(weight, x.view(-1))
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


SHORT = 2048  # inputs
AVX = "AVX" in torch.backends.cpu.get_cpu_capability()  # where this was measured


def _sum_columns(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight (n_out, n_in), which lies by columns, times x (n_in,) in bf16: (n_out,).

    The quickest sum of columns in PyTorch is that of embeddings: weighted, in fp32, a bag of them for each thread. What
    the threads found is rounded to bf16 before it is added up, as PyTorch does by default in long sums on GPUs.
    """
    index, start = _bags(weight.shape[1], torch.get_num_threads())
    return torch._embedding_bag_forward_only(weight.t(), index, start, False, 0, False, x)[0].sum(0)


@lru_cache(maxsize=16)
def _bags(n: int, parts: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n, device="cpu"), torch.arange(parts, device="cpu") * n // parts


class Attention(Light):
    """Grouped-query attention whose past lives in the cache."""

    def __init__(self, c: Config, rope: RoPE):
        super().__init__()
        self.rope = rope
        self.heads, self.head_dim = (c.n_heads, c.n_kv_heads, c.n_kv_heads), c.head_dim
        self.widths = tuple(n * c.head_dim for n in self.heads)
        self.qkv = Linear(c.hidden, sum(self.widths), bias=c.qkv_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.hidden, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None

    def forward(self, x: Tensor, pos: Tensor, cache) -> Tensor:
        """Attend from x (B, T, E) at positions pos (B, T) to everything `cache` (a LayerCache) remembers."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2).split_with_sizes(self.heads, 1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # (B, H, T, D), (B, Hkv, T, D)
        pos = cache.append(k, v, x, pos)  # remember
        o = cache.attend(self.rope(q, pos), pos)  # look back: (B, H, T, D)
        cache.compress(q, pos)  # forget, then pack
        return self.o(o.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(Light):
    """down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_up = Linear(c.hidden, 2 * c.ffn)
        self.down = Linear(c.ffn, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        if kernels.small(x):
            return self.down(kernels.launch("swiglu", both))
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class Block(Light):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, c: Config, rope: RoPE):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.hidden, c.eps), Attention(c, rope)
        self.ffn_norm, self.ffn = RMSNorm(c.hidden, c.eps), SwiGLU(c)

    def forward(self, x: Tensor, pos: Tensor, cache) -> Tensor:
        x, h = self.ffn_norm.after(x, self.attn(self.attn_norm(x), pos, cache))
        return x + self.ffn(h)


class Decoder(nn.Module):
    """A Llama-family language model. `model(ids, cache)` reads new tokens and returns their logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.rope = config, RoPE(config, torch.device("cpu"))
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config, self.rope) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.head = Linear(config.hidden, config.vocab)
        if config.tied:
            self.head.weight = self.embed.weight

    def arrange(self, device="cpu") -> Decoder:
        """Lay out every matrix for products on `device`, see `Linear.arrange`; return the model."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.arrange(torch.device(device))
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor, cache, last: bool = False) -> Tensor:
        """Read ids (B, T) after what `cache` (a KVCache, changed in place) holds; return logits (B, T, vocab).

        With `last` only the logits of the last position are computed: (B, 1, vocab).
        """
        pos = cache.begin(ids)  # (B, T)
        x = self.embed(ids)  # (B, T, E)
        for i, block in enumerate(self.layers):
            x, pos = cache.before_layer(i, x, pos)
            x = block(x, pos, cache.layers[i])
            x, pos = cache.after_layer(i, x, pos)
        cache.end()
        return self.head(self.norm(x[:, -1:] if last else x))

    def slots(self) -> dict[str, Tensor]:
        """Return a writable view for every tensor of a checkpoint, under its name in the hub's layout.

        Queries, keys and values share one matrix here, as do gate and up; the views are where the parts go.
        """
        c, out = self.config, {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        if not c.tied:
            out["lm_head.weight"] = self.head.weight
        for i, block in enumerate(self.layers):
            p, a = f"model.layers.{i}.", block.attn
            for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
                parts = getattr(a.qkv, kind).data.split(a.widths)
                out |= {f"{p}self_attn.{n}_proj.{kind}": t for n, t in zip("qkv", parts, strict=True)}
            gate, up = block.ffn.gate_up.weight.data.chunk(2)
            out |= {p + "mlp.gate_proj.weight": gate, p + "mlp.up_proj.weight": up}
            out |= {p + "mlp.down_proj.weight": block.ffn.down.weight, p + "self_attn.o_proj.weight": a.o.weight}
            out |= {p + "input_layernorm.weight": block.attn_norm.weight}
            out |= {p + "post_attention_layernorm.weight": block.ffn_norm.weight}
            if c.o_bias:
                out[p + "self_attn.o_proj.bias"] = a.o.bias
            if c.qk_norm:
                out |= {p + "self_attn.q_norm.weight": a.q_norm.weight, p + "self_attn.k_norm.weight": a.k_norm.weight}
        return {name: t.detach() for name, t in out.items()}
