"""Folders in the hub's layout: config.json, tokenizer.json, and safetensors in one file or in shards with an index."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanokv.model import Config
from nanokv.sources import PICKLE_REFUSED, LoadError, first_pickle
from nanokv.tokenizer import Tokenizer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class SafetensorsFolder:
    """Read a folder in the hub's layout; a source. Raises LoadError."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.config = read_json(self.path / "config.json")
        if (self.path / "generation_config.json").is_file():  # where chat models may list more ends of a text
            ids = _eos(self.config) + _eos(read_json(self.path / "generation_config.json"))
            self.config["eos_token_id"] = list(dict.fromkeys(ids))
        self.shapes = {}
        self._file = {}  # by tensor name, as shapes
        for file in (self.path / name for name in weight_files(self.path)):
            if not file.is_file() and (pickle := first_pickle(os.listdir(self.path))):
                raise LoadError(f"{self.path} has its weights only in {pickle}: {PICKLE_REFUSED}")
            with _open_safetensors(file) as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    self._file[name] = file
                    self.shapes[name] = tuple(f.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in the file's dtype, mapped from disk: the mapping, and its memory, goes with it."""
        with _open_safetensors(self._file[name]) as f:
            t = f.get_tensor(name)
        if not t.is_floating_point() or t.element_size() == 1:
            raise LoadError(f"{self._file[name]}: tensor {name} is {t.dtype}, which is not supported")
        return t

    def tokenizer(self) -> Tokenizer:
        """Return the folder's tokenizer."""
        return Tokenizer.from_folder(self.path)


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    names = read_json(index).get("weight_map")
    names = sorted(set(names.values())) if isinstance(names, dict) else []
    if not names or any(Path(n).name != n for n in names):
        raise LoadError(f"{index} names no files of this folder")
    return names


def read_json(file: Path) -> dict:
    """Return the JSON object in a file. Raises LoadError."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as e:
        raise LoadError(f"{file} is missing") from e
    except (OSError, ValueError) as e:
        raise LoadError(f"{file} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise LoadError(f"{file} holds no JSON object")
    return value


@contextmanager
def _open_safetensors(file: Path):
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except FileNotFoundError as e:
        raise LoadError(f"{file} is missing") from e
    except (SafetensorError, OSError) as e:
        raise LoadError(f"{file} is damaged or truncated: {e}") from e


# ----------------------------------------------------------------------------------------------------------- config


def parse_config(c: dict) -> Config:
    """Turn a hub config.json, in the style of transformers 4 or 5, into a Config. Raises LoadError."""
    kind = _architecture(c)
    for key, plain in (("quantization_config", None), ("hidden_act", "silu"), ("mlp_bias", False)):
        if c.get(key, plain) not in (plain, None):
            what = c[key].get("quant_method") if isinstance(c[key], dict) else c[key]
            raise LoadError(f"{key} {what} is not supported (supported: {plain})")
    try:
        return _parse(c, kind)
    except KeyError as e:
        raise LoadError(f"the config lacks {e}") from e
    except LoadError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise LoadError(f"the config has a wrong value: {e}") from e


def _architecture(c: dict) -> str:
    """Return the kind of model, a key of ARCHITECTURES."""
    by_class = {v: k for k, v in ARCHITECTURES.items()}
    named = (c.get("architectures") or [ARCHITECTURES.get(c.get("model_type"), c.get("model_type"))])[0]
    if named not in by_class:
        raise LoadError(f"architecture {named} is not supported (supported: {', '.join(by_class)})")
    return by_class[named]


def _parse(c: dict, kind: str) -> Config:
    """Fill in the defaults that transformers has for each kind."""
    heads, hidden, layers = (int(c[k]) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    kv_heads = c.get("num_key_value_heads", {"llama": None, "mistral": 8}.get(kind, 32)) or heads
    head_dim = c.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    if not 0 < kv_heads <= heads or heads % kv_heads or head_dim % 2:
        raise LoadError(f"{heads} heads, {kv_heads} KV heads and head_dim {head_dim} do not fit together")
    bias = bool(c.get("attention_bias")) and kind in ("llama", "qwen3")
    theta, scaling = _parse_rope(c, head_dim)
    return Config(
        layers, heads, kv_heads, head_dim, hidden,
        ffn=int(c["intermediate_size"]),
        vocab=int(c["vocab_size"]),
        context=int(c.get("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768))),
        eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        qk_norm=kind == "qwen3",
        windows=_parse_windows(c, kind, layers),
        eos=tuple(_eos(c)),
        name=kind,
    )  # fmt: skip


def _eos(config: dict) -> list[int]:
    """Return the ids that end a text, which may be one, several or none."""
    eos = config.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _parse_rope(c: dict, head_dim: int) -> tuple[float, dict | None]:
    """Return the base of the rotary frequencies and their scaling, as Config wants them."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", c.get("rope_theta", 10000.0)))
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise LoadError(f"partial_rotary_factor {partial} is not supported (supported: 1.0)")
    if any(isinstance(v, dict) for v in rope.values()):
        raise LoadError("rope_parameters per layer type are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = {"linear": ["factor"], "factors": ["factors"], "default": []}
    keys["llama3"] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if kind not in keys:
        raise LoadError(f"rope type {kind} is not supported (supported: default, linear, llama3)")
    if kind == "factors" and len(rope["factors"]) != head_dim // 2:
        raise LoadError(f"{len(rope['factors'])} rope factors for {head_dim // 2} frequencies")
    return theta, {"type": kind} | {k: rope[k] for k in keys[kind]} if keys[kind] else None


def _parse_windows(c: dict, kind: str, layers: int) -> tuple:
    """Return the sliding window of each layer in tokens or None, or () if no layer has one."""
    window = c.get("sliding_window", None if kind == "llama" else 4096)
    if kind == "llama" or not window or (kind != "mistral" and not c.get("use_sliding_window", False)):
        return ()
    if kind == "mistral":
        return (int(window),) * layers
    first = c.get("max_window_layers", 28)
    types = c.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(types) != layers or not {*types} <= {"full_attention", "sliding_attention"}:
        raise LoadError(f"layer_types names {len(types)} of {layers} layers or more than full and sliding_attention")
    return tuple(int(window) if t == "sliding_attention" else None for t in types)
