"""The decoder against transformers: logits of every architecture, and greedy text of the default model."""

import pytest
import tiny
import torch
import transformers

import weights
from nanokv import KVCache, fast_cpu, generate
from nanokv.model import RMSNorm

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


@pytest.mark.parametrize("fast", [False, True])
def test_modules_can_be_hooked_trained_and_replaced(fast):
    m, heard = tiny.model(), []
    m = fast_cpu.speed_up(m) if fast else m
    for module in (m.layers[0].self_attn, m.layers[0].input_layernorm, m.layers[1].mlp, m.layers[1]):
        module.register_forward_hook(lambda *_: heard.append(1))
    m(tiny.ids(3), KVCache(m))
    assert len(heard) == 4
    m.norm.weight.requires_grad_(True)
    m(tiny.ids(3), KVCache(m)).sum().backward()
    assert m.norm.weight.grad.abs().sum() > 0


def test_angles_grow_with_use():
    m = tiny.model(context=1 << 20)
    assert len(m.rope.cos) <= 128
    m(tiny.ids(300), KVCache(m))
    assert 300 <= len(m.rope.cos) <= 512


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
