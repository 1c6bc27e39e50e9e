"""The cache of one layer: a storage, the policies that thin it out, and what both may look at.

The attention layer calls it three times and knows nothing else about it:

    pos = cache.append(k, v, x, pos)         # 1. remember
    o   = cache.attend(rope(q, pos), pos)    # 2. look back
    cache.compress(q, pos)                   # 3. forget, then pack

An entry that was forgotten is *hidden*: it is never attended to again, and its memory is reclaimed when that is worth
a copy. Entries are numbered by their *token*, the index of the token they came from; their *position* is what RoPE and
the causal mask use. The two differ only in caches that renumber. Slots are in the order in which their tokens came, and
are renumbered only when a pass begins or ends.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nanokv import attention, backend
from nanokv.method import Plan, Policy, Storage
from nanokv.rows import Rows, spare

HIDDEN = 2**31 - 1  # the token number of a forgotten entry: later than any query, so that no query sees it


class Pass:
    """What all layers know of the tokens under way. Lists have one number per sequence.

    phase: "prompt" while more of it is to come, "last", "decode" or "draft"; pos (B, T): -1 where a sequence reads
    nothing; came: tokens that each sequence reads; before: tokens that each had read before. `real` (B, T) says which
    tokens are read, None: all are.
    """

    def __init__(self, phase: str, pos: Tensor, came: list[int], before: list[int]):
        self.phase, self.pos, self.came, self.before = phase, pos, came, before
        self.real = None if min(came, default=0) == pos.shape[1] else pos >= 0


class LayerCache:
    """What one layer remembers. Methods are handed it, and see `layer`, `config`, `rope`, `attn`, `plan`, B, n_rows."""

    recorder = None  # told what was attended to and merged, where somebody watches

    def __init__(self, model, layer: int, storage: Storage, policies: list[Policy], plan: Plan, waits: bool):
        self.config, self.rope, self.attn, self.layer = model.config, model.rope, model.layers[layer].self_attn, layer
        self.storage, self.policies, self.plan = storage, policies, plan
        self.window = self.config.window(layer)
        self.renumbers = any(p.renumbers for p in policies)
        self.raw = self.renumbers or storage.raw  # keys are stored before RoPE
        self.waits = waits  # packing must wait for the end of the pass
        self.last_reader = layer  # the last layer that reads these entries
        self.n_observed = max((p.observes for p in policies), default=0)
        self.B, self.n_rows, self.slots, self.now, self.draft = 0, 0, None, None, None
        self.difference = 0.0  # the largest between two backends' results, where both run

    def allocate(self, B: int, device) -> None:
        """Create empty state for B sequences."""
        self.B, self.n_rows, self.device = B, B * self.config.n_kv_heads, device
        self.slots = Rows(self.n_rows)  # what is known of each slot: its token, where not implied, and columns
        self.fills: dict[str, float] = {}  # column -> value for new slots
        self.n_slots, self.counts = [0] * self.n_rows, [0] * self.n_rows  # slots and live entries of each row
        self.settled = 0  # hidden slots that the storage could not let go of
        self.moved = 0  # how often slots were renumbered
        self.notes: dict = {}  # what methods remember of the layer: tensors (B, ...) and lists of B values
        self.reads = [0] * B  # tokens of the prompt or step under way, for each sequence
        self.tail = self.asked = self.chosen = None  # last queries of a prompt; what `act` is to see; what `select` chose
        self.n_read = 0.0  # slots that were attended to since the pass began, once for each layer that did
        self.positions = None  # of the newest entries, as `append` returned them
        self.open = False  # a pass is under way
        self.storage.reset(self)

    # The three verbs

    def append(self, k: Tensor, v: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        """Remember T new entries k, v (B, Hkv, T, D), k not yet rotated; return their positions, (B, T) or (B, Hkv, T)."""
        if self.slots is None:
            self.allocate(k.shape[0], k.device)
        came, real = self._coming(pos)
        n = self._each(came)
        if self.now.phase == "draft":
            self.draft = (k, v, x, pos)
        else:
            self._begin(came, n)
        token = pos
        pos = self.positions = self._ranks(k.shape[2], real) if self.renumbers else pos
        k = k if self.raw else self.rope(k, pos)
        if real is None:
            self.storage.store(n, k.flatten(0, 2), v.flatten(0, 2), x.flatten(0, 1))
        else:  # padding is never stored
            every = real[:, None].expand(-1, k.shape[1], -1)
            self.storage.store(n, k[every], v[every], x[real])
        self._number(n, token, real)
        for policy in self.policies if self.now.phase != "draft" else ():
            policy.before_attend(self, x, pos)
        return pos

    def attend(self, q: Tensor, pos: Tensor) -> Tensor:
        """Look back from rotated q (B, H, T, D) at pos to every live entry not later than it: (B, H, T, D)."""
        self.chosen = self._select(q, pos) if self.policies else None
        self.n_read = self.n_read + sum(self.n_slots) * self._share()
        o = backend.attend(self.storage, q, pos, self)
        if self.recorder:
            self.recorder.attended(self, q, pos, o)
        return o

    def compress(self, q: Tensor, pos: Tensor) -> None:
        """Let the policies act, then pack: after a prompt's part now, after a token when all layers have read it."""
        if self.now.phase == "draft":
            self.draft += (q,)
            return
        self.asked = q, pos
        if self.now.phase != "decode" and self.last_reader == self.layer:
            self.settle()

    def grown(self, pos: Tensor) -> None:
        """Take note of entries at pos (B, T) that somebody has put into the storage, and attended to."""
        n = self._each(self.now.came)
        self._begin(self.now.came, n)
        self._number(n, pos, None)
        self.n_read = sum(self.n_slots)

    def settle(self) -> None:
        """Forget, and pack unless that must wait for the end of the pass."""
        self.act()
        if not self.waits:
            self.pack()

    def act(self) -> None:
        """Let the policies forget, once per pass."""
        if self.asked is None:
            return
        (q, pos), self.asked = self.asked, None
        phase = self.now.phase
        if self.window and not self.renumbers:  # no later query can see further back
            newest = pos.amax(-1)[:, None, None]
            self.keep(self.token > newest + 1 - self.window)
        if phase != "decode" and self.n_observed:
            self._observe(q, pos)
        rotated = self.rope(q, pos) if self.policies else None
        for policy in self.policies:
            if phase == "decode":
                policy.after_step(self, rotated, pos)
            else:
                policy.after_part(self, rotated, pos)
            if phase == "last":
                policy.after_prompt(self)

    def pack(self) -> None:
        """End the layer's part of a pass: free what was forgotten, and let the storage pack what is left."""
        if not self.open:
            return
        self.open = False
        self._reclaim(spare(self.n_live) if self.now.phase == "decode" else 1)
        if self.now.phase != "prompt":
            self.storage.pack(self)
            self.tail, self.reads = None, [0] * self.B

    # Drafts

    def ahead(self) -> int | None:
        """Return how many tokens may be read before anything is packed or forgotten; None: any number."""
        every = [self.storage.ahead(), *(p.ahead(self) for p in self.policies)]
        return min((n for n in every if n is not None), default=None)

    def withdraw(self) -> tuple:
        """Take the drafted entries back; return k, v, x, pos and q, each sequence's tokens first, for `again`."""
        (k, v, x, pos, q), self.draft = self.draft, None
        came = self.now.came
        self._cut(self._each(came))
        if min(came) < pos.shape[1]:  # padding stands first: move it behind
            T = pos.shape[1]
            at = torch.tensor([T - c for c in came], device=pos.device)[:, None] + torch.arange(T, device=pos.device)
            real, at = at < T, at.clamp(max=T - 1)
            k, v, q = (t.take_along_dim(at[:, None, :, None], 2) for t in (k, v, q))
            x, pos = x.take_along_dim(at[..., None], 1), pos.take_along_dim(at, 1).masked_fill(~real, -1)
        return k, v, x, pos, q

    def again(self, drafted: tuple, i: int, j: int) -> None:
        """Remember the drafted tokens i to j - 1 as steps would have; `now` says which sequences have them."""
        k, v, x, _, q = drafted
        pos = self.append(k[:, :, i:j], v[:, :, i:j], x[:, i:j], self.now.pos)
        self.compress(q[:, :, i:j], pos)

    def truncate(self, n: int) -> None:
        """Drop the entries of tokens from n on, which must be the newest, and still as they came."""
        gone = [max(0, s - n) for s in self.n_slots]
        whole = self.n_slots == self.counts == self._each(self.next_position)
        if self.policies or not whole:
            raise NotImplementedError("only a cache that forgets nothing can be cut shorter")
        if any(g > exact for g, exact in zip(gone, self.storage.newest(), strict=True)):
            raise NotImplementedError(f"{self.storage.name} has packed entries that would have to go")
        self._cut(gone)

    def expand(self, B: int) -> None:
        """Turn one sequence into B equal ones."""
        self.storage.repeat(B)
        self.slots.repeat(B)
        self.B, self.n_rows = B, self.n_rows * B
        self.n_slots, self.counts, self.reads = self.n_slots * B, self.counts * B, self.reads * B
        for name, note in self.notes.items():
            if isinstance(note, Tensor):
                self.notes[name] = note.repeat(B, *[1] * (note.dim() - 1))
            elif isinstance(note, list):
                self.notes[name] = note * B

    # What methods see; sizes of 1 broadcast

    @property
    def phase(self) -> str:
        """Return "prompt" while more of the prompt is to come, "last" in its last part, "decode" or "draft"."""
        return self.now.phase

    @property
    def next_position(self) -> list[int]:
        """Return how many tokens each sequence has read, those under way included."""
        return [a + b for a, b in zip(self.now.before, self.now.came, strict=True)]

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

    def observed(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the prompt's last n queries, rotated, (B, H, n, D), and their positions (B, n), however it was cut.

        Fewer only if the prompt is shorter; -1 where another sequence's is longer. Positions are those that the
        queries' own entries have now. (None, None) if n is 0.
        """
        if not n:
            return None, None
        q, pos = self.tail[0][:, :, -n:], self.tail[1][:, -n:]
        if self.renumbers:
            counts = self.counts[:: self.config.n_kv_heads]
            back = torch.arange(-pos.shape[1], 0, device=pos.device)
            pos = torch.where(pos >= 0, torch.tensor(counts, device=pos.device)[:, None] + back, -1)
        return self.rope(q, pos.clamp(min=0)), pos

    def probs(self, q: Tensor, pos: Tensor) -> Tensor:
        """Return what rotated queries q (B, H, T, D) at pos attend to, fp32 (B, H, T, N)."""
        return attention.probs(q, self.read()[0], self.additive_mask(pos))

    def paid(self, q: Tensor, pos: Tensor, reduce: str) -> Tensor:
        """Return the attention that each entry gets from all these queries, fp32 (B, Hkv, N)."""
        return backend.paid(q, pos, self, reduce)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all slots as k, v (B, Hkv, N, D), keys rotated by their positions."""
        k, v = (t.view(self.B, -1, *t.shape[1:]) for t in self.storage.read())
        if self.raw:
            pos = self.pos
            k = self.rope(k, pos if self.counts == self.n_slots == [self.N] * self.n_rows else pos.masked_fill(pos == HIDDEN, 0))
        return k, v

    def mask(self, pos: Tensor) -> tuple[Tensor | None, bool]:
        """Return what the newest queries, at pos, may see, to be added to logits, and whether it is plainly causal."""
        if self.plain:
            return None, pos.shape[-1] > 1
        return self.additive_mask(pos), False

    @property
    def plain(self) -> bool:
        """Say whether the newest queries see all slots up to their own."""
        whole = self.counts == self.n_slots and min(self.counts) == max(self.counts)
        plain = whole and not self.window and self.chosen is None and self.now.real is None
        return plain and "bias" not in self.slots.data

    @property
    def lengths_say_all(self) -> bool:
        """Say whether a query of the newest entry sees all of its row, rows being of unequal length."""
        ragged = self.counts == self.n_slots and min(self.counts) < max(self.counts)
        return ragged and not self.window and self.chosen is None and self.now.real is None and "bias" not in self.slots.data

    def additive_mask(self, pos: Tensor) -> Tensor:
        """Return what is to be added to the logits of queries at pos, fp32 (B, 1 or Hkv, T, N): bias, or -inf."""
        at = pos[:, None, :, None] if pos.dim() == 2 else pos[..., None]  # (B, 1 or Hkv, T, 1)
        key = self.pos[:, :, None]  # (B, Hkv, 1, N), sizes of 1 broadcast
        see = key <= at
        if self.window:
            see = see & (key > at - self.window)
        if self.chosen is not None and self.chosen.shape[-1] == self.N:
            see = see & (self.chosen[:, :, -pos.shape[-1] :] | (key == at))  # a token always sees itself
        mask = torch.where(see, 0.0, -torch.inf)
        return mask + self.column("bias")[:, :, None] if "bias" in self.slots.data else mask

    # What methods do

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

    def drop_run(self, first: int, n: list[int]) -> None:
        """Forget the n[r] oldest entries of row r that follow its `first` ones; slots are renumbered if that is cheap."""
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

    def leaving(self, score: Tensor, n: int | list[int], first: int = 0, last: int = 0) -> tuple[Tensor, list[int]]:
        """Return which slots `keep_best` would forget: (B, 1 or Hkv, m), worst first, and how many of each row."""
        n = [n] * self.n_rows if isinstance(n, int) else n
        rows = zip(self.counts, n, self._each(self.reads), strict=True)
        gone = [max(0, min(c - m, c - first - last)) if reading else 0 for c, m, reading in rows]
        least = torch.finfo(score.dtype).min
        score = score.nan_to_num(least, torch.inf, least).masked_fill(~self.between(first, last), torch.inf)
        return attention.lowest(score, max(gone)), gone

    def write(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite the slots index (B, Hkv, M), negative to skip, with k, v (B, Hkv, M, D), k rotated as in `read`."""
        self.storage.write(*(t.flatten(0, 1) for t in (index, k, v)))

    def merge(self, left: Tensor, to: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite the slots `to` (B, Hkv, M), -1 for none, with k, v (B, Hkv, M, D), into which the slots `left` went.

        The entries of `left` are still to be forgotten. Slots that several went into are given the same k, v each time.
        """
        self.write(to, k, v)
        if self.recorder:
            self.recorder.merged(self, left, to)

    def visible(self, pos: Tensor, G: int) -> dict:
        """Return what a decode kernel must know to hide entries and weigh merged ones, as plain tensors; {}: nothing.

        pos: position of each slot, int32, flat, and where rows start in it, col_start; q_pos, int32 (R, G * T); bias,
        like pos, or None; window in tokens or None.
        """
        if self.plain or (self.lengths_say_all and pos.shape[-1] == 1):
            return {}
        if self.chosen is not None:
            raise NotImplementedError("no kernel reads only what a policy selects")
        at = pos[:, None] if pos.dim() == 2 else pos  # (B, 1 or Hkv, T)
        at = at.unsqueeze(2).expand(self.B, self.config.n_kv_heads, G, -1).reshape(self.n_rows, -1).int()
        out = {"q_pos": at, "window": self.window}
        if self.renumbers:
            here = self.pos.expand(self.B, self.config.n_kv_heads, -1)
            start = torch.arange(self.n_rows, device=self.device) * self.N
            return out | {"pos": here.reshape(-1).int(), "col_start": start}
        self._write_tokens()
        bias = self.slots.data.get("bias")
        return out | {"pos": self.slots.data["token"], "col_start": self.slots.where[0], "bias": bias}

    # Bookkeeping

    def _each(self, numbers: list[int]) -> list[int]:
        """Repeat one number per sequence for each of its rows."""
        return [n for n in numbers for _ in range(self.config.n_kv_heads)]

    def _coming(self, pos: Tensor) -> tuple[list[int], Tensor | None]:
        """Return how many tokens each sequence is to read, and which these are, or None: all."""
        if pos is self.now.pos:
            return self.now.came, self.now.real
        real = pos >= 0  # a plan has dropped some
        came = real.sum(1).tolist()
        return came, None if min(came) == pos.shape[1] else real

    def _begin(self, came: list[int], n: list[int]) -> None:
        """Let policies make room for n[r] new entries."""
        before = self.reads if self.now.phase != "decode" else [0] * self.B
        self.reads = [a + b for a, b in zip(before, came, strict=True)]
        for policy in self.policies:
            policy.before_append(self, n)
        self.open, self.n_read = True, 0.0
        self._reclaim(spare(self.n_live))

    def _ranks(self, T: int, real: Tensor | None) -> Tensor:
        """Return the positions of T new entries in a cache that renumbers, (B, T), or (B, Hkv, T) where rows differ."""
        if real is None and len(set(self.counts)) == 1:
            return torch.arange(self.counts[0], self.counts[0] + T, device=self.device).expand(self.B, T)
        counts = self._per_row(self.counts)  # (B, Hkv, 1)
        if real is None:
            return counts + torch.arange(T, device=self.device)
        return torch.where(real[:, None], counts + real[:, None].cumsum(-1) - 1, -1)

    def _select(self, q: Tensor, pos: Tensor) -> Tensor | None:
        chosen = None
        for policy in self.policies:
            if self.now.phase in ("decode", "draft") or policy.selects_prompts:
                mask = policy.select(self, q, pos)
                chosen = mask if chosen is None else chosen if mask is None else chosen & mask
        return chosen

    def _share(self):
        """Return the share of what is held that this attention reads."""
        if self.chosen is None:
            return 1.0
        return (self.chosen.any(2) & self.live).sum() / sum(self.counts)

    def _observe(self, q: Tensor, pos: Tensor) -> None:
        """Keep each sequence's last queries, un-rotated, across the parts of a prompt."""
        pos = pos if pos.dim() == 2 else pos[:, 0]
        if self.tail is not None:
            q, pos = torch.cat([self.tail[0], q], 2), torch.cat([self.tail[1], pos], 1)
        if self.now.real is not None:  # padding first
            at = (pos >= 0).int().argsort(dim=1, stable=True)
            q, pos = q.take_along_dim(at[:, None, :, None], 2), pos.take_along_dim(at, 1)
        n = self.n_observed
        self.tail = q[:, :, -n:].clone(), pos[:, -n:].clone()  # not views, which would hold on to the whole pass

    def _per_row(self, numbers: list[int]) -> Tensor:
        """Return one number per row as (B, Hkv, 1), or (1, 1, 1) where all are the same."""
        if len(set(numbers)) == 1:
            return torch.full((1, 1, 1), numbers[0], device=self.device)
        return torch.tensor(numbers, device=self.device).view(self.B, -1, 1)

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
            self.slots.data[name] = value.new_full((sum(self.slots.cap),), fill)
            self.slots.write(name, value)

    def _number(self, n: list[int], token: Tensor, real: Tensor | None) -> None:
        """Take note of n[r] new entries of row r, of the tokens (B, T) that are `real`."""
        if "token" not in self.slots.data:
            if token is not self.now.pos or self._each(self.now.before) != self.n_slots:  # slot i is not of token i
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

    def _reclaim(self, least: int) -> None:
        """Free hidden slots, if there are `least` more of them than could not be freed last time."""
        if self.counts == self.n_slots:
            return
        hidden = max(n - c for n, c in zip(self.n_slots, self.counts, strict=True))
        if hidden - self.settled < least:
            return
        live = self.live.expand(self.B, self.config.n_kv_heads, -1).flatten(0, 1)
        self.slots.keep(self.storage.keep(live))
        self.n_slots, self.moved, self.chosen = list(self.slots.n), self.moved + 1, None
        self.settled = max(n - c for n, c in zip(self.n_slots, self.counts, strict=True))


@lru_cache(maxsize=8)  # layers share them
def _numbers(n: int, device, dtype=torch.int64) -> Tensor:
    """Return 0..n-1 as (1, 1, n)."""
    return torch.arange(n, dtype=dtype, device=device).view(1, 1, -1)


class Borrowed:
    """The cache of a layer that looks into an earlier layer's: nothing is stored, forgotten or packed here."""

    recorder = None

    def __init__(self, lender: LayerCache, layer: int):
        self.lender, self.layer = lender, layer
        lender.last_reader = layer

    def __getattr__(self, name: str):
        if name.startswith("__") or "lender" not in vars(self):
            raise AttributeError(name)
        return getattr(self.lender, name)

    def append(self, k, v, x, pos):
        """Store nothing; return where the lender's newest entries are."""
        return self.lender.positions

    def attend(self, q, pos):
        """Look at what the lender holds."""
        return self.lender.attend(q, pos)

    def compress(self, q, pos):
        """Let the lender act once its last borrower has read."""
        if self.lender.last_reader == self.layer and self.lender.now.phase not in ("decode", "draft"):
            self.lender.settle()
