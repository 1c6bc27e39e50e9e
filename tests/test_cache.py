"""The cache itself: rows, slots, forgetting, positions, the ledger."""

import ast
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanokv
from nanokv import KVCache, attention, methods, specs
from nanokv.attention import Mask, attend, probs, ragged, reference
from nanokv.cache import HIDDEN, Plan, Policy, Rows, Storage, spare, top
from nanokv.methods.full import Full


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "extend", "pop", "pop_all", "keep", "trim", "set"]), st.integers(0, 2**16)
        ),
        max_size=14,
    )
)
def test_rows_behave_like_lists(plan):
    """Any sequence of operations gives what the same operations give on three plain lists."""
    rows, lists, counter = Rows(3, least=2), [[], [], []], 0
    for op, seed in plan:
        rng = torch.Generator().manual_seed(seed)
        pick = lambda n, rng=rng: int(torch.randint(0, n + 1, (1,), generator=rng))  # noqa: E731
        if op == "append" or (op == "extend" and not rows.data):
            T = pick(5)
            new = torch.arange(counter, counter + 3 * T).view(3, T, 1).repeat(1, 1, 2)
            rows.append(a=new, b=new[..., 0].float())
            for r in range(3):
                lists[r] += new[r, :, 0].tolist()
        elif op == "extend":
            T, which = pick(3), [0, 2]
            new = torch.arange(counter, counter + 2 * T).view(2, T, 1).repeat(1, 1, 2)
            rows.append(which, a=new, b=new[..., 0].float())
            for i, r in enumerate(which):
                lists[r] += new[i, :, 0].tolist()
        elif not rows.data:
            continue
        elif op in ("pop", "pop_all"):
            counts = [pick(len(x)) for x in lists]
            if op == "pop_all":
                counts = [min(counts)] * 3
            for which, taken in rows.pop("a", counts):
                for i, r in enumerate(which):
                    assert taken[i, :, 0].tolist() == lists[r][: counts[r]]
            lists = [x[c:] for x, c in zip(lists, counts, strict=True)]
        elif op == "keep":
            mask = torch.rand(3, rows.size, generator=rng) < 0.5
            for r in range(3):
                mask[r, rows.n[r] :] = False
                lists[r] = [x for x, m in zip(lists[r], mask[r].tolist(), strict=False) if m]
            rows.keep(mask)
        elif op == "set":
            rows["b"] = rows["b"] + 0.25
            rows["b"] = rows["b"] - 0.25
        else:
            rows.trim()
            assert all(c == n + spare(n, 2) for n, c in zip(rows.n, rows.cap, strict=True))
        counter += 100
        assert rows.n == [len(x) for x in lists]
        for r in range(3):
            if rows.data:
                assert rows.row("a", r)[:, 0].tolist() == lists[r]
                assert rows.row("b", r).tolist() == rows["b"][r, : rows.n[r]].tolist() == lists[r]
        assert all(len(f) == sum(rows.cap) for f in rows.data.values())


def test_rows_take_numbers_and_nothing():
    rows = Rows(2)
    rows.append(a=torch.ones(2, 3, dtype=torch.int16), b=torch.zeros(2, 3))
    rows.append(T=1, a=7, b=-torch.inf)
    assert rows["a"].tolist() == [[1, 1, 1, 7]] * 2 and rows["b"][:, 3].tolist() == [-torch.inf] * 2
    rows.append([1], a=torch.tensor([[8]]), b=0.5)  # unequal from here
    rows.append([], a=torch.ones(0, 1), b=torch.ones(0, 1))
    rows.append(T=2, a=9, b=1.5)
    assert [rows.row("a", r).tolist() for r in range(2)] == [[1, 1, 1, 7, 9, 9], [1, 1, 1, 7, 8, 9, 9]]
    assert rows.row("b", 1)[3:].tolist() == [-torch.inf, 0.5, 1.5, 1.5]


def test_growing_copies_rarely():
    rows, copies = Rows(2), 0
    for _ in range(4000):
        before = rows.data["a"].data_ptr() if rows.data else 0
        rows.append(a=torch.zeros(2, 1, 4))
        copies += rows.data["a"].data_ptr() != before
    assert copies < 110  # each copy makes room for a sixteenth more: log(4000 / 256) / log(17 / 16) + 256 / 16 = 61


def test_top_is_stable_and_ignores_what_is_not_offered():
    score = torch.tensor([[[1.0, 3, 3, 9, 3, 0]]])
    among = torch.tensor([[[True, True, True, False, True, True]]])
    assert top(score, 2, among).tolist() == [[[False, True, True, False, False, False]]]
    assert top(score, 4, among).tolist() == [[[True, True, True, False, True, False]]]
    assert top(score, 9, among).tolist() == among.tolist()
    assert top(torch.full_like(score, -torch.inf), 1, among).tolist() == [[[True] + [False] * 5]]
    per_row = top(score.expand(1, 2, -1), torch.tensor([[[1], [0]]]), among.expand(1, 2, -1))
    assert per_row.sum(-1).tolist() == [[1, 0]]


