"""Triton kernels, each beside its plain PyTorch twin, and the state of the switch between the two.

    nanokv.kernels.use("triton")            # from here on
    with nanokv.kernels.use("torch"): ...   # in this block

Kernels take plain tensors and know nothing of caches. A storage hands them its own (`Storage.kernel`), and
nanokv/backend.py decides when. "auto", the default, takes Triton for tensors on a GPU and PyTorch elsewhere; "both"
runs the two side by side. What a kernel is not made for it refuses with NotImplementedError: under "triton" that is an
error, under "auto" PyTorch takes it.
"""

import importlib.metadata
import os
import re
from functools import lru_cache

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "both")
OLDEST = {"triton": (3, 5), "torch": (2, 9)}  # earlier ones do not compile thin products
_state = {"backend": "auto"}
_used: set[str] = set()


class use:
    """Choose the backend, "auto", "torch", "triton" or "both": from now on, or for a `with` block. ValueError else."""

    def __init__(self, backend: str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.before = _state["backend"]
        _state["backend"] = backend
        _used.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _state["backend"] = self.before


def backend() -> str:
    """Return the backend in use, as given to `use`."""
    return _state["backend"]


def note(name: str) -> None:
    """Remember that something ran on "torch" or "triton"."""
    _used.add(name)


def used() -> str:
    """Return what was noted since `use` was last called, such as "torch" or "torch+triton"."""
    return "+".join(sorted(_used))


def missing(device: torch.device) -> str:
    """Return why Triton kernels cannot run on tensors of this device, or an empty string."""
    if why := _outdated():
        return why
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment for its slow interpreter"
    return ""


def triton_for(x: Tensor) -> bool:
    """Say whether the backend in use takes Triton for x. NotImplementedError where it must and cannot."""
    name = backend()
    if name == "torch" or (name == "auto" and not x.is_cuda):
        return False
    why = missing(x.device)
    if why and name != "auto":
        raise NotImplementedError(why)
    return not why


@lru_cache(maxsize=1)
def _outdated() -> str:
    for name, least in OLDEST.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed"
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            return f"Triton kernels need {name} {'.'.join(map(str, least))} or newer, not {version}"
    return ""
