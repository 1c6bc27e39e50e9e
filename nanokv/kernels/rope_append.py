"""Rotate new keys and put keys and values into the cache's buffers, in one kernel.

Rotating takes three operations and storing two, each of them a launch for a few hundred numbers. Here a program takes
one (row, new token): it loads the two halves of the key, rotates them against each other, and writes key and value
into their slots of the flat buffers, wherever these begin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rope_append_naive(k, v, cos, sin, pos, k_buffer, v_buffer, slot) -> None:
    """Rotate k (R, T, D) by pos, integers (R, T), with cos, sin (P, D / 2); write it and v to slots slot[r] + t."""
    c, s, (a, b) = cos[pos].to(k.dtype), sin[pos].to(k.dtype), k.chunk(2, -1)
    k = torch.cat([a * c - b * s, b * c + a * s], -1)
    for r, at in enumerate(slot.tolist()):
        k_buffer[at : at + k.shape[1]] = k[r]
        v_buffer[at : at + k.shape[1]] = v[r]


@triton.jit
def rotate_store(
    p_k, p_v, p_cos, p_sin, p_pos, p_k_buffer, p_v_buffer, p_slot, T,
    s_kr, s_kt, s_vr, s_vt, D: tl.constexpr, b_D: tl.constexpr, b_H: tl.constexpr,
):  # fmt: skip
    """Rotate the key of one row and new token, and write it and the value to slot p_slot[r] + t; s_* are strides."""
    r, t = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    H: tl.constexpr = D // 2
    o_h, o_d = tl.arange(0, b_H), tl.arange(0, b_D)
    m_h, m_d = o_h < H, o_d < D
    pos = tl.load(p_pos + r * T + t).to(tl.int64)
    slot = (tl.load(p_slot + r) + t).to(tl.int64)
    # (H,) each
    cos = tl.load(p_cos + pos * H + o_h, mask=m_h, other=0.0)
    sin = tl.load(p_sin + pos * H + o_h, mask=m_h, other=0.0)
    a = tl.load(p_k + r * s_kr + t * s_kt + o_h, mask=m_h, other=0.0).to(tl.float32)
    b = tl.load(p_k + r * s_kr + t * s_kt + H + o_h, mask=m_h, other=0.0).to(tl.float32)
    kind = p_k_buffer.dtype.element_ty
    tl.store(p_k_buffer + slot * D + o_h, (a * cos - b * sin).to(kind), mask=m_h)
    tl.store(p_k_buffer + slot * D + H + o_h, (b * cos + a * sin).to(kind), mask=m_h)
    # (D,)
    v = tl.load(p_v + r * s_vr + t * s_vt + o_d, mask=m_d, other=0.0)
    tl.store(p_v_buffer + slot * D + o_d, v, mask=m_d)


def rope_append_triton(k: Tensor, v: Tensor, cos, sin, pos, k_buffer, v_buffer, slot) -> None:
    """Do what `rope_append_naive` does in one kernel; k and v may be views whose last dimension is dense."""
    R, T, D = k.shape
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise NotImplementedError("rope_append: the channels of keys and values must lie side by side")
    rotate_store[(R, T)](
        k, v, cos, sin, pos.contiguous(), k_buffer, v_buffer, slot, T, k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), D, triton.next_power_of_2(D), triton.next_power_of_2(D // 2), num_warps=1,
    )  # fmt: skip


def aot_cases() -> dict:
    """Return configurations to compile ahead of time: fn, types, constants, aligned, options per backend."""
    types = dict.fromkeys(("p_k", "p_v", "p_k_buffer", "p_v_buffer"), "*fp16") | dict.fromkeys(
        ("T", "s_kr", "s_kt", "s_vr", "s_vt"), "i32"
    )
    types |= {"p_cos": "*fp32", "p_sin": "*fp32", "p_pos": "*i64", "p_slot": "*i64"}
    options = {"cuda": {"num_warps": 1}, "hip": {"num_warps": 1}}
    aligned = ("s_kr", "s_kt", "s_vr", "s_vt")
    return {
        f"rope_append D={D}": (rotate_store, types, {"D": D, "b_D": D, "b_H": D // 2}, aligned, options)
        for D in (64, 128)
    }
