"""The KV cache as an explicit object: KVCache (all layers), LayerCache (one layer), and the three kinds of method.

The attention layer calls its LayerCache three times per forward pass and knows nothing else about it:

    pos = cache.append(k, v, x, pos)        # 1. remember
    o   = cache.attend(rope(q, pos), pos)   # 2. look back
    cache.compress(q, pos)                  # 3. forget, then pack

A Storage decides how an entry is represented, a Policy which entries stay, a Plan what happens across layers.

Words. A *row* is one KV head of one sequence; there are R = B * Hkv of them. A *slot* is one place in a row, and slots
are in the order in which their tokens came. An entry that was forgotten is *hidden*: its slot is never attended to
again, and the storage reclaims its memory when that is worth a copy. Entries are numbered by their *token*, the index
of the token they came from; their *position* is what RoPE and the causal mask use. The two differ only in caches that
renumber.
"""

from __future__ import annotations

import copy
import inspect
import math
import weakref
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanokv import attention, kernels, snapshot

HIDDEN = 2**31 - 1  # the token number of a forgotten entry: later than any query, so that no query sees it


def spare(n: int, least: int = 16) -> int:
    """Return how many slots beyond n are allocated (or left unreclaimed) to make growing and forgetting cheap."""
    return max(least, n // 16)


class Rows:
    """Equal or unequal numbers of slots per row, each slot with the same fields, every field in one flat tensor.

    Rows of equal length are seen as (R, N, ...) without a copy. Rows of unequal length (ragged heads) lie one behind
    the other, each with spare slots at its end, so that no row pays for a longer one.
    """

    derived = ("_wide",)  # not saved

    def __init__(self, n_rows: int, least: int = 16):
        self.least = least
        self.n, self.cap = [0] * n_rows, [0] * n_rows  # slots used and allocated, per row
        self.start = [0] * n_rows  # where each row begins in the flat tensors
        self.skip = 0  # slots at the front of every row that were popped and not yet overwritten
        self.equal = True  # all rows have the same length, so that they can be seen as one (R, N, ...) tensor
        self.data: dict[str, Tensor] = {}  # field -> (sum of cap, ...)
        self._wide: dict[str, tuple] = {}  # field -> the tensor in `data`, and the same as (R, cap, ...) of equal rows

    def __getstate__(self) -> dict:
        return vars(self) | {"_wide": {}}  # pickled, its tensors would be others than those in `data`

    @property
    def size(self) -> int:
        """Return the length of the longest row."""
        return max(self.n)

    def used(self, *names: str) -> int:
        """Return the bytes of the slots in use, of some fields or of all."""
        fields = [self.data[n] for n in names or self.data if n in self.data]
        return sum(self.n) * sum(math.prod(f.shape[1:]) * f.element_size() for f in fields)

    def add(self, name: str, shape: tuple, dtype, device, fill=0) -> None:
        """Create a field with `fill` in every slot."""
        self.data[name] = torch.full((sum(self.cap), *shape), fill, dtype=dtype, device=device)

    def remove(self, name: str) -> None:
        """Free a field, if there is one."""
        self.data.pop(name, None)
        self._wide.pop(name, None)

    def row(self, name: str, r: int) -> Tensor:
        """Return one row of a field, (n_r, ...), as a view."""
        lo = self.start[r] + self.skip
        return self.data[name][lo : lo + self.n[r]]

    def __getitem__(self, name: str) -> Tensor:
        """Return a field as (R, N, ...): a view when rows are equal, else a copy padded with zeros."""
        if self.equal:
            return self._room(name, self.skip, self.n[0])
        field = self.data[name]
        out = field.new_zeros(len(self.n), self.size, *field.shape[1:])
        for r, n in enumerate(self.n):
            out[r, :n] = self.row(name, r)
        return out

    def _room(self, name: str, at: int, T: int) -> Tensor:
        """Return T slots of every row of a field, used or not, as a view (R, T, ...); rows are equal."""
        field, (seen, wide) = self.data[name], self._wide.get(name, (None, None))
        if seen is not field:
            wide = field.view(len(self.n), self.cap[0], *field.shape[1:])
            self._wide[name] = field, wide
        return wide[:, at : at + T]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Overwrite a field from (R, N, ...); what stands beyond a row's length is ignored."""
        if self.equal:
            self[name].copy_(value)
        else:
            for r, n in enumerate(self.n):
                self.row(name, r).copy_(value[r, :n])

    def put(self, name: str, index: Tensor, value: Tensor) -> None:
        """Overwrite single slots: index int64 (R, M), negative to skip, value (R, M, ...)."""
        start = torch.tensor(self.start, device=index.device)[:, None] + self.skip
        self.data[name][(start + index)[index >= 0]] = value[index >= 0].to(self.data[name].dtype)

    def append(self, rows=None, T: int = 0, **fields: Tensor | float) -> None:
        """Add slots to every row (or to those listed in `rows`), each field given as (rows, T, ...).

        A field that exists may be given as a number for all T slots, which must then be said if there are only such.
        """
        T = next((value.shape[1] for value in fields.values() if isinstance(value, Tensor)), T)
        for name, value in fields.items():
            if name not in self.data:
                self.add(name, value.shape[2:], value.dtype, value.device)
        if self.equal and (rows is None or len(rows) == len(self.n)):
            if self.skip + self.n[0] + T > self.cap[0]:
                self.reserve([n + T for n in self.n])
            lo = self.skip + self.n[0]
            self.n = [n + T for n in self.n]
            for name, value in fields.items():
                new = self._room(name, lo, T)
                new.copy_(value) if isinstance(value, Tensor) else new.fill_(value)
            return
        which = range(len(self.n)) if rows is None else rows
        self.reserve([n + T * (r in which) for r, n in enumerate(self.n)])
        device = next(iter(self.data.values())).device
        at = torch.tensor([self.start[r] + self.skip + self.n[r] for r in which], dtype=torch.int64, device=device)
        at = at if T == 1 else (at[:, None] + torch.arange(T, device=device)).flatten()
        for name, value in fields.items():
            field = self.data[name]
            if isinstance(value, Tensor):
                field.index_copy_(0, at, value.flatten(0, 1).to(field.dtype))
            else:
                field.index_fill_(0, at, value)
        self.n = [n + T * (r in which) for r, n in enumerate(self.n)]
        self._look()

    def grow(self, T: int) -> list[int]:
        """Add T slots to every row, of rows that hold fields already, and leave what is in them; return where."""
        self.reserve([n + T for n in self.n])
        at = [s + self.skip + n for s, n in zip(self.start, self.n, strict=True)]
        self.n = [n + T for n in self.n]
        return at

    def pop(self, name: str, counts: list[int]) -> list[tuple[list[int], Tensor]]:
        """Remove the first counts[r] slots of each row; return them as (rows, (len(rows), count, ...)) batches."""
        out = []
        if not any(counts):
            return out
        for count in sorted(set(counts) - {0}):
            rows = [r for r, c in enumerate(counts) if c == count]
            taken = self[name][:, :count] if len(rows) == len(counts) else None
            if taken is None:
                taken = torch.stack([self.row(name, r)[:count] for r in rows])
            out.append((rows, taken.clone()))
        if len(set(counts)) == 1:  # forget by moving the front, not the data
            self.skip += counts[0]
            self.n = [n - counts[0] for n in self.n]
            self._look()
        else:
            self._move([n - c for n, c in zip(self.n, counts, strict=True)], None, drop=counts)
        return out

    def slide(self, first: int, gone: int) -> None:
        """Drop the `gone` slots that follow the `first` ones, by moving these; rows must be equal."""
        for name in self.data if first else ():
            x = self[name]
            x[:, gone : gone + first] = x[:, :first].clone()
        self.skip += gone
        self.n = [n - gone for n in self.n]

    def keep(self, mask: Tensor) -> None:
        """Drop the slots whose mask (R, N) is False, keeping order; memory shrinks when much is dropped."""
        order = torch.argsort(~mask, dim=1, stable=True)  # (R, N): kept slots first
        counts = mask.sum(1).tolist()
        fits = all(n <= c <= n + 2 * spare(n, self.least) for n, c in zip(counts, self.cap, strict=True))
        self._move(counts, None if fits else [n + spare(n, self.least) for n in counts], order=order)

    def reserve(self, need: list[int]) -> None:
        """Make room for need[r] slots in row r."""
        if all(self.skip + n <= c for n, c in zip(need, self.cap, strict=True)):
            return
        both = list(zip(need, self.cap, strict=True))
        fits = all(n <= c for n, c in both)
        self._move(self.n, None if fits else [max(c, n + spare(n, self.least)) for n, c in both])

    def trim(self) -> None:
        """Give back what is allocated beyond each row's length and its spare slots."""
        caps = [n + spare(n, self.least) for n in self.n]
        if caps != self.cap:
            self._move(self.n, caps)

    def _move(self, counts, caps, order: Tensor | None = None, drop: list[int] | None = None) -> None:
        """Rebuild every row from its slots order[r][:counts[r]] (or all after drop[r]), in place or with new caps."""
        new_cap = self.cap if caps is None else caps
        start = [0, *accumulate(new_cap)][:-1]
        for name, field in self.data.items():
            new = field if caps is None else field.new_zeros(sum(new_cap), *field.shape[1:])
            if self.equal and len(set(counts)) == 1 and len(set(new_cap)) == 1 and drop is None:
                rows = self[name]  # (R, N, ...)
                if order is not None:
                    rows = rows[torch.arange(len(counts), device=rows.device)[:, None], order[:, : counts[0]]]
                elif caps is None:
                    rows = rows.clone()
                new.view(len(counts), new_cap[0], *field.shape[1:])[:, : counts[0]] = rows
            else:
                for r, n in enumerate(counts):
                    row = self.row(name, r)
                    row = row[drop[r] :] if drop else row if order is None else row[order[r, :n]]
                    new[start[r] : start[r] + n] = row.clone() if caps is None else row
            self.data[name] = new
        self.n, self.cap, self.start, self.skip = list(counts), list(new_cap), start, 0
        self._wide = {}  # whose tensors would live on
        self._look()

    def _look(self) -> None:
        self.equal = len(set(self.n)) == 1 and len(set(self.cap)) == 1


class Method:
    """What every method shares: hyper-parameters set by its constructor, and nothing else until it is bound."""

    name = ""  # the file's name, unless given
    source = ""  # the path of the file, if it lies outside nanokv/methods
    renumbers = False  # positions are ranks among live entries, and keys are stored un-rotated
    merges = False  # entries are overwritten, which needs a storage that can do that
    chunk = None  # the most prompt tokens that may be read at once, or None
    padded = True  # prompts of different lengths may share a batch
    observes = 0  # how many of a prompt's last queries it wants to look at together, see LayerCache.observed
    needs_probs = False  # it wants the attention probabilities of decode steps, see LayerCache.step_probs
    needs_sums = ""  # "mean", "max" or "sum": it wants what a prompt's queries pay each entry, see LayerCache.attend
    early = False  # it acts, or takes note of something, before the last pass of a prompt; see KVCache.adopt
    waits = False  # it acts on a layer again after later layers, so packing must wait for the end of the pass

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.parameters = dict(list(bound.arguments.items())[1:])  # as given and by default
        self.name = cls.name or cls.__module__.rpartition(".")[2]
        return self

    def __init__(self):
        """Take no hyper-parameters."""

    def __repr__(self) -> str:
        return f"{self.source or self.name}({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"

    def check(self, config) -> None:
        """Raise NotImplementedError, with the reason, if the method cannot work with this model."""

    def most(self, prompt: int, new: int) -> int:
        """Return the most entries a row may hold, on average over rows and layers, after these numbers of tokens."""
        return prompt + new

    @classmethod
    def exact(cls, config) -> dict:
        """Return hyper-parameters with which the method changes nothing."""
        return {"budget": config.context} if "budget" in inspect.signature(cls.__init__).parameters else {}


class Storage(Method):
    """Represent entries. One object per layer; `self.cache` is its LayerCache, known from the first `reset` on."""

    writable = False  # entries can be overwritten, which merging needs
    derived = ()  # attributes that `reset` makes from the model alone: shared by caches, not saved

    def bind(self, cache: LayerCache) -> Storage:
        """Return a copy without entries that belongs to `cache`."""
        new = object.__new__(type(self))
        vars(new).update(vars(self), cache=_owner(cache))
        new.reset()
        return new

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "cache"}

    def reset(self) -> None:
        """Create empty state; `self.cache.n_rows` is known."""
        raise NotImplementedError

    def store(self, k: Tensor, v: Tensor, x: Tensor) -> None:
        """Add k, v (B, Hkv, T, D) as T new slots per row; x (B, T, E) is the layer input they were made from."""
        raise NotImplementedError

    def store_rotated(self, k: Tensor, v: Tensor, pos: Tensor) -> bool:
        """Rotate k by pos and add k, v (B, Hkv, T, D) in one kernel, or return False; `store` does it then."""
        return False

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all slots as k, v (B, Hkv, N, D) in the model's dtype; shorter rows are padded.

        A storage implements this or `read_row`.
        """
        k, v = zip(*(self.read_row(r) for r in range(self.cache.n_rows)), strict=True)
        return tuple(pad_sequence(t, batch_first=True).unflatten(0, (self.cache.B, -1)) for t in (k, v))

    def read_row(self, r: int) -> tuple[Tensor, Tensor]:
        """Return the slots of one row as k, v (n_r, D)."""
        k, v = (t.flatten(0, 1)[r, : self.cache.n_slots[r]] for t in self.read())
        return k, v

    def write(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite slots index (R, M), negative to skip, with k, v (R, M, D). Only where `writable`."""
        raise NotImplementedError

    def drop(self, live: Tensor) -> Tensor:
        """Reclaim what can be reclaimed of the slots that are False in live (R, N); return (R, N) of what remains."""
        raise NotImplementedError

    def slide(self, first: int, gone: int) -> bool:
        """Reclaim the `gone` slots after the `first` ones of every row at little cost, or return False."""
        return False

    def pack(self) -> None:
        """Compress what is stored; called at the end of every pass, after the policies."""

    def trim(self) -> None:
        """Give spare memory back; called once the prompt is read. Rows that the storage itself holds are done here."""
        for held in vars(self).values():
            if isinstance(held, Rows):
                held.trim()

    def attend(self, q: Tensor, pos: Tensor) -> Tensor:
        """Attend from rotated q (B, H, T, D) at pos to everything stored: (B, H, T, D)."""
        c = self.cache
        if not c.equal:
            return attention.ragged(q, [c.read_row(r) for r in range(c.n_rows)], c.mask(pos, padded=False))
        k, v = c.read()
        return attention.attend(q, k, v, c.mask(pos))

    def attend_probs(self, q: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Attend as `attend` does, and return the probabilities too: fp32 (B, H, T, N)."""
        k, v = self.cache.read()
        p = attention.probs(q, k, self.cache.mask(pos))
        return attention.mix(p, v).to(q.dtype), p

    def attend_and_sum(self, q: Tensor, pos: Tensor, how: str) -> tuple[Tensor, Tensor]:
        """Attend as `attend` does, and return what the queries pay each slot, fp32 (B, Hkv, N)."""
        return attention.attend_and_sum(q, *self.cache.read(), self.cache.mask(pos), how)

    def attend_triton(self, q: Tensor, pos: Tensor, probs: bool) -> tuple[Tensor, Tensor | None]:
        """Do in Triton what `attend` and, with `probs`, `attend_probs` do; return o and the probabilities or None.

        NotImplementedError, in one line, for what no kernel can do. Entries are read out first; a storage overrides
        this to let a kernel read them as they are held.
        """
        c, R = self.cache, self.cache.n_rows
        k, v = (t.flatten(0, 2).contiguous() for t in c.read())  # (R * N, D)
        start = kernels.on_device(tuple(range(0, R * c.size, c.size)), torch.int64, q.device)
        return kernels.step("decode", c, q, pos, probs, k, v, start, kernels.lengths(c.n_slots, q.device))

    def bytes(self) -> dict[str, int]:
        """Return the bytes in use by category: payload, scales, residual. What else is held is counted as unused."""
        raise NotImplementedError

    def constants(self) -> list[Tensor]:
        """Return tensors derived from the model (bases, codebooks), which do not grow with the text."""
        return []


class Policy(Method):
    """Decide which entries of a layer stay. Holds hyper-parameters only; state per entry lives in cache columns."""

    def before(self, cache: LayerCache, n_new: int) -> None:
        """Act before n_new entries are appended. Most policies do not."""

    def __call__(self, cache: LayerCache, q: Tensor, pos: Tensor) -> None:
        """Act after attention; q (B, H, T, D) is not rotated. Look at cache.phase to know when to act.

        In a decode step of one token on a CPU `before` is called for all layers before the first layer, this after the
        last one, unless a plan acts between layers. Other layers may not be looked at in `before`.
        """


class Plan(Policy):
    """Act across layers: budgets, re-trimming, sharing, dropping rows of the hidden state.

    A plan is called for each layer as a policy is, after the policies, and in these places too. What it must remember
    between calls goes into the `notes` of a layer.
    """

    def before_layer(self, cache: KVCache, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state x (B, T, E) and positions that layer i is to read."""
        return x, pos

    def after_layer(self, cache: KVCache, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state and positions that the layers after i are to read."""
        return x, pos

    def after_prefill(self, cache: KVCache) -> None:
        """Act once, when the whole prompt has passed all layers."""


class LayerCache:
    """The cache of one layer: a storage, the policies that thin it out, and what both may look at.

    Context for methods: `layer` (index), `config`, `rope`, `attn` (the attention module, for its weights), `phase`.
    """

    def __init__(self, parent: KVCache, layer: int, attn):
        self.parent, self.layer, self.attn = _owner(parent), layer, attn
        self.config, self.rope, self.window = parent.config, parent.rope, parent.config.window(layer)
        self.policies, self.renumbers = parent.policies + ([parent.plan] if parent.plan else []), parent.renumbers
        self.B, self.n_rows, self.storage = 0, 0, None
        self.notes: dict[str, list] = {}  # what a method remembers about this layer, such as numbers per sequence
        self.difference = 0.0  # the largest between two backends' results, where both run
        self.step_probs = None  # fp32 (B, H, T, N) of the decode step under way, where a method `needs_probs`
        self._expected = None  # positions of the entries to come, once there is room for them
        self._mask = None  # what the query of a step of one token sees, from `expect` to `compress`
        self._asked = None  # queries and positions of the pass under way, while policies wait for other layers

    def _allocate(self, B: int, device) -> None:
        self.B, self.n_rows, self.device = B, B * self.config.n_kv_heads, device
        self.slots = Rows(self.n_rows)  # what is known of each slot: its token, where not implied, and columns
        self.n_slots = [0] * self.n_rows
        self.counts = [0] * self.n_rows  # live entries per row, known without asking the device
        self.fills: dict[str, float] = {}  # column -> value for new slots
        self.same = True  # every row holds the same tokens
        self._settled = 0  # hidden slots that were left by the last reclaim
        self._ends = 0, 0  # where anything is hidden: how many slots at each row's beginning and end are known to live
        self._tail = None  # the last queries of a prompt under way, and their positions
        self._at_rest = True  # no pass is between `append` and `finish`, whose slots must stay where they are
        self.storage = self.parent.storage.bind(self)

    # What the attention layer calls

    def append(self, k: Tensor, v: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        """Remember T new entries k, v (B, Hkv, T, D), k not yet rotated; return their positions (B, T)."""
        if self.storage is None:
            self._allocate(k.shape[0], k.device)
        if self._expected is None:
            self.expect(pos)
        pos, self._expected = self._expected, None
        if self.renumbers or not (kernels.small(x) and self.storage.store_rotated(k, v, pos)):
            self.storage.store(k if self.renumbers else self.rope(k, pos), v, x)
        return pos

    def expect(self, token: Tensor) -> None:
        """Make room for new entries, of tokens (B, T), and number them.

        Before a step of one token on a CPU this is done for all layers at once, for the reason that `compress` gives.
        """
        T = token.shape[1]
        for policy in self.policies:
            policy.before(self, T)
        self._tidy()
        self._at_rest = False
        self._expected = self._next_ranks(T) if self.renumbers else token
        self._grow(token)
        if self.parent.together and self.equal:
            self._mask = self.mask(self._expected)
            self._mask.additive(torch.float32 if self.parent.needs_probs else self.parent.dtype)

    def attend(self, q: Tensor, pos: Tensor) -> Tensor:
        """Look back from rotated q (B, H, T, D) at pos to every live entry not later than it: (B, H, T, D).

        In a prompt, where a method `needs_sums`, each entry's column `paid` is set to the attention that it gets from
        these queries, each one's probabilities reduced over its group; it lasts until the end of the pass.
        """
        if self.parent.needs_sums and self.phase != "decode":
            o, paid = self.storage.attend_and_sum(q, pos, self.parent.needs_sums)
            self.column("paid")
            self.set_column("paid", paid)
            return o
        probs = self.parent.needs_probs and self.phase == "decode"
        o, self.step_probs = kernels.attend(self.storage, q, pos, probs)
        return o

    def compress(self, q: Tensor, pos: Tensor) -> None:
        """Let policies forget entries, then let the storage pack what is left. q (B, H, T, D) is not rotated.

        A step of one token on a CPU waits with it for the last layer (`KVCache.end`): one after the other, the small
        operations of all layers find in the processor's caches what the next layer's weights would have driven out.
        """
        self._asked, self._mask = (q, pos), None
        if not self.parent.together:
            self.act()

    def act(self) -> None:
        """Do what `compress` was asked for, unless it is done."""
        if not self._asked:
            return
        (q, pos), self._asked = self._asked, None
        self._observe(q, pos)
        if self.window and not self.renumbers and self.parent.next_position + q.shape[2] > self.window:
            self.keep(self.token > pos[:, -1, None, None] + 1 - self.window)  # no later query can see further back
        for policy in self.policies:
            policy(self, q, pos)
        if not self.parent.waits:
            self.finish()

    def finish(self) -> None:
        """End this layer's part of a pass: pack, and at the end of a prompt give back what is not needed."""
        self.step_probs, self._at_rest = None, True
        self.drop_column("paid")
        self._tidy()
        self.storage.pack()
        if self.phase == "last":
            self.slots.trim()
            self.storage.trim()
            self._tail = None

    # What methods use

    @property
    def phase(self) -> str:
        """Return "prompt" while more of the prompt is to come, "last" in its last pass, "decode" afterwards."""
        return self.parent.phase

    @property
    def size(self) -> int:
        """Return N, the slots of the longest row, hidden ones included."""
        return max(self.n_slots) if self.storage else 0

    @property
    def equal(self) -> bool:
        """Say whether every row has the same number of slots."""
        return len(set(self.n_slots)) == 1

    @property
    def n_live(self) -> int:
        """Return the live entries of the fullest row."""
        return max(self.counts) if self.storage else 0

    @property
    def token(self) -> Tensor:
        """Return the token of each slot, int32 (B, Hkv, N), HIDDEN where nothing lives; sizes of 1 broadcast."""
        if "token" not in self.slots.data:
            return torch.arange(self.size, dtype=torch.int32, device=self.device).view(1, 1, -1)
        return self._column("token", HIDDEN)

    @property
    def live(self) -> Tensor:
        """Return which slots hold a live entry, bool (B, Hkv, N); sizes of 1 broadcast."""
        return self.token != kernels.on_device(HIDDEN, torch.int32, self.device)

    @property
    def rank(self) -> Tensor:
        """Return each live entry's place among the live ones of its row, 0 the oldest; -1 for hidden slots."""
        if self.equal and not self._hidden:
            return torch.arange(self.size, device=self.device).view(1, 1, -1)
        live = self.live
        return torch.where(live, live.cumsum(-1) - 1, -1)

    def newest(self, n: int) -> Tensor:
        """Return which slots hold the n newest live entries of their row, bool (B, Hkv, N); sizes of 1 broadcast."""
        return self.rank >= self._older(n)

    def between(self, first: int, last: int) -> Tensor:
        """Return which slots live, but for the `first` oldest and the `last` newest, bool like `rank`."""
        if self._apart(first, last):  # the first and the last slots
            everything = torch.ones(1, 1, self.size, dtype=torch.bool, device=self.device)
            out = self.live.clone() if self._hidden else everything
            out[..., :first] = out[..., max(0, self.size - last) :] = False
            return out
        rank = self.rank
        return (rank >= first) & (rank < self._older(last))

    def _older(self, n: int) -> int | Tensor:
        """Return how many live entries of each row are older than its n newest: one number, or (B, Hkv, 1)."""
        older = [max(0, c - n) for c in self.counts]
        return older[0] if min(older) == max(older) else torch.tensor(older, device=self.device).view(self.B, -1, 1)

    @property
    def pos(self) -> Tensor:
        """Return the position of each slot, as RoPE and the mask use it; hidden slots get HIDDEN."""
        if not self.renumbers:
            return self.token
        rank = self.rank
        return torch.where(rank < 0, HIDDEN, rank)

    def column(self, name: str, fill: float = 0.0, dtype=torch.float32) -> Tensor:
        """Return a named value per slot (B, Hkv, N), `fill` for slots that were never set. Change it by set_column."""
        if name not in self.slots.data:
            self._add_column(name, fill, dtype)
        return self._column(name, fill)

    def set_column(self, name: str, value: Tensor) -> None:
        """Overwrite a column from (B, Hkv, N)."""
        self.slots[name] = value.expand(self.B, -1, -1).reshape(self.n_rows, -1)

    def drop_column(self, name: str) -> None:
        """Free a column, if there is one."""
        self.slots.remove(name)
        self.fills.pop(name, None)

    def keep(self, mask: Tensor) -> None:
        """Forget the entries whose mask is False; bool (B, Hkv, N), sizes of 1 broadcast."""
        shape = (self.B, self.config.n_kv_heads, self.size)
        self.same &= mask.shape[0] == mask.shape[1] == 1
        self.number_slots()
        token = torch.where(mask, self.token, HIDDEN).expand(shape)
        self.slots["token"] = token.reshape(self.n_rows, -1)
        self.counts, self._ends = (token != HIDDEN).sum(-1).flatten().tolist(), (0, 0)
        if self.phase != "decode" and self._hidden > spare(self.n_live):  # a decode step's slots stay until it ends
            self._reclaim()

    def keep_best(self, score: Tensor, n: int | list[int], first: int = 0, last: int = 0) -> None:
        """Forget the lowest-scored entries until n live in each row; of equals the newest go.

        score is fp32 (B, Hkv, N), or 1 where rows hold the same; n may differ between sequences. The `first` oldest
        and the `last` newest live entries of a row stay whatever their score.
        """
        gone = self._excess(n, first, last)
        ends = (first, last) if self._apart(first, last) else tuple(map(min, self._ends, (first, last)))
        if self.phase == "decode" and self.slots.equal and set(gone) == {1}:  # no look at all the others
            least = self._lowest(score, first, last)
            self.number_slots()
            self.same &= least.shape[0] == least.shape[1] == 1
            self.slots["token"].scatter_(1, least.expand(self.B, self.config.n_kv_heads, 1).reshape(-1, 1), HIDDEN)
            self.counts = [c - 1 for c in self.counts]
        elif any(gone):
            self.keep(~self._worst(score, gone, first, last))
        self._ends = ends

    def leaving(self, score: Tensor, n: int | list[int], first: int = 0, last: int = 0) -> tuple[Tensor, Tensor]:
        """Return which slots `keep_best` would forget, int64 (B, Hkv, m), and which of the m are such, bool."""
        gone = self._excess(n, first, last)
        if set(gone) == {1}:
            least = self._lowest(score, first, last)
            return least, torch.ones_like(least, dtype=torch.bool)
        forget = self._worst(score, gone, first, last)
        index = some(forget, max(gone))
        return index, forget.gather(-1, index)

    def keep_ends(self, first: int, last: int) -> None:
        """Forget all live entries of every row but the `first` oldest and the `last` newest."""
        gone = self.n_live - first - max(0, last)
        if gone <= 0:
            return
        if self._at_rest and not self._hidden and self.slots.equal:  # a run of slots goes: no need for a mask
            self.number_slots()
            if self.storage.slide(first, gone):
                self.slots.slide(first, gone)
                self.n_slots, self.counts = list(self.slots.n), list(self.slots.n)
                return
        rank = self.rank
        self.keep((rank < first) | (rank > rank.amax(-1, keepdim=True) - last))

    def write(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite the slots index (B, Hkv, M), negative to skip, with k, v (B, Hkv, M, D), k rotated as in `read`."""
        self.storage.write(*(t.flatten(0, 1) for t in (index, k, v)))

    def observed(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the prompt's last n queries, rotated, (B, H, n, D), and their positions (B, n).

        At most as many as the method asked for by `observes`; fewer only if the prompt is shorter. The same however the
        prompt was cut into chunks. Positions are those that the queries' own entries have now.
        """
        q, pos = self._tail[0][:, :, -n:], self._tail[1][..., -n:]
        if self.renumbers:
            pos = self._next_ranks(q.shape[2]) - q.shape[2]
        return self.rope(q, pos.clamp(min=0)), pos

    def probs(self, q: Tensor, pos: Tensor) -> Tensor:
        """Return what rotated queries q (B, H, T, D) at pos attend to, as probabilities per slot, fp32 (B, H, T, N)."""
        return attention.probs(q, self.read()[0], self.mask(pos, newest=False))

    def masked(self, s: Tensor, pos: Tensor) -> Tensor:
        """Return logits s (R, G * T, N) of queries at pos with biases added, and -inf where an entry is not seen."""
        add = self.mask(pos).additive()
        if add is None:
            return s
        T, N = pos.shape[-1], s.shape[-1]
        return (s.view(self.B, -1, s.shape[1] // T, T, N) + add[:, :, None]).view_as(s)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all slots as k, v (B, Hkv, N, D), keys rotated by their position."""
        k, v = self.storage.read()
        if self.renumbers and not self._hidden:
            k = self.rope(k, slice(0, self.size))
        elif self.renumbers:
            pos = self.pos[:1, :1] if self.same else self.pos
            k = self.rope(k, torch.where(pos == HIDDEN, 0, pos))
        return k, v

    def read_row(self, r: int) -> tuple[Tensor, Tensor]:
        """Return the slots of one row as k, v (n_r, D), keys rotated by their position."""
        k, v = self.storage.read_row(r)
        if self.renumbers:
            pos = self.pos.expand(self.B, self.config.n_kv_heads, -1).flatten(0, 1)[r, : len(k)]
            k = self.rope(k[None, None], torch.where(pos == HIDDEN, 0, pos)[None])[0, 0]
        return k, v

    def mask(self, pos: Tensor, newest: bool = True, padded: bool = True) -> attention.Mask:
        """Return what queries at pos (B, T) may see, with the additive bias of merged entries.

        `newest` says that these are the queries of the newest T entries, which makes most masks trivial, and `padded`
        that shorter rows are followed by slots that none may see.
        """
        if self._mask and newest:
            return self._mask
        T, N = pos.shape[-1], self.size
        bias = self._column("bias", 0.0) if "bias" in self.slots.data else None
        plain = newest and bias is None and self.window is None
        if plain and not self._hidden and (self.equal or T == 1 and not padded):  # queries are the last T of N slots
            return attention.Mask(causal=T > 1, T=T, N=N, device=self.device)
        if newest and T == 1 and self.window is None:  # the newest entry's query sees all that lives
            return attention.Mask(see=self.live[:, :, None], bias=bias, T=T, N=N)
        pos = pos[:, None, :, None] if pos.dim() == 2 else pos[..., None]  # (B, 1 or Hkv, T, 1)
        key = self.pos[:, :, None, :]  # (B, Hkv, 1, N)
        see = key <= pos
        if self.window:
            see = see & (key > pos - self.window)
        return attention.Mask(see=see, bias=bias, T=T, N=N)

    # Bookkeeping

    def belong(self, parent: KVCache) -> None:
        """Become a layer of another cache."""
        self.parent, parts = _owner(parent), [self.storage]
        for part in parts:  # a storage may be made of others
            if isinstance(part, Storage):
                part.cache = _owner(self)
                parts += vars(part).values()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "parent"}

    def _excess(self, n: int | list[int], first: int, last: int) -> list[int]:
        """Return how many entries of each row must go, and can, for n (per sequence, or one) to be left."""
        n = [n] * self.B if isinstance(n, int) else n
        rows = enumerate(self.counts)
        return [max(0, min(c - n[r // self.config.n_kv_heads], c - first - last)) for r, c in rows]

    def _worst(self, score: Tensor, gone: list[int], first: int, last: int) -> Tensor:
        """Return which gone[r] slots of row r score lowest between `first` and `last`, bool like `score`."""
        stay = [c - first - last - g for c, g in zip(self.counts, gone, strict=True)]  # of those between
        stay = torch.tensor(stay, device=self.device).view(self.B, -1, 1)[: score.shape[0], : score.shape[1]]
        among = self.between(first, last)
        return among & ~top(score, stay, among)

    def _lowest(self, score: Tensor, first: int, last: int) -> Tensor:
        """Return the slot of each row that scores lowest between `first` and `last`, int64 (B, Hkv, 1)."""
        if not self._apart(first, last):
            return lowest(score, ~self.between(first, last))
        end = self.size - last
        hidden = (
            self.token[..., first:end] == kernels.on_device(HIDDEN, torch.int32, self.device) if self._hidden else None
        )
        return lowest(score[..., first:end], hidden, first)

    def _apart(self, first: int, last: int) -> bool:
        """Say whether the `first` oldest and `last` newest entries are known to be the first and last slots."""
        return self.equal and (not self._hidden or (self._ends[0] >= first and self._ends[1] >= last))

    def _column(self, name: str, pad: float) -> Tensor:
        value = self.slots[name]
        if not self.slots.equal:
            for r, n in enumerate(self.slots.n):
                value[r, n:] = pad
        value = value.view(self.B, self.config.n_kv_heads, -1)
        return value[:1, :1] if name == "token" and self.same else value

    def number_slots(self) -> None:
        """Write down each slot's token, where until now slot i held token i."""
        if "token" not in self.slots.data:
            token = self.token.expand(self.B, self.config.n_kv_heads, -1)
            self._add_column("token", 0, torch.int32)
            self.set_column("token", token)

    def _add_column(self, name: str, fill: float, dtype) -> None:
        self.fills[name] = fill
        if self.slots.data:
            self.slots.add(name, (), dtype, self.device, fill)
        else:
            self.slots = Rows(self.n_rows)
            self.slots.append(**{name: torch.full((self.n_rows, self.size), fill, dtype=dtype, device=self.device)})

    def _grow(self, token: Tensor) -> None:
        """Take note of a new entry for every token (B, T) in every row; negative ones are padding and stay hidden."""
        B, T = token.shape
        pads = self.parent.pads
        if pads and "token" not in self.slots.data:
            self.number_slots()
        self.n_slots = [n + T for n in self.n_slots]
        hidden = (
            [n for n in (token < 0).sum(1).tolist() for _ in range(self.n_rows // B)] if pads else [0] * self.n_rows
        )
        self.counts = [n + T - h for n, h in zip(self.counts, hidden, strict=True)]
        self._ends = self._ends[0], 0 if any(hidden) else self._ends[1] + T
        self.same &= not pads
        if not self.fills:
            return
        new = dict(self.fills)
        if "token" in new and T == 1 and not pads and self.phase == "decode":
            new["token"] = self.parent.next_position
        elif "token" in new:
            token = torch.where(token < 0, HIDDEN, token) if pads else token
            new["token"] = token[:, None].expand(B, self.n_rows // B, T).flatten(0, 1)
        self.slots.append(T=T, **new)

    def _observe(self, q: Tensor, pos: Tensor) -> None:
        """Keep the prompt's last queries, un-rotated, across chunks."""
        if self.parent.observes and self.phase != "decode":
            pos = pos[:, 0] if pos.dim() == 3 else pos  # where caches renumber, `observed` counts again
            if self._tail is not None:
                q, pos = torch.cat([self._tail[0], q], 2), torch.cat([self._tail[1], pos], -1)
            n = self.parent.observes
            self._tail = q[:, :, -n:].clone(), pos[..., -n:].clone()  # not views, which would hold on to the whole pass

    def _next_ranks(self, T: int) -> Tensor:
        n = max(self.counts)
        self.rope.reserve(n + T)
        if n == min(self.counts):
            return _ranks(n, T, self.B, self.device)
        ranks = torch.arange(T, device=self.device)
        counts = torch.tensor(self.counts, device=self.device).view(self.B, -1, 1)
        return counts + ranks  # (B, Hkv, T)

    @property
    def _hidden(self) -> int:
        return 0 if self.n_slots == self.counts else max(s - c for s, c in zip(self.n_slots, self.counts, strict=True))

    def _tidy(self) -> None:
        """Reclaim the memory of hidden slots if there are as many new ones as the spare ones we allow ourselves."""
        if self._hidden - self._settled >= (spare(self.n_live) if self.phase == "decode" else 1):
            self._reclaim()

    def _reclaim(self) -> None:
        if self._hidden:
            live = self.live.expand(self.B, self.config.n_kv_heads, -1).reshape(self.n_rows, -1)
            rest = self.storage.drop(live)
            self.slots.keep(rest)
            self.n_slots = list(self.slots.n)
        self._settled = self._hidden  # what the storage could not let go of


@lru_cache(maxsize=1)  # the layers of one pass share it, and with it the angles that RoPE looks up
def _ranks(n: int, T: int, B: int, device) -> Tensor:
    return torch.arange(n, n + T, device=device).expand(B, T)


class KVCache:
    """The cache of a whole model, for `spec` such as "full", "kivi(bits=2)" or "streamingllm(budget=512)+kivi".

    At most one storage (else `full`), policies in the order written, at most one plan. Raises ValueError for unknown
    methods and bad parameters, NotImplementedError with the reason for what cannot be combined.
    """

    def __init__(self, model, spec="full"):
        from nanokv.specs import parse  # which imports this module

        self.model, self.config, self.rope, self.dtype = model, model.config, model.rope, model.embed.weight.dtype
        self.storage, self.policies, self.plan = parse(spec)
        self.spec = "+".join(map(repr, self.methods))
        self.renumbers = any(m.renumbers for m in self.methods)
        self.needs_probs = any(m.needs_probs for m in self.methods)
        self.needs_sums = next((m.needs_sums for m in self.methods if m.needs_sums), "")
        self.waits = any(m.waits for m in self.methods)
        self.observes = max(m.observes for m in self.methods)
        own = type(self.plan) if self.plan else Plan  # a plan that acts between layers may give them different tokens
        self.rerouted = (own.before_layer, own.after_layer) != (Plan.before_layer, Plan.after_layer)
        self._check()
        self.reset()

    def _check(self) -> None:
        for method in self.methods:
            method.check(self.config)
        if len({m.needs_sums for m in self.methods} - {""}) > 1:
            raise NotImplementedError("two methods want sums of attention, reduced over query groups in different ways")
        merging = [p.name for p in self.methods if p.merges]
        if merging and not self.storage.writable:
            why = f"{merging[0]} merges entries, and {self.storage.name} cannot overwrite one once it is stored"
            raise NotImplementedError(why)
        if merging and self.renumbers:
            raise NotImplementedError(
                f"{merging[0]} merges entries, and a merged key has no single position to renumber"
            )

    @property
    def methods(self) -> list[Method]:
        """Return the storage, the policies and the plan in use."""
        return [self.storage, *self.policies, *([self.plan] if self.plan else [])]

    @property
    def chunk(self) -> int | None:
        """Return the most prompt tokens that one pass may read, or None."""
        return min((m.chunk for m in self.methods if m.chunk), default=None)

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [LayerCache(self, i, block.attn) for i, block in enumerate(self.model.layers)]
        self.next_position = 0  # the token index of the next token (padding counted), which is not the stored length
        self.pads: list[int] = []  # tokens of padding before each sequence, where there are any
        self.phase, self._prompt_left, self._forced, self._under_way = "decode", 0, None, False
        self.together = False  # a step is under way in which policies act on all layers in a row

    # What the model calls

    def begin(self, ids: Tensor) -> Tensor:
        """Start a pass over ids (B, T) and return their positions (B, T), -1 for padding."""
        B, T = ids.shape
        if self._under_way:
            raise RuntimeError("a pass was interrupted, so that layers hold different texts; reset() or load the cache")
        if self._prompt_left:
            self.phase = "prompt" if self._prompt_left > T else "last"
        else:
            self.phase = self._forced or ("decode" if T == 1 and self.next_position else "last")
        if self.chunk and self.chunk < T:
            raise ValueError(f"{self.spec} reads at most {self.chunk} tokens per pass, not {T}; use nanokv.generate")
        first = self.layers[0]
        if first.B not in (0, B):
            raise ValueError(f"this cache holds a batch of {first.B}, not {B}; call reset() first")
        self._new, self._under_way = T, True
        if not self.renumbers:
            self.rope.reserve(self.next_position + T)
        pos = torch.arange(self.next_position, self.next_position + T, device=ids.device).expand(B, T)
        if self.pads:
            pos = (pos - torch.tensor(self.pads, device=ids.device)[:, None]).clamp(min=-1)
        self.together = self.phase == "decode" and T == 1 and first.storage is not None
        self.together &= ids.is_cpu and not self.rerouted
        for layer in self.layers if self.together else []:
            layer.expect(pos)
        return pos

    def before_layer(self, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Let the plan act before layer i."""
        return self.plan.before_layer(self, i, x, pos) if self.plan else (x, pos)

    def after_layer(self, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Let the plan act after layer i."""
        return self.plan.after_layer(self, i, x, pos) if self.plan else (x, pos)

    def end(self) -> None:
        """Finish a pass."""
        if self.phase == "last" and self.plan:
            self.plan.after_prefill(self)
        for layer in self.layers:
            layer.act()
        for layer in self.layers if self.waits else []:
            layer.finish()
        if self.phase == "last":
            attention.forget_masks()
        self._under_way = False
        self.next_position += self._new
        self._prompt_left = max(0, self._prompt_left - self._new)

    # What a user calls

    @contextmanager
    def prompt(self, total: int, pads: list[int] | None = None):
        """Declare that the next `total` tokens are one prompt, in as many passes as the caller likes.

        `pads` gives, for each sequence of a batch, how many of the first tokens are padding, which the cache forgets.
        """
        if pads and any(pads):
            if self.next_position:
                raise NotImplementedError("padding can only come before the first prompt of a batch")
            if stiff := [m.name for m in self.methods if not m.padded]:
                raise NotImplementedError(f"{stiff[0]} needs prompts of equal length in one batch")
            self.pads = list(pads)
        self._prompt_left = total
        try:
            yield self
            if self._prompt_left:
                raise ValueError(f"{self._prompt_left} of the {total} tokens declared as a prompt did not come")
        finally:
            self._prompt_left = 0
            if not self.next_position:
                self.pads = []

    @contextmanager
    def decoding(self):
        """Declare that passes of several tokens are continuations: policies treat them as generated text."""
        self._forced = "decode"
        try:
            yield self
        finally:
            self._forced = None

    def adopt(self, other: KVCache) -> None:
        """Begin with the part of a prompt that `other`, a full cache of the same model, has read; do not read it again.

        For methods that leave a prompt alone until its last pass, which must bring as many tokens as they observe.
        Call it inside `prompt`, declared for the tokens still to come. NotImplementedError for other methods.
        """
        if stiff := [m.name for m in self.methods if m.early or m.renumbers or m.needs_sums]:
            raise NotImplementedError(f"{stiff[0]} must read a prompt from its beginning")
        if any(self.config.windows) or other.pads:
            raise NotImplementedError("a cache that has forgotten tokens already, or padding, cannot be taken over")
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine._allocate(its.B, its.device)
            mine.storage.store(*its.read(), None)
            mine._grow(torch.arange(its.size, device=its.device).expand(its.B, -1))
        self.next_position, self.pads = other.next_position, list(other.pads)

    def clone(self) -> KVCache:
        """Return an independent copy, to go on from the same text in two ways."""
        shared = [self.model, self.config, self.rope, *(layer.attn for layer in self.layers), *self.methods]
        shared += [t for layer in self.layers if layer.storage for t in layer.storage.constants()]
        return copy.deepcopy(self, {id(o): o for o in shared})

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for layer in self.layers:  # a copy's layers know the copy
            layer.belong(self)

    def save(self, path) -> None:
        """Write everything held to a safetensors file, whole or not at all. ValueError in the middle of a prompt."""
        if self._prompt_left or self._under_way:
            raise ValueError("a cache can be saved when a prompt or a pass has ended, not in the middle of it")
        snapshot.save(self, path)

    @classmethod
    def load(cls, path, model) -> KVCache:
        """Return the cache that was saved; ValueError, in one line, if it is damaged or was made by another model."""
        return snapshot.load(cls, path, model)

    def live_positions(self, layer: int, kv_head: int, batch: int = 0) -> Tensor:
        """Return the indices of the tokens that live in one row, ascending, int64 (n,)."""
        c = self.layers[layer]
        if not c.storage:
            return torch.empty(0, dtype=torch.int64)
        token = c.token.expand(c.B, self.config.n_kv_heads, -1)[batch, kv_head]
        return token[token != HIDDEN].long()

    @property
    def nbytes(self) -> int:
        """Return the bytes of every tensor this cache holds, spare room included, constants of methods not."""
        return self.ledger()["total"]["held"]

    def ledger(self) -> dict:
        """Return the bytes held, by category, per layer and in total.

        {"layers": [{...}], "total": {...}}; each holds payload, scales, columns, residual, unused, their sum `held`,
        `constants` (not in the sum) and `full`, what an uncompressed cache of the same text would hold.
        """
        rows = [self._layer_ledger(c) for c in self.layers]
        return {"layers": rows, "total": {k: sum(row[k] for row in rows) for k in rows[0]}}

    def _layer_ledger(self, c: LayerCache) -> dict[str, int]:
        out = dict.fromkeys(("payload", "scales", "columns", "residual", "unused", "held", "constants", "full"), 0)
        if not c.storage:
            return out
        constants = {t.untyped_storage().data_ptr() for t in c.storage.constants()}
        held = {}  # storages, so that views are counted once
        for t in _tensors([c.storage, c.slots, c.notes, c._tail, c.step_probs]):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        out |= c.storage.bytes()
        out["columns"] += c.slots.used()
        out["constants"] = sum(b for p, b in held.items() if p in constants)
        out["held"] = sum(held.values()) - out["constants"]
        out["unused"] = out["held"] - sum(out[k] for k in ("payload", "scales", "columns", "residual"))
        width = 2 * self.config.head_dim * self.model.embed.weight.element_size()
        out["full"] = (self.next_position * c.B - sum(self.pads)) * c.n_rows // c.B * width
        return out


def _owner(cache):
    """Return a cache as its parts know it: they do not keep it alive, so that dropping a KVCache frees all of it."""
    return cache if isinstance(cache, weakref.ProxyType) else weakref.proxy(cache)


def _tensors(obj) -> list[Tensor]:
    """Return every tensor reachable from a storage or Rows, without following the way back to the LayerCache."""
    if isinstance(obj, Tensor):
        return [obj]
    if isinstance(obj, (list, tuple)):
        return [t for o in obj for t in _tensors(o)]
    if isinstance(obj, dict):
        return [t for o in obj.values() for t in _tensors(o)]
    if hasattr(obj, "__dict__") and not isinstance(obj, LayerCache):
        return _tensors(vars(obj))
    return []


def top(score: Tensor, n, among: Tensor) -> Tensor:
    """Return which n slots per row score highest among the candidates, bool (B, Hkv, N).

    score is fp32 (B, Hkv, N), n an int or integers (B, Hkv, 1), among bool, broadcastable.
    Ties go to the older slot.
    """
    least = torch.finfo(score.dtype).min
    among, score = among.expand_as(score), score.nan_to_num(least, torch.inf, least)
    order = torch.argsort(score.masked_fill(~among, -torch.inf), dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, place) < n) & among


def lowest(score: Tensor, never: Tensor | None = None, start: int = 0) -> Tensor:
    """Return the one slot per row that `top` would leave out first, int64 (B, Hkv, 1): the newest of the lowest.

    score (B, Hkv, n) is about slots start..start+n-1, and `never` says which of them are out of the question.
    """
    low, high = torch.finfo(score.dtype).min, torch.finfo(score.dtype).max
    score = score.nan_to_num(low, high, low)
    score = score if never is None else score.masked_fill_(never, torch.inf)
    newest = kernels.on_device(start + score.shape[-1] - 1, torch.int64, "cpu")
    return newest - score.flip(-1).argmin(-1, keepdim=True)


def some(mask: Tensor, n: int) -> Tensor:
    """Return n slots per row, int64 (B, Hkv, n), those of the mask (B, Hkv, N) first, in any order."""
    return mask.byte().topk(n, sorted=False).indices


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return slots index (B, Hkv, M) of x (B, Hkv, N, D): (B, Hkv, M, D)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
