"""The cache of one layer: a storage, the policies that thin it out, and what both may look at.

The attention layer calls it three times and knows nothing else about it:

    pos = cache.append(k, v, x, pos)         # 1. remember
    o   = cache.attend(rope(q, pos), pos)    # 2. look back
    cache.compress(q, pos)                   # 3. forget, then pack
"""

import torch
from torch import Tensor

from nanokv import attention, backend
from nanokv.entries import HIDDEN, Entries
from nanokv.method import Plan, Policy, Storage


class Pass:
    """What all layers know of the tokens under way. Lists have one number per sequence.

    phase: "prompt" while more of it is to come, "last", "decode" or "draft"; pos (B, T): -1 where a sequence reads
    nothing; came: tokens that each sequence reads; before: tokens that each had read before. `real` (B, T) says which
    tokens are read, None: all are.
    """

    def __init__(self, phase: str, pos: Tensor, came: list[int], before: list[int]):
        self.phase, self.pos, self.came, self.before = phase, pos, came, before
        self.real = None if min(came, default=0) == pos.shape[1] else pos >= 0


class LayerCache(Entries):
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
        self.asked, self.open = None, False  # also of a layer that is never asked
        self.difference = 0.0  # the largest between two backends' results, where both run

    def allocate(self, B: int, device) -> None:
        """Create empty state for B sequences."""
        super().allocate(B, device)
        self.notes: dict = {}  # what methods remember of the layer: tensors (B, ...) and lists of B values
        self.tail = self.asked = self.chosen = (
            None  # last queries of a prompt; what `act` is to see; what `select` chose
        )
        self.unrotated = None  # the queries that policies are told of, before RoPE
        self.positions = None  # of the newest entries, as `append` returned them
        self.n_read = 0.0  # slots that were attended to since the pass began, once for each layer that did

    # The three verbs

    def append(self, k: Tensor, v: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        """Remember new entries k, v (B, Hkv, T, D), k not yet rotated; return positions, (B, T) or (B, Hkv, T)."""
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
        self.n_read = self.n_read + sum(self.n_slots) * self._share(pos)
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
        if phase != "decode" and self.n_observed:
            self._observe(q, pos)
        rotated = self.rope(q, pos) if self.policies else None
        self.unrotated = q
        for policy in self.policies if phase != "decode" else ():
            policy.after_part(self, rotated, pos)  # while all that these queries saw is there
        if self.window and not self.renumbers:  # no later query can see further back
            newest = pos.amax(-1)[:, None, None]
            self.keep(self.token > newest + 1 - self.window)
        for policy in self.policies:
            if phase == "decode":
                policy.after_step(self, rotated, pos)
            if phase == "last":
                policy.after_prompt(self)
        self.unrotated = None

    def pack(self) -> None:
        """End the layer's part of a pass: free what was forgotten, and let the storage pack what is left."""
        if not self.open:
            return
        self.open = False
        self._reclaim(at_once=self.now.phase != "decode")
        if self.now.phase != "prompt":
            self.storage.pack(self)
            self.tail, self.reads = None, [0] * self.B

    # Drafts

    def ahead(self) -> int | None:
        """Return how many tokens may be read before anything is packed or forgotten; None: any number."""
        every = [self.storage.ahead(), *(p.ahead(self) for p in self.policies)]
        if self.window and every[0] is not None:  # what leaves the window is freed, and changes what is packed when
            every.append(1)
        return min((n for n in every if n is not None), default=None)

    def withdraw(self) -> tuple | None:
        """Take the drafted entries back; return k, v, x, pos and q, each sequence's tokens first, for `again`."""
        if self.draft is None:  # a plan has skipped the layer
            return None
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

    def beyond(self, n: int, read: list[int]) -> list[int]:
        """Return how many entries of each row come from tokens from n on, of sequences that have `read` so many.

        NotImplementedError where they could not be cut off: something was forgotten, or they are packed.
        """
        gone = [max(0, s - n) for s in self.n_slots]
        if self.policies or not self.n_slots == self.counts == self._each(read):
            raise NotImplementedError("only a cache that forgets nothing can be cut shorter")
        if any(g > exact for g, exact in zip(gone, self.storage.newest(), strict=True)):
            raise NotImplementedError(f"{self.storage.name} has packed entries that would have to go")
        return gone

    def truncate(self, gone: list[int]) -> None:
        """Drop the newest gone[r] entries of row r, see `beyond`."""
        self._cut(gone)

    def expand(self, B: int) -> None:
        """Turn one sequence into B equal ones."""
        self.storage.repeat(B)
        self.slots.repeat(B)
        self.B, self.n_rows = B, self.n_rows * B
        self.n_slots, self.counts = self.n_slots * B, self.counts * B
        self.reads, self.settled = self.reads * B, self.settled * B
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
            k = self.rope(
                k, pos if self.counts == self.n_slots == [self.N] * self.n_rows else pos.masked_fill(pos == HIDDEN, 0)
            )
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
        return (
            ragged
            and not self.window
            and self.chosen is None
            and self.now.real is None
            and "bias" not in self.slots.data
        )

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

    def write(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite the slots index (B, Hkv, M), negative to skip, with k, v (B, Hkv, M, D), k rotated as in `read`."""
        self.storage.write(*(t.flatten(0, 1) for t in (index, k, v)))

    def merge(self, left: Tensor, to: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite the slots `to` (B, Hkv, M), -1 for none, by k, v (B, Hkv, M, D), into which the slots `left` went.

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
        if pos.shape[-1] == 1 and (self.plain or self.lengths_say_all):
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
        self._reclaim(at_once=False)

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

    def _share(self, pos: Tensor):
        """Return the share of what is held that this attention reads."""
        if self.chosen is None:
            return 1.0
        at = pos[:, None, :, None] if pos.dim() == 2 else pos[..., None]
        read = self.chosen | (self.pos[:, :, None] == at)  # a token always sees itself
        return (read.any(2) & self.live).sum() / sum(self.counts)

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