class Drop(Policy):
    """Forget chosen tokens of chosen rows at the end of the prompt or in a step."""

    def __init__(self, plan):
        self.plan, self.name = plan, "drop"

    def __call__(self, cache, q, pos):
        now = cache.parent.next_position + q.shape[2]
        for at, head, tokens in self.plan:
            if at == now:
                heads = torch.arange(cache.config.n_kv_heads).view(1, -1, 1)
                gone = torch.isin(cache.token, torch.tensor(tokens, dtype=torch.int32))
                cache.keep(~(gone & ((heads == head) | (head is None))))


@pytest.mark.parametrize("storage", [None, "kivi"])
def test_ragged_heads_are_stored_ragged_and_attended_exactly(storage):
    m = tiny.model(n_layers=1)
    text = tiny.ids(120)
    plan = [(100, 0, list(range(10, 80))), (110, 1, [5, 101, 102]), (112, 0, [111])]
    cache = KVCache(m, [Drop(plan)] + ([methods_by_name(storage)(bits=8)] if storage else []))
    full = KVCache(m)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :100])
        tiny.steps(m, c, text[:, 100:])
    c, f = cache.layers[0], full.layers[0]
    gone = [{*range(10, 80), 111}, {5, 101, 102}]
    for h in (0, 1):
        assert cache.live_positions(0, h).tolist() == [t for t in range(120) if t not in gone[h]]
    assert c.counts == [120 - 71, 120 - 3] and not c.equal
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[120]])
    got = c.attend(q, pos)
    assert tiny.rms(got, reference(q, *c.read(), c.mask(pos))) < 1e-6
    k, v = f.read()
    for h in (0, 1):
        live = cache.live_positions(0, h)
        one = reference(q[:, 3 * h : 3 * h + 3], k[:, h : h + 1, live], v[:, h : h + 1, live], Mask(1, len(live)))
        assert tiny.rms(got[:, 3 * h : 3 * h + 3], one) < (1e-6 if not storage else 1e-2)
    if not storage:  # bytes of rows of 49 and 117 slots, not of two rows of 117
        assert cache.ledger()["total"]["payload"] == (49 + 117) * 2 * 32 * 4
        assert cache.nbytes < (49 + 117 + 4 * 16) * (2 * 32 * 4 + 4)


def methods_by_name(name):
    return next(i for i in methods() if i.name == name)


def test_hidden_entries_are_unseen_at_once_and_reclaimed_later():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, [Drop([(t, None, [t - 5]) for t in range(60, 91)])])
    tiny.feed(m, cache, tiny.ids(59))
    sizes = []
    for t in range(59, 90):
        tiny.steps(m, cache, tiny.ids(1, seed=t))
        c = cache.layers[0]
        sizes.append(c.size - c.n_live)
        assert cache.live_positions(0, 0).tolist() == [*range(55), *range(t - 3, t + 1)]
        assert (c.token == HIDDEN).sum() == c.size - c.n_live
        assert c.rank[c.live].tolist() == list(range(c.n_live))
    assert max(sizes) == 15 and 0 in sizes[2:]  # sixteen spare slots, then one copy


def test_columns_follow_their_entries():
    m = tiny.model(n_layers=1)

    class Mark(Policy):
        name = "mark"

        def __call__(self, cache, q, pos):
            mark = cache.column("mark", fill=-1.0)
            cache.set_column("mark", torch.where(mark < 0, cache.token.float() * 10, mark))

    drops = [(30, 0, [1, 2, 3, 20]), (30, 1, [7]), (36, 1, [0, 31]), (60, None, [40])]
    cache = KVCache(m, [Mark(), Drop(drops)])
    tiny.feed(m, cache, tiny.ids(30))
    tiny.steps(m, cache, tiny.ids(40))
    c = cache.layers[0]
    mark, token = c.column("mark"), c.token
    assert torch.equal(mark.expand(token.shape)[c.live], token[c.live].float() * 10)


@pytest.mark.parametrize("spec", ["full", "kivi", "streamingllm(budget=40)", "streamingllm(budget=50)+kivi(bits=8)"])
def test_the_ledger_counts_every_tensor_once(spec):
    m = tiny.model()
    cache = KVCache(m, spec)
    assert cache.nbytes == 0 and cache.live_positions(0, 0).tolist() == []
    tiny.feed(m, cache, tiny.ids(200), 9)
    tiny.steps(m, cache, tiny.ids(20))
    ledger = cache.ledger()
    for row in ledger["layers"]:
        assert row["held"] == sum(row[k] for k in ("payload", "scales", "columns", "residual", "unused"))
        assert row["unused"] >= 0 and row["full"] == 220 * 2 * 2 * 32 * 4
    assert ledger["total"]["held"] == cache.nbytes == _reachable(cache)


