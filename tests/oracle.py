"""A second reading of the same text: dense, in fp64, sequence by sequence, sharing no code with the engine.

The oracle computes every key, value and logit itself, in loops. Of the engine it takes only what quantisation and bases
have made of packed entries, what merging has written, and, under policies that it has no rules of its own for, which
entries live. Everything else must be equal: the logits of each pass, the entries that are held exactly, and, under the
policies in RULES and the plans in SHARES, the kept sets. What kivi packs, and when, is computed a second time too,
where nothing is forgotten in steps. `python tests/oracle.py --plans 2000 --seed 0` tries as many random plans.
"""

import argparse
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tiny  # noqa: E402

from nanokv import KVCache, fast_cpu, methods  # noqa: E402
from nanokv.method import Dense  # noqa: E402
from nanokv.method import Plan as MethodPlan  # noqa: E402

# The engine runs in fp64, but norms, RoPE's angles, products in a basis and rebuilt keys and values are fp32: each of
# them rounds by 2^-24 = 6e-8 of a number. The longest chain is about 20 such roundings (three layers, three to six in
# each, the last norm), and a softmax over logits of up to about 20 turns an error of 6e-8 of a logit into 1e-6 of a
# weight: 20 * 1e-6. One entry too many or too few, at one place in 100, is an error of about 1e-2.
CLOSE = 3e-5
# Scores are fp32 sums of up to 200 fp32 probabilities: two that are closer than this may be ranked either way.
TIE = 1e-5

KINDS = ("storage", "basis", "policy", "plan")


class Mismatch(AssertionError):
    """What the engine did is not what the oracle says."""


def near(got, want, what):
    """Raise Mismatch unless two tensors are equal up to CLOSE of the second one's root mean square."""
    want = torch.as_tensor(want)
    error = float((got.double() - want).abs().max()) / max(1e-9, float(want.square().mean().sqrt()))
    if not error < CLOSE:
        raise Mismatch(f"{what}: off by {error:.1e}")


class Weights:
    """The model in fp64, from nothing but its config and its state dict."""

    def __init__(self, model):
        self.c, self.w = model.config, {name: t.double().clone() for name, t in model.state_dict().items()}
        exponent = torch.arange(0, self.c.head_dim, 2).float() / self.c.head_dim
        self.frequency = 1 / self.c.rope_theta**exponent  # fp32, as every implementation has it

    def norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.c.eps).sqrt() * self.w[f"{name}.weight"]

    def line(self, x, name):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def heads(self, x, i, which):
        """Return queries, keys or values (n, heads, D) of layer i, not rotated."""
        y = self.line(x, f"layers.{i}.self_attn.{which}_proj").view(len(x), -1, self.c.head_dim)
        return self.norm(y, f"layers.{i}.self_attn.{which}_norm") if self.c.qk_norm and which != "v" else y

    def feed_forward(self, x, i):
        h = self.norm(x, f"layers.{i}.post_attention_layernorm")
        gate, up = (self.line(h, f"layers.{i}.mlp.{name}_proj") for name in ("gate", "up"))
        return x + self.line(gate * torch.sigmoid(gate) * up, f"layers.{i}.mlp.down_proj")

    def rotate(self, x, pos):
        """Rotate x (n, D) by pos (n,)."""
        angle = pos.float()[:, None] * self.frequency
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)


class Text:
    """What one sequence has read: keys and values of all its tokens, and which of them live in each row."""

    def __init__(self, c):
        self.c, self.n = c, 0
        none = torch.zeros(0, c.n_kv_heads, c.head_dim, dtype=torch.float64)
        self.k, self.v = [none] * c.n_layers, [none] * c.n_layers
        self.rows = [(i, h) for i in range(c.n_layers) for h in range(c.n_kv_heads)]
        self.live = {row: [] for row in self.rows}
        self.acc = {row: Counter() for row in self.rows}  # h2o's sums
        self.known = True  # all that has happened was followed
        self.shares = {}  # how many entries a row keeps, where a plan has said so; None: a tie has left that open
        self.asked = {i: [] for i in range(c.n_layers)}  # the prompt's queries, rotated
        self.packed = set()  # what was ever packed: a basis that is made anew puts entries back, as packing left them


class Read:
    """What a pass of n tokens has seen: queries (n, H, D) of each layer, rotated; keys of each row by token."""

    def __init__(self):
        self.q, self.keys, self.logits = {}, {}, None


