"""Import this before any module of nanokv.kernels: it makes Triton run kernels in Python, so that no GPU is needed.

Triton reads the variable when @triton.jit decorates a function. A kernel decorated so cannot be compiled in the same
process, which is why the tests that compile ahead of time start one of their own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

BAND = 256  # elements on each side of a guarded tensor


def guard(t: Tensor):
    """Return a copy of t inside a larger buffer, and a function that raises if the buffer around it was written to.

    The bands on both sides hold NaN (integers: bytes 0xFF), so that a kernel that reads them shows it in its result.
    """
    flat = poison(torch.zeros(BAND + t.numel() + BAND, dtype=t.dtype, device=t.device))
    inside = flat[BAND : BAND + t.numel()].view(t.shape)
    inside.copy_(t)
    before = _bytes(flat)

    def check(name: str = "tensor") -> None:
        now, width = _bytes(flat), BAND * t.element_size()
        for band, place in ((slice(None, width), "before"), (slice(len(now) - width, None), "behind")):
            assert torch.equal(now[band], before[band]), f"the memory {place} {name} was overwritten"

    return inside, check


def poison(t: Tensor) -> Tensor:
    """Fill t with what should never be read: NaN, or bytes 0xFF for integers."""
    if t.dtype.is_floating_point:
        return t.fill_(torch.nan)
    return t.fill_(255 if t.dtype == torch.uint8 else -1)


def error(a: Tensor, ref: Tensor) -> float:
    """Return the largest absolute error of a, relative to the root mean square of the fp64 reference."""
    assert a.shape == ref.shape, f"{tuple(a.shape)} is not {tuple(ref.shape)}"
    ref = ref.double()
    return ((a.double() - ref).abs().max() / ref.square().mean().sqrt().clamp_min(1e-30)).item()


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8).clone()