def _reachable(cache) -> int:
    """Count the bytes of all tensors that the layers' own state leads to, another way than the ledger does."""
    import gc

    seen, todo, bytes_ = set(), list(cache.layers), {}
    stop = {
        id(cache),
        id(cache.config),
        id(cache.rope),
        id(cache.model),
        *(id(c.attn) for c in cache.layers),
        *map(id, cache.policies),
        id(cache.policies),
    }
    while todo:
        o = todo.pop()
        if id(o) in seen or id(o) in stop or isinstance(o, type) or type(o).__name__ in ("function", "module"):
            continue
        seen.add(id(o))
        if isinstance(o, torch.Tensor):
            bytes_[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(o)
    return sum(bytes_.values())


@pytest.mark.parametrize("spec", ["full", "kivi", "streamingllm(budget=40)"])
def test_two_texts_one_after_the_other_equal_two_fresh_caches(spec):
    m = tiny.model()
    cache, fresh = KVCache(m, spec), KVCache(m, spec)
    tiny.feed(m, cache, tiny.ids(90, seed=3), 9)
    cache.reset()
    a, b = (torch.cat([tiny.feed(m, c, tiny.ids(90), 9), tiny.steps(m, c, tiny.ids(9))], 1) for c in (cache, fresh))
    assert torch.equal(a, b) and cache.ledger() == fresh.ledger()


def test_a_second_prompt_continues_the_first():
    m = tiny.model()
    text = tiny.ids(90)
    cache = KVCache(m)
    got = torch.cat([tiny.feed(m, cache, part) for part in text.split([40, 1, 49], 1)], 1)
    assert tiny.rms(got, m(text, KVCache(m))) < 2e-6


def test_a_batch_of_another_size_is_refused():
    m = tiny.model()
    cache = KVCache(m)
    m(tiny.ids(5, batch=2), cache)
    with pytest.raises(ValueError, match="batch of 2, not 1"):
        m(tiny.ids(5), cache)


@pytest.mark.parametrize("G, Hkv", [(1, 2), (3, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("T, N", [(1, 1), (1, 63), (2, 500), (17, 17), (40, 1023), (15, 15)])
@pytest.mark.parametrize("grouped", [True, False])  # False: a PyTorch that copies for groups
def test_attend_equals_the_reference(G, Hkv, T, N, grouped, monkeypatch):
    monkeypatch.setattr(attention, "GROUPED", grouped and attention.GROUPED)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, G * Hkv, T, 40), torch.randn(2, Hkv, N, 40), torch.randn(2, Hkv, N, 40)
    see = torch.rand(2, Hkv, T, N) < 0.6
    see[..., 0] = True
    bias = torch.randn(2, Hkv, N)
    masks = {"causal": T > 1}, {"see": see}, {"see": see[:, :1]}, {"see": see, "bias": bias}, {"bias": bias}
    for mask in (Mask(T, N), *(Mask(T, N, **options) for options in masks)):
        want = reference(q, k, v, mask)
        assert tiny.rms(attend(q, k, v, mask), want) < 1e-6
        rows = [(k[b, h], v[b, h]) for b in (0, 1) for h in range(Hkv)]
        assert tiny.rms(ragged(q, rows, mask), want) < 1e-6
        small = [t.bfloat16() for t in (q, k, v)]  # probabilities, results and biases are rounded by up to 2^-9 each
        assert tiny.rms(attend(*small, mask), reference(*small, mask)) < 2**-7
        p = probs(q, k, mask)
        assert torch.allclose(p.sum(-1), torch.ones(2, G * Hkv, T))
        naive = p @ v.repeat_interleave(G, 1)
        assert tiny.rms(naive, want) < 1e-6


def test_specs_are_read_and_refused_in_words():
    m = tiny.model()
    cache = KVCache(m, "streamingllm(budget=40, reindex=False) + kivi(bits=4)")
    assert (cache.policies[0].budget, cache.policies[0].renumbers, cache.storage.bits) == (40, False, 4)
    for spec, words in (
        ("nonsense", "unknown method 'nonsense'.*full.*kivi.*streamingllm"),
        ("kivi(bit=2)", "no parameter 'bit'; it has: bits, group, residual"),
        ("kivi+full", "both storages"),
        ("kivi(bits='2')", "bits must be int"),
        ("kivi(bits=True)", "bits must be int"),
        ("kivi(2)", "cannot read"),
        ("kivi(bits=", "cannot read"),
        ("", "cannot read"),
        ("kivi*full", "unknown method 'kivi[*]full'"),
        ("__import__('os')", "cannot read"),
    ):
        with pytest.raises(ValueError, match=words):
            KVCache(m, spec)


def test_methods_describe_themselves():
    listed = {i.name: i for i in methods()}
    assert {"full", "kivi", "streamingllm"} <= set(listed)
    assert listed["kivi"].kind == "storage" and listed["streamingllm"].kind == "policy"
    assert listed["kivi"].parameters == {"bits": 2, "group": 32, "residual": 128}
    assert issubclass(listed["full"].cls, Storage) and listed["full"].cls is Full
    for info in listed.values():
        assert set(info.axis.split(", ")) <= {"token", "head", "layer", "channel", "bits", "none"}
        assert info.paper and "Differs:" in info.header


def test_method_files_import_nothing_but_torch_and_the_cache():
    for file in (Path(nanokv.__file__).parent / "methods").glob("*.py"):
        if file.name.startswith("__"):
            continue
        tree = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names |= {f"nanokv.{a.name}" if n.module == "nanokv" else n.module for n in froms for a in n.names}
        allowed = {"torch", "math", "nanokv.cache", "nanokv.attention", "nanokv.quant", "nanokv.kernels"}
        assert names <= allowed | {"torch.nn.functional"}, file.name


def test_the_engine_never_imports_its_peers():
    for file in Path(nanokv.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not any(n.split(".")[0] in ("transformers", "kvpress") for n in names), file


class Merge(Policy):
    """Overwrite the third-newest entry of each row with the mean of it and its neighbour, counted twice."""

    name, merges, observes = "merge", True, 0

    def __call__(self, cache, q, pos):
        if cache.phase != "decode":
            return
        k, v = cache.read()
        bias = cache.column("bias").clone()
        live = [cache.live.expand(cache.B, 2, -1)[0, h].nonzero().flatten() for h in (0, 1)]
        index = torch.stack([x[-3] for x in live]).view(1, 2, 1)
        at = index[..., None].expand(-1, -1, -1, k.shape[-1])
        cache.write(index, (k.gather(2, at) + k.gather(2, at - 1)) / 2, (v.gather(2, at) + v.gather(2, at - 1)) / 2)
        bias.scatter_(2, index, float(torch.log(torch.tensor(2.0))))
        cache.set_column("bias", bias)
        cache.keep(torch.ones_like(cache.live.expand_as(bias)).scatter(2, index - 1, False))


@pytest.mark.parametrize("ragged_rows", [False, True])
def test_merged_entries_are_attended_with_their_weight(ragged_rows):
    m = tiny.model(n_layers=1)
    drops = [Drop([(40, 0, list(range(3, 30)))])] if ragged_rows else []
    cache, full = KVCache(m, [*drops, Merge()]), KVCache(m)
    text = tiny.ids(41)
    for c in (cache, full):
        tiny.feed(m, c, text[:, :40])
        tiny.steps(m, c, text[:, 40:])
    q, pos = torch.randn(1, 6, 1, 32), torch.tensor([[41]])
    k, v = full.layers[0].read()  # tokens 37 and 38 become two copies of their mean
    for t in (k, v):
        t[:, :, 37:39] = t[:, :, 37:39].mean(2, keepdim=True)
    got = cache.layers[0].attend(q, pos)
    for h in (0, 1):
        keep = [t for t in range(41) if not (ragged_rows and h == 0 and 3 <= t < 30)]
        want = reference(q[:, 3 * h : 3 * h + 3], k[:, h : h + 1, keep], v[:, h : h + 1, keep], Mask(1, len(keep)))
        assert tiny.rms(got[:, 3 * h : 3 * h + 3], want) < 1e-6


def test_merging_is_refused_where_it_cannot_be_stored():
    m = tiny.model()
    with pytest.raises(NotImplementedError, match="merge merges entries, and kivi cannot overwrite"):
        KVCache(m, [Merge(), methods_by_name("kivi")()])
    with pytest.raises(NotImplementedError, match="no single position"):
        KVCache(m, [Merge(), methods_by_name("streamingllm")(budget=100)])


@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 100])
def test_the_observation_window_does_not_depend_on_chunks(chunk):
    class Look(Policy):
        name, observes = "look", 16

        def __call__(self, cache, q, pos):
            if cache.phase == "last":
                seen.append((*cache.observed(16), cache.probs(*cache.observed(16))))

    m, seen = tiny.model(n_layers=1), []
    for c in (100, chunk):
        tiny.feed(m, KVCache(m, [Look()]), tiny.ids(100), c)
    (q, pos, p), (q2, pos2, p2) = seen
    assert pos.tolist() == pos2.tolist() == [list(range(84, 100))] and p.shape == (1, 6, 16, 100)
    assert tiny.rms(q2, q) < 1e-6 and tiny.rms(p2, p) < 1e-5
    assert torch.allclose(p.sum(-1), torch.ones(1, 6, 16)) and not p[0, 0].triu(85).any()


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
@pytest.mark.parametrize("chunk, block", [(100, 9), (100, 200), (33, 8), (7, 128)])
def test_what_a_prompt_pays_each_entry_is_the_dense_sum(chunk, block, how, monkeypatch):
    class Sum(Policy):
        name, needs_sums = "sum", how

        def __call__(self, cache, q, pos):
            cache.set_column("acc", cache.column("acc") + cache.column("paid"))
            dense.append(attention.reduce_group(cache.probs(cache.rope(q, pos), pos), 2, how).sum(2))

    monkeypatch.setattr(attention, "BLOCK", block)
    m, dense = tiny.model(n_layers=2), []
    cache, plain = KVCache(m, [Sum()]), KVCache(m)
    logits = tiny.feed(m, cache, tiny.ids(100), chunk)
    assert tiny.rms(logits, tiny.feed(m, plain, tiny.ids(100), chunk)) < 1e-5
    want = sum(torch.nn.functional.pad(d, (0, 100 - d.shape[-1])) for d in dense[::2])
    got = cache.layers[0].column("acc")
    assert tiny.rms(got, want) < 1e-5 and "paid" not in cache.layers[0].slots.data
    if how != "max":  # every softmax row sums to one
        assert torch.allclose(got.sum(-1), torch.full((1, 2), 100.0 if how == "mean" else 300.0))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_sums_are_those_of_the_specification_under_any_mask(how):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 11, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    see = torch.rand(2, 3, 11, 40) < 0.5
    see[1, :, 3] = False  # a query that sees nothing, as padding does
    for mask in (Mask(11, 40, see=see, bias=torch.randn(2, 3, 40)), Mask(11, 40, see=see[:1, :1]), Mask(11, 40)):
        o, paid = attention.attend_and_sum(q, k, v, mask, how)
        p = probs(q, k, mask)
        assert tiny.rms(paid, attention.reduce_group(p, 3, how).sum(2)) < 1e-6
        assert tiny.rms(o, reference(q, k, v, mask)) < 1e-6


def test_sums_of_16_bit_queries_are_computed_in_fp32():
    torch.manual_seed(0)
    q, k, v = (2.5 * torch.randn(1, n, 40, 128).bfloat16() for n in (4, 2, 2))
    o, paid = attention.attend_and_sum(q, k, v, Mask(40, 40, causal=True), "sum")
    want = reference(q, k, v, Mask(40, 40, causal=True))
    assert tiny.rms(o.float(), want) < 2.5e-3  # nothing is rounded but the result, to 8 bits: 2^-9 at most
    p = probs(q, k, Mask(40, 40, causal=True))
    assert tiny.rms(paid, attention.reduce_group(p, 2, "sum").sum(2)) < 1e-6


def test_sums_follow_the_entries_that_an_earlier_policy_leaves():
    class Sum(Policy):
        name, needs_sums = "sum", "mean"

        def __call__(self, cache, q, pos):
            if cache.phase == "last":
                got.append(cache.column("paid"))

    m, got, kept = tiny.model(n_layers=1), [], [0, 3, 4, 50, 70, 99]
    gone = [i for i in range(100) if i not in kept]
    for policies in ([Sum()], [Drop([(100, None, gone)]), Sum()]):
        tiny.feed(m, KVCache(m, policies), tiny.ids(100), 100)
    assert got[1].shape[-1] == len(kept) and torch.equal(got[0][..., kept], got[1])


def test_policies_before_a_reader_of_probabilities_do_not_move_its_slots():
    class Read(Policy):
        name, needs_probs = "read", True

        def __call__(self, cache, q, pos):
            if cache.phase == "decode":
                seen.append((cache.step_probs.shape[-1], cache.size, float(cache.step_probs.sum(-1).mean())))

    m, seen = tiny.model(n_layers=1), []
    cache = KVCache(m, [Drop([(50, None, list(range(30))), (52, 0, [33, 40])]), Read()])
    tiny.feed(m, cache, tiny.ids(45))
    tiny.steps(m, cache, tiny.ids(20))
    assert all(n == size and abs(total - 1) < 1e-5 for n, size, total in seen)
    assert cache.layers[0].step_probs is None and cache.layers[0].size < 45


def test_observed_positions_follow_the_numbering():
    class Look(Policy):
        name, observes = "look", 16

        def __call__(self, cache, q, pos):
            if cache.phase == "last":
                seen.append((cache.observed(16)[1].tolist(), cache.probs(*cache.observed(16))))

    m, seen = tiny.model(n_layers=1), []
    cache = KVCache(m, [methods_by_name("streamingllm")(budget=40), Look()])
    tiny.feed(m, cache, tiny.ids(100), 9)
    ((pos, p),) = seen
    assert pos == [list(range(24, 40))]
    assert torch.allclose(p.sum(-1), torch.ones(1, 6, 16)) and not p[0, 0].triu(25).any()


def test_a_window_is_freed_even_if_a_policy_keeps_less():
    m = tiny.model(n_layers=1, windows=(24,))
    cache = KVCache(m, [methods_by_name("h2o")(budget=10)])
    tiny.feed(m, cache, tiny.ids(60))
    assert min(cache.live_positions(0, 0)) >= 60 - 23
    tiny.steps(m, cache, tiny.ids(60))
    assert min(cache.live_positions(0, 0)) >= 120 - 23


def test_an_interrupted_pass_is_noticed():
    m = tiny.model()
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(20))
    append = cache.layers[1].append
    cache.layers[1].append = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        m(tiny.ids(3), cache)
    cache.layers[1].append = append
    with pytest.raises(RuntimeError, match="interrupted"):
        m(tiny.ids(1), cache)
    with pytest.raises(ValueError, match="in the middle"):
        cache.save("nowhere")
    cache.reset()
    assert m(tiny.ids(1), cache).isfinite().all()


def test_a_prompt_that_does_not_come_whole_is_noticed():
    m = tiny.model()
    cache = KVCache(m)
    with pytest.raises(ValueError, match="60 of the 100 tokens"), cache.prompt(100):
        m(tiny.ids(40), cache)
    cache.reset()
    with pytest.raises(ValueError, match="did not come"), cache.prompt(5, [2]):
        pass
    assert cache.pads == []


def test_observed_queries_hold_on_to_nothing_else():
    class Look(Policy):
        name, observes = "look", 8

    m = tiny.model(n_layers=1)
    cache = KVCache(m, [Look()])
    with cache.prompt(300):
        m(tiny.ids(200), cache)
        q, pos = cache.layers[0]._tail
        assert q.untyped_storage().nbytes() == 6 * 8 * 32 * 4
        row = cache.ledger()["layers"][0]
        assert row["held"] == row["payload"] + row["unused"] and row["unused"] >= q.nbytes + pos.nbytes
        m(tiny.ids(100), cache)
    assert cache.layers[0]._tail is None


@pytest.mark.parametrize("spec", [["nope"], [None], None, 5, [5]])
def test_lists_are_made_of_methods_and_names(spec):
    m = tiny.model()
    assert KVCache(m, ["kivi(bits=4)", methods_by_name("h2o")(budget=30)]).spec.startswith("kivi(bits=4")
    with pytest.raises((ValueError, TypeError), match="nope|not of|not iterable"):
        KVCache(m, spec)


def test_the_package_of_methods_can_be_called_and_imported():
    import nanokv.methods.kivi as kivi

    assert (
        nanokv.methods is methods
        and kivi.KIVI is methods.kivi.KIVI
        and [i.name for i in methods()] == sorted(i.name for i in methods())
    )


@pytest.mark.parametrize(
    "spec", ["full", "kivi(residual=32)", "snapkv(budget=40,window=8)", "adakv(budget=40,window=8)"]
)
def test_batches_of_long_prompts_in_chunks_and_turns(spec):
    m = tiny.model()
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (150, 90)]
    together = list(zip(*nanokv.generate_batch(m, KVCache(m, spec), prompts, 20, chunk=40), strict=True))
    for prompt, got in zip(prompts, together, strict=True):
        assert list(got) == list(nanokv.generate(m, KVCache(m, spec), prompt, 20, chunk=40))
    cache, ones = KVCache(m, spec), [KVCache(m, spec) for _ in (0, 1)]
    text = tiny.ids(140, batch=2)
    for part in text.split(70, 1):
        out = tiny.feed(m, cache, part)
        for b, one in enumerate(ones):
            assert tiny.rms(out[b], tiny.feed(m, one, part[b : b + 1])[0]) < 2e-2  # 2-bit codes at an edge may flip


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("N", [512, 513, 1023])
@pytest.mark.parametrize("T", [1, 2])
def test_a_long_cache_cut_among_threads_gives_the_same(threads, N, T, monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 512)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    q = torch.randn(1, 9, T, 64)
    k, v = (torch.randn(3, N + 20, 64)[:, :N].unflatten(0, (1, 3)) for _ in "kv")  # a view with spare slots behind
    try:
        torch.set_num_threads(threads)
        assert tiny.rms(attend(q, k, v, Mask(T, N)), reference(q, k, v, Mask(T, N))) < 1e-6
    finally:
        torch.set_num_threads(before)


