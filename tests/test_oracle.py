"""Random plans against the oracle, and the oracle against faults that it must see. oracle.py itself tries thousands."""

import datetime

import oracle
import pytest
import torch

from nanokv import attention, backend
from nanokv.entries import Entries

TODAY = datetime.date.today().toordinal() * 1000  # other plans every day; a failure names its seed


@pytest.mark.parametrize("seed", [*range(10), *range(TODAY, TODAY + 20)])
def test_a_random_plan_is_what_the_oracle_says(seed):
    assert oracle.tried(seed)["tokens compared"]


def test_plans_differ_and_contain_what_matters():
    total = sum((oracle.tried(seed) for seed in range(40, 70)), oracle.Counter())
    for what in ("pauses", "later prompts", "unequal prompts", "prompts in parts", "drafts", "kept sets", "clones"):
        assert total[what], what
    assert total["packed or merged entries"] > 100 and total["exact entries"] > 1000


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
