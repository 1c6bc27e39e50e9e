"""The hooks, each under a small method that no shipped one stands for; and what methods say of themselves."""

import copy
from dataclasses import dataclass

import pytest
import tiny
import torch
from methods_for_tests import (
    Backwards,
    Every,
    LastOnly,
    Log,
    LooksAgain,
    Louder,
    Newest,
    Oldest,
    OnlyFirst,
    Pages,
    Pairs,
    Rounded,
    Skips,
    Tidies,
)

from nanokv import KVCache, generate, generate_batch
from nanokv.layer import Borrowed
from nanokv.method import Basis, Chain, Dense, Method, Plan, at_least, together
from nanokv.methods import find


def both(m, spec, n=60, more=12):
    """Read a prompt and steps; return all logits and the cache."""
    cache = KVCache(m, spec)
    first = tiny.feed(m, cache, tiny.ids(n))
    return torch.cat([first, tiny.steps(m, cache, tiny.ids(more, seed=4))], 1), cache


# select


def test_selecting_in_steps_is_forgetting_without_forgetting():
    m = tiny.model(dtype=torch.float64)
    got, cache = both(m, Newest(budget=8))
    want, window = both(m, "window(budget=8)")
    assert tiny.rms(got, want) < 1e-12
    assert cache.layers[0].n_live == 72 and window.layers[0].n_live == 8
    row = cache.ledger()["layers"][0]
    assert row["read"] == 8 * row["payload"] // 72  # what the last step loaded, of all that is held
    assert "read" in row and both(m, "full")[1].ledger()["layers"][0]["read"] == row["payload"]


def test_selecting_in_prompts_is_a_sliding_window():
    m = tiny.model(dtype=torch.float64)
    windows = copy.deepcopy(m)
    for name, value in vars(tiny.model(windows=(8, 8)).config).items():
        object.__setattr__(windows.config, name, value)
    want, _ = both(windows, "full")
    assert tiny.rms(both(m, Newest(budget=8, prompts=True))[0], want) < 1e-12
    whole = both(m, "full")[0]
    assert tiny.rms(both(m, Newest(budget=8))[0][:, :60], whole[:, :60]) < 1e-12  # not asked in prompts


@pytest.mark.parametrize("prompts", [True, False])
def test_a_token_always_sees_itself(prompts):
    class Nothing(Newest):
        def select(self, cache, q, pos):
            return super().select(cache, q, pos) & False

    m = tiny.model(dtype=torch.float64)
    got, want = both(m, Nothing(prompts=prompts))[0], both(m, Newest(budget=1, prompts=prompts))[0]
    assert bool(got.isfinite().all()) and tiny.rms(got, want) < 1e-12


def test_two_selections_meet_and_batches_are_as_alone():
    m = tiny.model(dtype=torch.float64)
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (40, 9)]
    spec = [Newest(budget=8), "h2o(budget=20)", "streamingllm(budget=16, reindex=False)"]
    got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 12), strict=True))
    assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 12)) for t in texts]
    assert tiny.rms(both(m, [Newest(budget=8), Newest(budget=30)])[0], both(m, Newest(budget=8))[0]) < 1e-12


class ByLoops:
    """A recorder that attends to the best pages of each head by loops, and notes how far attention is from that."""

    def __init__(self, best, page):
        self.best, self.page, self.errors, self.read = best, page, [], []

    def attended(self, cache, q, pos, o):
        G, (k, v) = cache.config.group, cache.read()
        for b in range(cache.B):
            for h in range(cache.config.n_kv_heads):
                n, mine = cache.n_slots[b * cache.config.n_kv_heads + h], q[b, h * G : (h + 1) * G, -1]
                pages = [list(range(i, i + self.page)) for i in range(0, n - n % self.page, self.page)]
                promise = []
                for page in pages:
                    low, high = k[b, h, page].aminmax(dim=0)
                    promise.append(max(float(torch.maximum(one * low, one * high).sum()) for one in mine))
                best = sorted(range(len(pages)), key=lambda i: -promise[i])[: self.best]
                slots = [t for i in sorted(best) for t in pages[i]] + list(range(n - n % self.page, n))
                slots += [n - 1] if n - 1 not in slots else []  # a token always sees itself
                p = (mine @ k[b, h, slots].T / k.shape[-1] ** 0.5).softmax(-1)
                self.errors.append(tiny.rms(o[b, h * G : (h + 1) * G, -1], p @ v[b, h, slots]))
                self.read.append(len(slots))