def test_a_mask_is_made_once_in_each_dtype():
    mask = Mask(1, 4, see=torch.tensor([[[[True, False, True, True]]]]))
    made = {dtype: mask.additive(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, add in made.items():
        assert add.dtype is dtype and add.flatten().tolist() == [0, -torch.inf, 0, 0] and mask.additive(dtype) is add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 5, 40, 300])
def test_values_may_be_wider_than_keys(T, dtype, monkeypatch):
    """As those are that a storage mixes before it makes values of them."""
    monkeypatch.setattr(attention, "SPLIT", 64)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, d, dtype=dtype) for h, n, d in ((9, T, 32), (3, 300, 32), (3, 300, 80)))
    mask = Mask(T, 300, causal=T > 1)
    try:
        torch.set_num_threads(2)
        got = attend(q, k, v, mask)
    finally:
        torch.set_num_threads(before)
    # bf16: probabilities and result are rounded to 8 bits of mantissa, 2^-9 relative each
    assert tiny.rms(got.float(), reference(q, k, v, mask)) < (6e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("B,H,Hkv", [(1, 9, 3), (2, 4, 4), (2, 8, 1)])
@pytest.mark.parametrize("T,N", [(17, 18), (17, 100), (64, 200), (100, 101)])
def test_a_later_part_of_a_prompt_is_attended_causally_without_a_mask(T, N, B, H, Hkv, dtype):
    torch.manual_seed(0)
    q = torch.randn(B, T, H, 32, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(B * Hkv, N + 9, 32, dtype=dtype)[:, :N].unflatten(0, (B, Hkv)) for _ in "kv")
    mask = Mask(T, N, causal=True)
    # bf16: the two parts and their average are each rounded to 8 bits of mantissa, 2^-9 relative
    assert tiny.rms(attend(q, k, v, mask).float(), reference(q, k, v, mask)) < (
        4e-3 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("phase, goal", [("last", [9, 12]), ("decode", [29, 29]), ("decode", [29, 28]), ("last", 30)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("ends", [(0, 0), (3, 0), (4, 7)], ids=str)
def test_keeping_the_best_is_what_sorting_would_do(phase, goal, heads, ends):
    """Where one of each row goes another path is taken, which must be the same."""
    if heads == 1 and goal != 30:
        goal = goal[0]  # rows of one score stay the same
    score = torch.randint(0, 4, (2 if heads > 1 else 1, heads, 30)).float()  # many ties
    score[..., 3], score[..., 8], score[..., 20] = float("nan"), float("inf"), float("-inf")
    m = tiny.model(n_layers=1)
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(30).expand(2, -1))
    cache.phase, c, (first, last) = phase, cache.layers[0], ends
    c.keep_best(score, goal, first, last)
    middle = list(range(first, 30 - last))
    for b in range(2):
        n = (goal if isinstance(goal, int) else goal[b]) - first - last
        for h in range(2):
            s = score[b % len(score), h % heads].nan_to_num(-1e30, 1e30, -1e30)
            best = sorted(middle, key=lambda i: (-s[i], i))[: max(0, n)]
            want = {*best, *range(first), *range(30 - last, 30)}
            assert set(cache.live_positions(0, h, b).tolist()) == want
            assert c.counts[b * 2 + h] == len(want)
    assert c.same == (heads == 1 or goal == 30)


@pytest.mark.parametrize("seed", range(20))
def test_which_entries_are_the_oldest_and_newest_is_known_whatever_went_before(seed):
    """Steps in which one entry of each row goes, between others that leave holes at the ends, against a list."""
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (1,), generator=g))

    class Some(Policy):
        def __call__(self, cache, q, pos):
            for row in alive:
                row.append(cache.parent.next_position)
            for _ in range((cache.n_live > 16) * (1 + draw(2))):
                N, first, last = cache.size, draw(6), draw(9)
                score = torch.rand(1, 2, N, generator=g)
                token = cache.token.expand(1, 2, -1)[0].tolist()
                if draw(8) == 0:  # anything goes
                    stay = torch.rand(1, 2, N, generator=g) > 0.1
                    cache.keep(stay)
                    for h, row in enumerate(alive):
                        row[:] = [t for t in row if stay[0, h, token[h].index(t)]]
                    continue
                n = cache.n_live - 1 - (draw(6) == 0)
                cache.keep_best(score, n, first, last)
                for h, row in enumerate(alive):
                    goes = max(0, min(len(row) - n, len(row) - first - last))
                    middle = row[first : len(row) - last]
                    gone = sorted(middle, key=lambda t: (score[0, h, token[h].index(t)], -t))[:goes]
                    row[:] = [t for t in row if t not in gone]
                quick.append(cache._hidden > 0 and cache._apart(first, last))
            held = [cache.token.expand(1, 2, -1)[0, h][cache.live.expand(1, 2, -1)[0, h]].tolist() for h in range(2)]
            assert held == alive

    alive, quick, m = [list(range(24)), list(range(24))], [], tiny.model(n_layers=1)  # few, so that ends matter
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(24))
    cache.layers[0].policies = [Some()]
    tiny.steps(m, cache, tiny.ids(60))
    assert any(quick)  # or the path in question was never taken


