"""The decode kernel for codes and the packing kernel, in Triton's interpreter, against PyTorch."""

import itertools

import pytest
import torch
from interpret import error, guard, poison  # sets TRITON_INTERPRET, so it comes first

from nanokv import quant
from nanokv.kernels.decode_codes import Codes, Exact, decode_codes, decode_codes_naive
from nanokv.kernels.pack import encode_naive, encode_triton

# Largest error relative to the RMS of the reference, before the output is rounded to q's dtype. In fp16 probabilities,
# values and, from 3 bits on, codes times scales are rounded, each by up to 2^-11: up to 8e-4, 8e-4 and 1e-3 here. A
# bf16 model's keys and values are fp16 inside the kernel.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}
HIDDEN = 2**31 - 1
HALF, FULL = torch.float16, torch.float32


class Case:
    """A ragged cache of rows of n tokens, nk of whose keys and nv of whose values are codes, between poisoned slots."""

    def __init__(self, rows, M=3, D=64, bits=2, bits_v=None, group=32, dtype=FULL, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.rows, self.checks = rows, []
        n, nk, nv = zip(*rows, strict=True)
        offset = self.randn(D) * 3 * (torch.arange(D) % 8 == 0)  # some channels of keys are large for every token
        keys, values = [self.randn(t, D) + offset for t in n], [self.randn(t, D) for t in n]
        k_old = [encode_naive(x[:t].view(-1, group, D), bits) for x, t in zip(keys, nk, strict=True)]
        v_old = [encode_naive(x[:t, None], bits_v or bits, group) for x, t in zip(values, nv, strict=True)]
        self.args = {
            "k_old": self.codes("k", k_old, [t // group for t in nk], bits),
            "v_old": self.codes("v", v_old, nv, bits_v or bits),
            "k_new": self.exact("k", [x[t:].to(dtype) for x, t in zip(keys, nk, strict=True)]),
            "v_new": self.exact("v", [x[t:].to(dtype) for x, t in zip(values, nv, strict=True)]),
            "length": torch.tensor(n, dtype=torch.int32),
        }
        self.q, check = guard(self.randn(len(rows), M, D).to(dtype))
        self.checks.append((check, "q"))
        self.more = {"scale": D**-0.5, "most": max(n)}

    def randn(self, *shape):
        return torch.randn(shape, generator=self.rng)

    def codes(self, which, old, n, bits):
        fields = [self.place(f"{which}_{name}", [x[i] for x in old]) for i, name in enumerate(("code", "scale", "low"))]
        return Codes(*(flat for flat, _ in fields), fields[0][1], torch.tensor(n, dtype=torch.int32), bits)

    def exact(self, which, new):
        return Exact(*self.place(f"{which}_new", new))

    def place(self, name, rows):
        """Lay rows one behind the other with spare slots before, between and behind them, all poisoned."""
        starts = list(itertools.accumulate((len(x) + 3 for x in rows), initial=2))
        flat, check = guard(poison(rows[0].new_empty(starts.pop(), *rows[0].shape[1:])))
        for at, x in zip(starts, rows, strict=True):
            flat[at : at + len(x)] = x
        self.checks.append((check, name))
        return flat, torch.tensor(starts)

    def columns(self, forget=0.0, bias=False, T=1):
        """Number the tokens; some are forgotten, some positions lie ahead of the first of T queries."""
        n, M = [r[0] for r in self.rows], self.q.shape[1]
        pos = [torch.arange(t, dtype=torch.int32) for t in n]
        for x in pos:
            x[torch.rand(len(x), generator=self.rng) < forget] = HIDDEN
        self.more["pos"], self.more["col_start"] = self.place("pos", pos)
        if bias:
            self.more["bias"], _ = self.place("bias", [self.randn(t) for t in n])
        last = self.args["length"][:, None] - T + torch.arange(T, dtype=torch.int32)  # (R, T)
        self.more["q_pos"] = last.repeat(1, M // T).int()
        return self

    def run(self, **options):
        out = decode_codes(self.q, **self.args, **self.more, **options)
        for check, name in self.checks:
            check(name)
        return out

    def truth(self, **options):
        return decode_codes_naive(self.q.double(), **self.args, **self.more, **options)


def limit(case, ref):
    """Return the largest error allowed, relative to the RMS of ref: LIMITS, or more where PyTorch's fp32 needs more.

    An output that is one value, and far above the RMS, has that value's roundings, of minimum and sum, 2^-12 each.
    """
    if case.q.dtype == FULL:
        naive = decode_codes_naive(case.q, **case.args, **case.more)
        return max(LIMITS[FULL], 2 * error(naive, ref))
    return max(LIMITS[case.q.dtype], float(2**-11 * ref.abs().max() / ref.square().mean().sqrt()))


def close(case, **options):
    (o, lse), (ref, ref_lse) = case.run(lse=True, **options), case.truth(lse=True)
    most = limit(case, ref)
    assert error(o, ref) < most
    assert torch.equal(lse.isinf(), ref_lse.isinf()) and (lse - ref_lse).nan_to_num(0.0).abs().max() < max(most, 4e-5)
    assert torch.equal(case.run(**options), o.to(case.q.dtype))
    assert (o.double() - ref).square().mean() < (most / 4) ** 2 * ref.square().mean()


RAGGED = [(1, 0, 0), (15, 0, 7), (63, 32, 35), (500, 480, 372), (1023, 896, 895), (0, 0, 0)]  # tokens, nk, nv


@pytest.mark.parametrize("bits, dtype", [(2, HALF), (4, HALF), (8, HALF), (2, FULL)])
def test_ragged_rows_of_every_length(bits, dtype):
    case = Case(RAGGED, bits=bits, dtype=dtype)
    close(case)
    assert not case.run()[-1].any()  # an empty row


@pytest.mark.parametrize("bits, bits_v", [(1, 1), (3, 3), (5, 6), (6, 5), (2, 8), (4, 3), (8, 1)])
@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_widths(bits, bits_v, dtype):
    close(Case([(200, 192, 130), (65, 64, 33)], bits=bits, bits_v=bits_v, dtype=dtype))


@pytest.mark.parametrize("M", [1, 4, 8, 24, 64])
def test_query_rows(M):
    close(Case([(150, 128, 100), (70, 32, 69)], M=M, bits=2, dtype=HALF))


@pytest.mark.parametrize("D, group", [(128, 32), (32, 32), (128, 64), (64, 16)])
@pytest.mark.parametrize("bits, dtype", [(2, HALF), (4, HALF), (8, HALF), (4, FULL)])
def test_channels_and_groups(D, group, bits, dtype):
    close(Case([(200, 128, 130), (65, 64, 33)], D=D, bits=bits, group=group, dtype=dtype))


@pytest.mark.parametrize("row", [(300, 288, 0), (300, 0, 172), (300, 0, 300), (288, 288, 0), (256, 256, 256),
                                 (300, 32, 299), (300, 64, 64), (33, 32, 1), (40, 0, 0)], ids=str)  # fmt: skip
def test_ends(row):
    """Keys and values that are quantised to different lengths, either way round, or not at all."""
    close(Case([row, (70, 64, 6)], bits=2))
    close(Case([row, (70, 64, 6)], bits=4, dtype=HALF))


def test_bf16():
    for bits in (2, 8):
        close(Case([(300, 256, 172), (31, 0, 31)], bits=bits, dtype=torch.bfloat16))


def test_large_queries_of_a_bf16_model():
    """Queries beyond fp16's range are divided before they are cast."""
    case = Case([(100, 64, 36)], bits=4, dtype=torch.bfloat16)
    case.q *= 1e5
    case.more["scale"] *= 1e-5
    close(case)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=["fp32", "fp16"])
def test_forgotten_slots_and_bias(T, dtype):
    close(Case([(300, 256, 172), (1, 0, 0), (37, 32, 33), (0, 0, 0)], M=3 * T, dtype=dtype).columns(0.4, True, T))


def test_bias_without_positions():
    case = Case([(130, 96, 2)]).columns(bias=True)
    del case.more["pos"], case.more["q_pos"]
    close(case)


def test_window():
    case = Case([(300, 256, 172), (90, 64, 62)]).columns()
    case.more["window"] = 50
    close(case)


def test_nothing_visible_gives_zeros():
    case = Case([(300, 256, 172), (90, 64, 62)]).columns()
    case.more["q_pos"][0] = -1
    o = case.run()
    assert not o[0].any() and o[1].any()


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(splits):
    close(Case([(600, 512, 472), (90, 64, 62)], seed=1), splits=splits)


def test_same_bits_every_time():
    case = Case([(500, 480, 372), (63, 32, 35)], dtype=HALF)
    assert torch.equal(case.run(), case.run())


def test_naive_reads_what_quant_packs():
    """Keys and values that went through `quant.encode` are attended to as `quant.decode` gives them back."""
    torch.manual_seed(0)
    k, v, q = torch.randn(2, 96, 64), torch.randn(2, 77, 64), torch.randn(2, 3, 64)
    k_new, v_new = torch.randn(2, 5, 64), torch.randn(2, 24, 64)
    keys = quant.encode(k.view(6, 32, 64), 4)
    values = quant.encode(v.view(154, 1, 64), 4, 32)

    def ints(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    args = (
        Codes(**keys, start=torch.tensor([0, 3]), n=ints(3, 3), bits=4),
        Codes(**values, start=torch.tensor([0, 77]), n=ints(77, 77), bits=4),
        Exact(k_new.flatten(0, 1), torch.tensor([0, 5])),
        Exact(v_new.flatten(0, 1), torch.tensor([0, 24])),
        ints(101, 101),
    )
    k = torch.cat([quant.decode(**keys, bits=4, tokens=32).view(2, 96, 64), k_new], 1)
    v = torch.cat([quant.decode(**values, bits=4, tokens=1, group=32).view(2, 77, 64), v_new], 1)
    ref = (q @ k.mT * 0.125).softmax(-1) @ v
    assert error(decode_codes_naive(q, *args, scale=0.125, most=101), ref) < 2e-6
    assert error(decode_codes(q, *args, scale=0.125, most=101), ref) < 2e-6


def test_refuses():
    for options, why in (({"bits": 7}, "7 bits"), ({"D": 96}, "96 channels"), ({"M": 65}, "query rows"),
                         ({"group": 8}, "groups of 8")):  # fmt: skip
        case = Case([(40, 32, 0)], **options)
        with pytest.raises(NotImplementedError, match=why):
            case.run()
    case = Case([(40, 32, 0)])
    case.more["pos"] = torch.zeros(40)
    with pytest.raises(ValueError, match="come together"):
        case.run()


def inputs(n, D, seed=0):
    """Yield kinds of numbers, fp32 (n, D), that fp16 can hold the range of."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=rng)
    yield "normal", x
    yield "constant", torch.full_like(x, 0.3)
    yield "zero", torch.zeros_like(x)
    yield "negative", -x.abs() - 5
    yield "large", x * 8000
    yield "tiny", x * 1e-6
    yield "tinier", x * 1e-9
    yield "halves", torch.randint(0, 7, (n, D), generator=rng) / 2.0  # codes that lie between two integers
    yield "beyond fp16", x * 1e6
    yield "a far one", torch.where(x > 2, 60000.0, x)
    steps = torch.arange(n * D).view(n, D) % 31
    yield "one step", 1 + steps * 2**-13


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [FULL, HALF, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_packs_the_same_bits(bits, dtype):
    for T, C, group in ((32, 64, 0), (16, 128, 0), (1, 64, 32), (1, 128, 64), (4, 32, 16)):
        x = torch.stack([x for _, x in inputs(T, C)]).to(dtype)  # (11, T, C)
        for mine, ref in zip(encode_triton(x, bits, group), encode_naive(x, bits, group), strict=True):
            assert mine.dtype == ref.dtype and mine.shape == ref.shape and torch.equal(mine, ref)


def test_packing_stays_within_its_memory(monkeypatch):
    import nanokv.kernels.pack as module

    checks = []

    def empty(*shape, dtype, device):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        inside, check = guard(torch.zeros(*shape, dtype=dtype))
        checks.append(check)
        return inside

    k, v = (guard(torch.randn(shape))[0] for shape in ((3, 32, 64), (45, 1, 64)))
    expected = encode_naive(k, 3), encode_naive(v, 2, 32)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", empty)
        out = encode_triton(k, 3), encode_triton(v, 2, 32)
    assert len(checks) == 6
    for check in checks:
        check()
    for mine, ref in zip(out, expected, strict=True):
        assert all(map(torch.equal, mine, ref))


def test_packs_nothing():
    code, scale, low = encode_triton(torch.empty(0, 1, 64), 2, 32)
    assert code.shape == (0, 16) and scale.shape == low.shape == (0, 1, 2)
    assert encode_triton(torch.empty(0, 32, 64), 2)[0].shape == (0, 512)


def test_packing_refuses():
    with pytest.raises(NotImplementedError, match="32 by 80"):
        encode_triton(torch.zeros(1, 32, 80), 2)
    with pytest.raises(NotImplementedError, match="float64"):
        encode_triton(torch.zeros(1, 1, 64).double(), 2, 32)
