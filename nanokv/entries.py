"""Which entries the rows of a layer hold: their tokens and columns, and how they are forgotten.

A row is one KV head of one sequence, R = B * Hkv of them. A *slot* is one place in a row, in the order in which the
tokens came. An entry that was forgotten is *hidden*: its slot is never attended to again, and its memory is reclaimed
when that is worth a copy. Entries are numbered by their *token*, the index of the token that they came from; their
*position* is what RoPE and the causal mask use. The two differ only in caches that renumber. Slots are renumbered only
when a pass begins or ends.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nanokv import attention
from nanokv.rows import Rows, spare

HIDDEN = 2**31 - 1  # the token number of a forgotten entry: later than any query, so that no query sees it


class Entries:
    """What is known of a layer's entries, beside a `storage`, which holds the entries themselves."""

    renumbers = False  # positions are ranks among the living

    def allocate(self, B: int, device) -> None:
        """Create empty state for B sequences."""
        self.B, self.n_rows, self.device = B, B * self.config.n_kv_heads, device
        self.slots = Rows(self.n_rows)  # each slot's token, where that is not its number, and columns
        self.fills: dict[str, float] = {}  # column -> value for new slots
        self.n_slots, self.counts = [0] * self.n_rows, [0] * self.n_rows  # slots and live entries of each row
        self.settled = [0] * B  # hidden slots of each sequence that the storage could not let go of
        self.moved = 0  # how often slots were renumbered
        self.reads = [0] * B  # tokens of the prompt or step under way, for each sequence
        self.open = False  # a pass is under way: slots stay where they are
        self.storage.reset(self)

    # What there is; sizes of 1 broadcast

    @property
    def N(self) -> int:
        """Return the slots of the longest row, hidden ones included."""
        return max(self.n_slots)

    @property
    def n_live(self) -> int:
        """Return the live entries of the fullest row."""
        return max(self.counts)

    @property
    def token(self) -> Tensor:
        """Return the token of each slot, int32 (B, Hkv, N), HIDDEN where nothing lives."""
        if "token" in self.slots.data:
            return self.column("token", HIDDEN, torch.int32)
        every = _numbers(self.N, self.device, torch.int32)
        if len(set(self.n_slots)) == 1:
            return every
        return torch.where(every < self._per_row(self.n_slots), every, HIDDEN)

    @property
    def live(self) -> Tensor:
        """Return which slots hold a live entry, bool (B, Hkv, N)."""
        return self.token != HIDDEN

    @property
    def rank(self) -> Tensor:
        """Return each live entry's place among the live ones of its row, 0 the oldest; -1 for hidden slots."""
        if self.counts == self.n_slots and len(set(self.counts)) == 1:
            return _numbers(self.N, self.device)
        live = self.live
        return torch.where(live, live.cumsum(-1) - 1, -1)

    @property
    def pos(self) -> Tensor:
        """Return the position of each slot, as RoPE and the mask use it; HIDDEN where nothing lives."""
        if not self.renumbers:
            return self.token
        rank = self.rank
        return torch.where(rank < 0, HIDDEN, rank)

    def between(self, first: int, last: int) -> Tensor:
        """Return which slots live, but for the `first` oldest and the `last` newest, bool (B, Hkv, N)."""
        rank = self.rank
        return (rank >= first) & (rank < self._per_row([c - last for c in self.counts]))

    def column(self, name: str, fill: float = 0.0, dtype=torch.float32) -> Tensor:
        """Return a number kept per slot, (B, Hkv, N), `fill` where it was never set; entries take it along."""
        if name not in self.slots.data:
            self._add(name, torch.full((self.n_rows, self.N), fill, dtype=dtype, device=self.device), fill)
        value = self.slots[name].view(self.B, -1, self.N)
        if self.slots.equal:
            return value
        inside = torch.arange(self.N, device=self.device) < self._per_row(self.n_slots)
        return torch.where(inside, value, fill)

    def set_column(self, name: str, value: Tensor, fill: float = 0.0) -> None:
        """Overwrite a column from (B, Hkv, N), of new slots too if it is new, which get `fill`."""
        value = value.expand(self.B, self.config.n_kv_heads, -1).flatten(0, 1)
        self.slots.write(name, value) if name in self.slots.data else self._add(name, value, fill)

    def drop_column(self, name: str) -> None:
        """Free a column, if there is one."""
        self.slots.data.pop(name, None)
        self.fills.pop(name, None)
        if not self.slots.data:  # nothing to be known of slots: their number is not kept up either
            self.slots = Rows(self.n_rows)

    # Forgetting

    def keep(self, mask: Tensor) -> None:
        """Forget the entries whose mask is False, bool (B, Hkv, N). Sequences that read nothing now keep theirs."""
        live = self.live
        mask = mask.expand(self.B, self.config.n_kv_heads, -1) & live
        if not all(self.reads):
            paused = torch.tensor([not n for n in self.reads], device=self.device)[:, None, None]
            mask = mask | live & paused
        counts = mask.sum(-1).flatten().tolist()
        if counts != self.counts:
            self.counts = counts
            self._write_tokens()
            self.set_column("token", torch.where(mask, self.token, HIDDEN))

    def keep_best(self, score: Tensor, n: int | list[int], first: int = 0, last: int = 0) -> None:
        """Forget the lowest-scored entries until n live in each row; of equals the newest go.

        score is fp32 (B, 1 or Hkv, N), n a number or one per row. The `first` oldest and the `last` newest of a row
        stay whatever their score.
        """
        at, gone = self.leaving(score, n, first, last)
        if not any(gone):
            return
        at = at.expand(self.B, self.config.n_kv_heads, -1).flatten(0, 1)  # (R, most that go)
        self._write_tokens()
        token = self.slots["token"]
        if len(set(gone)) == 1:
            token = token.scatter(1, at, HIDDEN)
        else:
            some = torch.arange(max(gone), device=at.device) < torch.tensor(gone, device=at.device)[:, None]
            hidden = torch.zeros_like(token, dtype=torch.bool).scatter_(1, at, some)
            token = token.masked_fill(hidden, HIDDEN)
        self.slots.write("token", token)
        self.counts = [c - g for c, g in zip(self.counts, gone, strict=True)]

    def leaving(self, score: Tensor, n: int | list[int], first: int = 0, last: int = 0) -> tuple[Tensor, list[int]]:
        """Return which slots `keep_best` would forget: (B, 1 or Hkv, m), worst first, and how many of each row."""
        n = [n] * self.n_rows if isinstance(n, int) else n
        rows = zip(self.counts, n, self._each(self.reads), strict=True)
        gone = [max(0, min(c - m, c - first - last)) if reading else 0 for c, m, reading in rows]
        ends = torch.finfo(score.dtype)
        score = score.nan_to_num(ends.min, ends.max, ends.min).masked_fill(~self.between(first, last), torch.inf)
        return attention.lowest(score, max(gone)), gone

    def drop_run(self, first: int, n: list[int]) -> None:
        """Forget the n[r] oldest entries of row r that follow its `first` ones; free them at once if that is cheap."""
        n = [max(0, min(m, c - first)) for m, c in zip(n, self.counts, strict=True)]
        if not any(n):
            return
        whole = self.counts == self.n_slots and min(self.counts) == max(self.counts) and not self.open
        if whole and min(n) == max(n) and self.storage.drop_run(first, n[0]):
            self._write_tokens()
            self.slots.drop_run(first, n[0])
            self.n_slots = [m - n[0] for m in self.n_slots]
            self.counts, self.moved = list(self.n_slots), self.moved + 1
            return
        rank = self.rank
        self.keep((rank < first) | (rank >= first + self._per_row(n)))

    # Bookkeeping

    def _number(self, n: list[int], token: Tensor, real: Tensor | None) -> None:
        """Take note of n[r] new entries of row r, of the tokens (B, T) that are `real`."""
        in_order = token is self.now.pos and self._each(self.now.before) == self.n_slots  # slot i is of token i
        if "token" not in self.slots.data and not in_order:
            self._write_tokens() if self.N else self.fills.setdefault("token", HIDDEN)
        if self.fills:
            new = {}
            for name, fill in self.fills.items():
                dtype = self.slots.data[name].dtype if name in self.slots.data else torch.int32
                new[name] = torch.full((sum(n),), fill, dtype=dtype, device=self.device)
            if "token" in new:
                every = token[:, None].expand(self.B, self.config.n_kv_heads, -1)
                new["token"] = (every.flatten() if real is None else every[real[:, None].expand_as(every)]).int()
            self.slots.append(n, **new)
        self.n_slots = [a + t for a, t in zip(self.n_slots, n, strict=True)]
        self.counts = [c + t for c, t in zip(self.counts, n, strict=True)]

    def _cut(self, gone: list[int]) -> None:
        """Drop each row's newest entries, which live."""
        self.storage.cut(gone)
        if self.slots.data:
            self.slots.cut(gone)
        self.n_slots = [a - b for a, b in zip(self.n_slots, gone, strict=True)]
        self.counts = [a - b for a, b in zip(self.counts, gone, strict=True)]

    def _reclaim(self, at_once: bool) -> None:
        """Free the hidden slots of each sequence that reads, at once or when there are as many as `spare` allows."""
        if self.counts == self.n_slots:
            return
        hidden, heads = self._hidden(), self.config.n_kv_heads
        due = []
        for b, (n, left, reads) in enumerate(zip(hidden, self.settled, self.reads, strict=True)):
            allowed = 1 if at_once else spare(max(self.counts[b * heads : (b + 1) * heads]))
            due.append(bool(reads) and n - left >= allowed)
        if not any(due):
            return
        keep = self.live if all(due) else self.live | ~torch.tensor(due, device=self.device)[:, None, None]
        self.slots.keep(self.storage.keep(keep.expand(self.B, heads, -1).flatten(0, 1)))
        self.n_slots, self.moved, self.chosen = list(self.slots.n), self.moved + 1, None
        self.settled = [n if now else left for n, now, left in zip(self._hidden(), due, self.settled, strict=True)]

    def _hidden(self) -> list[int]:
        """Return how many slots of each sequence's fullest row are hidden."""
        hidden, heads = [n - c for n, c in zip(self.n_slots, self.counts, strict=True)], self.config.n_kv_heads
        return [max(hidden[i : i + heads]) for i in range(0, self.n_rows, heads)]

    def _write_tokens(self) -> None:
        """Write down each slot's token, where until now slot i held token i."""
        if "token" not in self.slots.data:
            token = self.token.expand(self.B, self.config.n_kv_heads, -1).flatten(0, 1)
            self._add("token", token.contiguous(), HIDDEN)

    def _add(self, name: str, value: Tensor, fill: float) -> None:
        """Add a column, (R, N)."""
        self.fills[name] = fill
        if not self.slots.data and self.N:
            new = [value[r, :n] for r, n in enumerate(self.n_slots)]
            self.slots.append(self.n_slots, **{name: torch.cat(new)})
        else:
            self.slots.data[name] = value.new_full((self.slots.size,), fill)
            self.slots.write(name, value)

    def _each(self, numbers: list[int]) -> list[int]:
        """Repeat one number per sequence for each of its rows."""
        return [n for n in numbers for _ in range(self.config.n_kv_heads)]

    def _per_row(self, numbers: list[int]) -> Tensor:
        """Return one number per row as (B, Hkv, 1), or (1, 1, 1) where all are the same."""
        if len(set(numbers)) == 1:
            return torch.full((1, 1, 1), numbers[0], device=self.device)
        return torch.tensor(numbers, device=self.device).view(self.B, -1, 1)


@lru_cache(maxsize=8)  # layers share them
def _numbers(n: int, device, dtype=torch.int64) -> Tensor:
    """Return 0..n-1 as (1, 1, n)."""
    return torch.arange(n, dtype=dtype, device=device).view(1, 1, -1)
