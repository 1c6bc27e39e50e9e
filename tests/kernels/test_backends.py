"""The switch between PyTorch and Triton, and that users' text does not depend on it."""

import interpret  # noqa: F401
import pytest
import tiny
import torch

from nanokv import KVCache, kernels
from nanokv.engine import generate
from nanokv.kernels import decode

SPECS = [
    "full",
    "kivi(bits=2,residual=32)",
    "kivi(bits_k=4,bits_v=3,residual=32)",
    "streamingllm(budget=40)",
    "h2o(budget=40)",
    "snapkv(budget=40,window=8)",
    "snapkv(budget=30,window=8)+adakv",
    "pca(rank=8)",
    "h2o(budget=50)+kivi(residual=32)",
]


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.use("auto")


@pytest.mark.parametrize("spec", SPECS)
def test_greedy_text_is_the_same(spec):
    m = tiny.model(head_dim=64, n_layers=2)
    text, out = tiny.ids(90)[0].tolist(), []
    for backend in ("torch", "triton"):
        with kernels.use(backend):
            out.append(list(generate(m, KVCache(m, spec), text, max_new_tokens=8)))
            assert backend in kernels.used()
    assert out[0] == out[1]


@pytest.mark.parametrize(
    "spec", ["full", "kivi(residual=32)", "streamingllm(budget=40)", "snapkv(budget=40,window=8)+adakv", "pca(rank=8)"]
)
@pytest.mark.parametrize("model", [{"G": 1}, {"windows": (24, None)}], ids=str)
def test_logits_are_the_same_for_other_models_batches_and_drafts(spec, model):
    m, logits = tiny.model(head_dim=64, **model), []
    text = tiny.ids(110, batch=2)
    for backend in ("torch", "triton"):
        cache = KVCache(m, spec)
        with kernels.use(backend):
            tiny.feed(m, cache, text[:, :100])
            out = [m(text[:, i : i + 1], cache) for i in range(100, 104)]
            logits.append(torch.cat([*out, m(text[:, 104:108], cache, "draft")], 1))
    assert tiny.rms(logits[1], logits[0]) < 2e-6  # fp32, sums in another order, two layers


def test_both_goes_on_with_pytorch_and_tells_the_difference():
    m, caches = tiny.model(head_dim=64), []
    for backend in ("torch", "both"):
        with kernels.use(backend):
            caches.append(KVCache(m, "kivi(residual=32)"))
            out = list(generate(m, caches[-1], tiny.ids(80)[0].tolist(), max_new_tokens=5))
    assert kernels.used() == "torch+triton" and len(out) == 5
    assert caches[0].layers[0].difference == 0 < caches[1].layers[0].difference < 1e-4


def test_both_sees_a_wrong_kernel(monkeypatch):
    m, right = tiny.model(head_dim=64), decode.decode
    monkeypatch.setattr(decode, "decode", lambda *a, **o: right(*a, **o) * 1.01)
    with kernels.use("both"):
        cache = KVCache(m)
        list(generate(m, cache, tiny.ids(30)[0].tolist(), max_new_tokens=3))
    assert min(c.difference for c in cache.layers) > 1e-3


def test_auto_is_not_triton_on_a_cpu():
    m = tiny.model()
    with kernels.use("auto"):
        list(generate(m, KVCache(m), [1, 2, 3], max_new_tokens=3))
        assert "triton" not in kernels.used()


def test_use_is_a_function_and_a_block():
    kernels.use("torch")
    with kernels.use("triton"):
        assert kernels.backend() == "triton"
    assert kernels.backend() == "torch"
    with pytest.raises(ValueError, match="auto, torch, triton, both"):
        kernels.use("cuda")
    assert kernels.backend() == "torch"


@pytest.mark.parametrize(
    "versions,why",
    [
        ({"triton": "3.4.0", "torch": "2.13.0+cpu"}, "need triton 3.5 or newer, not 3.4.0"),
        ({"triton": "3.5.1", "torch": "2.8.0"}, "need torch 2.9 or newer, not 2.8.0"),
        ({"triton": "3.10.0", "torch": "2.13.0a0+git"}, ""),
        ({"torch": "2.13.0"}, "triton is not installed"),
    ],
)
def test_old_versions_are_named(monkeypatch, versions, why):
    """They do not compile the kernels; "auto" on a GPU takes PyTorch then, and "triton" says why it cannot."""

    def version(name):
        if name not in versions:
            raise kernels.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

    monkeypatch.setattr(kernels.importlib.metadata, "version", version)
    kernels._outdated.cache_clear()
    try:
        assert why in kernels.missing(torch.device("cuda")) and bool(why) == bool(kernels.missing(torch.device("cuda")))
        with kernels.use("auto"):
            assert kernels.triton_for(OnGPU) is not bool(why)
        if why:
            with kernels.use("triton"), pytest.raises(NotImplementedError, match=why):
                kernels.triton_for(OnGPU)
    finally:
        monkeypatch.undo()
        kernels._outdated.cache_clear()


@pytest.mark.parametrize("bits,prompt,policy", [(2, 77, ""), (3, 131, ""), (8, 33, ""), (2, 77, "snapkv(budget=60)+")])
def test_kernels_pack_what_pytorch_packs(monkeypatch, bits, prompt, policy):
    """Attention is PyTorch's both times, so that both caches are given the same keys and values."""
    monkeypatch.setattr("nanokv.backend._quick", lambda *a: None)
    m, text, caches = tiny.model(n_layers=1, head_dim=64), tiny.ids(prompt + 300), []
    for backend in ("torch", "triton"):
        with kernels.use(backend):
            caches.append(KVCache(m, f"{policy}kivi(bits={bits},residual=32)"))
            tiny.feed(m, caches[-1], text[:, :prompt])
            tiny.steps(m, caches[-1], text[:, prompt:])
    for which in "kv":
        ref, mine = (c.layers[0].storage.old[which] for c in caches)
        assert mine.n == ref.n and any(ref.n)
        for name in ref.data:
            for r in range(len(ref.n)):
                assert torch.equal(mine.row(name, r), ref.row(name, r)), name


def test_what_no_kernel_can_pack_is_an_error(monkeypatch):
    m, spec = tiny.model(head_dim=48), "kivi(group=16,residual=16)"
    with kernels.use("triton"), pytest.raises(NotImplementedError, match="16 by 48"):
        tiny.feed(m, KVCache(m, spec), tiny.ids(40))
    monkeypatch.delenv("TRITON_INTERPRET")
    with kernels.use("triton"), pytest.raises(NotImplementedError, match="need a GPU"):
        tiny.feed(m, KVCache(m, spec), tiny.ids(40))
    tiny.feed(m, KVCache(m, spec), tiny.ids(40))  # "auto" takes PyTorch


def test_what_no_kernel_can_do_is_an_error_and_no_silent_replacement(monkeypatch):
    m = tiny.model(head_dim=64)
    with kernels.use("triton"):
        cache = KVCache(m, "streamingllm(budget=60)+kivi(residual=32)")
        with pytest.raises(NotImplementedError, match="rotates"):
            list(generate(m, cache, tiny.ids(100)[0].tolist(), max_new_tokens=3))
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(NotImplementedError, match="need a GPU"):
            list(generate(m, KVCache(m), tiny.ids(10)[0].tolist(), max_new_tokens=3))
