"""What every method promises, for every method there is: a new file in nanokv/methods is tested by its presence here.

Small models and small parameters, so that methods act early: a parameter takes its value from SMALL by its name.
"""

import copy
import gc
import inspect
import itertools
import pickle
import weakref
from pathlib import Path

import pytest
import tiny
import torch

from nanokv import KVCache, generate, generate_batch, methods
from nanokv.attention import reference
from nanokv.cache import Policy, _tensors

SMALL = {"budget": 40, "window": 8, "residual": 32, "group": 32, "rank": 16, "floor": 4}
ALL = {info.name: info for info in methods()}
NAMES = {kind: [i.name for i in ALL.values() if i.kind == kind] for kind in ("storage", "policy", "plan")}


def small(name, **more):
    """Construct a method with small parameters."""
    info = ALL[name]
    return info(**{k: v for k, v in (SMALL | more).items() if k in info.parameters})


def combinations():
    """Yield every set of at most one storage, one policy and one plan."""
    for names in itertools.product(*([*NAMES[kind], None] for kind in NAMES)):
        if any(names):
            yield [n for n in names if n]


def build(m, names, **more):
    """Return a cache for the combination, or None where it is refused in words."""
    try:
        return KVCache(m, [small(n, **more) for n in names])
    except NotImplementedError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return None


def parts(cache, n):
    """Return how many tokens this cache reads at once, at most n."""
    return min(n, cache.chunk or n)


@pytest.fixture(scope="module")
def m():
    return tiny.model()


each = pytest.mark.parametrize("name", ALL)


# (a) with the right parameters nothing changes


@each
def test_exact_parameters_equal_the_full_cache(name, m):
    method = ALL[name](**ALL[name].cls.exact(m.config))
    full, cache = KVCache(m), KVCache(m, [method])
    text = tiny.ids(230)
    chunk = parts(cache, 100)
    want = torch.cat([tiny.feed(m, full, text[:, :200]), tiny.steps(m, full, text[:, 200:])], 1)
    got = torch.cat([tiny.feed(m, cache, text[:, :200], chunk), tiny.steps(m, cache, text[:, 200:])], 1)
    assert tiny.rms(got, want) < 1e-4  # fp32 through a change of basis and two layers of sharp attention


# (b) attention is what `read` says, whatever fast path computes it; for all combinations, ragged and hidden rows too


@pytest.mark.parametrize("names", list(combinations()), ids="+".join)
def test_combinations_work_or_refuse_in_words(names, m, record_property):
    """(b), (d), (g), (h): run past every window and group, hold bounds, attend as the reference does over `read`."""
    cache = build(m, names)
    record_property("refused", cache is None)
    if cache is None:
        return
    run_past_every_limit(m, cache, 200)


@pytest.mark.parametrize("names", list(itertools.permutations(NAMES["policy"], 2)), ids="+".join)
def test_two_policies_share_a_cache(names, m):
    """(b), (d), (g) for ordered pairs; the second one has less room, so that both have something to forget."""
    first, second = small(names[0]), small(names[1], budget=30)
    if first.renumbers and second.merges or first.merges and second.renumbers:
        with pytest.raises(NotImplementedError, match="no single position"):
            KVCache(m, [first, second])
        return
    run_past_every_limit(m, KVCache(m, [first, second]), 50)


def run_past_every_limit(m, cache, steps):
    """Read 130 tokens in parts, then `steps` more; assert that bounds hold and attention is what `read` says."""
    text = tiny.ids(130 + steps)
    tiny.feed(m, cache, text[:, :130], parts(cache, 50))
    for t in range(130, 130 + steps):
        logits = m(text[:, t : t + 1], cache)
        if t % 20 == 0 or t < 135:
            live = sum(sum(c.counts) for c in cache.layers) / sum(c.n_rows for c in cache.layers)
            assert live <= min(method.most(130, t - 129) for method in cache.methods) + 1e-9
            for c in cache.layers:
                counts = c.live.expand(c.B, 2, -1).sum(-1).flatten().tolist()
                assert c.counts == counts and all(n <= s for n, s in zip(c.counts, c.n_slots, strict=True))
    assert logits.isfinite().all()
    for c in cache.layers:
        q = torch.randn(1, 6, 1, 32)
        pos = torch.full((1, 1), 129 + steps if not cache.renumbers else c.n_live)
        k, v = c.read()
        assert k.shape == v.shape == (1, 2, c.size, 32)
        want = reference(q, k, v, c.mask(pos))
        assert tiny.rms(c.attend(q, pos), want) < 1e-5  # fp32, sums in another order
    row = cache.ledger()["total"]
    assert row["held"] == sum(row[x] for x in ("payload", "scales", "columns", "residual", "unused"))
    assert row["unused"] >= 0


