"""What every method promises, found by file: constant time per method. Combinations are sampled, another set each day.

A check takes a spec and a model, so that a method in any file can be put to it. NANOKV_ALL=1 runs all combinations.
"""

import datetime
import itertools
import os
import random
import tempfile
from dataclasses import fields
from pathlib import Path

import methods_for_tests
import pytest
import tiny
import torch

from nanokv import KVCache, fast_cpu, generate, generate_batch, kernels
from nanokv.layer import Pass
from nanokv.method import Policy
from nanokv.methods import available, parse
from nanokv.model import RoPE

INFOS = {info.name: info for info in available()}
SMALL = {"budget": 24, "window": 8, "rank": 8, "bits": 2, "group": 16, "residual": 16, "n_sink": 2, "n_future": 16}
SPECIAL = {"pca": {"least": 12}}
PARTS = ("payload", "scales", "columns", "residual", "unused")  # of a ledger's `held`
MODELS = {}


def small(info, beside=False) -> str:
    """Return a spec with which a method really acts on texts of a hundred tokens.

    Where a policy stands beside it, a plan is given its own parameters only, and not those of the policy it brings.
    """
    known = {f.name for f in fields(info.cls)} if beside else info.parameters
    given = {k: v for k, v in SMALL.items() if k in known} | SPECIAL.get(info.name, {})
    return spelt(info, given)


def spelt(info, given) -> str:
    name = info.source or info.name
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given else name


SPECS = {name: small(info) for name, info in INFOS.items()}
NAMES = list(SPECS)
every_method = pytest.mark.parametrize("spec", SPECS.values(), ids=NAMES)


def model(**options):
    """Return a tiny model in fp64, the same one for the same options."""
    key = tuple(sorted(options.items(), key=str))
    if key not in MODELS:
        MODELS[key] = tiny.model(**({"n_layers": 2, "dtype": torch.float64} | options))
    return MODELS[key]


def run(m, spec, ids, more, chunk=None):
    """Read a prompt, then what follows one by one; return the logits of both and the cache."""
    cache = KVCache(m, spec)
    first = tiny.feed(m, cache, ids, min(chunk or 10**6, cache.chunk or 10**6))
    return first, tiny.steps(m, cache, more), cache


def kept(cache, b=None) -> list:
    """Return the live tokens of every row, of one sequence or of all."""
    some = range(cache.B) if b is None else [b]
    rows = [(i, h, b) for b in some for i in range(len(cache.layers)) for h in range(cache.config.n_kv_heads)]
    return [cache.live_positions(*row).tolist() for row in rows]


def acts_early(spec) -> bool:
    """Say whether a method may change what a prompt's own tokens see."""
    return any(m.chunk or getattr(m, "selects_prompts", False) for m in parse(spec))


def tensors(part, seen=None) -> dict[int, int]:
    """Return where the tensors lie that can be reached from anything but the model, and their bytes."""
    seen = set() if seen is None else seen
    if id(part) in seen or isinstance(part, (torch.nn.Module, RoPE, Pass, type)):
        return {}
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        memory = part.untyped_storage()
        return {memory.data_ptr(): memory.nbytes()} if memory.nbytes() else {}
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple, set)) else ()
    own = vars(part) if hasattr(part, "__dict__") else {}
    inside = [*inside, *(held for name, held in own.items() if name != "_where")]  # 12 bytes a row, made when needed
    return {at: n for more in inside for at, n in tensors(more, seen).items()}


# Checks


def check_exact(info, m):
    """With the parameters that `exact` names, a method changes nothing."""
    harmless = info.cls.exact(m.config)
    if "budget" in info.parameters and info.kind == "plan":
        harmless = {"budget": m.config.context} | harmless
    ids, more = tiny.ids(60), tiny.ids(9, seed=4)
    want, got = run(m, "full", ids, more), run(m, spelt(info, harmless), ids, more)
    assert tiny.rms(got[0], want[0]) < 1e-6 and tiny.rms(got[1], want[1]) < 1e-5  # bases and rebuilding are fp32


def check_acts(spec, m):
    """With small parameters it acts; the prompt's own tokens see all of it, unless it reads in parts of its own."""
    ids, more = tiny.ids(100), tiny.ids(24, seed=4)
    want, got = run(m, "full", ids, more), run(m, spec, ids, more)
    assert tiny.rms(got[1], want[1]) > 1e-3, "it never acts"
    assert got[2].nbytes < want[2].nbytes, "it holds no less"
    assert acts_early(spec) or tiny.rms(got[0], want[0]) < 1e-5