class Oracle:
    """Read along with a cache."""

    def __init__(self, model, cache):
        self.w, self.c = Weights(model), model.config
        self.policies = cache.policies
        self.renumbers = any(p.name == "streamingllm" and p.reindex for p in self.policies)
        self.merges = any(p.name == "keepkv" for p in self.policies)
        self.plans = [p for p in self.policies if isinstance(p, MethodPlan)]
        scorers = [p for p in self.policies if p not in self.plans]
        self.policy = scorers[0] if len(scorers) == 1 else None
        names = {p.name for p in self.policies}
        unknown = {p.name for p in self.plans} - set(SHARES) or {"tova", "adakv"} <= names
        self.rule = RULES.get(self.policy.name) if self.policy and not unknown else None
        self.dense = isinstance(cache.storage, Dense)
        in_steps = [
            p for p in self.policies if getattr(p, "online", False) or p.name in ("window", "streamingllm", "cake")
        ]
        forgets = in_steps or any(self.c.windows or ())
        kivi = cache.storage.name == "kivi" and not cache.bases and not forgets
        self.kivi = Kivi(cache.storage, self) if kivi else None
        self.texts = []

    # Reading

    def read(self, text, ids, held, bias):
        """Read ids after `text`, whose entries in `held` are as given there: {row: {token: (k, v)}}."""
        c, n, out = self.c, len(ids), Read()
        x = self.w.w["embed_tokens.weight"][ids]
        new = list(range(text.n, text.n + n))
        for i in range(c.n_layers):
            h = self.w.norm(x, f"layers.{i}.input_layernorm")
            q, k, v = (self.w.heads(h, i, which) for which in "qkv")
            text.k[i], text.v[i] = torch.cat([text.k[i], k]), torch.cat([text.v[i], v])
            mixed, asked = [], []
            for row in [r for r in text.rows if r[0] == i]:
                o, rotated = self.attend(text, row, q, new, held.get(row, {}), bias.get(row, {}), out)
                mixed.append(o)
                asked.append(rotated)
            out.q[i] = torch.cat(asked, 1)
            x = x + self.w.line(torch.cat(mixed, 1).flatten(1), f"layers.{i}.self_attn.o_proj")
            x = self.w.feed_forward(x, i)
        out.logits = self.w.line(self.w.norm(x, "norm"), "lm_head")
        text.n += n
        return out

    def attend(self, text, row, q, new, held, bias, out):
        """Attend from q (n, H, D), of the tokens `new`, to a row's live entries and to these."""
        (i, h), G = row, self.c.group
        tokens = text.live[row] + new
        at = torch.arange(len(tokens)) if self.renumbers else torch.tensor(tokens)  # positions
        keys = self.w.rotate(text.k[i][tokens, h], at)
        values = text.v[i][tokens, h].clone()
        for slot, token in enumerate(tokens):
            if token in held:
                k, v, rotated = held[token]
                keys[slot] = k if rotated else self.w.rotate(k[None], at[slot : slot + 1])[0]
                values[slot] = v
        plus = torch.tensor([bias.get(t, 0.0) for t in tokens], dtype=torch.float64)
        out.keys[row] = dict(zip(tokens, keys, strict=True))
        here, mixed, rotated = at[-len(new) :], [], []
        see = self.see(i, here, at)
        for g in range(h * G, (h + 1) * G):
            turned = self.w.rotate(q[:, g], here)
            s = turned @ keys.T / self.c.head_dim**0.5 + plus
            mixed.append(s.masked_fill(~see, -torch.inf).softmax(-1) @ values)
            rotated.append(turned)
        return torch.stack(mixed, 1), torch.stack(rotated, 1)

    def see(self, layer, here, at):
        """Return which entries, at positions `at`, the queries at positions `here` see."""
        window = self.c.window(layer)
        see = at[None] <= here[:, None]
        return see & (at[None] > here[:, None] - window) if window else see

    def probs(self, text, row, q, pos, keys, tokens):
        """Return what q (n, G, D) at pos pay a row's tokens: (n, G, len(tokens)); 0 where nothing can be seen."""
        see = self.see(row[0], torch.tensor(pos), torch.tensor(tokens))[:, None]
        s = q @ torch.stack([keys[t] for t in tokens]).T / self.c.head_dim**0.5
        return s.masked_fill(~see, -torch.inf).softmax(-1).nan_to_num(0.0)

    # Forgetting

    def rule_for(self, text, phase):
        """Return the policy's rule, if there is one, and nothing that it adds up or goes by was missed."""
        if text.shares is None and phase == "decode":
            return None
        return self.rule if text.known or not hasattr(self.rule, "part") else None

    def before(self, text, n, phase):
        """Do what sliding windows of policies do before n tokens come."""
        for p in self.policies:
            if p.name == "window" and phase == "decode":
                first = 0
            elif p.name == "streamingllm" and (p.reindex or phase == "decode"):
                first = p.n_sink
            else:
                continue
            for row, live in text.live.items():
                over = max(0, min(len(live) + n - p.budget, len(live) - first))
                text.live[row] = live[:first] + live[first + over :]

    def after(self, text, n, phase, seen):
        """Forget by the oracle's own rules when the n newest tokens have been read; return the narrowest decision."""
        new, margin = list(range(text.n - n, text.n)), torch.inf
        for row in text.rows:
            text.live[row] = text.live[row] + [t for t in new if t not in text.live[row]]
        for i in range(self.c.n_layers):
            if phase != "decode":
                text.asked[i] += zip(new, seen.q[i][-n:], strict=True)
        rule = self.rule_for(text, phase)
        text.known = text.known and rule is not None
        if hasattr(rule, "part") and phase != "decode":
            rule.part(self, self.policy, text, new, seen)
        for row in text.rows if not self.renumbers else ():
            window = self.c.window(row[0])
            text.live[row] = [t for t in text.live[row] if not window or t > text.n - window]
        if hasattr(rule, "part") and phase == "decode" and self.policy.online:
            rule.part(self, self.policy, text, new, seen)
        if rule and phase != "prompt":
            margin = rule(self.policy, text, new, seen, phase, self)
        if phase == "last":
            text.asked = {i: [] for i in text.asked}
        return margin

    def cut(self, p, text, score, phase, last=0, pooled=False):
        """Keep the best of each row, {row: {token: score}}, as many as the plan says; return the narrowest decision.

        The newest `last` of a row stay. `pooled`: equal scores are equal in the engine too, and no narrow decision.
        """
        goals, margins = dict.fromkeys(score, p.budget), []
        if phase == "decode":
            goals |= text.shares
        for plan in self.plans if phase == "last" else ():
            goals, margins = SHARES[plan.name](plan, p, text, score, self.c, last)
            if getattr(p, "online", False):
                text.shares = goals if min(margins, default=torch.inf) > TIE else None
        for row, own in score.items():
            text.live[row], margin = choose(text.live[row], own, goals[row], last=last)
            margins.append(margin)
        return min((m for m in margins if m > 0 or not pooled), default=torch.inf)


