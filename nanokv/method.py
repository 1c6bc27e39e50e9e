"""The kinds of method, and the moments at which they may act.

A *storage* says how entries are held (bits), a *basis* in which coordinates (channels), a *policy* which of them stay
(tokens), a *plan* how many in each head and layer. A method is a dataclass: its fields are its hyper-parameters, and
its flags on the command line; `limits` says which values they may have. What a method must remember about a text lives
in the cache, as columns per entry or notes per layer, never in the method.
"""

import copy
from dataclasses import dataclass, fields

from torch import Tensor

from nanokv import attention
from nanokv.rows import Rows


def at_least(n):
    """Return a limit: numbers from n on."""
    return (lambda x: x >= n), f"at least {n}"


def one_of(*values):
    """Return a limit: one of these values."""
    return (lambda x: x in values), f"one of {', '.join(map(str, values))}"


@dataclass
class Method:
    """What all kinds share. Subclasses with hyper-parameters are dataclasses."""

    name = ""  # the file's name; a class outside of a method file is called by its own
    source = ""  # the path of the file, if it lies outside nanokv/methods
    limits = {}  # hyper-parameter -> (function that says whether a value is allowed, words for what is)
    chunk = None  # the most tokens that one pass may read, or None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        folder, _, file = cls.__module__.rpartition(".")
        cls.name = file if folder.endswith("methods") else cls.__name__.lower()
        cls.__repr__ = Method.__repr__  # as a spec, not as a dataclass

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{self.name}: {field.name} must be {_KINDS.get(kind, kind.__name__)}, got {value!r}")
            ok, what = self.limits.get(field.name, (lambda x: True, ""))
            if not ok(value) or value != value:
                raise ValueError(f"{self.name}: {field.name} must be {what}, got {value}")

    def __repr__(self) -> str:
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.source or self.name}({given})" if given else self.source or self.name

    def check(self, config) -> None:
        """Raise NotImplementedError, with the reason, if the method cannot work with this model."""

    def most(self, prompt: int, new: int) -> int:
        """Return the most entries a row may hold, on average over rows and layers, after these numbers of tokens."""
        return prompt + new

    @classmethod
    def exact(cls, config) -> dict:
        """Return hyper-parameters with which the method changes nothing."""
        return {"budget": config.context} if "budget" in {f.name for f in fields(cls)} else {}


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class At:
    """Whose rows are meant: `layer`, and for each of them its sequence b and KV head h, int lists."""

    layer: int
    sequence: list[int]
    head: list[int]


