"""Random plans against the oracle, and the oracle against faults that it must see. oracle.py itself tries thousands."""

import datetime

import oracle
import pytest
import torch

from nanokv import attention, backend, quant
from nanokv.entries import Entries
from nanokv.methods.adakv import AdaKV
from nanokv.methods.kivi import KIVI
from nanokv.methods.pyramidkv import PyramidKV

TODAY = datetime.date.today().toordinal() * 1000  # other plans every day; a failure names its seed


@pytest.mark.parametrize("seed", [*range(10), *range(TODAY, TODAY + 20)])
def test_a_random_plan_is_what_the_oracle_says(seed):
    assert oracle.tried(seed)["tokens compared"]


def test_plans_differ_and_contain_what_matters():
    total = sum((oracle.tried(seed) for seed in range(40, 70)), oracle.Counter())
    for what in ("pauses", "later prompts", "unequal prompts", "prompts in parts", "drafts", "kept sets", "clones"):
        assert total[what], what
    assert total["packed or merged entries"] > 100 and total["exact entries"] > 1000
    assert total["kept sets under plans"] and total["kivi's numbers"]


def later_one(self, pos):
    """Let every query see one entry that comes after it."""
    see = self.pos[:, :, None] <= (pos[:, None, :, None] if pos.dim() == 2 else pos[..., None]) + 1
    return torch.where(see, 0.0, -torch.inf)


def other_victims(self, score, n, first=0, last=0, original=Entries.leaving):
    return original(self, -score, n, first, last)


def heads_swapped(storage, q, pos, cache, original=backend.attend):
    return original(storage, q.flip(1), pos, cache).flip(1)


def rounded(q, k, v, mask=None, causal=False, original=attention.attend):
    return original(q, k, v.bfloat16().to(v.dtype), mask, causal)


@pytest.mark.parametrize(
    "where, what, fault",
    [
        ("nanokv.layer.LayerCache", "additive_mask", later_one),
        ("nanokv.entries.Entries", "leaving", other_victims),
        ("nanokv.backend", "attend", heads_swapped),
        ("nanokv.attention", "attend", rounded),
    ],
)
def test_the_oracle_sees_faults(monkeypatch, where, what, fault):
    monkeypatch.setattr(f"{where}.{what}", fault)
    wrong = 0
    for seed in range(12):
        try:
            oracle.tried(seed)
        except oracle.Mismatch:
            wrong += 1
    assert wrong >= 2


def one_moved(budgets):
    """Let the last layer have an entry of the first one's."""
    return [budgets[0] - 1, *budgets[1:-1], budgets[-1] + 1] if len(set(budgets)) > 1 else budgets


def less_even(self, cache, score, policy, original=AdaKV.shares):
    return original(AdaKV(alpha=self.alpha / 2), cache, score, policy)


def rounded_late(x, bits):
    """Compute codes from a scale that is rounded only afterwards."""
    low, high = x.float().aminmax(dim=-1)
    scale = (high - low) / (2**bits - 1)
    codes = ((x.float() - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale.half(), low.half()


PYRAMID, ADA = "pyramidkv(budget=14, window=4, beta=3)", "adakv(budget=12, window=4, alpha=0.5)"
CODES = "kivi(bits_k=4, bits_v=8, group=8, residual=16)"
FAULTS = [
    (PYRAMID, PyramidKV, "budgets", lambda self, *a, original=PyramidKV.budgets: one_moved(original(self, *a))),
    (ADA, AdaKV, "shares", less_even),
    (ADA, AdaKV, "shares", lambda self, cache, score, policy: policy.budget),
    (CODES, quant, "quantise", rounded_late),
    (CODES, KIVI, "due", lambda self, which, n: n - n % (self.group if which == "k" else self.residual)),
]


@pytest.mark.parametrize("spec, where, what, fault", FAULTS)
def test_the_oracle_sees_faults_of_plans_and_codes(monkeypatch, spec, where, what, fault):
    assert all(oracle.tried(seed, spec)["tokens compared"] for seed in range(8))
    monkeypatch.setattr(where, what, fault)
    wrong = 0
    for seed in range(8):
        try:
            oracle.tried(seed, spec)
        except oracle.Mismatch:
            wrong += 1
    assert wrong >= 2
