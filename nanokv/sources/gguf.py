"""GGUF files of any quantisation, told in the hub's names, shapes and config."""

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanokv.sources import LoadError
from nanokv.sources.folder import ARCHITECTURES
from nanokv.tokenizer import Tokenizer


class GGUFFile:
    """Read a GGUF file of architecture llama (Mistral too), qwen2 or qwen3; a source. Raises LoadError."""

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
        """Return the tokenizer that the metadata describes."""
        return Tokenizer.from_gguf(self.fields)

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
        name = "mistral" if window and kind == "llama" else kind
        ends = [self.fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
        config = {
            "architectures": [ARCHITECTURES[name]],
            "model_type": name,
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
        return config | {"rope_parameters": _rope(meta, factors)}

    def _same(self, meta: dict, key: str, default: int | None = None) -> int:
        """Return a count that may be given per layer, and then has to be the same in all."""
        value = meta[key] if default is None else meta.get(key, default)
        if isinstance(value, list) and len(set(value)) != 1:
            raise LoadError(f"{self.path}: {key} differs between layers, which is not supported")
        return value[0] if isinstance(value, list) else value


def _rope(meta: dict, factors: list | None) -> dict:
    """Return a hub config's rope_parameters; factors are Llama 3.1's scaling as a file stores it, or None."""
    theta = meta.get("rope.freq_base", 10000.0)
    if factors is not None:  # the scaling as its effect: one divisor per frequency
        return {"rope_theta": theta, "rope_type": "factors", "factors": factors}
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        kind = "linear" if "rope.scale_linear" in meta else "default"
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0))
    return {"rope_theta": theta, "rope_type": kind, "factor": factor}


def _field(field, types):
    """Return a metadata field of a GGUF reader as a plain Python value."""
    text = field.types[-1] == types.STRING
    values = [bytes(p).decode() if text else p.tolist()[0] for p in (field.parts[i] for i in field.data)]
    return values if field.types[0] == types.ARRAY else values[0]