def choose(live, score, n, first=0, last=0):
    """Return the n entries of the highest scores, ties to the older, and by how much the decision was won."""
    free = live[first : len(live) - last] if last else live[first:]
    gone = max(0, min(len(live) - n, len(free)))
    order = sorted(free, key=lambda t: (score[t], -t))
    margin = score[order[gone]] - score[order[gone - 1]] if 0 < gone < len(order) else torch.inf
    out = set(order[:gone])
    return [t for t in live if t not in out], margin / max(1e-9, max((abs(s) for s in score.values()), default=1.0))


def window(p, text, new, seen, phase, oracle):
    first = p.n_sink if p.name == "streamingllm" else 0
    for row, live in text.live.items():
        over = max(0, min(len(live) - p.budget, len(live) - first)) if phase == "last" else 0
        text.live[row] = live[:first] + live[first + over :]
    return torch.inf


def knorm(p, text, new, seen, phase, oracle):
    if text.n <= p.budget or (phase == "decode" and not p.decode_update):
        return torch.inf
    rows = [row for row in text.rows if row[0] >= p.skip_layers]
    return oracle.cut(
        p, text, {row: {t: -float(seen.keys[row][t].norm()) for t in text.live[row]} for row in rows}, phase
    )


def keydiff(p, text, new, seen, phase, oracle):
    if text.n <= p.budget or (phase == "decode" and not p.online):
        return torch.inf
    score = {}
    for row, live in text.live.items():
        unit = {t: seen.keys[row][t] / seen.keys[row][t].norm() for t in live}
        mean = sum(unit.values())
        score[row] = {t: -float(unit[t] @ mean) for t in live}
    return oracle.cut(p, text, score, phase, last=min(len(new), p.budget) if phase == "decode" else 0)


def tova(p, text, new, seen, phase, oracle):
    if text.n <= p.budget or (phase == "decode" and not p.online):
        return torch.inf
    score, G = {}, oracle.c.group
    for i in range(oracle.c.n_layers):
        rows = [row for row in text.rows if row[0] == i]
        live = text.live[rows[0]]
        per_head = [
            oracle.probs(text, row, seen.q[i][-1:, row[1] * G : (row[1] + 1) * G], new[-1:], seen.keys[row], live)[0]
            for row in rows
        ]
        mean = torch.cat(per_head).mean(0)
        score |= {row: dict(zip(live, mean.tolist(), strict=True)) for row in rows}
    return oracle.cut(p, text, score, phase, last=1)


