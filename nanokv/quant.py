"""Uniform quantisation in groups, and packing codes of 2, 4 or 8 bits densely into bytes."""

from functools import lru_cache

import torch
from torch import Tensor

from nanokv import kernels
from nanokv.cache import Rows


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups x (..., g) asymmetrically: codes uint8 (..., g) in 0..2^bits - 1, scale and minimum fp16 (...).

    Minimum and scale are rounded to fp16 first and codes computed with the rounded values, so that an element is off by
    at most scale / 2 plus that rounding. A constant group gets scale 1 and codes 0.
    """
    x = x.float().clamp(-65504, 65504)  # what fp16 can hold
    low, high = x.aminmax(dim=-1)
    low = low.half()
    base = low.float()
    scale = ((high - base) / (2**bits - 1)).half()
    scale = scale.masked_fill_(scale <= 0, 1.0)
    codes = ((x - base[..., None]) / scale.float()[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., n, m) into bytes (..., n * bits / 8, m): code j of byte row w is row j * (rows of bytes) + w.

    Rows far apart share a byte, so that unpacking writes whole runs of rows and loading reads runs of m bytes.
    """
    planes = codes.unflatten(-2, (8 // bits, -1)).unbind(-3)  # 8 / bits times (..., n * bits / 8, m)
    out = planes[0].clone()
    for j, plane in enumerate(planes[1:], 1):
        out |= plane << (j * bits)
    return out


def place(codes: Tensor, bits: int, group: int, at: list[int]) -> Tensor:
    """Pack codes (R, t, D) of t tokens, which begin at token at[r] of a group, by groups of `group` tokens.

    Returns bytes (R, groups, group * bits / 8, D) for the groups that the longest row needs, with codes 0 where there
    is no token.
    """
    R, t, D = codes.shape
    room = codes.new_zeros(R, -(-(max(at) + t) // group) * group, D)
    for r, first in enumerate(at):
        room[r, first : first + t] = codes[r]
    return pack(room.unflatten(1, (-1, group)), bits)


def unpack(packed: Tensor, bits: int, dtype=torch.uint8) -> Tensor:
    """Undo `pack`: bytes (..., w, m) to codes (..., w * 8 / bits, m) in any dtype."""
    per = 8 // bits
    out = packed.new_empty(*packed.shape[:-2], per, *packed.shape[-2:], dtype=dtype)  # (..., per, w, m)
    for j in range(per):
        plane = packed >> (j * bits) if j else packed
        out.select(-3, j).copy_(plane & (2**bits - 1) if j < per - 1 else plane)
    return out.flatten(-3, -2)


def planes(packed: Tensor, bits: int) -> Tensor:
    """Return codes as `unpack` does, in fp32 and where they stand: the j-th run of rows times 2^(bits * j), exactly.

    That is quicker than shifting them down; what is computed from them is multiplied by `unshift`, exactly too.
    """
    if bits == 8:
        return packed.float()
    return (packed.unsqueeze(-3) & _masks(bits, packed.device)).float().flatten(-3, -2)


@lru_cache
def _masks(bits: int, device) -> Tensor:
    masks = [(2**bits - 1) << j for j in range(0, 8, bits)]
    return torch.tensor(masks, dtype=torch.uint8, device=device)[:, None, None]


@lru_cache(maxsize=8)
def unshift(bits: int, group: int, device, n_groups: int = 1) -> Tensor:
    """Return the factors fp32 (n_groups * group,) by which `planes` of groups of codes are too large, inverted."""
    one = torch.arange(8 // bits, device=device).mul_(-bits).exp2().repeat_interleave(group * bits // 8)
    return one.repeat(n_groups)


class PerChannel:
    """Quantised vectors whose groups are `group` consecutive tokens of one channel: for keys.

    All vectors of a row are (t, D) with t a multiple of `group`. Held per group: codes (group * bits / 8, D) bytes,
    scale and minimum (D) fp16.
    """

    def __init__(self, n_rows: int, bits: int, group: int):
        self.bits, self.group = bits, group
        self.rows = Rows(n_rows, least=4)  # a slot is a group

    @property
    def n(self) -> list[int]:
        """Return the tokens held per row."""
        return [n * self.group for n in self.rows.n]

    def add(self, rows: list[int], x: Tensor) -> None:
        """Quantise x (len(rows), t, D) and append it to these rows."""
        x = x.unflatten(1, (-1, self.group))  # (rows, t/g, g, D)
        if out := kernels.packed("keys", x, self.bits):
            code, scale, low = out
        else:
            codes, scale, low = quantise(x.mT, self.bits)  # (rows, t/g, D, g), (rows, t/g, D)
            code = pack(codes.mT, self.bits)
        self.rows.append(rows, code=code, scale=scale, low=low)

    def read(self, r: int | None = None) -> Tensor:
        """Dequantise row r to fp32 (t, D), or all rows, of equal length, to (R, t, D)."""
        code, scale, low = (self._field(f, r) for f in ("code", "scale", "low"))
        x = unpack(code, self.bits, torch.float32)  # (..., t/g, g, D)
        return x.mul_(scale.float().unsqueeze(-2)).add_(low.float().unsqueeze(-2)).flatten(-3, -2)

    def dot(self, q: Tensor) -> Tensor:
        """Return q (R, n, D) @ read().mT as (R, n, t): scales and minima are multiplied into q, not into the codes."""
        scale, low = self._field("scale").float(), self._field("low").float()  # (R, t/g, D)
        codes = planes(self._field("code"), self.bits)  # (R, t/g, g, D)
        s = (q[:, None] * scale[:, :, None]) @ codes.mT  # (R, t/g, n, g)
        s = torch.addcmul((low @ q.mT)[..., None], s, unshift(self.bits, self.group, q.device))
        return s.transpose(1, 2).flatten(2)

    def for_kernel(self, device) -> dict[str, Tensor]:
        """Return what the kernel decode_kivi must know about keys."""
        fields = {f"k_{name}": self.rows.data[name] for name in ("code", "scale", "low")}
        return fields | {"k_start": kernels.places(self.rows, device), "k_len": kernels.lengths(self.n, device)}

    def keep(self, mask: Tensor) -> None:
        """Drop the groups of which no token is kept; mask (R, t)."""
        self.rows.keep(mask.unflatten(1, (-1, self.group)).any(-1))

    def _field(self, name: str, r: int | None = None) -> Tensor:
        return self.rows[name] if r is None else self.rows.row(name, r)


class PerToken:
    """Quantised vectors whose groups are `group` consecutive channels of one token: for values.

    Held per `group` tokens: codes (group * bits / 8, D) bytes, the last of which may have room left; per token: scale
    and minimum (D / group) fp16.
    """

    def __init__(self, n_rows: int, bits: int, group: int):
        self.bits, self.group = bits, group
        self.codes, self.stats = Rows(n_rows, least=4), Rows(n_rows)

    @property
    def n(self) -> list[int]:
        """Return the tokens held per row."""
        return self.stats.n

    def add(self, rows: list[int], x: Tensor) -> None:
        """Quantise x (len(rows), t, D) and append it to these rows."""
        at = self._filled(rows)
        if out := kernels.packed("values", x, self.bits, self.group, at):
            self._append(rows, at, *out)
            return
        codes, scale, low = quantise(x.unflatten(-1, (-1, self.group)), self.bits)  # (rows, t, D/g, g)
        self._add(rows, codes.flatten(-2), scale, low)

    def _filled(self, rows: list[int]) -> list[int]:
        """Return how many tokens of its last group each row has, 0 if that is full."""
        return [self.n[r] % self.group for r in rows]

    def _add(self, rows: list[int], codes: Tensor, scale: Tensor, low: Tensor) -> None:
        """Append codes (len(rows), t, D)."""
        at = self._filled(rows)
        if codes.shape[1] > 1 or not at[0] or not self._all(rows, at):
            self._append(rows, at, place(codes, self.bits, self.group, at), scale, low)
            return
        self.stats.append(rows, scale=scale, low=low)
        j, w = divmod(at[0], self.group * self.bits // 8)  # one token: into the byte where others wait for it
        self.codes["code"][:, -1, w] |= codes[:, 0] << (j * self.bits)

    def _append(self, rows: list[int], at: list[int], packed: Tensor, scale: Tensor, low: Tensor) -> None:
        """Append t tokens to each of these rows, packed (len(rows), groups, g * bits / 8, D) from at[i] of a group."""
        if len(set(at)) > 1:
            for i, r in enumerate(rows):
                n = -(-(at[i] + scale.shape[1]) // self.group)
                self._append([r], at[i : i + 1], packed[i : i + 1, :n], scale[i : i + 1], low[i : i + 1])
            return
        if at[0] and self._all(rows, at):  # the first group is there already, with codes 0 where tokens are to come
            self.codes["code"][:, -1] |= packed[:, 0]
        for i, r in enumerate([] if self._all(rows, at) or not at[0] else rows):
            self.codes.row("code", r)[-1] |= packed[i, 0]
        self.stats.append(rows, scale=scale, low=low)
        if packed.shape[1] > (at[0] > 0):
            self.codes.append(rows, code=packed[:, int(at[0] > 0) :])

    def _all(self, rows: list[int], at: list[int]) -> bool:
        """Say whether these are all rows, and alike, so that one operation reaches them."""
        return len(set(at)) == 1 and len(rows) == len(self.n) and self.codes.equal

    def read(self, r: int | None = None) -> Tensor:
        """Dequantise row r to fp32 (t, D), or all rows, of equal length, to (R, t, D)."""
        x, scale, low = self._parts(r)
        x = x.unflatten(-1, (-1, self.group))  # (..., t, D/g, g)
        return x.mul_(scale.float().unsqueeze(-1)).add_(low.float().unsqueeze(-1)).flatten(-2)

    def mix(self, p: Tensor) -> Tensor:
        """Return p (R, n, t) @ read() as (R, n, D): scales and minima are multiplied into p, not into the codes."""
        low, n_groups = self.stats["low"], self.codes.n[0]
        (R, n, t), S = p.shape, low.shape[-1]
        codes = planes(self.codes["code"], self.bits).flatten(1, 2)[:, :t]  # (R, t, D)
        scale = self.stats["scale"].mT.to(torch.float32, memory_format=torch.contiguous_format)  # (R, D/g, t)
        scale *= unshift(self.bits, self.group, p.device, n_groups)[:t]
        weighted = p[:, None] * scale[:, :, None]  # (R, D/g, n, t)
        o = (weighted.flatten(1, 2) @ codes).view(R, S, n, S, self.group)  # every scale with every group of channels,
        o = o.diagonal(dim1=1, dim2=3).transpose(2, 3)  # of which its own is wanted: (R, n, D/g, g)
        return (o + (p @ low.float())[..., None]).flatten(2)

    def for_kernel(self, device) -> dict[str, Tensor]:
        """Return what the kernel decode_kivi must know about values."""
        starts = {
            "v_code_start": kernels.places(self.codes, device),
            "v_stat_start": kernels.places(self.stats, device),
        }
        fields = {
            "v_code": self.codes.data["code"],
            "v_scale": self.stats.data["scale"],
            "v_low": self.stats.data["low"],
        }
        return starts | fields | {"v_len": kernels.lengths(self.n, device)}

    def keep(self, mask: Tensor) -> None:
        """Drop the tokens whose mask (R, t) is False; the codes of the others stay what they are."""
        old = [(self._parts(r, torch.uint8), mask[r, : self.n[r]]) for r in range(len(self.n))]
        self.__init__(len(self.n), self.bits, self.group)
        for r, (parts, some) in enumerate(old):
            self._add([r], *(part[some][None] for part in parts))
        self.codes.trim()
        self.stats.trim()

    def _parts(self, r: int | None = None, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (..., t, D), scale and minimum (..., t, D/g) of row r or of all."""
        code, scale, low = (
            rows[f] if r is None else rows.row(f, r)
            for rows, f in ((self.codes, "code"), (self.stats, "scale"), (self.stats, "low"))
        )
        return unpack(code, self.bits, dtype).flatten(-3, -2)[..., : scale.shape[-2], :], scale, low
