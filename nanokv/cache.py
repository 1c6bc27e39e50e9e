"""The KV cache of a whole model as an explicit object: what a user holds.

A Storage decides how an entry is represented, a Basis in which coordinates, a Policy which entries stay, a Plan what
happens across heads and layers (method.py); one LayerCache per layer brings them together (layer.py).
"""

import copy

import torch
from torch import Tensor

from nanokv import snapshot
from nanokv.entries import HIDDEN
from nanokv.layer import Borrowed, LayerCache, Pass
from nanokv.method import Basis, Dense, Evict, Method, Plan, Policy, Storage, together
from nanokv.methods import parse
from nanokv.packed import Packed
from nanokv.rows import Rows

PHASES = ("prompt", "last", "decode", "draft")


class KVCache:
    """The cache of `model` for `spec` such as "full", "kivi(bits=2)" or "snapkv(budget=256)+adakv+pca(rank=48)".

    At most one storage (else `full`), bases and policies in the order written, plans that answer different hooks.
    `ratio`, the share kept, may stand wherever a budget may, given n_prompt, the tokens that it is a share of. Raises
    ValueError for unknown methods and bad parameters, NotImplementedError with the reason for what cannot be combined.
    """

    recorder = None  # told of every pass, where somebody watches

    def __init__(self, model, spec="full", tokenizer=None, n_prompt: int | None = None):
        self.model, self.config, self.rope, self.tokenizer = model, model.config, model.rope, tokenizer
        self.dtype = model.embed_tokens.weight.dtype
        self.methods: list[Method] = parse(spec, n_prompt)
        self.plan = together([m for m in self.methods if isinstance(m, Plan)])
        self.policies = [m for m in self.methods if isinstance(m, Policy)]
        self.bases = [m for m in self.methods if isinstance(m, Basis)]
        self.storage = self._storage()
        self._check()
        self.reset()

    @property
    def spec(self) -> str:
        """Return the methods with all their hyper-parameters, as `KVCache` reads them."""
        return "+".join(map(repr, self.methods)) or "full"

    @property
    def renumbers(self) -> bool:
        """Say whether positions are counted inside the cache, so that a text may be longer than the model's context."""
        return any(p.renumbers for p in self.policies)

    @property
    def chunk(self) -> int | None:
        """Return the most tokens that one pass may read, or None."""
        return min((m.chunk for m in self.methods if m.chunk), default=None)

    def reset(self) -> None:
        """Forget everything."""
        storages = self.plan.storages(self.config, self.storage.spread(self.config))
        storages = [s.on(self.bases) if isinstance(s, Packed) else s for s in storages]
        hooks = ("before_layer", "after_layer", "after_pass")
        waits = any(s.linked for s in storages) or any(hook in vars(self.plan) for hook in hooks)
        shared = (self.policies, self.plan, waits)
        own = [LayerCache(self.model, i, s, *shared) for i, s in enumerate(storages)]
        readers = enumerate(self.plan.share(self.config))
        self.layers = [own[i] if i == lender else Borrowed(own[lender], i) for i, lender in readers]
        self.B, self.phase = 0, "decode"
        self.next_position: list[int] = []  # how many tokens each sequence has read: not the stored length
        self._ids, self._under_way, self._drafted = None, None, None

    # What the model calls

    def begin(self, model, ids: Tensor, phase: str | None = None) -> Tensor:
        """Start a pass of `model` over ids (B, T), see `Decoder.forward`; return positions (B, T), -1 for none."""
        now, pos = self._take(model, ids, phase)
        self._under_way, self.phase = (ids.cpu(), now, self.phase), now.phase
        for layer in self.layers:
            layer.now = now
        return pos

    def end(self) -> None:
        """Finish a pass."""
        (ids, now, phase), self._under_way = self._under_way, None
        self.next_position = [a + b for a, b in zip(now.before, now.came, strict=True)]
        if now.phase == "draft":
            self._drafted = now, ids, phase
            return
        self._ids.append(now.came, id=ids[ids >= 0].int())
        self._finish(now)

    # What a user calls

    @property
    def ids(self) -> list[Tensor]:
        """Return the tokens that each sequence has read, int32 (n,) on the CPU."""
        return [self._ids.row("id", b) for b in range(self.B)] if self._ids else []

    def ahead(self) -> int | None:
        """Return how many tokens a draft may have and still be read as by steps; None: any number."""
        every = [layer.ahead() for layer in self._own() if layer.slots is not None]
        return min((n for n in every if n is not None), default=None)

    def accept(self, n: int | list[int]) -> None:
        """Keep the first n tokens of the draft, each sequence its own number, as if steps had read them; drop the rest.

        What the draft's tokens saw is what steps would have seen for the first `ahead()` of them.
        """
        if self._drafted is None:
            raise ValueError("there is no draft to accept")
        n = [n] * self.B if isinstance(n, int) else list(n)
        if len(n) != self.B:
            raise ValueError(f"accept takes one number, or one for each of {self.B} sequences, not {len(n)}")
        if bad := [m for m, came in zip(n, self._drafted[0].came, strict=True) if not 0 <= m <= came]:
            raise ValueError(f"a draft of {max(self._drafted[0].came)} tokens has no first {bad[0]}")
        (now, ids, self.phase), self._drafted = self._drafted, None  # as if there had been no draft
        drafted = [layer.withdraw() for layer in self._own()]
        self.next_position = list(now.before)
        rows = [row[row >= 0][:m] for row, m in zip(ids, n, strict=True)]
        i = 0
        while i < max(n):
            far = self.ahead()  # together, while nothing happens in between
            j = min(max(n), i + (max(n) if far is None else max(1, far - 1)))
            part = [row[i:j] for row in rows]
            width = j - i
            self._again(drafted, i, j, torch.stack([_padded(p, width) for p in part]))
            i = j

    def truncate(self, n: int) -> None:
        """Cut every sequence back to its first n tokens; what was packed early stays packed.

        NotImplementedError where a method may have forgotten entries, or has packed those that would have to go.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"a cache can be cut to 0 tokens or more, not to {n}")
        self._at_rest()
        layers = [layer for layer in self._own() if layer.slots is not None]
        gone = [layer.beyond(n, self.next_position) for layer in layers]  # all are asked before any is cut
        for layer, rows in zip(layers, gone, strict=True):
            layer.truncate(rows)
        if self._ids:
            self._ids.cut([max(0, m - n) for m in self.next_position])
        self.next_position = [min(n, m) for m in self.next_position]

    def expand(self, B: int) -> None:
        """Turn the one sequence that was read into a batch of B that begin alike."""
        if self.B != 1 or B < 1:
            raise ValueError(f"one sequence can be expanded to 1 or more, not {self.B} to {B}")
        self._at_rest()
        for layer in self._own():
            if layer.slots is not None:
                layer.expand(B)
        self._ids.repeat(B)
        self.B, self.next_position = B, self.next_position * B

    def clone(self) -> "KVCache":
        """Return an independent copy, to go on from the same text in two ways."""
        shared = [self.model, self.config, self.rope, self.tokenizer, *self.methods]
        for layer in self._own():
            derived = [getattr(layer.storage, name, None) for name in layer.storage.derived]
            shared += [layer.attn, *layer.storage.constants(), *(d for d in derived if isinstance(d, (Tensor, tuple)))]
        return copy.deepcopy(self, {id(o): o for o in shared})

    def save(self, path) -> None:
        """Write everything held to a safetensors file, whole or not at all. ValueError in the middle of a prompt."""
        if self.phase == "prompt" or self._under_way or self._drafted:
            raise ValueError("a cache can be saved when a prompt or a pass has ended, not in the middle of it")
        snapshot.save(self, path)

    @classmethod
    def load(cls, path, model) -> "KVCache":
        """Return the cache that was saved; ValueError, in one line, if it is damaged or was made by another model."""
        return snapshot.load(cls, path, model)

    def live_positions(self, layer: int, kv_head: int, batch: int = 0) -> Tensor:
        """Return the indices of the tokens that live in one row, ascending, int64 (n,)."""
        c = self.layers[layer]
        if c.slots is None:
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
        `constants` (not in the sum), `full`, what an uncompressed cache of the same text would hold, and `read`, what
        the last pass had to read. The tokens' ids, 4 bytes each, are a column of the total.
        """
        counted: set[int] = set()
        rows = [self._layer_ledger(c, counted) for c in self.layers]
        total = {k: sum(row[k] for row in rows) for k in rows[0]}
        ids = _storages([self._ids, self._drafted])
        total["columns"] += self._ids.bytes() if self._ids else 0
        total["held"] += sum(ids.values())
        total["unused"] += sum(ids.values()) - (self._ids.bytes() if self._ids else 0)
        return {"layers": rows, "total": total}

    # Bookkeeping

    def _at_rest(self) -> None:
        if self._drafted is not None or self._under_way is not None:
            raise ValueError("a draft or a pass is open: accept some of the draft, or none, first")

    def _own(self) -> list[LayerCache]:
        return [c for c in self.layers if isinstance(c, LayerCache)]

    def _storage(self) -> Storage:
        storage = next((m for m in self.methods if isinstance(m, Storage)), None)
        if self.bases and storage is not None and not isinstance(storage, Packed):
            why = (
                f"{storage.name} packs nothing, so there is nothing to hold in the coordinates of {self.bases[0].name}"
            )
            raise NotImplementedError(why)
        return storage or (Packed() if self.bases else Dense())

    def _check(self) -> None:
        for method in self.methods:
            method.check(self.config)
        plans = [p for p in self.policies if isinstance(p, Plan) and (p.overrides("shares") or p.overrides("rescore"))]
        if plans and not any(isinstance(p, Evict) for p in self.policies):
            raise NotImplementedError(f"{plans[0].name} needs a policy that scores entries, such as snapkv")
        kinds = [type(p) for p in self.policies if isinstance(p, Evict)]
        if twice := [p.name for p in kinds if kinds.count(p) > 1]:
            raise NotImplementedError(f"{twice[0]} is written twice, and the two would share what they remember")
        merging = [p.name for p in self.policies if p.merges]
        if merging and not self.storage.writable:
            why = f"{merging[0]} merges entries, and {self.storage.name} cannot overwrite one once it is stored"
            raise NotImplementedError(why)
        if merging and self.renumbers:
            why = f"{merging[0]} merges entries, and a merged key has no single position to renumber"
            raise NotImplementedError(why)

    def _take(self, model, ids: Tensor, phase: str | None) -> tuple[Pass, Tensor]:
        """Check a pass, and say who reads what in it."""
        if model is not self.model:
            raise ValueError("this cache was made for another model")
        if self._drafted is not None:
            raise ValueError("a draft is open: accept some of it, or none, before reading on")
        if self._under_way is not None:
            raise RuntimeError("a pass was interrupted, so that layers hold different texts; reset() or load the cache")
        if phase not in (None, *PHASES):
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, or None, not {phase!r}")
        B, T = ids.shape
        host = ids.cpu()
        if not ids.numel() or (not self.B and int(host.max()) < 0):
            raise ValueError(f"a pass over {B} sequences and {T} tokens reads nothing")
        if ids.is_floating_point() or int(host.max()) >= self.config.vocab or int(host.min()) < -1:
            raise ValueError(f"ids are whole numbers from 0 to {self.config.vocab - 1}, or -1 where nothing is read")
        if self.B not in (0, B):
            raise ValueError(f"this cache holds a batch of {self.B}, not {B}; call reset() first")
        real = host >= 0
        came = real.sum(1).tolist()
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError("ids of -1 stand before a sequence's tokens, not among or behind them")
        if self.chunk and self.chunk < max(came) and phase != "draft":
            raise ValueError(f"{self.spec} reads at most {self.chunk} tokens per pass, not {T}; use nanokv.generate")
        if not self.B:
            self.B, self.next_position, self._ids = B, [0] * B, Rows(B)
        started = any(self.next_position)
        phase = phase or ("decode" if T == 1 and started else "last")
        before, device = list(self.next_position), model.embed_tokens.weight.device
        self.rope.reserve(max(before) + T)
        first = [n - (T - c) for n, c in zip(before, came, strict=True)]  # as if padding had positions too
        if len(set(first)) == 1:
            pos = torch.arange(first[0], first[0] + T, device=device).expand(B, T)
        else:
            pos = torch.tensor(first, device=device)[:, None] + torch.arange(T, device=device)
        if min(came) < T:
            pos = torch.where(real.to(device), pos, -1)
        return Pass(phase, pos, came, before), pos

    def _finish(self, now: Pass) -> None:
        """Let policies and plans act on what all layers have read, and pack."""
        for layer in self._own():
            layer.act()
        self.plan.after_pass(self)
        self.phase = now.phase
        for layer in self.layers:
            layer.now = now  # a plan may have looked again
            if isinstance(layer, LayerCache):
                layer.pack()
        if self.recorder:
            self.recorder.passed(self)

    def _again(self, drafted: list[tuple], i: int, j: int, ids: Tensor) -> None:
        """Read the drafted tokens i to j - 1, ids (B, j - i), -1 behind those of a sequence that has fewer."""
        real, before = ids >= 0, list(self.next_position)
        came = real.sum(1).tolist()
        device = self.model.embed_tokens.weight.device
        pos = torch.tensor(before, device=device)[:, None] + torch.arange(j - i, device=device)
        pos = pos if min(came) == j - i else torch.where(real.to(device), pos, -1)
        now = Pass("decode", pos, came, before)
        self.phase = now.phase
        for layer in self.layers:
            layer.now = now
        for layer, draft in zip(self._own(), drafted, strict=True):
            if draft is not None:
                layer.again(draft, i, j)
        self.next_position = [a + b for a, b in zip(before, came, strict=True)]
        self._ids.append(came, id=ids[real].int())
        self._finish(now)

    def _layer_ledger(self, c, counted: set[int]) -> dict[str, int]:
        names = ("payload", "scales", "columns", "residual", "unused", "held", "constants", "full", "read")
        out = dict.fromkeys(names, 0)
        if c.slots is None:
            return out
        width = 2 * self.config.head_dim * self.model.embed_tokens.weight.element_size()
        out["full"] = sum(self.next_position) * self.config.n_kv_heads * width
        if isinstance(c, Borrowed):
            return out
        constants = set(_storages([c.storage.constants(), [getattr(c.storage, n, None) for n in c.storage.derived]]))
        parts = {k: v for k, v in vars(c.storage).items() if k not in c.storage.derived}
        held = _storages([parts, c.storage.constants(), c.slots, c.notes, c.tail, c.asked, c.draft, c.chosen])
        held = {at: n for at, n in held.items() if at not in counted}
        out |= c.storage.bytes()
        out["columns"] += c.slots.bytes()
        out["constants"] = sum(n for at, n in held.items() if at in constants)
        out["held"] = sum(held.values()) - out["constants"]
        out["unused"] = out["held"] - sum(out[k] for k in ("payload", "scales", "columns", "residual"))
        per_slot = sum(out[k] for k in ("payload", "scales", "columns", "residual")) / max(1, sum(c.n_slots))
        out["read"] = round(float(c.n_read) * per_slot)
        counted.update(held)
        return out


def _padded(ids: Tensor, n: int) -> Tensor:
    return torch.cat([ids, ids.new_full((n - len(ids),), -1)])


def _storages(parts) -> dict[int, int]:
    """Return where the tensors in nested parts lie, and the bytes there, so that views are counted once."""
    out: dict[int, int] = {}
    if isinstance(parts, Tensor):
        out[parts.untyped_storage().data_ptr()] = parts.untyped_storage().nbytes()
    elif isinstance(parts, (list, tuple)):
        for part in parts:
            out |= _storages(part)
    elif isinstance(parts, dict):
        out = _storages(list(parts.values()))
    elif isinstance(parts, Rows):
        out = _storages(parts.data)
    elif isinstance(parts, Pass):
        out = _storages([parts.pos, parts.real])
    return out
