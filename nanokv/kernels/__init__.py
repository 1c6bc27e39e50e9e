"""Decode kernels in Triton, each beside its plain PyTorch twin, and the switch between the two.

    nanokv.kernels.use("triton")            # from here on
    with nanokv.kernels.use("torch"): ...   # in this block

"auto", the default, takes Triton for tensors on a GPU and PyTorch elsewhere; "both" runs the attention of every decode
step on both, goes on with PyTorch's result and notes the largest difference in `LayerCache.difference`. Attention
kernels are for decode steps of few queries (ROWS per KV head); prompts, and passes of more, go through PyTorch's own
attention under every backend. Keys and values are quantised and packed by kernels whenever that happens. Under "triton"
what no kernel supports raises NotImplementedError; under "auto" PyTorch takes it. `used()` says what ran.
"""

import importlib
import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "both")
ROWS = 64  # query rows per KV head, heads of the group times new tokens, that a decode kernel takes
_state = {"backend": "auto"}
_used: set[str] = set()


class use:
    """Choose the backend, "auto", "torch", "triton" or "both": from now on, or for a `with` block. ValueError else."""

    def __init__(self, backend: str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.before, _state["backend"] = _state["backend"], backend
        _used.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _state["backend"] = self.before


def backend() -> str:
    """Return the backend in use, as given to `use`."""
    return _state["backend"]


def used() -> str:
    """Return what decode steps ran on since `use` was last called, such as "torch" or "triton"."""
    return "+".join(sorted(_used))


def missing(device) -> str:
    """Return why Triton kernels cannot run on tensors of this device, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment for its slow interpreter"
    return ""


def attend(storage, q: Tensor, pos: Tensor, probs: bool) -> tuple[Tensor, Tensor | None]:
    """Attend from rotated q (B, H, T, D) at pos to what `storage` holds, through the backend in use.

    Returns o (B, H, T, D) and, with `probs`, the probabilities, fp32 (B, H, T, N), else None.
    """
    cache, name = storage.cache, _state["backend"]
    few = q.shape[2] * q.shape[1] // cache.config.n_kv_heads <= ROWS
    if name == "torch" or (name == "auto" and q.device.type != "cuda") or cache.phase != "decode" or not few:
        return _torch(storage, q, pos, probs)
    try:
        if why := missing(q.device):
            raise NotImplementedError(why)
        o, p = storage.attend_triton(q, pos, probs)
    except NotImplementedError:
        if name != "auto":
            raise
        return _torch(storage, q, pos, probs)
    _used.add("triton")
    if name == "both":
        mine, (o, p) = o, _torch(storage, q, pos, probs)
        cache.difference = max(cache.difference, float((mine.float() - o.float()).abs().max()))
    return o, p


def small(x: Tensor) -> bool:
    """Say whether a decode step over x (B, T, E) takes the fused kernels of the model's small pieces."""
    name = _state["backend"]
    if (name == "auto" and not x.is_cuda) or name in ("torch", "both"):
        return False
    return x.shape[0] * x.shape[1] <= ROWS and not missing(x.device)


def packed(what: str, x: Tensor, *args) -> tuple[Tensor, Tensor, Tensor] | None:
    """Quantise and pack "keys" or "values" x by the kernels of nanokv/kernels/pack.py; None: PyTorch is to do it."""
    if (name := _state["backend"]) in ("torch", "both") or (name == "auto" and x.device.type != "cuda"):
        return None
    try:
        if why := missing(x.device):
            raise NotImplementedError(why)
        return getattr(importlib.import_module("nanokv.kernels.pack"), f"pack_{what}_triton")(x, *args)
    except NotImplementedError:
        if name != "auto":
            raise
        return None


def _torch(storage, q, pos, probs):
    if storage.cache.phase == "decode":
        _used.add("torch")
    return storage.attend_probs(q, pos) if probs else (storage.attend(q, pos), None)


def launch(kernel: str, *args, **options):
    """Call the Triton side of a kernel of this folder, which is imported only now: Triton may not be installed."""
    return getattr(importlib.import_module(f"nanokv.kernels.{kernel}"), f"{kernel}_triton")(*args, **options)


def step(kernel: str, cache, q: Tensor, pos: Tensor, probs: bool, *args, **options) -> tuple[Tensor, Tensor | None]:
    """Launch a decode kernel for rotated q (B, H, T, D) at pos on a LayerCache; return o and the probabilities or None.

    What the kernel shares with others comes from the cache; `args` and `options` say where its entries lie.
    """
    more = masking(cache, q, pos, always=kernel == "decode_rope") | options
    scale, x = q.shape[-1] ** -0.5, rows(q, cache.n_rows)
    out = launch(kernel, x, *args, scale=scale, most=cache.size, probs=probs, **more)
    o, p = out if probs else (out, None)
    return heads(o, q), heads(p, q)


def where(held, device) -> tuple[Tensor, Tensor]:
    """Return where the rows of a `Rows` begin, int64 (R,), and their slots, int32 (R,)."""
    return places(held, device), lengths(held.n, device)


@lru_cache(maxsize=256)  # the layers of a step share them
def on_device(numbers: tuple | float, dtype, device) -> Tensor:
    """Return a tensor of host numbers, such as where rows begin and how long they are.

    Even on a CPU an operation begins some microseconds sooner with a tensor of no dimensions than with a number.
    """
    return torch.tensor(numbers, dtype=dtype, device=device)


def places(rows, device) -> Tensor:
    """Return where each row of a `Rows` begins in its flat tensors: int64 (R,)."""
    return on_device(tuple(s + rows.skip for s in rows.start), torch.int64, device)


def lengths(numbers, device) -> Tensor:
    """Return the slots of each row, int32 (R,)."""
    return on_device(tuple(numbers), torch.int32, device)


def masking(cache, q: Tensor, pos: Tensor, always: bool = False) -> dict:
    """Return what a decode kernel must know to hide entries and weigh merged ones: pos, q_pos, bias, col_start, window.

    Empty where every query sees every slot, unless `always` is asked for.
    """
    columns, T = cache.slots.data, q.shape[2]
    if not always and T == 1 and not cache.window and "bias" not in columns and min(cache.counts) == cache.size:
        return {}
    B, Hkv = cache.B, cache.config.n_kv_heads
    q_pos = (pos[:, None] if pos.dim() == 2 else pos).unsqueeze(2)  # (B, 1 or Hkv, 1, T)
    q_pos = q_pos.expand(B, Hkv, q.shape[1] // Hkv, T).reshape(B * Hkv, -1).int()
    out = {"q_pos": q_pos, "window": cache.window}
    if cache.renumbers:  # ranks are computed, not stored
        N = cache.size
        if min(cache.counts) == N:  # the same 0, 1, ... in every row
            step, out["pos"] = 0, torch.arange(N, dtype=torch.int32, device=q.device)
        else:
            step, out["pos"] = N, cache.pos.expand(B, Hkv, N).reshape(-1).int()
        out["col_start"] = on_device(tuple(i * step for i in range(B * Hkv)), torch.int64, q.device)
        return out
    cache.number_slots()
    out |= {"pos": cache.slots.data["token"], "col_start": places(cache.slots, q.device)}
    return out | {"bias": cache.slots.data.get("bias")}


def rows(q: Tensor, R: int) -> Tensor:
    """Return q (B, H, T, D) with the queries of a group as rows of its KV head: (R, M, D), contiguous."""
    return q.reshape(R, -1, q.shape[-1]).contiguous()


def heads(x: Tensor | None, q: Tensor) -> Tensor | None:
    """Undo `rows` for a result x (R, M, w), outputs or probabilities: (B, H, T, w)."""
    return None if x is None else x.view(*q.shape[:3], -1)
