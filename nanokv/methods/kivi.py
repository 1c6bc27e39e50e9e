"""Quantise keys per channel and values per token to 2, 4 or 8 bits, and keep the newest tokens exact.

Paper: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750
Axis: bits
Idea: A few key channels are large for every token, so the tokens of one channel share a scale. Values have no such
    channels, so the channels of one token share a scale. A window of the newest tokens stays exact, because a key group
    needs `group` tokens to fill and because nearby tokens matter most.
Stores: per KV head, with b bits, group size g, residual length R. Keys: groups of g tokens, codes (g * b / 32, D) int32
    with an fp16 scale and minimum per channel. Values: per token, codes (D * b / 32) int32 with an fp16 scale and
    minimum per g channels. Residual: the last T mod R keys and the last R values in the model's dtype.
Bytes: a quantised key or value takes D*b/8 + 4*D/g per KV head, codes and scales. After T tokens Tk = T - T % R keys
    and Tv = max(0, T - R) values are quantised: (Tk + Tv) * (D*b/8 + 4*D/g) + (2*T - Tk - Tv) * D * itemsize per KV
    head. Unused: spare slots of these buffers.
Acts: the prompt is read in full precision and packed when its last token is in; the first generated token sees the
    exact prompt. Then, after every step, the oldest value beyond R is packed, and all keys once there are R exact ones.
Differs: scales and minima are rounded to fp16 before codes are computed, so that codes fit the scales that are stored.
    Entries that a policy forgets free their memory with the last entry of their key group. 8 bits are offered too.
"""

import torch

from nanokv.cache import Rows, Storage


