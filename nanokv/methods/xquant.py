"""Store quantised layer inputs, and compute keys and values from them again when they are needed.

Paper: XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, arXiv 2508.10395
Axis: bits
Idea: Keys and values are both linear functions of one vector, the layer's input x. Where x is not wider than the two
    together, store x. Where it is (grouped queries), store its coordinates in the row spaces of W_k and W_v, which lose
    nothing and are as wide as keys and values: W_k = U_k M_k by a singular value decomposition, z_k = x U_k,
    K = z_k M_k. Both are smoother than keys and values, and bear fewer bits.
Stores: per sequence and layer, for all KV heads together, C = Hkv * D wide, with b bits and group size g. Latent mode:
    z_k with an fp16 scale and minimum per channel and g tokens, z_v with one per token and g channels; each r = min(E,
    C) wide. x mode: x, E wide, per token and g channels. The last T mod g tokens are exact. Constants: U_k, U_v, M_k,
    M_v, fp32, in latent mode.
Bytes: with w = E in x mode, 2 * r in latent mode, and Tq = T - T % g: payload = Tq * w * b / 8, scales = Tq * w * 4 /
    g, residual = (T - Tq) * w * itemsize per sequence and layer. bits=16 quantises nothing: payload = T * w * itemsize.
Acts: the prompt is read exactly and quantised, but for the last T mod g tokens, when its last token is in: the first
    generated token sees the exact prompt. Then a group is quantised whenever there are g exact tokens. Every step
    computes the keys of all tokens again; values are mixed first and multiplied by M_v once per query.
Differs: XQuant-CL (differences between layers) is left out. x is what enters the projections, after the norm. Values
    wait for the group of their keys to be complete. An entry that a policy forgets in one KV head stays until it is
    forgotten in all, and, once quantised, until its whole group is: policies that keep different tokens per head, or
    scattered ones, save less memory here than elsewhere. mode="auto" takes x if E <= 2 * C. In latent mode a prompt in
    16 bits is read exactly but for the rounding of z to 16 bits. No 3 bits, which do not fill bytes.
"""

import torch

from nanokv import attention
from nanokv.cache import Rows, Storage
from nanokv.quant import PerChannel, PerToken

# qkv weight -> (U, M_k, M_v), so that caches share them; to be cleared by whoever changes weights in place
FACTORS = torch.utils.weak.WeakTensorKeyDictionary()


def factor(weight, widths):
    """Split W_k (C, E) into U_k (E, r) and M_k (r, C), W_v likewise; return [U_k | U_v], M_k, M_v, fp32."""
    if weight not in FACTORS or FACTORS[weight][0].device != weight.device:
        parts = [torch.linalg.svd(W.detach().double().T, full_matrices=False) for W in weight.split(widths)[1:]]
        U = torch.cat([U for U, _, _ in parts], 1).float()
        FACTORS[weight] = U, *((S[:, None] * Bt).float() for _, S, Bt in parts)
    return FACTORS[weight]