class Storage(Method):
    """How entries are represented. One object per layer; rows are KV heads of sequences, R = B * Hkv."""

    writable = False  # entries can be overwritten at any time, which merging in steps needs
    raw = False  # it is handed keys before RoPE, and they are rotated when read
    linked = False  # `spread` ties layers together, so that none packs before all have read
    derived = ()  # attributes made from the model or other layers, not from the text: shared by clones, not saved

    def spread(self, config) -> list["Storage"]:
        """Return each layer's own storage; called once per KVCache, so layers may be linked here."""
        return [copy.copy(self) for _ in range(config.n_layers)]

    def reset(self, cache) -> None:
        """Create empty state for cache.n_rows rows; `cache` is the LayerCache, which knows config, attn and layer."""
        raise NotImplementedError

    def store(self, counts: list[int], k: Tensor, v: Tensor, x: Tensor) -> None:
        """Add counts[r] slots to row r: k, v (sum of counts, D) row by row, made from x (tokens, E) by sequence."""
        raise NotImplementedError

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all slots as k, v (R, N, D) in the model's dtype, shorter rows padded."""
        raise NotImplementedError

    def keep(self, mask: Tensor) -> Tensor:
        """Free what can be freed of the slots that are False in mask (R, N); return (R, N) of what remains."""
        raise NotImplementedError

    def drop_run(self, first: int, n: int) -> bool:
        """Free the n slots that follow the `first` ones of every row, at little cost, or return False."""
        return False

    def cut(self, counts: list[int]) -> None:
        """Drop the newest counts[r] slots of row r, which are still as they came."""
        raise NotImplementedError

    def newest(self) -> list[int]:
        """Return how many of each row's newest slots are still as they came."""
        raise NotImplementedError

    def pack(self, cache) -> None:
        """Compress what is stored. Called after the policies, never in the middle of a prompt."""

    def ahead(self) -> int | None:
        """Return how many tokens may come before the next packing; None: any number."""
        return None

    def packed(self, which: str) -> Tensor | None:
        """Return which slots' keys ("k") or values ("v") are packed, bool (R, N); None: none are."""
        return None

    def write(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite slots index (R, M), negative ones skipped, with k, v (R, M, D); ValueError for packed ones."""
        raise NotImplementedError(f"{self.name} cannot overwrite entries")

    def repeat(self, times: int) -> None:
        """Turn one sequence into `times` equal ones."""
        for held in vars(self).values():
            for rows in held.values() if isinstance(held, dict) else [held]:
                if isinstance(rows, Rows):
                    rows.repeat(times)

    def attend(self, q: Tensor, pos: Tensor, cache) -> Tensor:
        """Attend from rotated q (B, H, T, D) at pos to everything stored. An override is held to this by tests."""
        return attention.attend(q, *cache.read(), *cache.mask(pos))

    def kernel(self, q: Tensor, pos: Tensor, cache) -> Tensor:
        """Do what `attend` does by a Triton kernel; NotImplementedError, with the reason, where none is made for it."""
        raise NotImplementedError(f"no kernel reads what {self.name} holds")

    def bytes(self) -> dict[str, int]:
        """Return the bytes in use by category: payload, scales, residual. What else is held is counted as unused."""
        raise NotImplementedError

    def constants(self) -> list[Tensor]:
        """Return tensors that do not grow with the text, such as bases and codebooks."""
        return []


class Dense(Storage):
    """Hold keys and values as the model made them."""

    writable = True

    def reset(self, cache):
        self.kv = Rows(cache.n_rows)

    def store(self, counts, k, v, x):
        self.kv.append(counts, k=k, v=v)

    def read(self):
        return self.kv["k"], self.kv["v"]

    def keep(self, mask):
        self.kv.keep(mask)
        return mask

    def drop_run(self, first, n):
        if self.kv.equal:
            self.kv.drop_run(first, n)
        return self.kv.equal

    def cut(self, counts):
        self.kv.cut(counts)

    def newest(self):
        return self.kv.n

    def write(self, index, k, v):
        self.kv.put(index, k=k, v=v)

    def kernel(self, q, pos, cache):
        from nanokv.kernels.decode import decode, heads_of, rows_of  # imported only now: Triton may not be installed

        x = rows_of(q, cache.n_rows)  # (R, M, D)
        more = cache.visible(pos, q.shape[1] // cache.config.n_kv_heads)
        if cache.raw:
            more |= {"cos": cache.rope.cos, "sin": cache.rope.sin}
        k, v = self.kv.data["k"], self.kv.data["v"]
        return heads_of(decode(x, k, v, *self.kv.where, scale=q.shape[-1] ** -0.5, most=cache.N, **more), q)

    def bytes(self):
        return {"payload": self.kv.bytes()}


class Basis(Method):
    """In which coordinates the packed entries of a row are held: k @ U, with U (D, C) orthonormal, and v likewise.

    A query meets keys where they are, q.k = (q @ U).(k @ U), and a mix of values is turned back once, o @ U.mT.
    """

    least = 0  # how many exact entries a fit needs; until a row has them, all of it stays exact
    learns = False  # U depends on the entries, and is made anew when a row's have doubled
    raw = False  # it wants keys before RoPE
    joint = False  # a row is a sequence, all KV heads side by side
    constant = False  # U is the same for all rows and texts

    def fit(self, x: Tensor, which: str, at: At) -> Tensor | None:
        """Return U (D, C), fp32, from a row's exact keys or values x (n, D); None: these stay as they are."""
        raise NotImplementedError


class Chain(Basis):
    """Coordinates of coordinates: each basis is made in those of the one before."""

    def __init__(self, parts: list[Basis]):
        self.parts, self.least = parts, max(b.least for b in parts)
        self.learns, self.raw, self.joint, self.constant = (
            any(b.learns for b in parts),
            any(b.raw for b in parts),
            any(b.joint for b in parts),
            all(b.constant for b in parts),
        )

    def fit(self, x, which, at):
        whole = None
        for basis in self.parts:
            U = basis.fit(x if whole is None else x.float() @ whole, which, at)
            whole = U if whole is None else whole if U is None else whole @ U
        return whole


class Policy(Method):
    """Which entries of a layer stay. Override the moments at which the method acts, and nothing else."""

    renumbers = False  # positions are ranks among the living, and keys are stored before RoPE
    merges = False  # it overwrites entries while text is generated, which needs a writable storage
    observes = 0  # how many of a prompt's last queries it wants to see together, see LayerCache.observed
    selects_prompts = False  # `select` is asked about prompts too, not only about steps

    @property
    def protects(self) -> tuple[int, int]:
        """Return how many of the first and of the newest entries stay whatever happens."""
        return 0, 0

    def before_append(self, cache, n: list[int]) -> None:
        """n[r] entries are about to come to row r."""

    def before_attend(self, cache, x: Tensor, pos: Tensor) -> None:
        """Entries made from the layer input x (B, T, E) have come, and are about to be looked at."""

    def select(self, cache, q: Tensor, pos: Tensor) -> Tensor | None:
        """Return which slots rotated q (B, H, T, D) of a step need to read, bool (B, Hkv, T, N), or None: all."""

    def after_part(self, cache, q: Tensor, pos: Tensor) -> None:
        """Act when a part of a prompt has been read, of rotated queries q (B, H, T, D)."""

    def after_prompt(self, cache) -> None:
        """Act when the layer has read the whole prompt; the first token is chosen with all of it in sight."""

    def after_step(self, cache, q: Tensor, pos: Tensor) -> None:
        """Act when all layers have read a generated token, of rotated queries q (B, H, T, D)."""

    def ahead(self, cache) -> int | None:
        """Return how many tokens may be read before it forgets anything; None: any number."""
        if type(self).before_attend is not Policy.before_attend:
            return 0  # drafts are read without it
        acts = any(getattr(type(self), m) is not getattr(Policy, m) for m in ("before_append", "after_step"))
        return 1 if acts else None  # unless the method knows better


class Evict(Policy):
    """Keep the `budget` highest-scored entries: after the prompt and, with `online`, after every step."""

    n_sink = n_recent = 0  # first and newest entries, which stay whatever their score
    online = False

    @property
    def protects(self):
        return self.n_sink, self.n_recent

    def most(self, prompt, new):
        return min(prompt + new, self.budget) if self.online else min(prompt, self.budget) + new

    def score(self, cache, q: Tensor, pos: Tensor) -> Tensor:
        """Return fp32 (B, 1 or Hkv, N), higher is better; q are the queries that came last, `observes` of them."""
        raise NotImplementedError

    def ahead(self, cache):
        return max(1, self._room(cache) + 1) if self.online else None

    def after_prompt(self, cache):
        if max(cache.next_position) > self.budget:
            q, pos = cache.observed(self.observes)
            score = cache.plan.rescore(cache, self.score(cache, q, pos), self)
            shares = cache.plan.shares(cache, score, self)
            self.forget(cache, score, shares, q)
            if self.online and not isinstance(shares, int):  # a sequence that pauses keeps the shares it has
                rows = range(cache.n_rows)
                old, reads = self._shares(cache), [cache.reads[r * cache.B // cache.n_rows] for r in rows]
                cache.notes[f"{self.name}'s shares"] = [shares[r] if reads[r] else old[r] for r in rows]

    def after_step(self, cache, q, pos):
        if self.online and self._room(cache) < 0:
            self.forget(cache, self.score(cache, q, pos), self._shares(cache), q)

    def forget(self, cache, score: Tensor, n: int | list[int], q: Tensor) -> None:
        """Make do with n entries, a number or one per row, of these scores; q are the queries that gave them."""
        cache.keep_best(score, n, *self.protects)

    def _shares(self, cache) -> list[int]:
        """Return how many entries each row may keep."""
        return cache.notes.get(f"{self.name}'s shares") or [self.budget] * cache.n_rows

    def _room(self, cache) -> int:
        """Return how many entries may come before a row has more than it may keep."""
        return min(n - c for n, c in zip(self._shares(cache), cache.counts, strict=True))


class Plan(Policy):
    """How many: what happens across heads and layers, on top of what a policy may do in each.

    Several plans may work together, but each hook is answered by one of them at most.
    """

    brings = None  # (name, hyper-parameters): the policy that its paper uses, and with what, where none is written
    hooks = {
        "rescore": "how entries are scored",
        "shares": "how many entries rows keep",
        "storages": "how layers hold entries",
        "share": "which layers hold entries",
        "before_layer": "what a layer reads",
        "after_layer": "what follows a layer",
        "after_pass": "what follows a pass",
    }

    def rescore(self, cache, score: Tensor, policy: Evict) -> Tensor:
        """Return another score (B, Hkv, N) in place of the one that `policy` gave."""
        return score

    def shares(self, cache, score: Tensor, policy: Evict) -> int | list[int]:
        """Return how many entries `policy`, which gave these scores, may keep in each row: a number, or one per row."""
        return policy.budget

    def storages(self, config, kept: list[Storage]) -> list[Storage]:
        """Return each layer's storage, given those that the storage would have."""
        return kept

    def share(self, config) -> list[int]:
        """Return whose entries each layer reads: its own number, or that of an earlier layer, which lends them."""
        return list(range(config.n_layers))

    def before_layer(self, cache, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the hidden state (B, T, E) and positions that layer i is to read, None to skip it; cache: KVCache."""
        return x, pos

    def after_layer(self, cache, i: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state and positions that the layers after i are to read."""
        return x, pos

    def after_pass(self, cache) -> None:
        """Act when all layers have read a part of a prompt or a generated token, and the policies have acted."""

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Say whether plans of this class answer a hook."""
        return getattr(cls, hook) is not getattr(Plan, hook)


def together(plans: list[Plan]) -> Plan:
    """Return one plan that answers each hook as the one of `plans` does that knows an answer."""
    whole = Plan()
    for hook, what in Plan.hooks.items():
        mine = [p for p in plans if p.overrides(hook)]
        if len(mine) > 1:
            raise NotImplementedError(f"{mine[0].name} and {mine[1].name} both decide {what}; leave one of them out")
        if mine:
            setattr(whole, hook, getattr(mine[0], hook))
    return whole
