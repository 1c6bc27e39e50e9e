"""Which way attention is computed: the readable text, its faster form on a CPU, or a kernel on a GPU.

"auto", the default, takes fast_cpu.py for tensors on a CPU and Triton on a GPU; "torch" is the readable text; "both"
runs the readable text beside and notes the largest difference in `LayerCache.difference`. Under "triton", what no
kernel supports raises NotImplementedError; under "auto" the readable text takes it. See nanokv.kernels.use.
"""

from torch import Tensor

from nanokv import attention, kernels

ROWS = 64  # query rows per KV head, heads of the group times new tokens, that a decode kernel takes


def attend(storage, q: Tensor, pos: Tensor, cache) -> Tensor:
    """Attend from rotated q (B, H, T, D) at pos to what `storage` holds, through the backend in use."""
    return storage.attend(q, pos, cache)


def paid(q: Tensor, k: Tensor, mask, reduce: str) -> Tensor:
    """Return what queries pay each entry, see attention.paid, through the backend in use."""
    return attention.paid(q, k, mask, reduce)
