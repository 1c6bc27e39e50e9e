"""Quantise keys per channel and values per token to 2, 4 or 8 bits, and keep the newest tokens exact.

Paper: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750
Axis: bits
Idea: A few key channels are large for every token, so the tokens of one channel share a scale. Values have no such
    channels, so the channels of one token share a scale. A window of the newest tokens stays exact, because a key group
    needs `group` tokens to fill and because nearby tokens matter most.
Stores: per KV head, with b bits, group size g, residual length R. Codes of keys and of values are packed along tokens,
    (g * b / 8, D) bytes per g tokens. Keys have an fp16 scale and minimum per channel and g tokens, values per token
    and g channels. Residual: the last T mod R keys and the last R values in the model's dtype.
Bytes: a quantised key or value takes D*b/8 + 4*D/g per KV head, codes and scales. After T tokens Tk = T - T % R keys
    and Tv = max(0, T - R) values are quantised: (Tk + Tv) * (D*b/8 + 4*D/g) + (2*T - Tk - Tv) * D * itemsize per KV
    head. Unused: spare slots of these buffers.
Acts: the prompt is read in full precision and packed when its last token is in; the first generated token sees the
    exact prompt. Then, after every step, the oldest value beyond R is packed, and all keys once there are R exact ones.
Differs: scales and minima are rounded to fp16 before codes are computed, so that codes fit the scales that are stored.
    8 bits are offered too. Where a policy forgets entries, a key group goes with its last entry; if less than half of
    what is stored lives, what lives is quantised again in new groups.
"""

import torch

from nanokv import kernels
from nanokv.cache import Rows, Storage
from nanokv.quant import PerChannel, PerToken


