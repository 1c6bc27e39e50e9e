"""Rows of unequal length that lie one behind the other in flat tensors, so that no row pays for a longer one.

A *row* is one KV head of one sequence (or whatever a storage likes). Row r has n[r] *slots* in use, in the order in
which they came, and some spare ones behind them. Every field of a slot has one flat tensor: slot i of row r is
data[field][start[r] + i].
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def spare(n: int, least: int = 16) -> int:
    """Return how many slots beyond n are allocated, or left unreclaimed, so that growing and forgetting are cheap."""
    return max(least, n // 16)


class Rows:
    """R rows of slots with the same fields; `least` slots at least are spare behind each row."""

    def __init__(self, n_rows: int, least: int = 16):
        self.least = least
        self.n, self.cap, self.start = [0] * n_rows, [0] * n_rows, [0] * n_rows
        self.stride: int | None = 0  # from one row's start to the next, where that is the same for all
        self.equal = True  # rows are of one length and evenly spaced: they can be seen as one tensor without a copy
        self.data: dict[str, Tensor] = {}  # field -> (slots of all rows, spare ones too, ...)
        self._where: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """Return the slots that every field has, spare ones and those before the first row included."""
        return len(next(iter(self.data.values()))) if self.data else sum(self.cap)

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """Return where rows start, int64 (R,), and their lengths, int32 (R,), as tensors on the fields' device."""
        if self._where is None:
            device = next(iter(self.data.values())).device
            if self.equal:  # made on the device: nothing is uploaded
                start = torch.arange(len(self.n), device=device) * self.stride + self.start[0]
                self._where = start, torch.full((len(self.n),), self.n[0], dtype=torch.int32, device=device)
            else:
                lengths = torch.tensor(self.n, dtype=torch.int32, device=device)
                self._where = torch.tensor(self.start, device=device), lengths
        return self._where

    def __getitem__(self, name: str) -> Tensor:
        """Return a field as (R, N, ...): a view where rows are equal, else a copy padded with zeros."""
        if self.equal:
            return self._room(name, 0, self.n[0])
        return pad_sequence([self.row(name, r) for r in range(len(self.n))], batch_first=True)

    def row(self, name: str, r: int) -> Tensor:
        """Return one row of a field, a view (n[r], ...)."""
        return self.data[name][self.start[r] : self.start[r] + self.n[r]]

    def flat(self, name: str) -> Tensor:
        """Return a field row by row, (sum of n, ...)."""
        return self[name].flatten(0, 1) if self.equal else torch.cat([self.row(name, r) for r in range(len(self.n))])

    def bytes(self, *names: str) -> int:
        """Return what the slots in use take, of all fields or of those named."""
        per_slot = (f[:1].nbytes if len(f) else 0 for name, f in self.data.items() if not names or name in names)
        return sum(self.n) * sum(per_slot)

    def append(self, counts: list[int], **fields: Tensor) -> None:
        """Add counts[r] slots to row r; fields are given row by row, (sum of counts, ...)."""
        for name, value in fields.items():
            if name not in self.data:
                self.data[name] = value.new_empty(self.size, *value.shape[1:])
        need = [n + t for n, t in zip(self.n, counts, strict=True)]
        if any(n > c for n, c in zip(need, self.cap, strict=True)):
            self._move(need)
        same = min(counts) == max(counts)
        if same and self.equal:
            for name, value in fields.items():
                self._room(name, self.n[0], counts[0]).copy_(value.view(len(counts), counts[0], *value.shape[1:]))
        elif any(counts):
            at = self._slots(counts) if same else self._index(self.n, counts)
            for name, value in fields.items():
                self.data[name].index_copy_(0, at, value.to(self.data[name].dtype))
        self._lengths(need, counts[0] if same else None)

    def reserve(self, n: int) -> None:
        """Make room for n slots in every row, at the start of its memory."""
        self._move([n] * len(self.n))

    def grown(self, T: int) -> None:
        """Take note of T slots that somebody has written behind every row."""
        self._lengths([n + T for n in self.n], T)

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a field from (R, N, ...); what stands beyond a row's length is ignored."""
        if self.equal:
            self[name].copy_(value)
        else:
            for r, n in enumerate(self.n):
                self.row(name, r).copy_(value[r, :n])

    def put(self, index: Tensor, **fields: Tensor) -> None:
        """Overwrite the slots index (R, M), negative ones skipped, of the fields given as (R, M, ...)."""
        at, some = index + self.where[0][:, None], index >= 0
        for name, value in fields.items():
            self.data[name][at[some]] = value[some].to(self.data[name].dtype)

    def pop(self, counts: list[int]) -> dict[str, Tensor]:
        """Remove the first counts[r] slots of row r; return their fields row by row."""
        if self.equal and len(set(counts)) == 1:
            out = {name: self._room(name, 0, counts[0]).flatten(0, 1).clone() for name in self.data}
        else:
            at = self._index([0] * len(counts), counts)
            out = {name: field[at] for name, field in self.data.items()}
        self.n, self.cap, self.start = (
            [a + sign * t for a, t in zip(now, counts, strict=True)]
            for now, sign in ((self.n, -1), (self.cap, -1), (self.start, 1))
        )
        self.stride = self.stride if len(set(counts)) == 1 else None
        self._lengths(self.n)
        if sum(len(f) for f in self.data.values()) > len(self.data) * sum(n + 2 * spare(n, self.least) for n in self.n):
            self._move(self.n)  # else the room in front of the rows is given back when they grow
        return out

    def drop_run(self, first: int, n: int) -> None:
        """Drop the n slots that follow the `first` ones of every row, by moving these; rows are equal."""
        for name in self.data if first else ():
            self._room(name, n, first).copy_(self._room(name, 0, first).clone())
        self.cap = [c - n for c in self.cap]
        self.start = [s + n for s in self.start]
        self._lengths([m - n for m in self.n])

    def cut(self, counts: list[int]) -> None:
        """Drop the newest counts[r] slots of row r; nothing moves."""
        self._lengths([n - t for n, t in zip(self.n, counts, strict=True)])

    def keep(self, mask: Tensor) -> None:
        """Drop the slots whose mask, bool (R, N), is False; what stays keeps its order, and memory shrinks."""
        width = max(self.n)
        if not width:
            return
        slot = torch.arange(width, device=mask.device)
        start, length = (t[:, None] for t in self.where)
        mask = mask[:, :width] & (slot < length)
        n = mask.sum(1).tolist()
        if n != self.n:
            at = (start + slot)[mask]
            self.n = n
            self._move(n, at)

    def repeat(self, times: int) -> None:
        """Turn R rows into R * times: all of them again and again."""
        if self.data:
            at = self._index([0] * len(self.n), self.n).repeat(times)
        self.n = self.n * times
        self._move(self.n, at if self.data else None)

    def _lengths(self, n: list[int], more: int | None = None) -> None:
        """Set the rows' lengths; `more`: each has grown by as many slots, so that nothing need be uploaded."""
        self.n, self.equal = n, self.stride is not None and min(n) == max(n)
        if more is None:
            self._where = None
        elif self._where is not None:
            self._where[1].add_(more)

    def _room(self, name: str, first: int, T: int) -> Tensor:
        """Return T slots of every row from its slot `first` on, used or not, as a view (R, T, ...); rows are equal."""
        field, at = self.data[name], self.start[0] + first
        return field.view(len(self.n), self.stride, *field.shape[1:])[:, at : at + T]

    def _slots(self, counts: list[int]) -> Tensor:
        """Return the flat indices of equally many new slots of every row, without an upload."""
        start, length = self.where
        return (torch.arange(counts[0], device=start.device) + (start + length)[:, None]).flatten()

    def _index(self, first: list[int], counts: list[int]) -> Tensor:
        """Return the flat indices of counts[r] slots of row r, from its slot first[r] on."""
        device = next(iter(self.data.values())).device
        if self.stride is not None and len(set(first)) == len(set(counts)) == 1:  # made on the device
            start = torch.arange(len(first), device=device) * self.stride + self.start[0] + first[0]
            return (start[:, None] + torch.arange(counts[0], device=device)).flatten()
        runs = [torch.arange(s + f, s + f + t) for s, f, t in zip(self.start, first, counts, strict=True)]
        return torch.cat(runs).to(device)

    def _move(self, need: list[int], at: Tensor | None = None) -> None:
        """Lay rows out with room for need[r] slots; `at`: which old slots, row by row, are the n[r] of row r."""
        at = self._index([0] * len(self.n), self.n) if at is None and self.data else at
        self.cap = [n + spare(n, self.least) for n in need]
        self.start = [0, *accumulate(self.cap)][:-1]
        self.stride = self.cap[0] if len(set(self.cap)) == 1 else None
        self._lengths(self.n)
        if self.data:
            to = self._index([0] * len(self.n), self.n)
            for name, field in self.data.items():
                new = field.new_zeros(sum(self.cap), *field.shape[1:])
                self.data[name] = new.index_copy_(0, to, field[at])
