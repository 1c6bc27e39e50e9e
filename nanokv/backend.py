"""Which way attention is computed: the readable text, its faster form on a CPU, or a kernel on a GPU.

"auto", the default, takes fast_cpu.py for tensors on a CPU and Triton on a GPU; "torch" is the readable text; "both"
runs the readable text beside the faster way and notes the largest difference in `LayerCache.difference`. What no kernel
is made for raises NotImplementedError under "triton"; otherwise the readable text takes it. See nanokv.kernels.use.
"""

from torch import Tensor

from nanokv import attention, fast_cpu, kernels

ROWS = 64  # query rows per KV head, heads of the group times new tokens, that a decode kernel takes


def attend(storage, q: Tensor, pos: Tensor, cache) -> Tensor:
    """Attend from rotated q (B, H, T, D) at pos to what `storage` holds, through the backend in use."""
    name = kernels.backend()
    quick = None if name == "torch" else _quick(storage, q, pos, cache, name)
    if quick is not None and name != "both":
        return quick
    kernels.note("torch")
    o = storage.attend(q, pos, cache)
    if quick is not None:
        cache.difference = max(cache.difference, float((quick.float() - o.float()).abs().max()))
    return o


def paid(q: Tensor, pos: Tensor, cache, reduce: str) -> Tensor:
    """Return what rotated queries pay each entry, see attention.paid, through the backend in use."""
    k = cache.read()[0]
    if q.is_cpu and kernels.backend() == "auto" and cache.plain:
        return fast_cpu.paid(q, k, reduce)
    return attention.paid(q, k, lambda i, j: cache.additive_mask(pos[..., i:j]), reduce)


def _quick(storage, q: Tensor, pos: Tensor, cache, name: str) -> Tensor | None:
    """Attend the faster way, or return None where there is none."""
    few = q.shape[2] * q.shape[1] // cache.config.n_kv_heads <= ROWS
    if (q.is_cuda or name != "auto") and few and cache.phase in ("decode", "draft"):
        try:
            if kernels.triton_for(q):
                o = _kernel(storage)(q, pos, cache)
                kernels.note("triton")
                return o
        except NotImplementedError:
            if name == "triton":
                raise
    return fast_cpu.attend(storage, q, pos, cache) if q.is_cpu and name != "triton" else None


def _kernel(storage):
    """Return the storage's kernel, unless its class overrides the attention that the kernel stands for."""
    order = type(storage).__mro__
    owner = {name: next(c for c in order if name in vars(c)) for name in ("kernel", "attend")}
    if order.index(owner["kernel"]) > order.index(owner["attend"]):
        raise NotImplementedError(f"{storage.name} attends in its own way, which no kernel knows")
    return storage.kernel