def test_each_head_reads_its_own_pages():
    m = tiny.model(dtype=torch.float64)
    cache, whole = KVCache(m, Pages(best=2, page=8)), both(m, "full", 60, 12)[1]
    assert tiny.rms(tiny.feed(m, cache, tiny.ids(60)), both(m, "full", 60)[0][:, :60]) < 1e-12  # prompts read all
    seen = ByLoops(2, 8)
    for layer in cache.layers:
        layer.recorder = seen
    tiny.steps(m, cache, tiny.ids(12, seed=4))
    assert len(seen.errors) == 12 * 2 * 2 and max(seen.errors) < 1e-6
    assert cache.layers[0].n_live == 72  # nothing is forgotten
    rows, full = cache.ledger()["layers"], whole.ledger()["layers"]
    for i, row in enumerate(rows):  # what the last step loaded, of 72 entries of two heads
        assert row["read"] == round(full[i]["read"] * sum(seen.read[-4 + 2 * i :][:2]) / 144)
    assert rows[0]["read"] < 0.4 * full[0]["read"] and rows[0]["held"] >= full[0]["held"]


def test_pages_of_a_batch_are_as_alone_and_all_pages_are_the_whole():
    m, more = tiny.model(dtype=torch.float64), tiny.ids(9, seed=4)
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (70, 33, 5)]
    for spec in ([Pages()], [Pages(), "h2o(budget=40)"], [Pages(), "kivi(group=16, residual=16)"]):
        got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 15), strict=True))
        assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 15)) for t in texts]
    assert tiny.rms(both(m, Pages(best=9, page=8))[0], both(m, "full")[0]) < 1e-12
    a, b = (both(m, Pages())[1] for _ in range(2))
    draft, steps = m(more, a, "draft"), tiny.steps(m, b, more[:, :1])
    a.accept(1)
    assert tiny.rms(draft[:, :1], steps) < 1e-12 and tiny.rms(tiny.steps(m, a, more), tiny.steps(m, b, more)) < 1e-12


# before_attend


def test_what_comes_can_be_altered_before_anybody_looks_at_it():
    m = tiny.model(dtype=torch.float64)
    twin = copy.deepcopy(m)
    for block in twin.layers:
        block.self_attn.v_proj.weight.mul_(2)
    for chunk in (None, 13):
        got, want = KVCache(m, Louder()), KVCache(twin)
        a, b = (
            torch.cat([tiny.feed(model, c, tiny.ids(40), chunk), tiny.steps(model, c, tiny.ids(6, seed=4))], 1)
            for model, c in ((m, got), (twin, want))
        )
        assert tiny.rms(a, b) < 1e-12


def test_drafts_promise_nothing_where_what_comes_is_altered():
    m, more = tiny.model(dtype=torch.float64), tiny.ids(3, seed=4)
    a, b = (both(m, Louder())[1] for _ in range(2))
    assert a.ahead() == 0  # a draft is read without it: not even its first token is what a step would read
    draft = m(more, a, "draft")
    a.accept(0)
    assert tiny.rms(draft, tiny.steps(m, b, more)) > 1e-4
    b = both(m, Louder())[1]
    assert torch.equal(tiny.steps(m, a, more), tiny.steps(m, b, more))  # and a rejected one leaves no trace


# Plans


def test_a_plan_may_act_when_a_pass_has_ended_and_accepted_tokens_are_steps():
    m, more = tiny.model(dtype=torch.float64), tiny.ids(12, seed=4)
    plans = Tidies(), Tidies()
    a, b = (KVCache(m, plan) for plan in plans)
    for cache in (a, b):
        tiny.feed(m, cache, tiny.ids(20), 8)
    assert plans[0].told == [("prompt", [8], [8, 8]), ("prompt", [16], [16, 16]), ("last", [20], [20, 20])]
    tiny.steps(m, b, more[:, :4])
    assert b.live_positions(1, 1).tolist() == [0, 1, 2, *range(7, 24)]
    m(more[:, :6], a, "draft")
    assert len(plans[0].told) == 3  # a draft is no pass that has ended
    a.accept(4)
    assert plans[0].told == plans[1].told and plans[0].told[-1] == ("decode", [24], [21, 21])
    assert a.live_positions(1, 1).tolist() == b.live_positions(1, 1).tolist()
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (30, 9)]
    got = list(zip(*generate_batch(m, KVCache(m, Tidies()), texts, 9), strict=True))
    assert [list(g) for g in got] == [list(generate(m, KVCache(m, Tidies()), t, 9)) for t in texts]


