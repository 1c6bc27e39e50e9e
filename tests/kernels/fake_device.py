"""A GPU that is not there: tensors whose data lies on the CPU say that they are on cuda:0, and calls are watched.

    model = on_gpu(model)
    with Watch() as seen:
        ...
    seen.mixes, seen.uploads, seen.syncs, seen.launches

Each is a list of where in nanokv it happened. A *mix* is a call with tensors of both devices, which would fail on a
GPU; an *upload* copies from the CPU and a *sync* waits for the GPU, so that it runs dry. Kernels run in Triton's
interpreter. What PyTorch's own operations do inside is not looked at.
"""

import traceback
from pathlib import Path

import interpret  # noqa: F401 (sets TRITON_INTERPRET)
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.overrides import TorchFunctionMode

import nanokv
from nanokv.model import RoPE

GPU = torch.device("cuda:0")
ROOT = str(Path(nanokv.__file__).parent)
MAKES = {getattr(torch, name) for name in (
    "tensor", "as_tensor", "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "rand", "randn")}  # fmt: skip
MAKES_LIKE = {f"new_{name}" for name in ("zeros", "ones", "full", "empty", "tensor")}
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "nonzero", "masked_select",
         "equal", "unique", "numpy"}  # fmt: skip
PLAIN = {"item", "tolist", "__bool__", "__len__", "__float__", "__int__", "__index__", "numpy", "size", "stride", "dim"}


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""


def on_gpu(model):
    """Move a model there, for good."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else p.data.as_subclass(OnGPU)
    with Watch():
        model.rope = RoPE(model.config, GPU)
    for block in model.layers:
        block.self_attn.rope = model.rope
    return model


class Watch(TorchFunctionMode):
    """Within the block there is a GPU, and what is done with it is noted."""

    def __init__(self):
        super().__init__()
        self.mixes, self.uploads, self.syncs, self.launches = [], [], [], []

    def __enter__(self):
        self.launch = interpreter.GridExecutor.__call__
        interpreter.GridExecutor.__call__ = lambda kernel, *args, **options: self._launch(kernel, args, options)
        return super().__enter__()

    def __exit__(self, *why):
        interpreter.GridExecutor.__call__ = self.launch
        return super().__exit__(*why)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return self._call(func, getattr(func, "__name__", str(func)), args, kwargs)

    def _call(self, func, name, args, kwargs):
        every = list(tensors((args, kwargs)))
        there = [t for t in every if isinstance(t, OnGPU)]
        if name == "__get__":
            return self._attribute(func, args, bool(there))
        if func in MAKES or name in MAKES_LIKE or name.endswith("_like"):
            device = kwargs.pop("device", None)
            to_gpu = torch.device(device).type == "cuda" if device is not None else bool(there)
            if to_gpu and func in (torch.tensor, torch.as_tensor) and not there:
                self.uploads.append(where())
            if there and func is torch.tensor:
                self.syncs.append(where())
            return move(func(*args, **kwargs)) if to_gpu else func(*args, **kwargs)
        if name in ("cpu", "to", "cuda"):
            return self._move(func, name, args, kwargs, there)
        if not there:
            return func(*args, **kwargs)
        if name in WAITS or (name == "repeat_interleave" and len(there) > 1):
            self.syncs.append(where())
        self._mixed(name, args, [t for t in every if not isinstance(t, OnGPU)])
        out = func(*args, **kwargs)
        return out if name in PLAIN else move(out)

    def _attribute(self, func, args, there):
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if there and name in ("device", "is_cuda", "is_cpu"):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name]
        out = func(*args)
        return move(out) if there else out

    def _move(self, func, name, args, kwargs, there):
        """Do x.cpu(), x.cuda() or x.to(...), whose first argument may be a device, a tensor or a type."""
        x, *more = args
        devices = [torch.device(a) for a in [*more, kwargs.pop("device", None)] if isinstance(a, (str, torch.device))]
        devices += [GPU if isinstance(a, OnGPU) else a.device for a in more if isinstance(a, Tensor)]
        to_gpu = name == "cuda" or (devices[0].type == "cuda" if devices else name == "to" and isinstance(x, OnGPU))
        if to_gpu and not isinstance(x, OnGPU):
            self.uploads.append(where())
        if not to_gpu and isinstance(x, OnGPU):
            self.syncs.append(where())
        types = [a for a in more if isinstance(a, torch.dtype)] + [a.dtype for a in more if isinstance(a, Tensor)]
        out = x.as_subclass(Tensor).to(*types, **kwargs) if types or kwargs else x.as_subclass(Tensor)
        return move(out) if to_gpu else out

    def _mixed(self, name, args, here):
        """Note what tensors on the CPU do among those on the GPU; single numbers may stand in most places."""
        if name in ("__getitem__", "__setitem__"):
            index = list(tensors(args[1]))
            if any(t.dtype == torch.bool for t in index) and name == "__getitem__":
                self.syncs.append(where())  # how many there are
            if not isinstance(args[0], OnGPU):
                self.mixes.append(where())
            elif here:
                self.uploads.append(where())
        elif name == "copy_":
            if here:
                self.uploads.append(where())
        elif any(t.dim() for t in here) or (here and name in ("cat", "stack", "index_select", "gather", "matmul")):
            self.mixes.append(where())

    def _launch(self, kernel, args, options):
        if any(not isinstance(t, OnGPU) for t in tensors((args, options))):
            self.mixes.append(where())
        self.launches.append(kernel.fn.__name__)

        def plain(x):
            return x.as_subclass(Tensor) if isinstance(x, OnGPU) else x

        with torch._C.DisableTorchFunction():
            return self.launch(kernel, *map(plain, args), **{name: plain(x) for name, x in options.items()})


def move(x):
    """Return x, a tensor or a tuple of some, as if it were on the GPU."""
    if isinstance(x, Tensor):
        return x if isinstance(x, OnGPU) else x.as_subclass(OnGPU)
    if isinstance(x, (tuple, list)):
        named = hasattr(x, "_fields") or type(x).__module__ == "torch.return_types"
        return type(x)([move(y) for y in x]) if named or isinstance(x, list) else tuple(move(y) for y in x)
    return x


def tensors(x):
    """Yield the tensors in nested arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors(y)
    elif isinstance(x, dict):
        yield from tensors(list(x.values()))
    elif isinstance(x, slice):
        yield from tensors((x.start, x.stop, x.step))


def where() -> str:
    """Return the innermost line of nanokv that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT):
            return f"{frame.filename[len(ROOT) + 1 :]}:{frame.lineno} {frame.line}"
    return "a test"
