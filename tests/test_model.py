"""The decoder against transformers: logits of every architecture, and greedy text of the default model."""

import copy

import pytest
import tiny
import torch
import transformers

import weights
from nanokv import KVCache, generate
from nanokv.model import Linear, RMSNorm

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama2": ("Llama", {"num_key_value_heads": 4, "num_attention_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "bias": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 37}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def _peer(kind, extra, seed=0):
    torch.manual_seed(seed)
    heads = extra.get("num_attention_heads", 6)
    base = {"vocab_size": 101, "hidden_size": 12 * heads, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": heads, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    config = getattr(transformers, kind + "Config")(**(base | extra), attn_implementation="eager")
    peer = getattr(transformers, kind + "ForCausalLM")(config).eval().requires_grad_(False)
    for name, p in peer.named_parameters():  # biases and gains that do something, attention that is not flat
        if name.endswith("bias") or "norm" in name:
            p.add_(torch.randn_like(p) * 0.3)
        elif "q_proj" in name or "k_proj" in name:
            p.mul_(8)
        elif "embed" in name:
            p.mul_(20)
    return peer


def _ours(peer, folder):
    peer.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer()).save_pretrained(folder)
    return weights.load(str(folder))[0]


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(101)}, unk_token="0"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, tmp_path):
    peer = _peer(*ARCHITECTURES[name])
    model = _ours(peer, tmp_path)
    text = tiny.ids(150, batch=2)
    want = peer(text).logits
    assert float(want.std(-1).mean()) > 0.1  # the comparison is of something
    assert tiny.rms(model(text, KVCache(model)), want) < 1e-5
    for chunk in (1, 13, 64):
        assert tiny.rms(tiny.feed(model, KVCache(model), text, chunk), want) < 1e-5
    cache = KVCache(model)
    got = torch.cat([tiny.feed(model, cache, text[:, :90]), tiny.steps(model, cache, text[:, 90:])], 1)
    assert tiny.rms(got, want) < 1e-5


@pytest.mark.parametrize("heads, kv", [(2, 2), (6, 2), (8, 2), (8, 1)])
def test_logits_equal_transformers_for_every_group_size(heads, kv, tmp_path):
    peer = _peer("Llama", {"num_attention_heads": heads, "num_key_value_heads": kv})
    model = _ours(peer, tmp_path)
    text = tiny.ids(80)
    want = peer(text).logits
    assert tiny.rms(model(text, KVCache(model)), want) < 1e-5
    cache = KVCache(model)
    got = torch.cat([tiny.feed(model, cache, text[:, :31], 7), tiny.steps(model, cache, text[:, 31:])], 1)
    assert tiny.rms(got, want) < 1e-5


def test_a_sliding_window_frees_what_no_query_can_see(tmp_path):
    model = _ours(_peer(*ARCHITECTURES["mistral-window"]), tmp_path)
    cache = KVCache(model)
    tiny.feed(model, cache, tiny.ids(200), 16)
    tiny.steps(model, cache, tiny.ids(50))
    assert cache.live_positions(0, 0).tolist() == list(range(250 - 36, 250))  # the next query sees itself and 36 more
    assert cache.nbytes < 0.3 * cache.ledger()["total"]["full"]


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2**-22), (torch.bfloat16, 2**-7)])
def test_one_huge_channel_takes_no_digits_from_the_others(dtype, digits):
    x = torch.randn(3, 576).to(dtype)
    x[:, 7], x[2] = 1e6, 0.0
    norm = RMSNorm(576, 1e-5).to(dtype)
    norm.weight.data.normal_()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    error = (norm(x).double() - exact).abs()
    assert (error <= digits * exact.abs()).all()  # a handful of roundings, each by half of 2^-23 or 2^-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_in, n_out", [(96, 301), (96, 96), (301, 96), (2048, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same_however_the_matrix_lies(n_in, n_out, bias, dtype):
    torch.manual_seed(0)
    layer = Linear(n_in, n_out, bias).to(dtype).requires_grad_(False)
    w, b = (p.clone() for p in (layer.weight, layer.bias if bias else torch.zeros(n_out, dtype=dtype)))
    layer.arrange(torch.device("cpu"))
    narrow, bf16 = dtype.itemsize == 2, dtype == torch.bfloat16
    columns = "AVX" in torch.backends.cpu.get_cpu_capability() and n_in < 2048 and (bf16 or not narrow and n_out > n_in)
    assert layer.columns == columns == (not layer.weight.is_contiguous())
    assert torch.equal(layer.weight, w)
    threads = torch.get_num_threads()
    try:
        for rows, n in [(1, 1), (1, 2), (1, 3), (2, 2), (3, 2), (4, 2), (50, 2)]:
            torch.set_num_threads(n)
            x = torch.randn(1, rows, n_in).to(dtype)
            with torch.no_grad():
                y, exact = layer(x), x.double() @ w.double().T + b.double()
            assert y.shape == exact.shape and y.dtype == dtype
            # Sums are taken in at least fp32, with an error of at most n_in roundings of the sum of absolute terms.
            # In 16 bits the sum is rounded, what threads have found too, their sum, and the bias's.
            ulp = torch.finfo(dtype).eps / 2
            size = (x.double().abs() @ w.double().abs().T + b.double().abs()) * n_in * (2**-24 if narrow else ulp)
            parts = sum((p @ q.T).abs() for p, q in zip(*(t.double().tensor_split(n, -1) for t in (x, w)), strict=True))
            assert ((y - exact).abs() <= size + (ulp * (parts + 3 * exact.abs() + b.abs()) if narrow else 0)).all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16, torch.float32])