@pytest.mark.parametrize("others", ["", "kivi(group=16, residual=16)", "h2o(budget=20)", "pca(rank=8, least=12)"])
def test_a_second_look_at_the_prompt_leaves_no_trace(others):
    m, plan = tiny.model(dtype=torch.float64), LooksAgain()
    got, cache = both(m, [plan, *([others] if others else [])])
    want, plain = both(m, others or "full")
    assert len(plan.logits) == 1 and torch.equal(got, want)
    assert cache.next_position == [72] and cache.phase == "decode" and len(cache.ids[0]) == 72
    totals = cache.ledger()["total"], plain.ledger()["total"]
    for part in ("payload", "scales", "columns", "residual", "full", "read"):  # room that it took may still be spare
        assert totals[0][part] == totals[1][part], part
    if not others:  # it was read as what follows the prompt
        twice = KVCache(m)
        assert tiny.rms(m(torch.cat([tiny.ids(60)] * 2, 1), twice)[:, 60:], plan.logits[0]) < 1e-12


def test_a_second_look_may_decide_what_stays():
    m = tiny.model(dtype=torch.float64)
    _, cache = both(m, LooksAgain(budget=16), more=1)
    full = KVCache(m)
    tiny.feed(m, full, tiny.ids(60))
    m(tiny.ids(60), full, "draft")
    for i, layer in enumerate(full.layers):
        *_, pos, q = layer.draft
        p = layer.probs(layer.rope(q, pos), pos).unflatten(1, (2, -1)).mean(2).sum(2)[0, :, :60]
        for h in range(2):
            want = sorted(p[h].argsort(descending=True, stable=True)[:16].tolist())
            assert cache.live_positions(i, h).tolist() == [*want, 60]


def test_a_draft_in_the_middle_of_a_prompt_leaves_it_there(tmp_path):
    m, ids = tiny.model(dtype=torch.float64), tiny.ids(60)
    a, b = (KVCache(m, "snapkv(budget=16, window=8)") for _ in range(2))
    for cache in (a, b):
        m(ids[:, :55], cache, "prompt")
    m(tiny.ids(5, seed=4), a, "draft")
    a.accept(0)
    assert a.phase == "prompt"
    with pytest.raises(ValueError, match="when a prompt or a pass has ended"):
        a.save(tmp_path / "c")  # its last queries are not written down
    for cache in (a, b):
        m(ids[:, 55:], cache, "last")
    assert a.live_positions(1, 1).tolist() == b.live_positions(1, 1).tolist()


def test_a_layer_that_borrows_reads_what_its_lender_holds():
    m = tiny.model(dtype=torch.float64, n_layers=4)
    cache = KVCache(m, Pairs())
    assert [type(layer) is Borrowed for layer in cache.layers] == [False, True, False, True]
    got = torch.cat([tiny.feed(m, cache, tiny.ids(50), 13), tiny.steps(m, cache, tiny.ids(9, seed=4))], 1)

    twin = copy.deepcopy(m)  # where the borrower makes its lender's keys and values anew, of the same input
    seen = {}
    for i in (0, 1, 2, 3):
        for name in ("k_proj", "v_proj"):
            proj = getattr(twin.layers[i].self_attn, name)
            if i % 2 == 0:
                proj.register_forward_hook(lambda _, __, out, key=(i, name): seen.update({key: out}))
            else:
                proj.register_forward_hook(lambda _, __, out, key=(i - 1, name): seen[key])
    whole = torch.cat([tiny.ids(50), tiny.ids(9, seed=4)], 1)
    assert tiny.rms(got, twin(whole, KVCache(twin))) < 1e-12
    held, full = cache.ledger()["total"], both(m, "full", 50, 9)[1].ledger()["total"]
    assert held["payload"] == full["payload"] // 2 and held["read"] == full["read"]  # each reader loads it


def test_a_lender_forgets_after_its_last_borrower():
    m, log = tiny.model(dtype=torch.float64, n_layers=4), Log()
    alone = tiny.feed(m, KVCache(m, Pairs()), tiny.ids(60))
    for spec in ([Pairs(), "snapkv(budget=16, window=4)", log], [Pairs(), "h2o(budget=16)", "kivi(group=16)"]):
        cache = KVCache(m, spec)
        assert tiny.rms(tiny.feed(m, cache, tiny.ids(60)), alone) < 1e-12  # all layers have read the whole prompt
        assert [len(cache.live_positions(i, 0)) for i in range(4)] == [16] * 4
        tiny.steps(m, cache, tiny.ids(40, seed=4))
        copy_, more = cache.clone(), tiny.ids(5, seed=5)
        assert torch.equal(tiny.steps(m, cache, more), tiny.steps(m, copy_, more))
    assert log.acted == [0, 2]