class XQuant(Storage):
    """bits: 2, 4, 8, or 16 for none; group: tokens per scale of z_k, channels per scale else; mode: latent, x, auto."""

    derived, early = ("bases",), True

    def __init__(self, bits: int = 4, group: int = 64, mode: str = "auto"):
        if bits not in (2, 4, 8, 16) or mode not in ("auto", "latent", "x"):
            raise ValueError(f"xquant: bits must be 2, 4, 8 or 16, mode auto, latent or x, got {bits} and {mode}")
        if group < 1 or group * bits % 8:
            raise ValueError(f"xquant: group must be a multiple of {8 // min(bits, 8)} at {bits} bits, got {group}")
        self.bits, self.group, self.mode = bits, group, mode

    def check(self, config):
        width = config.hidden if self._by_x(config) else min(config.hidden, config.n_kv_heads * config.head_dim)
        if width % self.group:
            raise NotImplementedError(f"xquant: group {self.group} does not divide the {width} channels of an entry")

    @classmethod
    def exact(cls, config):
        return {"bits": 16}

    def _by_x(self, config):
        return self.mode == "x" or (self.mode == "auto" and config.hidden <= 2 * config.n_kv_heads * config.head_dim)

    def reset(self):
        attn = self.cache.attn
        self.bases = () if self._by_x(self.cache.config) else factor(attn.qkv.weight, attn.widths)
        args = self.cache.B, self.bits, self.group
        self.new, self.k_old, self.v_old = Rows(args[0]), PerChannel(*args), PerToken(*args)  # exact z_k | z_v, or x

    def store(self, k, v, x):
        self.new.append(x=(x.float() @ self.bases[0]).to(x.dtype) if self.bases else x)

    def pack(self):
        if self.cache.phase == "prompt" or self.bits == 16:
            return
        for rows, z in self.new.pop("x", [n - n % self.group for n in self.new.n]):
            if self.bases:
                self.k_old.add(rows, z.chunk(2, -1)[0])
            self.v_old.add(rows, z.chunk(2, -1)[1] if self.bases else z)

    def _latents(self):
        """Return z_k and z_v of all slots (B, N, r), or x twice; shorter sequences are padded."""
        out = [self.new.row("x", b) for b in range(self.cache.B)]  # (t, w)
        for b, n in enumerate(self.v_old.n):
            if n:
                old = ([self.k_old.read(b)] if self.bases else []) + [self.v_old.read(b)]
                out[b] = torch.cat([torch.cat(old, -1).to(out[b].dtype), out[b]])  # (N, w)
        z = torch.nn.utils.rnn.pad_sequence(out, batch_first=True)
        return z.chunk(2, -1) if self.bases else (z, z)

    def _up(self, z, i):
        """Compute keys (i=0) or values (i=1) (B, Hkv, N, D), not rotated, from z (B, N, r)."""
        attn = self.cache.attn
        W = self.bases[i + 1] if self.bases else attn.qkv.weight.split(attn.widths)[i + 1].mT
        y = (z.to(W.dtype) @ W).to(z.dtype)
        y = y if attn.qkv.bias is None else y + attn.qkv.bias.split(attn.widths)[i + 1]
        return y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

    def _keys(self, z):
        c, k = self.cache, self._up(z, 0)
        k = c.attn.k_norm(k) if c.attn.k_norm else k
        return k if c.renumbers else c.rope(k, torch.where(c.live, c.token, 0))

    def read(self):
        zk, zv = self._latents()
        return self._keys(zk), self._up(zv, 1)

    def attend(self, q, pos):
        """Attend; in a decode step mix z_v and multiply the mixture by M_v, not every token's."""
        c, H = self.cache, q.shape[1]
        if q.shape[2] > 1 or c.renumbers:
            return super().attend(q, pos)
        zk, zv = self._latents()
        zv = zv[:, None].expand(-1, c.config.n_kv_heads, -1, -1)  # (B, Hkv, N, r)
        y = self._up(attention.attend(q, self._keys(zk), zv, c.mask(pos))[:, :, 0], 1)  # (B, Hkv, H, D)
        head = torch.arange(H, device=q.device)
        return y[:, head // c.config.group, head].unsqueeze(2)  # each query head by its own KV head's M_v

    def drop(self, live):
        rest = live.view(self.cache.B, -1, live.shape[-1]).any(1)  # (B, N): tokens that live in some head
        old, new = rest.new_zeros(len(rest), max(self.v_old.n)), rest.new_zeros(len(rest), self.new.size)
        for b, (n, m) in enumerate(zip(self.v_old.n, self.new.n, strict=True)):
            groups = rest[b, :n].view(-1, self.group)
            groups[:] = groups.any(-1, keepdim=True)
            old[b, :n], new[b, :m] = rest[b, :n], rest[b, n : n + m]
        if sum(self.v_old.n) > old.sum():
            self.v_old.keep(old)
            if self.bases:
                self.k_old.keep(old)
        self.new.keep(new)
        return rest.repeat_interleave(self.cache.n_rows // self.cache.B, 0)

    def trim(self):
        for rows in (self.new, self.k_old.rows, self.v_old.codes, self.v_old.stats):
            rows.trim()

    def bytes(self):
        old = {"payload": self.k_old.rows.used("code") + self.v_old.codes.used(),
               "scales": self.k_old.rows.used("scale", "low") + self.v_old.stats.used()}  # fmt: skip
        return old | {"residual" if self.bits < 16 else "payload": self.new.used()}

    def constants(self):
        return list(self.bases)