def check_attention(spec, m):
    """Attention is what attention.reference makes of what `read` returns, in steps, drafts and prompts."""
    fast = fast_cpu.speed_up(tiny.model(n_layers=2, G=m.config.group, n_kv_heads=m.config.n_kv_heads))
    for backend in ("torch", "auto"):
        with kernels.use(backend):
            *_, cache = run(fast, spec, tiny.ids(90), tiny.ids(20, seed=4))
            seen = methods_for_tests.Against()
            for layer in cache.layers:
                layer.recorder = seen
            tiny.steps(fast, cache, tiny.ids(3, seed=5))
            fast(tiny.ids(4, seed=6), cache, "draft")
            cache.accept(2)
            fast(tiny.ids(4, seed=7), cache, "last")
            assert len(seen.errors) == 10 and max(seen.errors) < 2e-5  # fp32, added up in another order


def check_causality(spec, m):
    """What comes later in a pass changes no logits of what comes earlier."""
    ids, cut = tiny.ids(70), KVCache(m, spec).chunk or 70
    other = ids.clone()
    other[:, 41:] = tiny.ids(29, seed=8)
    a, b = (tiny.feed(m, KVCache(m, spec), x, cut) for x in (ids, other))
    assert tiny.rms(a[:, :41], b[:, :41]) < 1e-12 and tiny.rms(a[:, 41:], b[:, 41:]) > 1e-3


def check_parts(spec, m):
    """A prompt in parts is the prompt. A method that reads in parts of its own has no such promise to keep."""
    ids, more = tiny.ids(97), tiny.ids(20, seed=4)
    want = run(m, spec, ids, more)
    for chunk in (1, 13, 64) if not want[2].chunk else ():
        got = run(m, spec, ids, more, chunk)
        assert kept(got[2]) == kept(want[2]) and tiny.rms(got[1], want[1]) < 1e-6, chunk


def check_most(spec, m):
    """No more lives than `most` says."""
    for n, steps in ((100, 30), (10, 40)):
        *_, cache = run(m, spec, tiny.ids(n), tiny.ids(steps, seed=4))
        most = min(x.most(n, steps) for x in [cache.storage, *cache.methods])
        assert sum(map(len, kept(cache))) <= most * cache.config.n_layers * cache.config.n_kv_heads


def check_ledger(spec, m):
    """The ledger's parts add up to what is held, which is what the tensors that can be found take."""
    *_, cache = run(m, spec, tiny.ids(90), tiny.ids(20, seed=4))
    ledger, known = cache.ledger(), {}
    for layer, row in zip(cache.layers, ledger["layers"], strict=True):
        assert sum(row[p] for p in PARTS) == row["held"] and min(row.values()) >= 0
        constants = tensors([layer.storage.constants(), [getattr(layer.storage, n, 0) for n in layer.storage.derived]])
        rest = {name: part for name, part in vars(layer).items() if name != "positions"}  # the pass's, which goes
        found = {at: n for at, n in tensors(rest).items() if at not in constants and at not in known}
        assert row["held"] == sum(found.values())
        known |= found
    c, total = m.config, ledger["total"]
    assert total["full"] == 110 * c.n_layers * c.n_kv_heads * 2 * c.head_dim * m.embed_tokens.weight.element_size()
    assert 0 < total["read"] <= total["held"] and sum(total[p] for p in PARTS) == total["held"] == cache.nbytes


def check_batches(spec, m):
    """Each sequence of a batch gets what it gets alone, though others stop, pause and go on."""
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (90, 41, 7)]
    later = [tiny.ids(n, seed=100 + n)[0].tolist() for n in (5, 33, 2)]
    stop = list(generate(m, KVCache(m, spec), texts[1], 9))[6:7]
    cache = KVCache(m, spec)
    first = list(zip(*generate_batch(m, cache, texts, 20, stop=stop), strict=True))
    tiny.steps(m, cache, torch.tensor([[5], [-1], [6]]))  # one pauses
    list(generate_batch(m, cache, [[7, 8, 9], [], [4]], 0))  # and is left out, while one reads a single token
    second = list(zip(*generate_batch(m, cache, later, 12), strict=True))
    assert any(None in own for own in first)
    for b, turns in enumerate([([5], [7, 8, 9]), ((), ()), ([6], [4])]):
        alone = KVCache(m, spec)
        assert list(generate(m, alone, texts[b], 20, stop=stop)) == [t for t in first[b] if t is not None]
        for turn in turns:
            list(generate(m, alone, turn, 0)) if len(turn) else None
        assert list(generate(m, alone, later[b], 12)) == list(second[b])
        assert kept(alone) == kept(cache, b)