def test_drafts_and_batches_where_layers_share():
    m = tiny.model(dtype=torch.float64, n_layers=3)
    spec, more = [Pairs(), "h2o(budget=30)"], tiny.ids(8, seed=4)
    a, b = KVCache(m, spec), KVCache(m, spec)
    for cache in (a, b):
        tiny.feed(m, cache, tiny.ids(20))
    m(more, a, "draft")
    a.accept(6)
    tiny.steps(m, b, more[:, :6])
    assert tiny.rms(tiny.steps(m, a, more), tiny.steps(m, b, more)) < 1e-12
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (40, 9)]
    got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 12), strict=True))
    assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 12)) for t in texts]


def test_a_plan_may_score_anew():
    m = tiny.model()
    first = both(m, Oldest(budget=16), more=1)[1]
    last = both(m, [Oldest(budget=16), Backwards()], more=1)[1]
    assert first.live_positions(1, 1).tolist() == [*range(16), 60]
    assert last.live_positions(1, 1).tolist() == list(range(44, 61))


def test_layers_hold_entries_in_their_own_ways():
    m = tiny.model(dtype=torch.float64, n_layers=3)
    _, mixed = both(m, [OnlyFirst(), "kivi(group=16, residual=16)"])
    kinds = [type(layer.storage).__name__ for layer in mixed.layers]
    assert kinds == ["Dense", "KIVI", "KIVI"]
    full, kivi = (both(m, spec)[1].ledger()["layers"] for spec in ("full", "kivi(group=16, residual=16)"))
    rows = mixed.ledger()["layers"]
    assert rows[0] == full[0] and rows[1] == kivi[1] and rows[2] == kivi[2]


def test_rows_dropped_before_a_layer_keep_their_tokens_numbers():
    m = tiny.model(dtype=torch.float64, n_layers=3)
    cache = KVCache(m, Every(first=1, nth=3))
    m(tiny.ids(40), cache)
    tiny.steps(m, cache, tiny.ids(4, seed=4))
    assert cache.live_positions(0, 0).tolist() == list(range(44))
    assert (
        cache.live_positions(1, 1).tolist() == cache.live_positions(2, 0).tolist() == [*range(0, 40, 3), *range(40, 44)]
    )
    assert cache.next_position == [44] and cache.layers[1].next_position == [44]


@pytest.mark.parametrize("plan", [Every(first=1, nth=3), Every(first=2, nth=7), LastOnly(layer=0), LastOnly(layer=1)])
def test_dropped_rows_in_batches_are_as_alone(plan):
    m = tiny.model(dtype=torch.float64, n_layers=3)
    for spec in (plan, [plan, "snapkv(budget=16, window=4)"], [plan, "h2o(budget=16)"], [plan, "kivi(group=16)"]):
        texts = [tiny.ids(n, seed=n)[0].tolist() for n in (40, 9, 1)]
        cache = KVCache(m, spec)
        got = list(zip(*generate_batch(m, cache, texts, 12), strict=True))
        more = list(zip(*generate_batch(m, cache, [[1, 2, 3], [], [4, 5]], 5), strict=True))
        for b, text in enumerate(texts):
            alone = KVCache(m, spec)
            assert list(generate(m, alone, text, 12)) == list(got[b])
            if b != 1:
                assert list(generate(m, alone, [[1, 2, 3], [], [4, 5]][b], 5)) == list(more[b])
            for i in range(3):
                assert alone.live_positions(i, 1).tolist() == cache.live_positions(i, 1, b).tolist()


def test_only_the_last_row_goes_on():
    m = tiny.model(dtype=torch.float64, n_layers=2)
    cache = KVCache(m, LastOnly(layer=0))
    logits = m(tiny.ids(40), cache)
    assert logits.shape == (1, 1, 101) and cache.live_positions(1, 0).tolist() == [39]
    assert cache.live_positions(0, 0).tolist() == list(range(40))


def test_a_skipped_layer_is_not_there():
    m = tiny.model(dtype=torch.float64, n_layers=3)
    less = tiny.model(dtype=torch.float64, n_layers=3)
    del less.layers[1]
    object.__setattr__(less.config, "n_layers", 2)
    got, cache = both(m, Skips(layer=1))
    assert tiny.rms(got, both(less, "full")[0]) < 1e-12
    assert cache.layers[1].slots is None and not cache.live_positions(1, 0).numel()
    assert not cache.ledger()["layers"][1]["held"]
    cache.clone()
    m(tiny.ids(4, seed=6), cache, "draft")
    cache.accept(2)
    assert cache.next_position == [74] and tiny.steps(m, cache, tiny.ids(2)).isfinite().all()


