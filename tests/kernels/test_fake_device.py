"""What a decode step would do on a GPU: no tensor of the wrong device, no waiting, and next to nothing copied to it."""

from collections import Counter

import pytest
import tiny
import torch
from fake_device import OnGPU, Watch, on_gpu

from nanokv import KVCache, kernels

SPECS = ["full", "kivi(bits=2,residual=32)", "streamingllm(budget=40)", "h2o(budget=40)", "snapkv(budget=40,window=8)"]
PROMPT, STEPS = 90, 24


def read(model, spec, watch):
    """Read a prompt and some tokens; return the logits and, for each step, what was seen and whether slots moved."""
    cache, text, logits, records = KVCache(model, spec), tiny.ids(PROMPT + STEPS), [], []
    with watch() as seen:
        logits.append(tiny.feed(model, cache, text[:, :PROMPT])[:, -1])
    records.append((seen, False))
    for i in range(PROMPT, PROMPT + STEPS):
        moved = [layer.moved for layer in cache.layers]
        with watch() as seen:
            logits.append(model(text[:, i : i + 1], cache)[:, -1])
        records.append((seen, moved != [layer.moved for layer in cache.layers]))
    return torch.stack([x.as_subclass(torch.Tensor) for x in logits]), records


@pytest.mark.parametrize("spec", SPECS)
def test_a_step(spec):
    with kernels.use("torch"):
        ref, _ = read(tiny.model(head_dim=64), spec, torch.no_grad)
    with kernels.use("auto"), torch.no_grad():
        out, records = read(on_gpu(tiny.model(head_dim=64)), spec, Watch)
        assert kernels.used() == "triton" or kernels.used() == "torch+triton"  # the prompt runs on PyTorch
    assert tiny.rms(out, ref) < 1e-5
    for i, (seen, moved) in enumerate(records):
        assert not seen.mixes, Counter(seen.mixes)
        if i:
            assert sum("split" in name for name in seen.launches) == 2, "a layer that did not take its kernel"
        if i > 1 and not moved:  # the first step may find room to make; freeing memory waits once per layer
            assert not seen.syncs, Counter(seen.syncs)
            assert len(seen.uploads) <= 2, Counter(seen.uploads)


def test_the_watch_sees():
    """Each kind is noted, else the test above would prove nothing."""
    with Watch() as seen:
        a = torch.tensor([1.0, 2.0], device="cuda")
        assert isinstance(a, OnGPU) and a.device.type == "cuda" and a.is_cuda and not a.is_cpu
        assert len(seen.uploads) == 1 and not seen.syncs
        a.tolist(), a[a > 1], a.cpu(), float(a[0])
        assert len(seen.syncs) == 4
        a + torch.ones(2)
        assert len(seen.mixes) == 1
        a[torch.tensor([0])], torch.ones(2).to(a.device), a.new_zeros(2).copy_(torch.ones(2))
        assert len(seen.uploads) == 4
        a + 1, a * torch.tensor(2.0), torch.zeros(3, device=a.device), a.to(torch.half), torch.zeros_like(a)
        assert len(seen.uploads) == 4 and len(seen.syncs) == 4 and len(seen.mixes) == 1
    assert not torch.ones(2).is_cuda