def check_drafts(spec, m):
    """The first tokens of a draft are exact, as many as `ahead` says; an accepted one is so many steps."""
    more = tiny.ids(40, seed=4)
    want, got = (run(m, spec, tiny.ids(60), more[:, :3])[2] for _ in range(2))
    size = min(9, got.chunk or 9)
    n, ahead = size // 2 + 1, got.ahead()
    exact = n if ahead is None else min(n, ahead)
    after = 3 + n
    draft = m(torch.cat([more[:, 3:after], tiny.ids(size - n, seed=9)], 1), got, "draft")
    got.accept(n)
    steps = tiny.steps(m, want, more[:, 3:after])
    assert not exact or tiny.rms(draft[:, :exact], steps[:, :exact]) < 1e-6
    assert got.next_position == want.next_position and got.ids[0].tolist() == want.ids[0].tolist()
    if exact == n:
        assert kept(got) == kept(want)
        assert tiny.rms(tiny.steps(m, got, more[:, after:]), tiny.steps(m, want, more[:, after:])) < 1e-6
    before, held = kept(got), got.ids[0].tolist()
    m(tiny.ids(size, seed=3), got, "draft")
    got.accept(0)
    assert kept(got) == before and got.ids[0].tolist() == held


def check_copies(spec, m):
    """Saved and cloned caches go on bit by bit, and the original as if nothing had been."""
    *_, cache = run(m, spec, tiny.ids(90), tiny.ids(20, seed=4))
    others = [cache.clone()]
    if all(method.source or type(method).__module__.startswith("nanokv.") for method in cache.methods):
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "c")
            others.append(KVCache.load(Path(folder) / "c", m))
    more = tiny.ids(30, seed=5)
    want = tiny.steps(m, cache, more)
    for other in others:
        assert torch.equal(tiny.steps(m, other, more), want)
        assert kept(other) == kept(cache) and other.ledger()["total"] == cache.ledger()["total"]


def check_shapes(spec, dtypes=(torch.float32, torch.bfloat16)):
    """It works with every group size, in 32 and 16 bits, with windows or a reason why not, on the shortest texts."""
    shapes = [{"G": 1}, {"G": 3, "n_kv_heads": 1}, {"G": 4, "n_kv_heads": 1}, {"windows": (24, None)}]
    for options, dtype in itertools.product(shapes, dtypes):
        m = model(**options, dtype=dtype)
        try:
            cache = KVCache(m, spec)
        except NotImplementedError as why:
            assert "window" in str(why) and "windows" in options
            continue
        for n in (1, 2, 37):
            cache.reset()
            first = tiny.feed(m, cache, tiny.ids(n))
            assert acts_early(spec) or dtype is not torch.float32 or tiny.rms(first, m(tiny.ids(n), KVCache(m))) < 1e-4
            assert bool(tiny.steps(m, cache, tiny.ids(30, seed=4)).isfinite().all()) and cache.next_position == [n + 30]


# Every method


@pytest.mark.parametrize("name", NAMES)
def test_harmless_parameters_change_nothing(name):
    check_exact(INFOS[name], model())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_small_parameters_act_and_leave_the_prompt_alone(name):
    check_acts(SPECS[name], model())


@every_method
def test_attention_is_the_reference_over_what_is_read(spec):
    check_attention(spec, model())


@every_method
def test_later_tokens_change_nothing_earlier(spec):
    check_causality(spec, model())


@every_method
def test_a_prompt_in_parts_is_the_prompt(spec):
    check_parts(spec, model())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "keepkv"])
def test_a_prompt_in_parts_is_the_prompt_under_sliding_windows(name):
    check_parts(SPECS[name], model(windows=(30, None)))


@every_method
def test_no_more_lives_than_is_said(spec):
    check_most(spec, model(n_layers=3))


@every_method
def test_the_ledger_is_what_is_held(spec):
    check_ledger(spec, model(dtype=torch.float32))


