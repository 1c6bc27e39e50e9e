"""Store quantised layer inputs, and compute keys and values from them again when they are needed.

Paper: XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, arXiv 2508.10395
Axis: bits
Idea: Keys and values are both linear functions of one vector, the layer's input x. Where x is not wider than the two
    together, store x. Where it is (grouped queries), store its coordinates in the row spaces of W_k and W_v, which lose
    nothing and are as wide as keys and values: W_k = U_k M_k by a singular value decomposition, z_k = x U_k,
    K = z_k M_k. Both are smoother than keys and values, and bear fewer bits.
Stores: per sequence and layer, for all KV heads together, C = Hkv * D wide, with b bits and group size g. Latent mode:
    z_k with an fp16 scale and minimum per channel and g tokens, z_v with one per token and g channels; each r = min(E,
    C) wide. x mode: x, E wide, per token and g channels. The first n_sink and the last `residual` tokens (none, unless
    told), and what does not fill g tokens yet, are exact. Constants: U_k, U_v, M_k, M_v, fp32, in latent mode.
Bytes: with w = E in x mode, 2 * r in latent mode, and Tq = T - T % g: payload = Tq * w * b / 8, scales = Tq * w * 4 /
    g, residual = (T - Tq) * w * itemsize per sequence and layer. bits=16 quantises nothing: Tq = 0.
Acts: the prompt is read exactly and quantised, but for the last T mod g tokens, when its last token is in: the first
    generated token sees the exact prompt. Then a group is quantised whenever there are g exact tokens. Every step
    computes the keys of all tokens again; values are mixed first and multiplied by M_v once per query.
Differs: g is 64 (the paper's 128 does not divide the default model's 192 channels). XQuant-CL (differences between
    layers) is left out. x is what enters the projections, after the norm. Values wait for the group of their keys to be
    complete. An entry that a policy forgets in one KV head stays until it is forgotten in all, and, once quantised in
    latent mode, until its whole group is: policies that keep different tokens per head, or scattered ones, save less
    memory here than elsewhere. mode="auto" takes x if E <= 2 * C. In latent mode a prompt in 16 bits is read exactly
    but for the rounding of z to 16 bits.
"""

from dataclasses import dataclass

import torch

from nanokv import attention, quant
from nanokv.method import Storage, one_of
from nanokv.packed import Packed

# weight -> (U, M), so that caches share them; to be cleared by whoever changes weights in place
FACTORS = torch.utils.weak.WeakTensorKeyDictionary()


def factor(weight):
    """Split the matrix W (C, E) of a projection into U (E, r), orthonormal, and M (r, C), with W^T = U M, fp32."""
    if weight not in FACTORS or FACTORS[weight][0].device != weight.device:
        U, S, B = torch.linalg.svd(weight.detach().double().T, full_matrices=False)
        FACTORS[weight] = U.float(), (S[:, None] * B).float()
    return FACTORS[weight]


@dataclass
class XQuant(Packed):
    """bits: 2 to 8, or 16 for none; group: tokens per scale of z_k, channels per scale else; mode: latent, x, auto."""

    bits: int = 4
    group: int = 64
    n_sink: int = 0
    residual: int = 0
    mode: str = "auto"
    limits = Packed.limits | {"bits": one_of(*range(2, 9), 16), "mode": one_of("auto", "latent", "x")}
    raw = joint = True
    derived = ("attn", "factors")

    def __post_init__(self):
        super().__post_init__()
        if bits := next((b for b in self.width.values() if self.group * b % 8), 0):
            raise ValueError(f"xquant: group must fill whole bytes, and {self.group} numbers of {bits} bits do not")
        if self.bits == 16 and self.bits_k + self.bits_v:
            raise ValueError("xquant: bits must be below 16 where bits_k or bits_v is given")

    def check(self, config):
        width = config.hidden if self._by_x(config) else min(config.hidden, config.n_kv_heads * config.head_dim)
        if width % self.group:
            raise NotImplementedError(f"xquant: group {self.group} does not divide the {width} channels of an entry")

    @classmethod
    def exact(cls, config):
        return {"bits": 16}

    def on(self, bases):
        if bases:
            raise NotImplementedError(f"xquant stores layer inputs, not keys and values for {bases[0].name} to turn")
        return super().on(bases)

    def reset(self, cache):
        by_x, self.attn = self._by_x(cache.config), cache.attn
        self.factors = () if by_x else (factor(self.attn.k_proj.weight), factor(self.attn.v_proj.weight))
        self.slot = {"k": self.group, "v": 1}
        super().reset(cache)
        for kind in (self.first, self.old, self.new) if by_x else ():
            del kind["k"]  # x stands for both

    def store(self, counts, k, v, x):
        counts = counts[:: self.per]
        self.came = [a + b for a, b in zip(self.came, counts, strict=True)]
        for which, new in self.new.items():
            new.append(counts, x=(x.float() @ self._factors(which)[0]).to(x.dtype) if self.factors else x)

    def due(self, which, n):
        return 0 if self.bits == 16 else max(0, n - self.residual) // self.group * self.group

    def encode(self, x, which, at):
        return quant.encode(x, self.width[which], 0 if which == "k" else self.group)

    def decode(self, fields, which, at):
        group = 0 if which == "k" else self.group
        return quant.decode(**fields, bits=self.width[which], tokens=self.slot[which], group=group)

    def read(self):
        z_k, z_v = self.latents()
        return self._project(z_k, "k").flatten(0, 1), self._project(z_v, "v").flatten(0, 1)

    def attend(self, q, pos, cache):
        """Attend; in a step mix z_v and multiply the mixture by M_v, not every token's."""
        if q.shape[2] > 1:
            return Storage.attend(self, q, pos, cache)
        (z_k, z_v), head = self.latents(), torch.arange(q.shape[1], device=q.device)
        k = cache.rope(self._project(z_k, "k"), torch.where(cache.live, cache.pos, 0))
        mixed = attention.attend(q, k, z_v[:, None].expand(-1, self.heads, -1, -1), *cache.mask(pos))  # (B, H, 1, r)
        o = self._project(mixed[:, :, 0], "v")  # (B, Hkv, H, D)
        return o[:, head // cache.config.group, head].unsqueeze(2)  # each query head by its own KV head's M_v

    def packed(self, which):
        return super().packed("v")

    def constants(self):
        return [t for pair in self.factors for t in pair]

    def latents(self):
        """Return z_k and z_v of all entries, (B, N, r), or x twice; shorter sequences are padded."""
        z = [self._joined(which) for which in self.new]
        return z[0], z[-1]

    def _project(self, z, which):
        """Compute keys, not rotated, or values, (B, Hkv, N, D), from z (B, N, r)."""
        proj = self.attn.k_proj if which == "k" else self.attn.v_proj
        if self.factors:
            y = (z.float() @ self._factors(which)[1]).to(z.dtype)
            y = y if proj.bias is None else y + proj.bias
        else:
            y = proj(z)
        y = y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.attn.k_norm(y) if which == "k" else y

    def _factors(self, which):
        return self.factors["kv".index(which)]

    def _by_x(self, config):
        return self.mode == "x" or (self.mode == "auto" and config.hidden <= 2 * config.n_kv_heads * config.head_dim)