def quantise(x, bits):
    """Quantise groups x (..., g) asymmetrically; return codes (..., g) in 0..2^bits-1, scale and minimum fp16 (...)."""
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    low = low.half()
    scale = ((high - low.float()) / (2**bits - 1)).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a constant group has codes 0
    codes = ((x - low.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.int(), scale, low


def pack(codes, bits):
    """Pack codes (..., n, m) into int32 words (..., n * bits / 32, m); code j of word w comes from j * words + w."""
    per = 32 // bits
    codes = codes.unflatten(-2, (per, -1))  # (..., per, words, m)
    shifts = torch.arange(0, 32, bits, device=codes.device, dtype=torch.int32).view(-1, 1, 1)
    return (codes << shifts).sum(-3, dtype=torch.int32)  # disjoint bits, so the sum is an or


def unpack(words, bits):
    """Undo `pack`: int32 words (..., w, m) to codes (..., w * 32 / bits, m)."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32).view(-1, 1, 1)
    return ((words.unsqueeze(-3) >> shifts) & (2**bits - 1)).flatten(-3, -2)


FIELDS = ("code", "scale", "low")


class KIVI(Storage):
    """bits: 2, 4 or 8; group: tokens per key scale and channels per value scale; residual: tokens kept exact."""

    def __init__(self, bits: int = 2, group: int = 32, residual: int = 128):
        if bits not in (2, 4, 8):
            raise ValueError(f"kivi: bits must be 2, 4 or 8, got {bits}")
        if group < 1 or group * bits % 32:
            raise ValueError(f"kivi: group must be a multiple of {32 // bits} at {bits} bits, got {group}")
        if residual < group or residual % group:
            raise ValueError(f"kivi: residual must be a multiple of group = {group}, got {residual}")
        self.bits, self.group, self.residual = bits, group, residual

    def check(self, config):
        if config.head_dim % self.group or config.head_dim * self.bits % 32:
            raise NotImplementedError(
                f"kivi: group {self.group} does not divide this model's head_dim {config.head_dim}"
            )

    @classmethod
    def exact(cls, config):
        return {"residual": 32 * config.context}

    def reset(self):
        R = self.cache.n_rows
        self.k_new, self.v_new = Rows(R), Rows(R)  # exact
        self.k_old, self.v_old = Rows(R, least=self.residual // self.group), Rows(R)  # a slot is a key group; a value

    def store(self, k, v, x):
        self.k_new.append(x=k.flatten(0, 1))
        self.v_new.append(x=v.flatten(0, 1))

    def pack(self):
        if self.cache.phase == "prompt":
            return
        whole = [n - n % self.residual for n in self.k_new.n]
        for rows, k in self.k_new.pop("x", whole):  # (rows, t, D)
            codes, scale, low = quantise(k.unflatten(1, (-1, self.group)).transpose(2, 3), self.bits)  # (.., t/g, D, g)
            self.k_old.append(rows, code=pack(codes.transpose(2, 3), self.bits), scale=scale, low=low)
        late = [max(0, n - self.residual) for n in self.v_new.n]
        for rows, v in self.v_new.pop("x", late):
            codes, scale, low = quantise(v.unflatten(-1, (-1, self.group)), self.bits)  # (rows, t, D/g, g)
            self.v_old.append(rows, code=pack(codes.flatten(-2)[..., None], self.bits)[..., 0], scale=scale, low=low)

    def _join(self, old_k, new_k, old_v, new_v):
        """Dequantise and append the exact part; olds are (code, scale, low) or None, all (..., slots, ...)."""
        if old_k is not None:
            code, scale, low = old_k
            k = unpack(code, self.bits) * scale.float()[..., None, :] + low.float()[..., None, :]  # (..., t/g, g, D)
            new_k = torch.cat([k.flatten(-3, -2).to(new_k.dtype), new_k], -2)
        if old_v is not None:
            code, scale, low = old_v
            v = unpack(code[..., None], self.bits)[..., 0].unflatten(-1, (-1, self.group))  # (..., t, D/g, g)
            v = v * scale.float()[..., None] + low.float()[..., None]
            new_v = torch.cat([v.flatten(-2).to(new_v.dtype), new_v], -2)
        return new_k, new_v

    def read_row(self, r):
        old = [tuple(old.row(f, r) for f in FIELDS) if old.data else None for old in (self.k_old, self.v_old)]
        return self._join(old[0], self.k_new.row("x", r), old[1], self.v_new.row("x", r))

    def read(self):
        B = self.cache.B
        if self.cache.equal and all(rows.equal for rows in self._parts()):
            old = [tuple(old[f] for f in FIELDS) if old.data else None for old in (self.k_old, self.v_old)]
            k, v = self._join(old[0], self.k_new["x"], old[1], self.v_new["x"])
        else:
            pad = torch.nn.utils.rnn.pad_sequence
            rows = [self.read_row(r) for r in range(self.cache.n_rows)]
            k, v = (pad([row[i] for row in rows], batch_first=True) for i in (0, 1))
        return k.unflatten(0, (B, -1)), v.unflatten(0, (B, -1))

    def drop(self, live):
        parts = [([n * self.group for n in self.k_old.n], self.k_old), (self.k_new.n, self.k_new),
                 (self.v_old.n, self.v_old), (self.v_new.n, self.v_new)]  # fmt: skip
        rest = live.clone()
        for r, n in enumerate(parts[0][0]):  # a key group goes when none of its entries lives
            rest[r, :n] = live[r, :n].view(-1, self.group).any(-1).repeat_interleave(self.group)
        for i, (counts, rows) in enumerate(parts):
            first = [0] * len(counts) if i % 2 == 0 else parts[i - 1][0]
            mask = rest.new_zeros(len(counts), max(counts))
            for r, (lo, n) in enumerate(zip(first, counts, strict=True)):
                mask[r, :n] = rest[r, lo : lo + n]
            if rows is self.k_old:
                mask = mask[:, :: self.group]
            if rows.data and not all(mask[r, : rows.n[r]].all() for r in range(len(counts))):
                rows.keep(mask)
        return rest

    def trim(self):
        for rows in self._parts():
            rows.trim()

    def _parts(self):
        return self.k_new, self.v_new, self.k_old, self.v_old

    def bytes(self):
        old = (self.k_old, self.v_old)
        return {
            "payload": sum(rows.used("code") for rows in old),
            "scales": sum(rows.used("scale", "low") for rows in old),
            "residual": self.k_new.used() + self.v_new.used(),
        }