def h2o(p, text, new, seen, phase, oracle):
    if text.n <= p.budget or (phase == "decode" and not p.online):
        return torch.inf
    score = {row: {t: text.acc[row][t] for t in live} for row, live in text.live.items()}
    return oracle.cut(p, text, score, phase, last=p.n_recent)


def h2o_part(oracle, p, text, new, seen):
    """Add what the queries of a part paid."""
    G = oracle.c.group
    for row in text.rows:
        q = seen.q[row[0]][-len(new) :, row[1] * G : (row[1] + 1) * G]
        live = text.live[row]
        paid = oracle.probs(text, row, q, new, seen.keys[row], live)
        reduced = {"mean": paid.mean(1), "max": paid.amax(1), "sum": paid.sum(1)}[p.reduce].sum(0)
        text.acc[row].update(dict(zip(live, reduced.tolist(), strict=True)))


h2o.part = h2o_part


def snapkv(p, text, new, seen, phase, oracle):
    if phase == "decode" or text.n <= p.budget:
        return torch.inf
    out, G, W = {}, oracle.c.group, min(p.window, p.budget)
    for row, live in text.live.items():
        asked = text.asked[row[0]][-W:]
        q = torch.stack([q[row[1] * G : (row[1] + 1) * G] for _, q in asked])
        paid = oracle.probs(text, row, q, [t for t, _ in asked], seen.keys[row], live).sum(0)
        s = {"mean": paid.mean(0), "max": paid.amax(0), "sum": paid.sum(0)}[p.reduce].tolist()
        old, half = s[: max(0, len(s) - W)], p.kernel // 2
        near_by = [old[max(0, j - half) : j + half + 1] for j in range(len(old))]
        pooled = [max(some) if p.pooling == "max" else sum(some) / p.kernel for some in near_by]
        out[row] = dict(zip(live, pooled + [0.0] * (len(live) - len(old)), strict=True))
    # neighbours of a peak tie with it, up to fp32: `choose` sees them as equal, the older first
    return oracle.cut(p, text, out, phase, last=W, pooled=True)


RULES = {"window": window, "streamingllm": window, "knorm": knorm, "keydiff": keydiff, "tova": tova, "h2o": h2o,
         "snapkv": snapkv}  # fmt: skip


def adakv(plan, p, text, score, c, last):
    """Share each layer's budget out: seat by seat, to the head that has least of what it should have.

    A tie for the last seat goes to the older entry, then to the lower head. It may go either way where fp64 rounds it
    (fifths), and where heads hold different tokens, whose age the engine tells by their slots.
    """
    goals, margins = {}, []
    for i in range(c.n_layers):
        rows = [row for row in score if row[0] == i]
        total = (p.budget - last) * len(rows)
        old = {row: text.live[row][: len(text.live[row]) - last] for row in rows}
        ranked = sorted((-score[row][t], j, row) for row in rows for j, t in enumerate(old[row]))
        free = Counter(row for *_, row in ranked[:total])
        if 0 < total < len(ranked):
            largest = max(1e-9, max(abs(s) for s, *_ in ranked))
            margins.append((ranked[total][0] - ranked[total - 1][0]) / largest)
        lack = {row: (1 - plan.alpha) * free[row] for row in rows}
        wanted = sorted((round(k - lack[row], 9), t, row) for row in rows for k, t in enumerate(old[row], 1))
        seats = Counter(row for *_, row in wanted[:total])
        strict = plan.alpha in (0.0, 0.5) and len({tuple(own) for own in old.values()}) == 1
        if 0 < total < len(wanted) and wanted[total][0] == wanted[total - 1][0] and not strict:
            margins.append(TIE / 2)
        spare = max(0, total - len(ranked)) // max(1, len(rows))
        goals |= {row: seats[row] + spare + last for row in rows}
    return goals, margins


def pyramidkv(plan, p, text, score, c, last):
    """Budgets that fall evenly from layer to layer; what rounding leaves over goes to the first ones."""
    L, b, n = c.n_layers, p.budget - last, text.n - last
    of = [b] * L
    if L > 1 and b > 0:
        low = min(Fraction(b), max(Fraction(b, plan.beta), Fraction(1)))
        high = min(2 * b - low, Fraction(n))
        low = 2 * b - high
        of = [int(high - (high - low) * i / (L - 1)) for i in range(L)]
        for i in range(L):
            of[i] += sum(of) < L * b and of[i] < n
    return {row: of[row[0]] + last for row in score}, []


