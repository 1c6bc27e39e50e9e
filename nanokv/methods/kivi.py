"""Quantise keys per channel and values per token to 1 to 8 bits, and keep the newest tokens exact.

Paper: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750
Axis: bits
Idea: A few key channels are large for every token, so the tokens of one channel share a scale. Values have no such
    channels, so the channels of one token share a scale. A window of the newest tokens stays exact, because a key group
    needs `group` tokens to fill and because nearby tokens matter most.
Stores: per KV head, with b_k and b_v bits, group size g, residual length R. A slot of keys is g tokens, D * g * b_k / 8
    bytes of codes and an fp16 scale and minimum per channel; one of values is a token, D * b_v / 8 bytes of codes and a
    scale and minimum per g channels. Exact, in the model's dtype: the first n_sink tokens, the keys that do not fill R
    tokens yet, and the last R values.
Bytes: after T tokens of which S = min(T, n_sink) are sinks, Tk = (T - S) - (T - S) % R keys and Tv = max(0, T - S - R)
    values are quantised, per KV head: payload = (Tk * b_k + Tv * b_v) * D / 8, scales = (Tk + Tv) * 4 * D / g,
    residual = (2 * T - Tk - Tv) * D * itemsize. Unused: spare slots of these buffers.
Acts: the prompt is read in full precision and packed when its last token is in; the first generated token sees the
    exact prompt. Then, after every step, the oldest value beyond R is packed, and all keys once there are R exact ones.
Differs: scales and minima are rounded to fp16 before codes are computed, so that codes fit the scales that are stored.
    The authors have 2 and 4 bits, the same for keys and values, and no sinks; n_sink=0 is theirs. Nothing is quantised
    twice: where a policy forgets entries, a key group goes with its last entry, so scattered ones may hold up to
    `group` times what lives. In a basis of fewer channels, values have the largest groups that divide these.
"""

from dataclasses import dataclass

from nanokv import quant
from nanokv.packed import Packed


@dataclass
class KIVI(Packed):
    """Keys by channel, values by token. group: tokens per key scale and channels per value scale; residual: tokens."""

    bits: int = 2
    n_sink: int = 0
    residual: int = 128

    def __post_init__(self):
        super().__post_init__()
        if bits := next((b for b in self.width.values() if self.group * b % 8), 0):
            raise ValueError(f"kivi: group must fill whole bytes, and {self.group} numbers of {bits} bits do not")
        if self.residual < self.group or self.residual % self.group:
            raise ValueError(f"kivi: residual must be a multiple of group = {self.group}, got {self.residual}")
        self.slot["k"] = self.group

    def check(self, config):
        if config.head_dim % self.group:
            raise NotImplementedError(f"kivi: group {self.group} does not divide head_dim {config.head_dim}")

    def due(self, which, n):
        return n - n % self.residual if which == "k" else super().due(which, n)

    def encode(self, x, which, at):
        return quant.encode(x, self.width[which], 0 if which == "k" else self.group)

    def decode(self, fields, which, at):
        group = 0 if which == "k" else self.group
        return quant.decode(**fields, bits=self.width[which], tokens=self.slot[which], group=group)

    def kernel(self, q, pos, cache):
        from nanokv.kernels.decode import heads_of, rows_of  # imported only now: Triton may not be installed
        from nanokv.kernels.decode_codes import Codes, Exact, decode_codes

        if self.basis or cache.raw or any(self.first["k"].n):
            raise NotImplementedError("kivi's kernel takes no basis, no policy that rotates keys anew, and no sinks")
        codes, exact = [], []
        for which, new in self.new.items():
            old = self.old[which]
            if not old.data:  # nothing is packed yet
                none = new.data["x"].new_empty(0, self.slot[which], q.shape[-1])
                old.append([0] * len(old.n), **self.encode(none, which, None))
            codes.append(Codes(**old.data, start=old.where[0], n=old.where[1], bits=self.width[which]))
            exact.append(Exact(new.data["x"], new.where[0]))
        length = self.old["v"].where[1] + self.new["v"].where[1]  # of values, whose slots are tokens
        more = cache.visible(pos, q.shape[1] // cache.config.n_kv_heads)
        x, scale = rows_of(q, cache.n_rows), q.shape[-1] ** -0.5
        return heads_of(decode_codes(x, *codes, *exact, length, scale=scale, most=cache.N, **more), q)