@pytest.mark.parametrize("goal", [29, 12])
def test_only_candidates_go_even_where_all_are_priceless(goal):
    m = tiny.model(n_layers=1)
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(30))
    cache.phase = "decode"
    cache.layers[0].keep_best(torch.full((1, 2, 30), torch.inf), goal, first=10)
    assert cache.live_positions(0, 1).tolist() == list(range(goal))


@pytest.mark.parametrize("goal", [29, 27])
def test_a_row_without_candidates_loses_nothing(goal):
    m = tiny.model(n_layers=1)
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(30))
    cache.phase, c = "decode", cache.layers[0]
    c.keep_best(torch.zeros(1, 2, 30), goal, first=20, last=10)
    assert c.counts == [30, 30]
    c.keep(torch.arange(30).view(1, 1, -1) < torch.tensor([30, 25]).view(1, 2, 1))
    c.keep_best(torch.zeros(1, 2, 30), 20, first=20, last=5)
    assert c.counts == [25, 25] and cache.live_positions(0, 1).tolist() == list(range(25))
    assert cache.live_positions(0, 0).tolist() == [*range(20), *range(25, 30)]
    left, leaves = c.leaving(torch.zeros(1, 2, 30), 24)
    assert left[0, 0].tolist() == [29] and left[0, 1].tolist() == [24] and leaves.all()