class KIVI(Storage):
    """bits: 2, 4 or 8; group: tokens per key scale and channels per value scale; residual: tokens kept exact."""

    def __init__(self, bits: int = 2, group: int = 32, residual: int = 128):
        if bits not in (2, 4, 8):
            raise ValueError(f"kivi: bits must be 2, 4 or 8, got {bits}")
        if group < 1 or group * bits % 8:
            raise ValueError(f"kivi: group must be a positive multiple of {8 // bits} at {bits} bits, got {group}")
        if residual < group or residual % group:
            raise ValueError(f"kivi: residual must be a multiple of group = {group}, got {residual}")
        self.bits, self.group, self.residual = bits, group, residual

    def check(self, config):
        if config.head_dim % self.group:
            raise NotImplementedError(f"kivi: group {self.group} does not divide head_dim {config.head_dim}")

    @classmethod
    def exact(cls, config):
        return {"residual": 32 * config.context}

    def reset(self):
        R = self.cache.n_rows
        self.k_new, self.v_new = Rows(R), Rows(R)  # exact
        self.k_old, self.v_old = PerChannel(R, self.bits, self.group), PerToken(R, self.bits, self.group)

    def store(self, k, v, x):
        self.k_new.append(x=k.flatten(0, 1))
        self.v_new.append(x=v.flatten(0, 1))

    def pack(self):
        if self.cache.phase == "prompt":
            return
        for rows, k in self.k_new.pop("x", [n - n % self.residual for n in self.k_new.n]):  # (rows, t, D)
            self.k_old.add(rows, k)
        for rows, v in self.v_new.pop("x", [max(0, n - self.residual) for n in self.v_new.n]):
            self.v_old.add(rows, v)

    def read_row(self, r):
        k, v = self.k_new.row("x", r), self.v_new.row("x", r)
        k = torch.cat([self.k_old.read(r).to(k.dtype), k]) if self.k_old.n[r] else k
        return k, torch.cat([self.v_old.read(r).to(v.dtype), v]) if self.v_old.n[r] else v

    def attend(self, q, pos):
        c = self.cache
        if c.phase != "decode" or c.renumbers or not all(rows.equal for rows in self._rows()) or not any(self.v_old.n):
            return super().attend(q, pos)
        B, H, T, D = q.shape
        x = q.float().reshape(c.n_rows, -1, D) / D**0.5  # (R, G*T, D)
        s = x @ self.k_new["x"].float().mT
        s = torch.cat([self.k_old.dot(x), s], -1) if any(self.k_old.n) else s  # (R, G*T, N)
        p, n = c.masked(s, pos).softmax(-1), self.v_old.n[0]
        return (self.v_old.mix(p[..., :n]) + p[..., n:] @ self.v_new["x"].float()).view(B, H, T, D).to(q.dtype)

    def attend_triton(self, q, pos, probs):
        if not any(self.v_old.n + self.k_old.n):  # nothing is quantised yet
            return super().attend_triton(q, pos, probs)
        if self.cache.renumbers:
            raise NotImplementedError("kivi: no kernel rotates quantised keys, which renumbering needs")
        held = {"bits": self.bits, "group": self.group, "length": kernels.lengths(self.cache.n_slots, q.device)}
        held |= self.k_old.for_kernel(q.device) | self.v_old.for_kernel(q.device)
        for name, rows in (("k_new", self.k_new), ("v_new", self.v_new)):
            held |= {name: rows.data["x"], f"{name}_start": kernels.places(rows, q.device)}
        return kernels.step("decode_kivi", self.cache, q, pos, probs, **held)

    def drop(self, live):
        rest = live.clone()
        for r, n in enumerate(self.k_old.n):
            rest[r, :n] = live[r, :n].unflatten(0, (-1, self.group)).any(-1).repeat_interleave(self.group)
        lives, stays = int(live.sum()), rest.sum(1).tolist()
        even = self.cache.phase != "decode" or not self.cache.equal or len(set(stays)) == 1  # quick rows stay equal
        if not even or 2 * lives < sum(stays):
            return self._requantise(live) if 2 * lives < sum(self.cache.n_slots) else live | True
        for old, new in ((self.k_old, self.k_new), (self.v_old, self.v_new)):
            old_mask, new_mask = (live.new_zeros(len(live), max(n)) for n in (old.n, new.n))
            for r, (n, m) in enumerate(zip(old.n, new.n, strict=True)):
                old_mask[r, :n], new_mask[r, :m] = rest[r, :n], rest[r, n : n + m]
            if not old_mask.all():
                old.keep(old_mask)
            new.keep(new_mask)
        return rest

    def _requantise(self, live):
        """Keep what lives and nothing else. Rows with equally many entries get equally many quantised ones."""
        kept = [[t[live[r, : len(t)]] for t in self.read_row(r)] for r in range(len(live))]
        old = [[int(live[r, : old.n[r]].sum()) for r in range(len(live))] for old in (self.k_old, self.v_old)]
        equal = len({len(k) for k, _ in kept}) == 1
        self.reset()
        for rows in [list(range(len(live)))] if equal else [[r] for r in range(len(live))]:
            k, v = (torch.stack([kept[r][i] for r in rows]) for i in (0, 1))
            nk, nv = (min(n[r] for r in rows) for n in old)
            nk -= nk % self.group
            self.k_old.add(rows, k[:, :nk])
            self.v_old.add(rows, v[:, :nv])
            self.k_new.append(rows, x=k[:, nk:])
            self.v_new.append(rows, x=v[:, nv:])
        return live

    def trim(self):
        for rows in self._rows():
            rows.trim()

    def _rows(self):
        return self.k_new, self.v_new, self.k_old.rows, self.v_old.codes, self.v_old.stats

    def bytes(self):
        codes = (sum(self.k_old.n) + sum(self.v_old.n)) * self.k_new.data["x"].shape[-1] * self.bits // 8
        scales = self.k_old.rows.used("scale", "low") + self.v_old.stats.used()
        return {"payload": codes, "scales": scales, "residual": self.k_new.used() + self.v_new.used()}
