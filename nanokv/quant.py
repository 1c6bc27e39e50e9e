"""Uniform quantisation in groups, and packing codes of 1 to 8 bits densely into bytes."""

import torch
from torch import Tensor

from nanokv import kernels


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


def dequantise(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Undo `quantise`, in fp32."""
    return torch.addcmul(low.float()[..., None], codes.float(), scale.float()[..., None])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., n) into bytes (..., n * bits / 8): code j of byte w is number j * (bytes) + w.

    Numbers far apart share a byte, so that unpacking writes whole runs of them. Widths that do not divide 8 are two
    packings side by side: 3 bits are the low 2, then the high 1; 5 to 7 are the low 4, then the rest.
    """
    if codes.shape[-1] * bits % 8:
        raise NotImplementedError(f"{codes.shape[-1]} numbers of {bits} bits do not fill whole bytes")
    if 8 % bits:
        low = 2 if bits == 3 else 4
        return torch.cat([pack(codes & 2**low - 1, low), pack(codes >> low, bits - low)], -1)
    planes = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)  # 8 / bits times (..., n * bits / 8)
    out = planes[0].clone()
    for j, plane in enumerate(planes[1:], 1):
        out |= plane << (j * bits)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`."""
    if 8 % bits:
        low = 2 if bits == 3 else 4
        n = packed.shape[-1] // bits
        parts = packed.split([n * low, n * (bits - low)], -1)
        return unpack(parts[0], low) | unpack(parts[1], bits - low) << low
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unsqueeze(-2) >> shift & 2**bits - 1).flatten(-2)


def encode(x: Tensor, bits: int, group: int = 0) -> dict[str, Tensor]:
    """Quantise and pack slots x (S, T, C): `group` channels of a token share a scale, with 0 the T tokens of a channel.

    Where `group` does not divide C, as in a basis of fewer channels, the largest size below it that does is taken.
    Returns code uint8 (S, T * C * bits / 8), packed over the whole slot; scale, low fp16 (S, T, C / group) or (S, C).
    """
    group = group and divisor(x.shape[-1], group)
    if kernels.backend() != "both" and kernels.triton_for(x):
        from nanokv.kernels.pack import encode_triton  # imported only now: Triton may not be installed

        try:
            code, scale, low = encode_triton(x, bits, group)
            return {"code": code, "scale": scale, "low": low}
        except NotImplementedError:
            if kernels.backend() == "triton":
                raise
    codes, scale, low = quantise(x.unflatten(-1, (-1, group)) if group else x.mT, bits)
    codes = codes.flatten(-2) if group else codes.mT  # (S, T, C)
    return {"code": pack(codes.flatten(1), bits), "scale": scale, "low": low}


def decode(code: Tensor, scale: Tensor, low: Tensor, bits: int, tokens: int, group: int = 0) -> Tensor:
    """Undo `encode`, in fp32: (S, tokens, C)."""
    codes = unpack(code, bits).unflatten(1, (tokens, -1))  # (S, T, C)
    if group:
        return dequantise(codes.unflatten(-1, (scale.shape[-1], -1)), scale, low).flatten(-2)
    return dequantise(codes.mT, scale, low).mT


def divisor(n: int, at_most: int) -> int:
    """Return the largest group size up to at_most that divides n."""
    return next(g for g in range(min(n, at_most), 0, -1) if n % g == 0)