def test_the_number_of_combinations(m, capsys):
    """(h) say how many combinations there are, and how many are refused."""
    built = [(names, build(m, names)) for names in combinations()]
    refused = [names for names, cache in built if cache is None]
    with capsys.disabled():
        print(
            f"\n{len(built)} combinations, {len(refused)} refused: {', '.join('+'.join(n) for n in refused) or 'none'}"
        )
    assert len(built) == (len(NAMES["storage"]) + 1) * (len(NAMES["policy"]) + 1) * (len(NAMES["plan"]) + 1) - 1


@each
@pytest.mark.parametrize("end", ["dropped", "reset"])
def test_memory_is_free_when_a_cache_is(name, end, m):
    """(d) at once, not when Python next looks for objects that know each other; clones and parts of prompts too."""
    gc.collect()
    gc.disable()
    try:
        cache = KVCache(m, [small(name)])
        tiny.feed(m, cache, tiny.ids(100), parts(cache, 40))
        other = cache.clone()
        tiny.steps(m, cache, tiny.ids(5))
        tiny.steps(m, other, tiny.ids(5))
        constants = {id(t) for c in cache.layers for t in c.storage.constants()}
        held = [t for k in (cache, other) for c in k.layers for t in _tensors([c.storage, c.slots])]
        held = [weakref.ref(t) for t in held if id(t) not in constants]
        assert held and all(t() is not None for t in held)
        if end == "reset":
            cache.reset()
            other.reset()
        else:
            del cache, other
        assert not any(t() is not None for t in held)
    finally:
        gc.enable()