def test_plans_work_together_unless_two_answer_one_hook():
    m = tiny.model(n_layers=3)
    cache = KVCache(m, ["snapkv(budget=24, window=4)", "adakv", OnlyFirst(), Skips(layer=2), Backwards()])
    tiny.feed(m, cache, tiny.ids(60))
    assert len(cache.live_positions(0, 0)) + len(cache.live_positions(0, 1)) == 48
    for pair, words in (
        ("adakv(budget=9)+pyramidkv", "adakv and pyramidkv both decide how many entries rows keep"),
        ([Skips(), Every()], "skips and every both decide what a layer reads"),
        ([Pairs(), Pairs()], "pairs and pairs both decide which layers hold entries"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            KVCache(m, pair)
    assert type(together([])) is Plan and together([]).share(m.config) == [0, 1, 2]
    with pytest.raises(NotImplementedError, match="backwards needs a policy that scores"):
        KVCache(m, Backwards())


def test_one_policy_twice_is_refused():
    with pytest.raises(NotImplementedError, match="h2o is written twice"):
        KVCache(tiny.model(), "h2o(budget=9)+h2o(budget=20)")


# What methods say of themselves


@dataclass
class Speaks(Method):
    """Three parameters."""

    n: int = 3
    share: float = 0.5
    word: str = "a"
    limits = {"n": at_least(1), "share": (lambda x: 0 < x <= 1, "above 0 and at most 1")}


@pytest.mark.parametrize("given, words", [
    ({"n": 0}, "speaks: n must be at least 1, got 0"),
    ({"n": 2.5}, "speaks: n must be a whole number, got 2.5"),
    ({"n": True}, "speaks: n must be a whole number, got True"),
    ({"share": 2}, "speaks: share must be above 0 and at most 1, got 2"),
    ({"share": float("nan")}, "speaks: share must be above 0"),
    ({"word": 3}, "speaks: word must be a text, got 3"),
])  # fmt: skip
def test_hyper_parameters_are_checked_in_words(given, words):
    with pytest.raises(ValueError, match=words):
        Speaks(**given)
    assert repr(Speaks(n=4, share=1)) == "speaks(n=4, share=1, word='a')"


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "keydiff", "cake", "kivi", "streamingllm", "keepkv"])
def test_what_a_method_protects_stays(name):
    m, info = tiny.model(), find(name)
    small = {"budget": 20, "window": 6, "n_sink": 3, "group": 16, "residual": 16}
    method = info(**{k: v for k, v in small.items() if k in info.cls.__dataclass_fields__})
    if not hasattr(method, "protects"):
        return
    first, last = method.protects
    assert first + last <= 20
    cache = KVCache(m, method)
    tiny.feed(m, cache, tiny.ids(60))
    live = cache.live_positions(1, 1).tolist()
    assert len(live) <= 20 and live[:first] == list(range(first))
    assert live[len(live) - last :] == list(range(60 - last, 60))


class Turn(Basis):
    """Some columns of an orthonormal matrix."""

    def __init__(self, n, seed):
        self.n, self.seed = n, seed

    def fit(self, x, which, at):
        rng = torch.Generator().manual_seed(self.seed)
        return torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=rng))[0][:, : self.n]


class Nothing(Basis):
    """No basis at all."""

    def fit(self, x, which, at):
        return None


def test_bases_of_bases():
    x = torch.randn(9, 8)
    chain = Chain([Turn(8, 0), Nothing(), Turn(5, 1)])
    U = chain.fit(x, "k", None)
    want = Turn(8, 0).fit(x, "k", None) @ Turn(5, 1).fit(x, "k", None)
    assert U.shape == (8, 5) and torch.allclose(U, want) and torch.allclose(U.T @ U, torch.eye(5), atol=1e-5)
    assert Chain([Nothing(), Nothing()]).fit(x, "k", None) is None


def test_dense_storage_can_be_written_and_others_say_so():
    m = tiny.model()
    assert Dense.writable and not Rounded.writable
    with pytest.raises(NotImplementedError, match="keepkv merges entries, and kivi cannot overwrite one"):
        KVCache(m, "keepkv(budget=16)+kivi(group=16)")