def test_the_newest_are_counted_among_the_living():
    m = tiny.model(n_layers=1)
    cache = KVCache(m, [Drop([(30, 0, [29, 28, 20]), (30, 1, [5])])])
    tiny.feed(m, cache, tiny.ids(30))
    c = cache.layers[0]
    token = c.token.expand(1, 2, -1)
    for n in (0, 1, 3, 28, 100):
        for h in range(2):
            alive = cache.live_positions(0, h).tolist()
            assert token[0, h][c.newest(n)[0, h]].tolist() == alive[len(alive) - min(n, len(alive)) :]


@pytest.mark.parametrize("first", ["random(budget=60)", "knorm(budget=60)", "keydiff(budget=60)", "snapkv(budget=60)"])
def test_queries_observed_after_another_policys_cut_see_what_their_positions_allow(first):
    """Nothing is hidden then, but the queries are no longer those of the last slots."""
    seen = []

    class Look(Policy):
        observes = 16

        def __call__(self, cache, q, pos):
            if cache.phase == "last":
                q, pos = cache.observed(16)
                k, _ = cache.read()
                see = cache.pos[:, :, None] <= pos[:, None, :, None]
                seen.append(tiny.rms(cache.probs(q, pos), probs(q, k, Mask(q.shape[2], k.shape[2], see=see))))

    m = tiny.model()
    tiny.feed(m, KVCache(m, [*specs.parse(first)[1], Look()]), tiny.ids(200), chunk=50)
    assert len(seen) == 2 and max(seen) < 1e-6


