"""Attention over coordinates in a subspace, without ever rebuilding a key or a value.

A store of low rank holds, instead of k and v, the coordinates z_k and z_v of k ~ U_k z_k + mean_k, v ~ U_v z_v + mean_v
(nanokv/methods/pca.py). Both bases can change sides:

    q . k       =  (U_k^T q) . z_k + q . mean_k         the query goes down, once per step
    sum p_i v_i =  U_v (sum p_i z_v,i) + mean_v sum p_i   the answer comes up, once per step

So it is decode.py's kernel with keys of rank_k and values of rank_v channels, and fewer bytes are read. The term
q . mean_k, here `shift`, is the same for all entries that a query sees. It cancels in their softmax, but not against
entries of another store, which are not shifted: it belongs to the lse, by which the two are weighed.
"""

import torch
from torch import Tensor

from nanokv.kernels.decode import TYPES, aot_case, decode_naive, decode_split, decode_triton


def decode_latent_naive(q: Tensor, z_k: Tensor, z_v: Tensor, start: Tensor, length: Tensor, *, scale: float,
                        shift: Tensor | None = None, probs: bool = False, **more):  # fmt: skip
    """Do what `decode_latent_triton` does, in fp32, or in fp64 if q is; shift is one more channel, in which keys are
    all alike."""
    if shift is not None:
        q = torch.cat([q.to(torch.promote_types(q.dtype, torch.float32)), shift[..., None].to(q.device) / scale], -1)
        z_k = torch.cat([z_k.to(q.dtype), torch.ones_like(z_k[:, :1], dtype=q.dtype)], -1)  # (S, rank_k + 1)
    return decode_naive(q, z_k, z_v, start, length, scale=scale, probs=probs, lse=True, **more)


def decode_latent_triton(q: Tensor, z_k: Tensor, z_v: Tensor, start: Tensor, length: Tensor, *, scale: float,
                         shift: Tensor | None = None, probs: bool = False, **more):  # fmt: skip
    """Attend from projected q (R, M, rank_k) to z_k (S, rank_k), z_v (S, rank_v): o fp32 (R, M, rank_v), and lse.

    z_k and z_v may be views of one tensor (S, rank_k + rank_v); ranks go up to 256. shift, fp32 (R, M), is added to all
    logits of a query. All else, and what is returned, is as in `decode_triton` with lse=True: o, lse, and with `probs`
    the probabilities among the entries of this store.
    """
    o, lse, *p = decode_triton(q, z_k, z_v, start, length, scale=scale, probs=probs, lse=True, **more)
    return (o, lse if shift is None else lse + shift, *p)


def aot_cases() -> dict:
    """Return representative kernels to compile ahead of time, as decode.aot_cases does."""
    cases = {}
    for dtype, M, rank_k, rank_v in (
        (torch.float16, 3, 32, 32), (torch.bfloat16, 3, 32, 32), (torch.float32, 3, 32, 32),
        (torch.float16, 3, 16, 48), (torch.float16, 4, 7, 100),
        (torch.float16, 4, 256, 256), (torch.float32, 4, 256, 256),
    ):  # fmt: skip
        row = rank_k + rank_v
        cases |= aot_case(f"decode_latent {TYPES[dtype]}", decode_split, dtype, M, rank_k, rank_v,
                          ROW_K=row, ROW_V=row, UPCAST=False)  # fmt: skip
    return cases