SHARES = {"adakv": adakv, "pyramidkv": pyramidkv}


class Kivi:
    """What kivi packs, and when, where all that it is given stays or is forgotten in prompts only."""

    def __init__(self, storage, oracle):
        self.s, self.oracle = storage, oracle
        self.sinks, self.own, self.met = {}, {}, {}  # by text and row: sinks; packed numbers; the engine's, once seen
        self.lost = set()  # texts and layers in which a packed key was forgotten: its slot stays while its group does
        self.numbers, self.other = 0, 0  # how many were compared, and how many are another code

    def pack(self, text):
        """Pack what is due when a pass has ended."""
        for row, live in text.live.items():
            at = id(text), row
            if any(t not in live for t in self.own.get(at, {}).get("k", ())):
                self.lost.add((id(text), row[0]))
            if at not in self.sinks:
                if len(live) <= self.s.n_sink:
                    continue
                self.sinks[at], self.own[at] = set(live[: self.s.n_sink]), {"k": {}, "v": {}}
            for which, own in self.own[at].items():
                exact = [t for t in live if t not in own and t not in self.sinks[at]]
                every = self.s.group if which == "k" else 1
                n = len(exact) // self.s.residual * self.s.residual if which == "k" else len(exact) - self.s.residual
                for j in range(0, n, every):
                    own |= self.packed(text, row, which, exact[j : j + every])

    def packed(self, text, row, which, tokens):
        """Return {token: (numbers (D,), by how much they may differ)}: keys by channel, values by token."""
        (i, h), g = row, self.s.group
        x = (text.k if which == "k" else text.v)[i][tokens, h]  # (tokens, D)
        x = self.oracle.w.rotate(x, torch.tensor(tokens)).T if which == "k" else x.view(-1, g)  # (groups, g)
        low = x.amin(1, keepdim=True).half().double()
        steps = 2 ** (self.s.bits_k if which == "k" else self.s.bits_v) - 1
        scale = ((x.amax(1, keepdim=True) - low) / steps).half().double()
        scale = torch.where(scale > 0, scale, 1.0)
        back = low + scale * ((x - low) / scale).round().clamp(0, steps)
        # the engine's x is off by CLOSE, so that a number at a border may get the next code, or a minimum the next half
        near_by = (scale + low.abs() * 2**-10).expand_as(x) * 1.01
        back, near_by = ((t.T if which == "k" else t).reshape(len(tokens), -1) for t in (back, near_by))
        return dict(zip(tokens, zip(back, near_by, strict=True), strict=True))

    def check(self, text, row, which, t, got):
        """Compare one entry of the engine, its numbers (D,) if it is packed, else None."""
        at = id(text), row
        if (id(text), row[0]) in self.lost:
            return
        own = self.own.get(at, {}).get(which, {}).get(t)
        if (got is None) != (own is None):
            is_, should = ("exact", "packed") if got is None else ("packed", "exact")
            raise Mismatch(f"kivi: {which} of token {t} in row {row} is {is_}, and should be {should}")
        if got is None:
            return
        before = self.met.get((at, which, t))
        if before is not None and not torch.equal(before, got):
            raise Mismatch(f"kivi: {which} of token {t} in row {row} has been packed twice")
        if before is None:
            self.met[at, which, t] = got.clone()
            off = (got.double() - own[0]).abs()
            if bool((off > own[1]).any()):
                raise Mismatch(
                    f"kivi: {which} of token {t} in row {row} is off by {float((off / own[1]).max()):.1f} steps"
                )
            self.numbers += len(off)
            self.other += int((off > 1e-4 * own[1] + 1e-6 * own[0].abs()).sum())

    def done(self):
        """Raise Mismatch if more numbers are another code than rounding explains: 1 in 50, and two groups."""
        if self.other > self.numbers / 50 + 64:
            raise Mismatch(f"kivi: {self.other} of {self.numbers} packed numbers are another code")


