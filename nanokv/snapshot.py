"""A cache on disk: one safetensors file that holds every tensor as it lies in memory, and says what it belongs to.

The header's metadata carries the state that is not tensors, the spec, a fingerprint of the model, versions, and a
checksum of the whole file (taken with zeros in the checksum's place), so that a changed byte anywhere is noticed.
"""

import hashlib
import json
import os
import re
from dataclasses import fields

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanokv.files import whole
from nanokv.layer import Pass
from nanokv.method import Storage
from nanokv.rows import Rows

FORMAT = "4"
ZEROS = b"0" * 64
LAYER = ("B", "n_slots", "counts", "fills", "settled", "moved", "n_read")  # what a LayerCache knows beside its tensors


def fingerprint(model) -> str:
    """Return a hash of a model's config and of about a thousand numbers of each weight."""
    digest = hashlib.sha256(repr(model.config).encode())
    for t in model.state_dict().values():
        sample = t.detach().flatten()[:: max(1, t.numel() // 1024)].float().cpu().contiguous()
        digest.update(f"{tuple(t.shape)} {t.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save(cache, path) -> None:
    """Write `cache` to `path`: to a temporary name beside it first, then renamed."""
    tensors: dict[str, Tensor] = {}
    state = {"next_position": cache.next_position, "ids": _encode(cache._ids, "ids", tensors), "layers": []}
    for i, layer in enumerate(cache.layers):
        owns = layer.layer == i and layer.slots is not None
        state["layers"].append(_layer_state(layer, str(i), tensors) if owns else None)
    meta = {"nanokv": FORMAT, "torch": torch.__version__, "spec": cache.spec, "model": fingerprint(cache.model),
            "state": json.dumps(state), "checksum": ZEROS.decode()}  # fmt: skip
    with whole(path) as part:
        save_file(tensors or {"empty": torch.zeros(1)}, part, metadata=meta)
        with open(part, "r+b") as f:
            digest, _, at = _checksum(f)
            f.seek(at)
            f.write(digest)
            f.flush()
            os.fsync(f.fileno())


def load(cls, path, model):
    """Return the KVCache saved in `path`. ValueError says, in one line, why it cannot be used."""
    with open(path, "rb") as f:
        digest, noted, _ = _checksum(f)
        if digest != noted:
            raise ValueError(f"{path} is damaged, or is no saved cache: its checksum does not fit")
    with safe_open(path, "pt", device=str(model.embed_tokens.weight.device)) as f:
        meta, tensors = f.metadata(), {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    if meta["nanokv"] != FORMAT:
        raise ValueError(f"{path} has format {meta['nanokv']}; this version of nanokv reads format {FORMAT}")
    if meta["model"] != fingerprint(model):
        raise ValueError(f"{path} was made with another model, or with this one in another dtype")
    cache, state = cls(model, meta["spec"]), json.loads(meta["state"])
    cache.next_position, cache.B = state["next_position"], len(state["next_position"])
    if cache.B:
        cache.rope.reserve(max(cache.next_position) + 1)
        cache._ids = _decode(state["ids"], tensors, Rows(cache.B))
        cache._ids.data = {name: ids.cpu() for name, ids in cache._ids.data.items()}
    nothing = Pass("decode", torch.empty(cache.B, 0), [0] * cache.B, cache.next_position)
    for layer, saved in zip(cache.layers, state["layers"], strict=True):
        layer.now = nothing
        if saved:
            _restore_layer(layer, saved, tensors, model.embed_tokens.weight.device)
    return cache


def _checksum(f) -> tuple[bytes, bytes, int]:
    """Hash an open file with zeros in place of its checksum; return the hash, the checksum, and where that stands."""
    f.seek(0)
    head = f.read(8)
    head += f.read(min(int.from_bytes(head, "little"), 1 << 26))  # the safetensors header, metadata included
    found = re.search(rb'"checksum":"([0-9a-f]{64})"', head)
    if not found:
        return b"", b"none", -1
    at = found.start(1)
    digest = hashlib.sha256(head[:at] + ZEROS + head[at + 64 :])
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest().encode(), found[1], at


def _layer_state(layer, name: str, tensors: dict) -> dict:
    state = {k: getattr(layer, k) for k in LAYER} | {"n_read": float(layer.n_read)}
    return state | {k: _encode(getattr(layer, k), f"{name}.{k}", tensors) for k in ("slots", "storage", "notes")}


def _restore_layer(layer, saved: dict, tensors: dict, device) -> None:
    layer.allocate(saved["B"], device)
    for k in LAYER:
        setattr(layer, k, saved[k])
    for k in ("slots", "storage"):
        _decode(saved[k], tensors, getattr(layer, k))
    layer.notes = _decode(saved["notes"], tensors)


def _encode(value, name: str, tensors: dict):
    """Return JSON for a value, and put the tensors in it into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Rows, Storage)):
        left_out = ["_where", "basis", *getattr(value, "derived", ())]
        left_out += [f.name for f in fields(value)] if isinstance(value, Storage) else []
        parts = {k: v for k, v in vars(value).items() if k not in left_out}
        return {"object": {k: _encode(v, f"{name}.{k}", tensors) for k, v in parts.items()}}
    raise NotImplementedError(f"{name} is a {type(value).__name__}, which a saved cache cannot hold")


def _decode(value, tensors: dict, into=None):
    """Undo `_encode`; objects are filled in place, as their owner's `reset` made them."""
    if isinstance(value, list):
        return [_decode(v, tensors, old) for v, old in zip(value, into or [None] * len(value), strict=False)]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: _decode(v, tensors, (into or {}).get(k)) for k, v in value["dict"].items()}
    for k, v in value["object"].items():
        setattr(into, k, _decode(v, tensors, getattr(into, k, None)))
    return into