@every_method
def test_each_sequence_of_a_batch_gets_what_it_gets_alone(spec):
    check_batches(spec, model())


@every_method
def test_a_draft_that_is_accepted_is_so_many_steps(spec):
    check_drafts(spec, model())


@every_method
def test_saved_and_cloned_caches_go_on_bit_by_bit(spec):
    check_copies(spec, model(dtype=torch.float32))


@every_method
def test_models_of_other_shapes_and_short_texts(spec):
    check_shapes(spec)


# Combinations


REFUSALS = (  # what cannot be combined, and why: anything else that is refused is a fault
    "merges entries, and",
    "needs a policy that scores entries",
    "both decide",
    "stores layer inputs, not keys and values",
)


def groups() -> dict[tuple, list[str]]:
    """Return specs of two to four methods by their kinds: each pair of kinds, two of one kind, and whole chains."""
    by = {k: [n for n in NAMES if INFOS[n].kind == k and n != "full"] for k in ("policy", "plan", "basis", "storage")}
    out = {pair: list(itertools.product(*(by[kind] for kind in pair))) for pair in itertools.combinations(by, 2)}
    out |= {(kind, kind): list(itertools.combinations(by[kind], 2)) for kind in ("policy", "plan")}
    out[tuple(by)] = list(itertools.product(*by.values()))
    return {kinds: [together(names) for names in some] for kinds, some in out.items()}


def together(names) -> str:
    """Return one spec of several methods."""
    scored, out = any(INFOS[name].kind == "policy" for name in names), []
    for name in names:
        out.append(small(INFOS[name], beside=scored))
        scored = scored or bool(getattr(INFOS[name].cls, "brings", None))
    return "+".join(out)


def refusal(spec) -> str:
    """Return why a combination is refused, or nothing. Any other error is for a test to meet."""
    try:
        KVCache(model(), spec)
    except NotImplementedError as why:
        return str(why)
    except Exception:
        return ""
    return ""


def combinations() -> list[str]:
    """Return specs of several methods: a sample of each group, another one each day, of those that can be combined."""
    out = groups().values()
    if not os.environ.get("NANOKV_ALL"):
        rng = random.Random(datetime.date.today().isoformat())
        out = [rng.sample(group, len(group)) for group in out]
        out = [list(itertools.islice((spec for spec in group if not refusal(spec)), 3)) for group in out]
    return [spec for group in out for spec in group if not refusal(spec)]


def test_each_pair_of_kinds_has_combinations_and_what_is_refused_is_known():
    for kinds, some in groups().items():
        why = {spec: refusal(spec) for spec in some}
        for spec, words in why.items():
            assert not words or any(known in words for known in REFUSALS) and "\n" not in words, f"{spec}: {words}"
        can = [spec for spec in some if not why[spec]]
        assert can, kinds


@pytest.mark.parametrize("spec", combinations())
def test_combinations_keep_the_promises(spec):
    m, texts = model(), [tiny.ids(n, seed=n)[0].tolist() for n in (80, 33)]
    cache = KVCache(m, spec)
    got = list(zip(*generate_batch(m, cache, texts, 16), strict=True))
    for b, text in enumerate(texts):
        assert list(got[b]) == list(generate(m, KVCache(m, spec), text, 16))
    if not cache.chunk:
        assert list(generate(m, KVCache(m, spec), texts[0], 16, chunk=21)) == list(got[0])
    row = cache.ledger()["total"]
    assert sum(row[p] for p in PARTS) == row["held"]
    check_drafts(spec, m)


# The checks themselves: a method with one fault fails the check that is made for it


@pytest.mark.parametrize(
    "check, faulty",
    [
        (check_acts, "Sleeps"),
        (check_acts, "Forgets"),
        (check_attention, "Rounds"),
        (check_causality, "Peeks"),
        (check_parts, "CountsParts"),
        (check_most, "Boasts"),
        (check_ledger, "Hides"),
        (check_batches, "Mixes"),
        (check_drafts, "Promises"),
        (check_copies, "Remembers"),
    ],
)
def test_a_faulty_method_fails(check, faulty):
    method = getattr(methods_for_tests, faulty)()
    m = model(dtype=torch.float32) if check is check_ledger else model()
    with pytest.raises(AssertionError):
        check(method, m)
    assert isinstance(method, Policy) or faulty in ("Rounds", "Hides")
