"""Rows of unequal length against plain lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv.rows import Rows, spare

OPS = ("append", "together", "pop", "pop_all", "keep", "cut", "drop_run", "put", "write", "repeat", "reserve")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 2**16)), max_size=14))
def test_rows_behave_like_lists(least, plan):
    rows, lists, count = Rows(3, least=least), [[], [], []], 0
    for op, seed in [("append", 1), *plan]:
        rng = torch.Generator().manual_seed(seed)
        pick = lambda n, rng=rng: int(torch.randint(0, n + 1, (1,), generator=rng))  # noqa: E731
        n, R = [len(x) for x in lists], len(lists)
        if op in ("append", "together"):
            some = [pick(5)] * R if op == "together" else [pick(5) for _ in lists]
            new = torch.arange(count, count + sum(some))
            rows.append(some, a=torch.stack([new, -new], 1), b=new.float())
            lists = [x + part.tolist() for x, part in zip(lists, new.split(some), strict=True)]
            count += sum(some)
        elif op in ("pop", "pop_all"):
            some = [pick(m) for m in n] if op == "pop" else [min(n)] * R
            taken = rows.pop(some)
            assert taken["b"].tolist() == [float(x) for own, m in zip(lists, some, strict=True) for x in own[:m]]
            lists = [x[m:] for x, m in zip(lists, some, strict=True)]
        elif op == "keep" and max(n):
            mask = torch.rand(R, max(n) + 2, generator=rng) < 0.5
            rows.keep(mask)
            lists = [[x for x, m in zip(own, row, strict=False) if m] for own, row in zip(lists, mask, strict=True)]
        elif op == "cut":
            some = [pick(m) for m in n]
            rows.cut(some)
            lists = [x[: len(x) - m] for x, m in zip(lists, some, strict=True)]
        elif op == "drop_run" and rows.equal and max(n):
            first = pick(n[0])
            m = pick(n[0] - first)
            rows.drop_run(first, m)
            lists = [x[:first] + x[first + m :] for x in lists]
        elif op == "put" and min(n):
            index = torch.tensor([[pick(m) - 1] for m in n])
            rows.put(index, a=torch.full((R, 1, 2), 7) * torch.tensor([1, -1]), b=torch.full((R, 1), 7.0))
            for own, (i,) in zip(lists, index.tolist(), strict=True):
                own[i : i + 1 if i >= 0 else i] = [7] if i >= 0 else []
        elif op == "write" and max(n):
            value = torch.arange(R * max(n)).view(R, -1)
            rows.write("a", torch.stack([value, -value], -1))
            rows.write("b", value.float())
            lists = [value[r, :m].tolist() for r, m in enumerate(n)]
        elif op == "repeat" and R == 3:
            rows.repeat(2)
            lists = [list(x) for x in lists * 2]
        elif op == "reserve":
            rows.reserve(max(n) + pick(9))
        assert rows.n == [len(x) for x in lists]
        assert [rows.row("b", r).tolist() for r in range(len(lists))] == [[float(i) for i in x] for x in lists]
        assert [rows.row("a", r)[:, 0].tolist() for r in range(len(lists))] == lists
        assert rows["a"].shape == (len(lists), max(rows.n), 2)
        assert rows.flat("b").tolist() == [float(i) for x in lists for i in x]
        start, length = rows.where
        assert start.tolist() == rows.start and length.tolist() == rows.n
        assert rows.bytes() == sum(rows.n) * (2 * 8 + 4) and rows.bytes("b") == sum(rows.n) * 4
        assert {len(f) for f in rows.data.values()} == {rows.size}


def test_equal_rows_are_seen_without_a_copy():
    rows = Rows(2)
    rows.append([3, 3], k=torch.randn(6, 4))
    assert rows.equal and rows["k"].data_ptr() == rows.data["k"].data_ptr()
    rows.append([1, 0], k=torch.randn(1, 4))
    assert not rows.equal and not rows["k"][1, 3].any()  # padded with zeros


def test_a_new_field_fits_rows_that_have_moved():
    rows = Rows(2)
    rows.append([5, 5], a=torch.arange(10))
    rows.drop_run(1, 2)
    rows.append([1, 1], a=torch.tensor([10, 11]), b=torch.tensor([1.0, 2.0]))
    assert rows["a"].tolist() == [[0, 3, 4, 10], [5, 8, 9, 11]] and rows["b"][:, -1].tolist() == [1, 2]


def test_growing_copies_rarely_and_forgetting_gives_memory_back():
    rows, moves, before = Rows(2), 0, None
    for i in range(2000):
        rows.append([1, 1], x=torch.full((2, 1), float(i)))
        moves += rows.data["x"].data_ptr() != before
        before = rows.data["x"].data_ptr()
    assert moves < 100
    assert rows.size <= 2 * (2000 + spare(2000))
    rows.keep(torch.zeros(2, 2000, dtype=torch.bool))
    assert rows.size == 2 * spare(0)


@pytest.mark.parametrize("n, room", [(0, 16), (256, 16), (1600, 100)])
def test_spare(n, room):
    assert spare(n) == room