@each
@pytest.mark.parametrize("how", [KVCache.clone, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_a_cache_go_on_alone(name, how, m, tmp_path):
    """(f) as the original would have, whatever becomes of it, and can be saved in turn."""
    cache = KVCache(m, [small(name)])
    tiny.feed(m, cache, tiny.ids(100), parts(cache, 40))
    tiny.steps(m, cache, tiny.ids(2))
    twin, text = how(cache), tiny.ids(9)
    want = tiny.steps(m, cache, text)
    assert all(c.parent.layers is twin.layers and c.storage.cache.slots is c.slots for c in twin.layers)
    del cache
    assert torch.equal(tiny.steps(m, twin, text), want)
    twin.save(tmp_path / "twin")
    loaded = KVCache.load(tmp_path / "twin", m)
    assert torch.equal(tiny.steps(m, loaded, text), tiny.steps(m, twin, text))


# (c) the prompt's own logits do not depend on how it was cut, where the whole prompt is read exactly


@each
@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_chunked_prefill_equals_one_shot(name, chunk, m):
    cache, again = KVCache(m, [small(name)]), KVCache(m, [small(name)])
    if cache.chunk:
        pytest.skip("reads a prompt in parts of its own, which decide what its tokens see")
    text = tiny.ids(100)
    whole = tiny.feed(m, cache, text)
    assert tiny.rms(whole, tiny.feed(m, KVCache(m), text)) < 1e-5  # compression comes after
    assert tiny.rms(tiny.feed(m, again, text, chunk), whole) < 1e-5
    for layer, head in itertools.product((0, 1), (0, 1)):
        assert torch.equal(cache.live_positions(layer, head), again.live_positions(layer, head))
    a, b = m(tiny.ids(1), cache), m(tiny.ids(1), again)
    assert tiny.rms(b, a) < 1e-2  # a code at a rounding edge may flip


# (f) nothing leaks from one text to the next


@each
def test_nothing_leaks_into_the_next_text(name, m):
    method = small(name)
    used, fresh = KVCache(m, [method]), KVCache(m, [small(name)])
    tiny.feed(m, used, tiny.ids(90, seed=5), parts(used, 90))
    tiny.steps(m, used, tiny.ids(50, seed=6))
    used.reset()
    other = KVCache(m, [method])  # the same method object in two caches at once
    for cache in (used, fresh, other):
        cache.out = torch.cat(
            [tiny.feed(m, cache, tiny.ids(90), parts(cache, 90)), tiny.steps(m, cache, tiny.ids(9))], 1
        )
    assert torch.equal(used.out, fresh.out) and torch.equal(other.out, fresh.out)
    assert used.ledger() == fresh.ledger()


# (i) dtypes, group sizes, the shortest prompts


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [1, 3, 4])
def test_dtypes_and_group_sizes(name, dtype, G):
    model = tiny.model(G=G, dtype=dtype)
    cache = KVCache(model, [small(name)])
    tiny.feed(model, cache, tiny.ids(90), parts(cache, 90))
    logits = tiny.steps(model, cache, tiny.ids(20))
    assert logits.dtype == dtype and logits.isfinite().all()
    k, v = cache.layers[0].read()
    assert k.dtype == v.dtype == dtype


@each
@pytest.mark.parametrize("T", [1, 2])
def test_the_shortest_prompts(name, T, m):
    cache, full = KVCache(m, [small(name)]), KVCache(m)
    text = tiny.ids(T + 2)
    for c in (cache, full):
        c.out = torch.cat([tiny.feed(m, c, text[:, :T]), tiny.steps(m, c, text[:, T:])], 1)
    assert cache.out.isfinite().all()
    if "budget" in ALL[name].parameters:  # larger than the text: nothing may happen
        assert tiny.rms(cache.out, full.out) < 1e-5


@each
def test_a_second_prompt_in_the_same_cache(name, m):
    """Several turns: each prompt is compressed at its end, and decoding goes on."""
    cache = KVCache(m, [small(name)])
    for turn in range(3):
        tiny.feed(m, cache, tiny.ids(60, seed=turn), parts(cache, 60))
        logits = tiny.steps(m, cache, tiny.ids(20, seed=turn + 9))
    assert logits.isfinite().all() and cache.next_position == 240


@each
def test_what_another_method_observes_changes_nothing(name, m):
    class Look(Policy):
        name, observes = "look", 64

    alone, beside = KVCache(m, [small(name)]), KVCache(m, [small(name), Look()])
    for cache in (alone, beside):
        tiny.feed(m, cache, tiny.ids(150), parts(cache, 150))
        cache.out = tiny.steps(m, cache, tiny.ids(10))
    assert torch.equal(alone.out, beside.out)
    for layer, head in itertools.product(range(2), range(2)):
        assert torch.equal(alone.live_positions(layer, head), beside.live_positions(layer, head))


# (j) saved, loaded and cloned caches go on bit by bit as the original does


@each
def test_saved_and_cloned_caches_continue_identically(name, m, tmp_path):
    cache = KVCache(m, [small(name)])
    text = list(generate(m, cache, tiny.ids(90)[0], 20))
    cache.save(tmp_path / "c")
    loaded, clone = KVCache.load(tmp_path / "c", m), cache.clone()
    assert cache.ledger() == loaded.ledger() == clone.ledger()
    out = [tiny.steps(m, c, torch.tensor([text]).repeat(1, 4)) for c in (cache, loaded, clone)]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


# batches


@each
def test_a_batch_equals_its_sequences_one_by_one(name, m):
    prompts = [tiny.ids(n, seed=n)[0].tolist() for n in (90, 61, 90, 5)]
    if not small(name).padded:
        with pytest.raises(NotImplementedError, match="equal length"):
            next(generate_batch(m, KVCache(m, [small(name)]), prompts, 2))
        prompts = [tiny.ids(90, seed=n)[0].tolist() for n in range(3)]
    together = list(zip(*generate_batch(m, KVCache(m, [small(name)]), prompts, 40), strict=True))
    for prompt, got in zip(prompts, together, strict=True):
        assert list(got) == list(generate(m, KVCache(m, [small(name)]), prompt, 40))


# the form of a method file


@each
def test_the_form_of_a_method_file(name):
    info = ALL[name]
    file = Path(inspect.getfile(info.cls))
    assert (Path(__file__).parent / f"test_{name}.py").exists(), "a method has tests of its own"
    assert info.cls.__doc__ and info.header.splitlines()[0].endswith(".")
    code = [x for x in file.read_text().split('"""', 2)[2].splitlines() if x.strip() and not x.strip().startswith("#")]
    assert len(code) < 100
    for param, default in info.parameters.items():
        assert default is not inspect.Parameter.empty, f"{param} has no default"


@each
def test_bad_parameters_are_refused_by_name(name):
    for param, default in ALL[name].parameters.items():
        if isinstance(default, int) and not isinstance(default, bool):
            with pytest.raises(ValueError, match=param):
                ALL[name](**{param: -1})
        with pytest.raises(ValueError, match=param):
            ALL[name](**{param: [1]})
    if "budget" in ALL[name].parameters:
        with pytest.raises(ValueError, match="budget"):
            ALL[name](budget=0)


# (k) a prompt's beginning may be taken over from a full cache, unless the method says that it looks at it


@each
def test_a_method_that_adopts_a_prompt_ends_like_one_that_read_it(name, m):
    text, method = tiny.ids(120), small(name)
    base, mine, whole = KVCache(m), KVCache(m, [method]), KVCache(m, [small(name)])
    with base.prompt(120):
        m(text[:, :60], base)
        with mine.prompt(60):
            if method.early or mine.renumbers:
                with pytest.raises(NotImplementedError, match="from its beginning"):
                    mine.adopt(base)
                mine._prompt_left = base._prompt_left = 0
                return
            mine.adopt(base)
            got = m(text[:, 60:], mine)
        m(text[:, 60:], base)
    with whole.prompt(120):
        m(text[:, :60], whole)
        want = m(text[:, 60:], whole)
    assert tiny.rms(got, want) < 1e-5
    for layer, head in itertools.product((0, 1), (0, 1)):
        assert torch.equal(mine.live_positions(layer, head), whole.live_positions(layer, head))
    assert mine.ledger()["total"]["held"] == whole.ledger()["total"]["held"]
    a, b = m(tiny.ids(1), mine), m(tiny.ids(1), whole)
    assert tiny.rms(a, b) < 1e-5
