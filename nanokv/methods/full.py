"""Keep every key and value as the model made them.

Paper: none; the baseline every other method is measured against.
Axis: none
Idea: The keys and values of past tokens do not change, so store them instead of computing them again.
Stores: k and v, (Hkv, N, D) each, in the model's dtype; keys rotated, unless a policy renumbers.
Bytes: payload = 2 * N * Hkv * D * itemsize per layer, N live entries per KV head. Unused: at most max(16, N / 16) spare
    slots per KV head beyond N, forgotten entries not yet reclaimed among them.
Acts: never. The first generated token sees the exact prompt.
Differs: -
"""

import torch

from nanokv import kernels
from nanokv.cache import Rows, Storage


class Full(Storage):
    """Hold keys and values of each row in one growing buffer."""

    writable = True

    def reset(self):
        self.kv = Rows(self.cache.n_rows)

    def store(self, k, v, x):
        self.kv.append(k=k.flatten(0, 1), v=v.flatten(0, 1))

    def store_rotated(self, k, v, pos):
        R, T = self.cache.n_rows, k.shape[2]
        if not self.kv.data or pos.dim() > 2:  # the buffers come with the first entries; pads have no angle
            return False
        slot = torch.tensor(self.kv.grow(T), device=k.device)
        pos = pos.clamp(min=0)[:, None].expand(*k.shape[:3]).reshape(R, T)
        kv = k.flatten(0, 1), v.flatten(0, 1)
        kernels.launch("rope_append", *kv, *self.cache.rope.halves(), pos, self.kv.data["k"], self.kv.data["v"], slot)
        return True

    def read(self):
        k, v = self.kv["k"], self.kv["v"]
        return k.view(self.cache.B, -1, *k.shape[1:]), v.view(self.cache.B, -1, *v.shape[1:])

    def read_row(self, r):
        return self.kv.row("k", r), self.kv.row("v", r)

    def write(self, index, k, v):
        self.kv.put("k", index, k)
        self.kv.put("v", index, v)

    def drop(self, live):
        self.kv.keep(live)
        return live

    def slide(self, first, gone):
        if self.kv.equal:
            self.kv.slide(first, gone)
        return self.kv.equal

    def attend_triton(self, q, pos, probs):
        where = self.kv.data["k"], self.kv.data["v"], *kernels.where(self.kv, q.device)
        if not self.cache.renumbers:
            return kernels.step("decode", self.cache, q, pos, probs, *where)
        cos, sin = self.cache.rope.halves()  # keys are held un-rotated
        return kernels.step("decode_rope", self.cache, q, pos, probs, *where, cos=cos, sin=sin)

    def bytes(self):
        k = self.kv.data["k"]
        return {"payload": 2 * sum(self.cache.counts) * k.shape[-1] * k.element_size()}
