"""The storage that quantisers and bases share: the first and the newest entries exact, the middle packed.

A quantiser is `encode` and `decode`; the rest is here. Keys and values are packed apart, in slots of `slot[which]`
tokens each, because a group of keys may span tokens where a group of values does not. A middle without a quantiser
holds its coordinates in a basis as they are.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanokv import attention
from nanokv.method import At, Basis, Chain, Storage, at_least, one_of
from nanokv.rows import Rows

WIDTHS = tuple(range(1, 9))
FAR = 64  # tokens: no draft is longer


@dataclass
class Packed(Storage):
    """bits: per number, bits_k and bits_v where keys and values differ; group: numbers per scale; n_sink: first entries
    and residual: newest entries, which stay exact; block: tokens packed at a time.
    """

    bits: int = 4
    bits_k: int = 0
    bits_v: int = 0
    group: int = 32
    n_sink: int = 4
    residual: int = 64
    block: int = 1
    limits = {
        "bits": one_of(*WIDTHS),
        "bits_k": one_of(0, *WIDTHS),
        "bits_v": one_of(0, *WIDTHS),
        "group": at_least(1),
        "n_sink": at_least(0),
        "residual": at_least(0),
        "block": at_least(1),
    }
    joint = False  # a row is a sequence, all KV heads side by side
    own = None  # a basis that is part of the method
    basis = None  # in which coordinates the middle is held
    scales = ("scale", "low")  # fields that are not codes

    def __post_init__(self):
        super().__post_init__()
        self.width = {"k": self.bits_k or self.bits, "v": self.bits_v or self.bits}
        self.slot = {"k": 1, "v": 1}  # tokens

    @classmethod
    def exact(cls, config):
        return {"residual": 32 * config.context}

    # What a quantiser says; x is row by row, and `at` says whose rows the slots belong to

    def encode(self, x: Tensor, which: str, at: At) -> dict[str, Tensor]:
        """Return fields (slots, ...) that stand for x (slots, tokens, C), keys where `which` is "k", else values."""
        return {"x": x.flatten(1)}

    def decode(self, fields: dict[str, Tensor], which: str, at: At) -> Tensor:
        """Undo `encode`: (slots, tokens, C)."""
        return fields["x"].unsqueeze(1)

    def due(self, which: str, n: int) -> int:
        """Return how many of n exact entries are to be packed now, whole slots."""
        t = max(self.block, self.slot[which])
        return max(0, n - self.residual) // t * t

    def correct(self, x: Tensor, decoded: Tensor, at: At) -> dict[str, Tensor] | None:
        """Return more fields (slots, ...), from which `decode` adds an error term, or None."""

    # What the cache asks

    def on(self, bases: list[Basis]) -> Storage:
        """Return the same storage in other coordinates, its own last."""
        parts = [copy.copy(b) for b in [*bases, *([self.own] if self.own else [])]]
        new = copy.copy(self)
        new.basis = Chain(parts) if len(parts) > 1 else parts[0] if parts else None
        new.raw, new.joint = self.raw or any(b.raw for b in parts), self.joint or any(b.joint for b in parts)
        return new

    def reset(self, cache):
        self.B, self.heads, self.layer = cache.B, cache.n_rows // cache.B, cache.layer
        self.n_rows, self.seen, self.came = cache.n_rows, [], []
        self.per = self.heads if self.joint else 1  # KV heads in one row
        R = cache.n_rows // self.per
        self.first = {which: Rows(R, least=0) for which in "kv"}
        self.old = {which: Rows(R, least=-(-16 // self.slot[which])) for which in "kv"}
        self.new = {which: Rows(R) for which in "kv"}
        self.came, self.seen = [0] * R, [0] * R  # entries so far, and when the basis was made
        self.U: dict[str, list] = {which: [None] * R for which in "kv"}  # each row's basis, (D, C)

    def store(self, counts, k, v, x):
        counts = counts[:: self.per]
        self.came = [a + b for a, b in zip(self.came, counts, strict=True)]
        self.new["k"].append(counts, x=self._join(k, counts))
        self.new["v"].append(counts, x=self._join(v, counts))

    def cut(self, counts):
        self.came = [a - b for a, b in zip(self.came, counts[:: self.per], strict=True)]
        for rows in self.new.values():
            rows.cut(counts[:: self.per])

    def newest(self):
        both = zip(*(rows.n for rows in self.new.values()), strict=True)
        return [min(n) for n in both for _ in range(self.per)]

    def ahead(self):
        at = [(which, n) for which, rows in self.new.items() for n in set(rows.n)]
        for t in range(1, FAR):
            if any(self.due(which, n + t) for which, n in at) or any(self._ripe(t)):
                return t
        return FAR

    def pack(self, cache):
        ripe, rows = self._ripe(), range(len(self.seen))
        if not any(ripe) and not any(self.due(which, n) for which, new in self.new.items() for n in set(new.n)):
            return
        if any(again := [now and was > 0 for now, was in zip(ripe, self.seen, strict=True)]):
            self._unpack(again)
        for which, new in self.new.items():
            sinks = [self.n_sink * (ripe[r] and not self.seen[r]) for r in rows]
            if any(sinks):
                self.first[which].append(sinks, **new.pop(sinks))
            for r in rows if self.basis else ():
                if ripe[r]:
                    self.U[which][r] = self.basis.fit(new.row("x", r), which, self.at([r]))
            counts = [self.due(which, n) if ripe[r] or self.seen[r] else 0 for r, n in enumerate(new.n)]
            if any(counts):
                x, t = new.pop(counts)["x"], self.slot[which]
                slots = [n // t for n in counts]
                at = self.at([r for r, n in enumerate(slots) for _ in range(n)]) if any(slots) else None
                x = self._down(x, which, counts).unflatten(0, (-1, t))
                self.old[which].append(slots, **self._encode(x, which, at))
        self.seen = [came if now else was for came, now, was in zip(self.came, ripe, self.seen, strict=True)]

    def read(self):
        return self._read("k"), self._read("v")

    def attend(self, q, pos, cache):
        """Attend to each part in its own coordinates, where rows are equal: nothing is rebuilt."""
        parts = [rows for kind in (self.first, self.old, self.new) for rows in kind.values()]
        plain = cache.raw or self.joint or not any(self.old["k"].n) or any(len(set(rows.n)) > 1 for rows in parts)
        if not self.basis or plain or self.U["k"][0] is None or self.U["v"][0] is None:
            return super().attend(q, pos, cache)
        return attention.in_parts(q, self.parts("k"), self.parts("v"), cache.additive_mask(pos))

    def kernel(self, q, pos, cache):
        """Attend to each part in its own coordinates by a kernel, and average them by their shares of the softmax."""
        from nanokv.kernels.decode import decode, heads_of, merge, rows_of

        if type(self).encode is not Packed.encode or cache.raw or self.joint:
            raise NotImplementedError(f"no kernel reads what {self.name} packs here")
        x, out = rows_of(q, cache.n_rows).float(), []  # (R, M, D)
        more = cache.visible(pos, q.shape[1] // cache.config.n_kv_heads) | {"scale": q.shape[-1] ** -0.5, "lse": True}
        for kind in (self.first, self.old, self.new):
            k, v = kind["k"], kind["v"]
            if (k.start, k.n) != (v.start, v.n):
                raise NotImplementedError("no kernel reads keys and values that are packed apart")
            if any(k.n):
                U_k, U_v = (torch.stack(self.U[which]) if kind is self.old else None for which in "kv")  # (R, D, C)
                z = x if U_k is None else x @ U_k
                o, lse = decode(z, k.data["x"], v.data["x"], *k.where, most=max(k.n), **more)
                out.append((o if U_v is None else o @ U_v.mT, lse))
                if "col_start" in more:
                    more["col_start"] = more["col_start"] + k.where[1]
        return heads_of(merge(out).to(q.dtype), q)

    def parts(self, which: str) -> list[tuple[Tensor, Tensor | None]]:
        """Return (x (R, n, C), basis U (R, D, C) or None) in the order of slots; rows are equal."""
        first, old, new = self.first[which], self.old[which], self.new[which]
        out = [(rows["x"], None) for rows in (first, new) if any(rows.n)]
        if any(old.n):
            x, n = self._middle(which)
            out.insert(1 if any(first.n) else 0, (x.unflatten(0, (len(n), -1)), torch.stack(self.U[which])))
        return out

    def keep(self, mask):
        """Free slots. A packed slot of several tokens goes with its last one, a joint token with its last head."""
        rest = mask
        for which in self.new:
            rest = self._whole(rest, which)
        for which in self.new:
            t, kinds = self.slot[which], (self.first[which], self.old[which], self.new[which])
            lengths = [(a, b * t, c) for a, b, c in zip(*(rows.n for rows in kinds), strict=True)]
            some = zip(rest[:: self.per], lengths, strict=True)
            parts = zip(*(m[: sum(n)].split(n) for m, n in some), strict=True)
            for rows, part in zip(kinds, parts, strict=True):
                part = pad_sequence(part, batch_first=True)
                rows.keep(part[:, ::t] if rows is kinds[1] else part)
        return rest

    def write(self, index, k, v):
        for which, x in (("k", k), ("v", v)):
            first, old, _ = self._lengths(which)
            behind = (
                index - torch.tensor([a + b for a, b in zip(first, old, strict=True)], device=index.device)[:, None]
            )
            if self.per > 1 or bool(((index >= 0) & (behind < 0)).any()):
                raise ValueError(f"{self.name} cannot overwrite entries that it has packed")
            self.new[which].put(behind.masked_fill(index < 0, -1), x=x)

    def repeat(self, times):
        super().repeat(times)
        self.B, self.n_rows, self.came, self.seen = (
            self.B * times,
            self.n_rows * times,
            self.came * times,
            self.seen * times,
        )
        self.U = {which: Us * times for which, Us in self.U.items()}

    def packed(self, which):
        slots = torch.arange(max(map(sum, zip(*self._lengths(which), strict=True))))
        first, old, _ = (torch.tensor(n).repeat_interleave(self.per)[:, None] for n in self._lengths(which))
        return (slots >= first) & (slots < first + old)

    def bytes(self):
        old = self.old.values()
        exact = sum(rows.bytes() for kind in (self.first, self.new) for rows in kind.values())
        scales = sum(rows.bytes(*self.scales) for rows in old)
        return {"payload": sum(rows.bytes() for rows in old) - scales, "scales": scales, "residual": exact}

    def constants(self):
        return [U for Us in self.U.values() for U in Us if U is not None]

    # Bookkeeping

    def at(self, rows: list[int]) -> At:
        """Say whose these rows are; of a joint row the head is 0."""
        heads = self.heads // self.per
        return At(self.layer, [r // heads for r in rows], [r % heads for r in rows])

    def _lengths(self, which):
        t = self.slot[which]
        return self.first[which].n, [n * t for n in self.old[which].n], self.new[which].n

    def _ripe(self, t: int = 0) -> list[bool]:
        """Return whose basis is to be made, or made anew, when t more have come."""
        least = self.n_sink + (self.basis.least if self.basis else 0)
        again = bool(self.basis and self.basis.learns)
        due = [not seen or again and n + t >= 2 * seen for n, seen in zip(self.came, self.seen, strict=True)]
        if not any(due):
            return due
        held = zip(*self._lengths("v"), strict=True)  # a policy may have left too few
        return [now and sum(n) + t > least for now, n in zip(due, held, strict=True)]

    def _encode(self, x, which, at):
        fields = self.encode(x, which, at)
        if type(self).correct is not Packed.correct:
            fields |= self.correct(x, self.decode(fields, which, at), at) or {}
        return fields

    def _unpack(self, which_rows: list[bool]) -> None:
        """Put the packed entries of these rows back before their exact ones, to be packed anew."""
        for which, new in self.new.items():
            if any(self.old[which].n):
                x, n = self._middle(which)
                back = [m if now else 0 for m, now in zip(n, which_rows, strict=True)]
                rebuilt = self._up(x, which, n).split(n)
                both = []
                for r, m in enumerate(back):
                    both += [rebuilt[r][:m], new.row("x", r).clone()]
                total = [a + b for a, b in zip(back, new.n, strict=True)]
                new.cut(list(new.n))
                new.append(total, x=torch.cat(both))
                gone = torch.tensor(which_rows, device=x.device)[:, None]
                self.old[which].keep(~gone.expand(-1, max(self.old[which].n)))

    def _middle(self, which: str) -> tuple[Tensor, list[int]]:
        """Decode what is packed: (entries, C) row by row, and how many entries each row has."""
        old, dtype = self.old[which], self.new[which].data["x"].dtype
        at = self.at([r for r, n in enumerate(old.n) for _ in range(n)])
        x = self.decode({name: old.flat(name) for name in old.data}, which, at).flatten(0, 1).to(dtype)
        return x, [n * self.slot[which] for n in old.n]

    def _down(self, x: Tensor, which: str, counts: list[int]) -> Tensor:
        """Return coordinates (sum of counts, C) of x, row by row."""
        return self._turn(x, which, counts, lambda t, U: t @ U)

    def _up(self, z: Tensor, which: str, counts: list[int]) -> Tensor:
        """Rebuild x from its coordinates, row by row."""
        return self._turn(z, which, counts, lambda t, U: t @ U.mT)

    def _turn(self, x, which, counts, product):
        if not self.basis:
            return x
        parts = [(t, U) for t, U in zip(x.split(counts), self.U[which], strict=True) if len(t)]
        return torch.cat([t if U is None else product(t.float(), U).to(x.dtype) for t, U in parts])

    def _read(self, which):
        """Return keys or values (R, N, D), R counting KV heads."""
        x = self._joined(which)
        return x.unflatten(-1, (self.per, -1)).transpose(1, 2).flatten(0, 1) if self.per > 1 else x

    def _joined(self, which):
        """Return all entries of each row, (rows, N, C); shorter rows are padded."""
        kinds = self.first[which], self.new[which]
        first, new = ([rows.row("x", r) for r in range(len(rows.n))] if rows.data else None for rows in kinds)
        parts = [part for part in (first, new) if part]
        if any(self.old[which].n):
            x, n = self._middle(which)
            parts.insert(len(parts) - 1, self._up(x, which, n).split(n))
        return pad_sequence([torch.cat(row) for row in zip(*parts, strict=True)], batch_first=True)

    def _join(self, x: Tensor, counts: list[int]) -> Tensor:
        """Put the heads of joint rows side by side: (sum over heads, D) to (sum of counts, heads * D)."""
        if self.per == 1:
            return x
        every = [n for n in counts for _ in range(self.per)]
        heads = x.split(every)
        return torch.cat([torch.cat(heads[i : i + self.per], -1) for i in range(0, len(heads), self.per)])

    def _whole(self, mask, which):
        """Add to mask what shares a packed slot, or a joint row's token, with an entry that is kept."""
        t = self.slot[which]
        if self.per > 1:
            mask = mask.unflatten(0, (-1, self.per)).any(1).repeat_interleave(self.per, 0)
        if t > 1:
            mask = mask.clone()
            for r, (a, n) in enumerate(zip(self.first[which].n, self.old[which].n, strict=True)):
                for i in range(r * self.per, (r + 1) * self.per) if n else ():
                    mask[i, a : a + n * t] = mask[i, a : a + n * t].view(n, t).any(-1).repeat_interleave(t)
        return mask
