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

from dataclasses import dataclass

from nanokv import quant
from nanokv.packed import Packed


@dataclass
class KIVI(Packed):
    """Keys by channel, values by token. group: tokens per key scale and channels per value scale."""

    bits: int = 2
    n_sink: int = 0
    residual: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.residual < self.group or self.residual % self.group:
            raise ValueError(f"kivi: residual must be a multiple of group = {self.group}, got {self.residual}")
        self.slot["k"] = self.group

    def due(self, which, n):
        """Keys go in whole residuals, values one by one."""
        return n - n % self.residual if which == "k" else super().due(which, n)

    def encode(self, x, which, at):
        return quant.encode(x, self.width[which], 0 if which == "k" else self.group)

    def decode(self, fields, which, at):
        group = 0 if which == "k" else self.group
        return quant.decode(**fields, bits=self.width[which], tokens=self.slot[which], group=group)