class Plan:
    """One random plan: a model, a spec (or the given one), and what is read, checked as it goes."""

    def __init__(self, seed, given=None):
        self.rng, self.count = random.Random(seed), Counter()
        rng = self.rng
        G, heads, L = rng.choice([1, 3, 4]), rng.randint(1, 4), rng.randint(1, 3)
        options = {"qkv_bias": rng.random() < 0.2, "qk_norm": rng.random() < 0.2, "head_dim": rng.choice([16, 32])}
        if rng.random() < 0.2:
            options["windows"] = tuple(rng.choice([None, rng.randint(5, 40)]) for _ in range(L))
        self.model = tiny.model(G, heads, n_layers=L, seed=seed, dtype=torch.float64, **options)
        while True:
            self.spec = given or spec(rng)
            try:
                self.cache = KVCache(self.model, self.spec)
                break
            except NotImplementedError:
                if given:
                    raise
                self.count["refused"] += 1
        self.oracle = Oracle(self.model, self.cache)
        if rng.random() < 0.5:
            fast_cpu.speed_up(self.model)
        kinds = {k for m in self.cache.methods for k in KINDS if k == kind(m)}
        self.count.update("+".join(pair) for pair in combinations([k for k in KINDS if k in kinds], 2))
        self.count.update(m.name for m in self.cache.methods)
        self.B = rng.randint(1, 3)
        self.oracle.texts = [Text(self.model.config) for _ in range(self.B)]

    @torch.no_grad()
    def run(self):
        """Read a prompt, then steps, pauses, later prompts and drafts in random order."""
        self.prompt(first=True)
        for _ in range(self.rng.randint(2, 4)):
            action = self.rng.choice([self.steps, self.steps, self.prompt, self.draft])
            action()
            if self.rng.random() < 0.1:
                self.cache = self.cache.clone()
                self.count["clones"] += 1
        if self.oracle.kivi:
            self.oracle.kivi.done()
            self.count["kivi's numbers"] += self.oracle.kivi.numbers
        return self.count

    def tokens(self, n):
        return [self.rng.randrange(101) for _ in range(n)]

    def prompt(self, first=False):
        """Read one prompt for some of the sequences, in parts."""
        rng, most = self.rng, self.cache.chunk or 10**6
        lengths = [rng.choice([0, 1, 2, rng.randint(3, 25)]) for _ in range(self.B)]
        if first:
            lengths = [rng.choice([1, 7, rng.randint(10, 70)]) for _ in range(self.B)]
        if not any(lengths):
            return
        self.count["later prompts"] += not first
        self.count["unequal prompts"] += len(set(lengths)) > 1
        cut = min(most, rng.choice([10**6, 10**6, rng.randint(1, 20)]))
        parts = [[self.tokens(min(cut, n - i)) for i in range(0, n, cut)] for n in lengths]
        longest = max(map(len, parts))
        parts = [[[]] * (longest - len(p)) + p for p in parts]
        self.count["prompts in parts"] += longest > 1
        for j in range(longest):
            self.go([p[j] for p in parts], "last" if j == longest - 1 else "prompt")

    def steps(self):
        """Read tokens one by one, with pauses."""
        pauses = self.rng.random() < 0.5 and self.B > 1
        self.count["pauses"] += pauses
        for _ in range(self.rng.randint(1, 12)):
            here = [self.tokens(int(not pauses or self.rng.random() < 0.7)) for _ in range(self.B)]
            if any(here):
                self.go(here, "decode")

    def draft(self):
        """Read a draft, and accept some of it."""
        n = self.rng.randint(1, 8)
        if self.cache.chunk:
            n = min(n, self.cache.chunk)
        self.count["drafts"] += 1
        rows = [self.tokens(self.rng.choice([n, n, self.rng.randint(0, n)])) for _ in range(self.B)]
        if not any(rows):
            return
        before, ahead = [dict(t.live) for t in self.oracle.texts], self.cache.ahead()
        seen = self.go(rows, "draft")
        keep = [self.rng.randint(0, len(r)) for r in rows]
        self.cache.accept(keep)
        for b, (text, n, row) in enumerate(zip(self.oracle.texts, keep, rows, strict=True)):
            text.live, margin = dict(before[b]), torch.inf
            start, packs = text.n - len(row), not self.oracle.dense  # what is packed in between is not followed
            for j in range(n if self.oracle.kivi else 0):
                text.live = {at: [*live, start + j] for at, live in text.live.items()}
                self.oracle.kivi.pack(text)
            if self.oracle.kivi:
                text.live = dict(before[b])
            if packs:
                text.known = text.known and not n
                text.live = {at: live + list(range(start, start + n)) for at, live in text.live.items()}
            for j in range(0 if packs else n):  # one by one, as steps
                text.n = start + j + 1
                self.oracle.before(text, 1, "decode")
                if (ahead is None or j < ahead) and self.oracle.rule:
                    self.promised(text, before[b], start, j)
                margin = min(margin, self.oracle.after(text, 1, "decode", prefix(seen[b], j, len(row))))
            text.n = start + n
            text.k, text.v = ([x[: text.n] for x in side] for side in (text.k, text.v))
            self.compare(b, margin, unseen=packs)

    def promised(self, text, before, start, j):
        """Check that token j of a draft, which was promised to be read as by a step, saw what a step would have."""
        self.count["promised tokens"] += 1
        for row, live in text.live.items():
            least = start + j - (self.oracle.c.window(row[0]) or 10**9) if not self.oracle.renumbers else -1
            want, got = [*before[row], *range(start, start + j)], live
            if [t for t in want if t > least] != [t for t in got if t > least]:
                raise Mismatch(f"token {j} of a draft saw {want} in row {row}, where a step would have seen {got}")

    def go(self, rows, phase):
        """Read one part, one step or one draft with both, and compare."""
        T = max(map(len, rows))
        ids = torch.tensor([[-1] * (T - len(r)) + r for r in rows])
        held, bias = self.take(phase)
        logits = self.model(ids, self.cache, phase)
        seen = []
        for b, (text, row) in enumerate(zip(self.oracle.texts, rows, strict=True)):
            seen.append(None)
            if not row:
                continue
            if phase != "draft":
                self.oracle.before(text, len(row), phase)
            seen[b] = self.oracle.read(text, torch.tensor(row), held[b], bias[b])
            near(logits[b, T - len(row) :], seen[b].logits, f"logits of sequence {b} in a {phase} of {len(row)}")
            self.count["tokens compared"] += len(row)
            if phase != "draft":
                self.compare(b, self.oracle.after(text, len(row), phase, seen[b]), phase)
        return seen

    def compare(self, b, margin, phase="decode", unseen=False):
        """Compare kept sets; where they were won by a hair, or the oracle knows no rule, go on with the engine's."""
        text, cache = self.oracle.texts[b], self.cache
        if cache.next_position[b] != text.n:
            raise Mismatch(f"sequence {b} has read {text.n}, not {cache.next_position[b]}")
        knows = (self.oracle.rule_for(text, phase) or not self.oracle.policies) and not unseen
        for row in text.rows:
            got = cache.live_positions(*row, b).tolist()
            if knows:
                self.count["kept sets"] += 1
                self.count["kept sets under plans"] += bool(self.oracle.plans)
                if got != text.live[row] and margin > TIE:
                    raise Mismatch(f"row {row} of sequence {b} keeps {got}, not {text.live[row]} (by {margin:.1e})")
                self.count["ties"] += got != text.live[row]
            elif not set(got) <= set(text.live[row]):
                raise Mismatch(f"row {row} of sequence {b} keeps {got}, of {text.live[row]}")
            text.live[row] = got
        if self.oracle.kivi and not unseen and phase != "prompt":
            self.oracle.kivi.pack(text)

    def take(self, phase):
        """Take what is packed or merged from the engine; compare what is held exactly."""
        held, bias = [{} for _ in range(self.B)], [{} for _ in range(self.B)]
        for i, layer in enumerate(self.cache.layers):
            if layer.slots is None or not layer.N:
                continue
            k, v = layer.storage.read()
            packed = {which: layer.storage.packed(which) for which in "kv"}
            token = layer.token.expand(layer.B, layer.config.n_kv_heads, -1)
            plus = layer.column("bias").expand_as(token) if "bias" in layer.slots.data else None
            for b, text in enumerate(self.oracle.texts):
                for h in range(layer.config.n_kv_heads):
                    r, row = b * layer.config.n_kv_heads + h, (i, h)
                    held[b][row], bias[b][row] = {}, {}
                    exact = {"k": ([], []), "v": ([], [])}
                    for slot, t in enumerate(token[b, h].tolist()):
                        if t >= text.n:
                            continue
                        if plus is not None:
                            bias[b][row][t] = float(plus[b, h, slot])
                        at = torch.tensor([t])
                        true = text.k[i][t, h]
                        true = true if layer.raw else self.oracle.w.rotate(true[None], at)[0]
                        mine = {"k": true, "v": text.v[i][t, h]}
                        for which, x in (("k", k), ("v", v)):
                            is_packed = packed[which] is not None and bool(packed[which][r, slot])
                            if self.oracle.kivi:
                                self.oracle.kivi.check(text, row, which, t, x[r, slot] if is_packed else None)
                            if is_packed:
                                text.packed.add((row, which, t))
                            if self.oracle.merges or (row, which, t) in text.packed:
                                mine[which] = x[r, slot].double().clone()  # not a view of what will change
                                self.count["packed or merged entries"] += which == "k"
                            else:
                                exact[which][0].append(x[r, slot])
                                exact[which][1].append(mine[which])
                        held[b][row][t] = mine["k"], mine["v"], not layer.raw
                    for which, (got, want) in exact.items():
                        if got:
                            near(torch.stack(got), torch.stack(want), f"exact {which} of row {row} of sequence {b}")
                            self.count["exact entries"] += len(got)
        return held, bias