def test_observing_where_rows_differ_and_are_renumbered():
    m = tiny.model()
    cache = KVCache(m, "adakv(budget=30,window=8)+streamingllm(budget=60)")
    tiny.feed(m, cache, tiny.ids(130), chunk=14)
    assert tiny.feed(m, cache, tiny.ids(60), chunk=7).isfinite().all()


def test_a_cache_that_forgot_is_not_adopted():
    m = tiny.model(windows=(24, None))
    base, cache = KVCache(m), KVCache(m)
    tiny.feed(m, base, tiny.ids(60))
    with pytest.raises(NotImplementedError, match="forgotten"):
        cache.adopt(base)


@pytest.mark.parametrize("n", [2, 3])
def test_a_score_that_is_no_number_is_the_lowest(n):
    score = torch.tensor([[[1.0, torch.nan, 2.0, 3.0]]])
    assert top(score, n, torch.ones(1, 1, 4, dtype=torch.bool)).sum() == n
    assert not top(score, n, torch.ones(1, 1, 4, dtype=torch.bool))[0, 0, 1]


class Nest(Full):
    """A storage made of another one."""

    def reset(self):
        self.inner = Full().bind(self.cache)

    @property
    def kv(self):
        return self.inner.kv


def test_storages_inside_storages_are_cloned_with_their_cache():
    m = tiny.model()
    cache = KVCache(m, [Nest()])
    tiny.feed(m, cache, tiny.ids(60), 30)
    twin, want = cache.clone(), tiny.steps(m, cache, tiny.ids(5))
    assert all(c.storage.inner.cache.slots is c.slots for c in twin.layers)
    del cache
    assert torch.equal(tiny.steps(m, twin, tiny.ids(5)), want)