def test_fp16_products_do_not_overflow_between_threads(loaded):
    layer = Linear(64, 200).to(loaded).requires_grad_(False)
    layer.weight[:, :32], layer.weight[:, 32:] = 100, -100
    layer.arrange(torch.device("cpu"))
    layer.half()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():  # each half alone is 160,000, beyond what fp16 holds
            assert not layer(torch.full((1, 1, 64), 50.0).half()).any()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_and_refuses_what_does_not_fit(dtype):
    layer = Linear(64, 200).to(dtype)
    layer.arrange(torch.device("cpu"))
    layer(torch.ones(1, 64, dtype=dtype)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(200, 64, dtype=dtype))
    with torch.no_grad():
        assert layer(torch.ones(0, 64, dtype=dtype)).shape == (0, 200)
        for wrong in (torch.ones(1, 32), torch.ones(2, 32), torch.ones(4, 48)):
            with pytest.raises(RuntimeError):
                layer(wrong.to(dtype))


def test_parts_of_a_module_are_the_ones_it_registered():
    block, layer = tiny.model().layers[0], Linear(8, 24, bias=True)
    block.attn.o = layer
    assert block.attn.o is layer is block.attn._modules["o"] and copy.deepcopy(block).attn.o is not layer
    block.attn.o = None
    assert block.attn.o is None
    del block.attn.o
    assert not hasattr(block.attn, "o")
    zeros = {"weight": torch.zeros(24, 8), "bias": torch.ones(24)}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(layer, zeros, torch.ones(1, 1, 8)), torch.ones(1, 1, 24))
        layer.load_state_dict(zeros, assign=True)
        assert torch.equal(layer(torch.ones(1, 1, 8)), torch.ones(1, 1, 24))


def test_only_the_last_logits_on_request():
    m = tiny.model()
    text = tiny.ids(20)
    last = m(text, KVCache(m), last=True)
    assert last.shape == (1, 1, 101)
    assert tiny.rms(last, m(text, KVCache(m))[:, -1:]) < 1e-6  # a product with one row rounds otherwise


TEXT = "The Eiffel Tower was finished in 1889. Its designer, Gustave Eiffel, had built bridges before. " * 12


def test_default_model_equals_transformers(smollm2, smollm2_peer):
    model, tokenizer = smollm2
    text = torch.tensor([tokenizer.encode(TEXT)])
    with torch.inference_mode():
        want = smollm2_peer[0](text).logits
    assert tiny.rms(model(text, KVCache(model)), want) < 1e-5
    assert tiny.rms(tiny.feed(model, KVCache(model), text, 77), want) < 1e-5


def test_default_model_greedy_text_equals_transformers(smollm2, smollm2_peer):
    model, tokenizer = smollm2
    prompt = tokenizer.chat([{"role": "user", "content": "Tell me a story about a lighthouse keeper and a whale."}])
    ids = tokenizer.encode(prompt)
    with torch.inference_mode():
        want = smollm2_peer[0].generate(torch.tensor([ids]), max_new_tokens=200, min_new_tokens=200, do_sample=False)
    assert list(generate(model, KVCache(model), ids, 200)) == want[0, len(ids) :].tolist()


def test_hooks_and_subclasses_are_heard():
    m, heard = tiny.model(), []
    for module in (m.layers[0].attn.qkv, m.layers[0].ffn_norm, m.layers[1].ffn, m.layers[1]):
        module.register_forward_hook(lambda *_: heard.append(1))
    m(tiny.ids(3), KVCache(m))
    assert len(heard) == 4