def prefix(seen, j, n):
    """Return what the first j + 1 of a draft of n tokens have seen, so that token j is the newest."""
    out = Read()
    out.q = {i: q[: j + 1] for i, q in seen.q.items()}
    out.keys = seen.keys
    return out


def kind(method) -> str:
    """Return a method's kind."""
    return methods.find(method.name).kind


def spec(rng) -> str:
    """Return a random spec."""
    budget = rng.choice([8, 12, rng.randint(9, 40)])
    bits_k, bits_v = rng.randint(1, 8), rng.randint(1, 8)
    residual = rng.choice([16, 32])
    sinks = rng.choice([0, 2])
    kivi = f"kivi(bits_k={bits_k}, bits_v={bits_v}, group={rng.choice([8, 16])}, residual={residual}, n_sink={sinks})"
    xquant = f"xquant(bits={rng.choice([2, 3, 4, 8, 16])}, group=16, mode={rng.choice(['auto', 'latent', 'x'])!r})"
    pca = f"pca(rank={rng.choice([8, 16])}, rank_v={rng.choice([0, 8])}, least={rng.choice([8, 16])})"
    storage = rng.choices([[], [kivi], [pca], [pca, kivi], [xquant]], [4, 2, 2, 2, 1])[0]
    window = rng.choice([1, 4, 7])
    online = rng.choice([True, False])
    reduce = rng.choice(["mean", "max", "sum"])
    one = {
        "snapkv": f"window={window}, kernel={rng.choice([1, 3, 5])}, pooling={rng.choice(['max', 'avg'])!r}, "
        f"reduce={reduce!r}",
        "h2o": f"recent={rng.choice([0.0, 0.3, 0.5])}, reduce={reduce!r}, online={online}",
        "tova": f"online={online}",
        "keydiff": f"online={online}",
        "knorm": f"skip_layers={rng.choice([0, 0, 1])}, decode_update={online}",
        "streamingllm": f"n_sink={rng.choice([0, 1, 4])}, reindex={rng.choice([True, False])}",
        "window": "",
        "random": f"seed={rng.randrange(99)}",
        "expected_attention": "n_future=16",
        "keepkv": f"n_sink=1, window={window}, threshold={rng.choice([-1.0, 0.3, 0.8])}",
    }
    some = lambda: (lambda name: f"{name}(budget={budget}, {one[name]})")(rng.choice(list(one)))  # noqa: E731
    policies = [some() for _ in range(rng.choices([0, 1, 2], [1, 7, 1])[0])]
    cake = f"cake(budget={budget}, window={rng.choice([2, 4, 7])}, floor=2)"
    usual = "" if policies else f"budget={budget}, window={window}, "  # of the policy that a plan brings
    beta = rng.choice([1, 3, 20])
    ada, pyramid = f"adakv({usual}alpha={rng.choice([0.0, 0.2, 0.5])})", f"pyramidkv({usual}beta={beta})"
    plans = rng.choices([[], [ada], [pyramid], [cake]], [6, 2, 2, 1])[0]
    return "+".join([*policies, *plans, *storage]) or "full"


def tried(seed, given=None) -> Counter:
    """Run one plan, of a random spec or the given one; a Mismatch tells its seed and spec."""
    plan = Plan(seed, given)
    try:
        return plan.run()
    except Exception as error:
        c = plan.model.config
        shape = f"{c.n_layers} layers, {c.n_heads} heads, {c.n_kv_heads} KV heads, windows {c.windows}, B={plan.B}"
        raise Mismatch(f"plan {seed}, {plan.spec}, {shape}: {error!r}") from error


def main() -> int:
    """Run plans, print what they were made of, and return how many went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spec", help="try this spec only")
    args = parser.parse_args()
    total, wrong, start = Counter(), 0, time.perf_counter()
    for seed in range(args.seed, args.seed + args.plans):
        try:
            total.update(tried(seed, args.spec))
        except Mismatch as error:
            wrong += 1
            print(error)
    for name, n in sorted(total.items()):
        print(f"{n:9,}  {name}")
    print(f"{args.plans:,} plans in {time.perf_counter() - start:.0f} s, {wrong} mismatches")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main()))