def test_parts_of_a_cache_that_is_gone_say_so():
    m = tiny.model()
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(20), 20)
    layer, storage = cache.layers[0], cache.layers[1].storage
    del cache
    for part in (lambda: layer.phase, storage.read):
        with pytest.raises(ReferenceError, match="no longer exists"):
            part()


@pytest.mark.parametrize("rerouted", [False, True])
def test_a_step_of_one_token_acts_on_all_layers_in_a_row(rerouted):
    """Unless a plan acts between layers, which then finds them as after any other pass."""
    events = []

    class Note(Policy):
        name = "note"

        def before(self, cache, n_new):
            events.append(f"before {cache.layer}")

        def __call__(self, cache, q, pos):
            events.append(f"after {cache.layer}")
            assert cache.size == cache.n_slots[0] == cache.storage.kv.n[0]

    class Between(Plan):
        name = "between"

        def after_layer(self, cache, i, x, pos):
            events.append(f"plan {i}")
            return x, pos

    class Noted(Full):
        def attend(self, q, pos):
            events.append(f"attend {self.cache.layer}")
            return super().attend(q, pos)

    m = tiny.model(n_layers=2)
    cache = KVCache(m, [Noted(), Note(), *([Between()] if rerouted else [])])
    tiny.feed(m, cache, tiny.ids(9))
    of = lambda i: [f"before {i}", f"attend {i}", f"after {i}", *([f"plan {i}"] if rerouted else [])]  # noqa: E731
    assert events == of(0) + of(1)
    events.clear()
    with cache.decoding():
        m(tiny.ids(3), cache)
    assert events == of(0) + of(1)
    events.clear()
    m(tiny.ids(1), cache)
    together = [f"{what} {i}" for what in ("before", "attend", "after") for i in (0, 1)]
    assert events == (of(0) + of(1) if rerouted else together)
    assert cache.layers[0]._asked is cache.layers[0]._mask is cache.layers[0]._expected is None
