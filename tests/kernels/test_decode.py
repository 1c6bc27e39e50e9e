"""The decode kernel in Triton's interpreter against its plain twin in fp64; between ragged rows lies NaN."""

import math
from itertools import product

import interpret
import pytest
import torch
from interpret import error, guard, poison

from nanokv import attention
from nanokv.kernels.decode import cut, decode, decode_naive, merge
from nanokv.model import Config, RoPE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HIDDEN = 2**31 - 1
LENGTHS = (63, 1, 0, 1023, 15, 500)
BOUND = {FP32: 2e-6, FP16: 2e-3, BF16: 2e-6}  # bf16 is computed in fp32 by the interpreter
DIMS, DTYPES = (64, 80, 96, 128), (FP32, FP16, BF16)
FEATURES = {
    "plain": (),
    "pos": ("pos",),
    "window": ("pos", "window"),
    "bias": ("bias",),
    "all": ("pos", "window", "bias"),
}
# every feature with every head_dim, and dtypes, G and T in turn: M is 1 to 64
CASES = [(f, D, DTYPES[(i + i // 4) % 3], (1, 3, 4, 8)[(i + i // 4) % 4], (1, 3, 1, 8, 1, 2, 1)[i % 7])
         for i, (f, D) in enumerate(product(FEATURES, DIMS))]  # fmt: skip


@pytest.fixture
def guarded(monkeypatch):
    """Give every tensor that a kernel's host side allocates guard bands and NaN inside; check the bands at the end."""
    checks = []

    def empty(*size, dtype=FP32, device=None):
        inside, check = guard(poison(torch.zeros(*size, dtype=dtype)))
        checks.append(check)
        return inside

    monkeypatch.setattr(torch, "empty", empty)
    yield checks
    for check in checks:
        check("an output")
    assert checks


def spread(rows, gaps):
    """Lay rows (n_r, ...) one behind the other with gaps[r] poisoned slots behind each: flat tensor, start (R,)."""
    parts, start, at = [], [], 3
    parts.append(poison(rows[0].new_zeros(3, *rows[0].shape[1:])))
    for row, gap in zip(rows, gaps, strict=True):
        start.append(at)
        parts += [row, poison(row.new_zeros(gap, *row.shape[1:]))]
        at += len(row) + gap
    return torch.cat(parts), torch.tensor(start)


def problem(D, dtype, G, T, features=(), lengths=LENGTHS, DV=None, seed=0, hide=0.3):
    """Return the arguments of a decode kernel: q and rows of random content, positional and by name."""
    torch.manual_seed(seed)
    R, M = len(lengths), G * T
    q = torch.randn(R, M, D).to(dtype)  # logits with a standard deviation of 1
    gaps = [16 + r for r in range(R)]
    k, start = spread([torch.randn(n, D).to(dtype) for n in lengths], gaps)
    v, _ = spread([torch.randn(n, DV or D).to(dtype) for n in lengths], gaps)
    args = [q, k, v, start, torch.tensor(lengths, dtype=torch.int32)]
    more = {"scale": D**-0.5, "most": max(lengths) + 5}
    if "pos" in features:  # ascending with holes, a third forgotten; the queries are the newest entries
        pos = [torch.randperm(2 * n)[:n].sort().values.int() for n in lengths]
        newest = torch.tensor([p.max().item() if len(p) else 5 for p in pos])
        for p in pos:
            p[torch.rand(len(p)) < hide] = HIDDEN
        pos[0][:] = HIDDEN  # nothing is left of a row
        pos[-1][:300] = HIDDEN  # nor of the first tiles of another
        more["q_pos"] = (newest[:, None] - torch.arange(T).flip(0)).repeat(1, G).int()
        more["q_pos"][3, 0] = -1  # a padded query
        more["pos"], more["col_start"] = spread(pos, [7 + 2 * r for r in range(R)])
    if "window" in features:
        more["window"] = 200
    if "bias" in features:
        more["bias"], more["col_start"] = spread([torch.randn(n) for n in lengths], [7 + 2 * r for r in range(R)])
    return args, more


def rotary(D, more):
    """Add what un-rotated keys need: tables, of more positions than there are entries."""
    rope = RoPE(Config(1, 1, 1, D, D, D, 10, 2100))
    rope.reserve(2100)
    return more | {"cos": rope.cos, "sin": rope.sin}


def compare(args, more, bound, splits=3):
    """Run the kernel on guarded copies, and check o and lse against the naive version in fp64.

    Where even the naive version in fp32 has a larger error than the bound, 1.5 times that error is allowed.
    """
    inputs, names = [*args, *(v for v in more.values() if isinstance(v, torch.Tensor))], iter(range(99))
    copies = [guard(t) for t in inputs]
    a = [copies[next(names)][0] for _ in args]
    m = {n: copies[next(names)][0] if isinstance(v, torch.Tensor) else v for n, v in more.items()}
    o, lse = decode(*a, **m, lse=True, splits=splits)
    for (inside, check), before in zip(copies, inputs, strict=True):
        check("an input")
        assert torch.equal(inside.nan_to_num(7.0), before.nan_to_num(7.0)), "an input was changed"
    wide = [t.double() if t.dtype.is_floating_point else t for t in args]
    ref, ref_lse = decode_naive(*wide, **more, lse=True)
    assert o.dtype == lse.dtype == FP32
    assert error(o, ref) < max(bound, 1.5 * error(decode_naive(*args, **more, lse=True)[0], ref))
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    seen = ~ref_lse.isinf()
    assert (lse - ref_lse)[seen].abs().max() < 20 * bound
    assert not o[~seen].any(), "a query that sees nothing gets zeros"
    return o, lse


@pytest.mark.parametrize(("features", "D", "dtype", "G", "T"), CASES)
def test_decode(features, D, dtype, G, T, guarded):
    args, more = problem(D, dtype, G, T, FEATURES[features])
    compare(args, more, BOUND[dtype])


@pytest.mark.parametrize(("features", "D", "dtype", "G", "T"), CASES[1::2])
def test_unrotated_keys(features, D, dtype, G, T, guarded):
    args, more = problem(D, dtype, G, T, FEATURES[features])
    compare(args, rotary(D, more), 2 * BOUND[dtype])  # keys are rounded once more


@pytest.mark.parametrize(("ranks", "dtype", "features"), [
    ((32, 32), FP32, "all"), ((1, 1), FP32, "plain"), ((7, 100), FP16, "pos"), ((48, 16), BF16, "all"),
    ((256, 256), FP32, "plain"), ((200, 3), FP16, "bias"), ((64, 24), BF16, "plain")])  # fmt: skip
def test_coordinates_of_low_rank(ranks, dtype, features, guarded):
    """Keys and values of other widths than each other's, side by side in one tensor."""
    args, more = problem(sum(ranks), dtype, 3, 2, FEATURES[features])
    q, x, _, start, length = args
    q = torch.randn(len(LENGTHS), 6, ranks[0])  # projected in fp32, whatever the coordinates are stored in
    q = q.half().float() if dtype is FP16 else q  # which is rounded to fp16 by the kernel
    x, check = guard(x)
    k, v = x.split(ranks, -1)
    o, lse = decode(q, k, v, start, length, **more, lse=True)
    check("x")
    ref, ref_lse = decode_naive(q.double(), k.double(), v.double(), start, length, **more, lse=True)
    seen = ~ref_lse.isinf()
    assert error(o, ref) < BOUND[dtype]
    assert torch.equal(lse.isinf(), ~seen) and (lse - ref_lse)[seen].abs().max() < 1e-4


def test_naive_is_the_specification():
    B, Hkv, G, T, N, D = 2, 3, 2, 3, 40, 64
    torch.manual_seed(1)
    q, k, v = torch.randn(B, Hkv * G, T, D), torch.randn(B, Hkv, N, D), torch.randn(B, Hkv, N, D)
    pos, q_pos = torch.randint(0, 50, (B, Hkv, N)).int(), torch.randint(10, 50, (B, T)).int()
    bias = torch.randn(B, Hkv, N)
    see = (pos[:, :, None] <= q_pos[:, None, :, None]) & (pos[:, :, None] > q_pos[:, None, :, None] - 20)
    mask = torch.where(see, bias[:, :, None], -torch.inf)
    R = B * Hkv
    o = decode_naive(
        q.view(R, G * T, D), k.view(-1, D), v.view(-1, D), torch.arange(0, R * N, N), torch.full((R,), N).int(),
        scale=D**-0.5, most=N, pos=pos.flatten(), bias=bias.flatten(), window=20,
        q_pos=q_pos[:, None, None].expand(B, Hkv, G, T).reshape(R, -1))  # fmt: skip
    assert error(o.view(B, Hkv * G, T, D), attention.reference(q, k, v, mask)) < 2e-6


def test_naive_rotates_as_the_model_does():
    D, N = 64, 30
    torch.manual_seed(2)
    rope = RoPE(Config(1, 1, 1, D, D, D, 10, 100))
    rope.reserve(100)
    q, k, v, pos = torch.randn(1, 1, D), torch.randn(N, D), torch.randn(N, D), torch.randperm(100)[:N]
    where = torch.zeros(1, dtype=torch.int64), torch.tensor([N], dtype=torch.int32)
    more = {"scale": 0.125, "most": N, "cos": rope.cos, "sin": rope.sin}
    last = torch.full((1, 1), 100, dtype=torch.int32)
    o = decode_naive(q, k, v, *where, pos=pos.int(), q_pos=last, **more)
    rotated = rope(k[None, None], pos[None])[0, 0]
    assert error(o, decode_naive(q, rotated, v, *where, scale=0.125, most=N)) < 2e-6
    rotated = rope(k[None, None], torch.arange(N)[None])[0, 0]
    o = decode_naive(q, k, v, *where, **more)
    assert error(o, decode_naive(q, rotated, v, *where, scale=0.125, most=N)) < 2e-6


@pytest.mark.parametrize("splits", [1, 2, 7, None])
def test_any_number_of_splits(splits, guarded):
    args, more = problem(64, FP32, 3, 1, FEATURES["all"])
    compare(args, more, 2e-6, splits)


@pytest.mark.parametrize(("most", "rows"), list(product((0, 1, 127, 128, 500, 4096, 10**6), (1, 3, 8, 64, 600))))
def test_cut(most, rows):
    splits, split_len = cut(most, rows, 64)
    assert split_len % 64 == 0 and 1 <= splits <= 64
    assert (splits - 1) * split_len < max(1, most) <= splits * split_len  # all are covered, and none is idle
    assert splits == 1 or split_len >= 128
    assert rows < 512 or splits == 1


def test_few_rows_are_cut_and_many_are_not():
    assert cut(4096, 3, 128) == (32, 128) and cut(4096, 128, 128) == (4, 1024)


@pytest.mark.parametrize("features", ["plain", "all"])
def test_same_bits_twice(features):
    args, more = problem(64, FP16, 3, 2, FEATURES[features], lengths=(63, 0, 15, 500, 1, 301))
    first, second = (decode(*args, **more) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_returned():
    args, more = problem(64, FP16, 3, 1, lengths=(63, 300))
    o = decode(*args, **more)
    assert o.dtype == FP16 and o.shape == args[0].shape
    o32, lse = decode(*args, **more, lse=True)
    assert lse.shape == o.shape[:2] and torch.equal(o32.half(), o)
    assert decode_naive(*args, **more).dtype == FP16


def test_no_entries_at_all():
    args, more = problem(64, FP32, 3, 1, lengths=(0, 0))
    more["most"] = 0
    o, lse = decode(*args, **more, lse=True)
    assert not o.any() and lse.eq(-torch.inf).all()


def test_combine_is_compiled_once_for_any_number_of_splits(monkeypatch):
    """What the compiler is told does not depend on how long the rows are."""
    seen = set()

    class Combine:
        def __getitem__(self, grid):
            return lambda *args: seen.add((args[4], args[5:]))

    args, more = problem(64, FP32, 3, 1, lengths=(1,))
    monkeypatch.setattr("nanokv.kernels.decode.combine", Combine())
    for most in (130, 300, 600, 4000):
        decode(*args, **more | {"most": most})
    assert len({splits for splits, _ in seen}) > 2
    assert len({constants for _, constants in seen}) == 1


@pytest.mark.parametrize(("D", "features"), [(64, ()), (80, ("pos",))])
def test_two_stores_merge_into_one(D, features):
    """The rows of one store are the first entries of the rows of another, whose other entries make a third."""
    args, more = problem(D, FP32, 3, 2, features)
    q, k, v, start, length = args
    whole, whole_lse = decode_naive(*(t.double() if t.dtype is FP32 else t for t in args), **more, lse=True)
    head = length // 3
    parts = []
    for offset, n in ((0 * head, head), (head, length - head)):
        m = dict(more)
        m["col_start"] = m.get("col_start", start) + offset
        parts.append(decode(q, k, v, start + offset, n, **m, lse=True, splits=2))
    o = merge(parts)
    assert error(o, whole) < 2e-6
    assert not o[whole_lse.isinf()].any()


def test_flat_tensors_may_exceed_32_bits():
    D, n = 64, 70
    try:
        k = torch.empty(2**31 // D + 200, D, dtype=FP16)  # 4 GB of addresses, of which few are ever touched
    except RuntimeError as why:
        pytest.skip(str(why))
    torch.manual_seed(4)
    k[-100:] = torch.randn(100, D).half()
    q, start, length = torch.randn(1, 3, D).half(), torch.tensor([len(k) - 90]), torch.tensor([n], dtype=torch.int32)
    o = decode(q, k, k, start, length, scale=0.125, most=n)
    row = k[-90 : -90 + n].double()
    ref = decode_naive(q.double(), row, row, start * 0, length, scale=0.125, most=n)
    assert error(o, ref) < 2e-3


def test_what_the_kernel_does_not_take():
    args, more = problem(64, FP32, 1, 1, lengths=(5,))
    q, k, v, start, length = args
    for bad, why, extra in (
        ((q.expand(1, 65, 64), k, v), "64 query rows", {}),
        ((q, k.double(), v.double()), "float64", {}),
        ((q, k.repeat(1, 5), v.repeat(1, 5)), "256 channels", {}),
        ((q, k.mT.contiguous().mT, v), "channels", {}),
        ((q[..., :63], k[:, :63], v), "even number", {"cos": q, "sin": q}),
    ):
        with pytest.raises(NotImplementedError, match=why) as e:
            decode(*bad, start, length, **more, **extra)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="window"):
        decode(*args, **more, window=5)


def test_guards_notice():
    """The checks of this file can fail."""
    inside, check = guard(torch.zeros(4, dtype=torch.int32))
    check()
    inside.as_strided((1,), (1,), inside.storage_offset() + 4).fill_(0)
    with pytest.raises(AssertionError):
        check()
    assert interpret.BAND and math.isnan(error(torch.full((2,), torch.nan), torch.ones(2)))
    args, more = problem(64, FP32, 1, 1, lengths=(5, 9))
    args[4] += 1  # one slot too many is read in every row
    assert decode(*args, **more).isnan().all()
