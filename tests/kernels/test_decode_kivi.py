"""The fused decode kernel for KIVI caches and the packing kernels, in Triton's interpreter, against PyTorch."""

import itertools

import pytest
import torch
from interpret import error, guard, poison  # sets TRITON_INTERPRET, so it comes first

from nanokv.kernels.decode_kivi import decode_kivi_naive, decode_kivi_triton
from nanokv.kernels.pack import pack_keys_naive, pack_keys_triton, pack_values_naive, pack_values_triton
from nanokv.quant import PerChannel, PerToken

# Largest error relative to the RMS of the reference, before the output is rounded to q's dtype. In fp16 probabilities,
# values and, at 4 and 8 bits, codes times scales are rounded, each by up to 2^-11: up to 8e-4, 8e-4 and 1e-3 here. A
# bf16 model's keys and values are fp16 inside the kernel.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}
HIDDEN = 2**31 - 1


def pack_row(x, bits, group):
    """Pack the values of one row, x (t, D), from the beginning of a group."""
    return tuple(out[0] for out in pack_values_naive(x[None], bits, group, [0]))


class Case:
    """A ragged cache of rows of n tokens, nk of whose keys and nv of whose values are codes, between poisoned slots."""

    def __init__(self, rows, M=3, D=64, bits=2, group=32, dtype=torch.float32, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.rows, self.checks, self.group = rows, [], group
        n, nk, nv = zip(*rows, strict=True)
        offset = self.randn(D) * 3 * (torch.arange(D) % 8 == 0)  # some channels of keys are large for every token
        keys, values = [self.randn(t, D) + offset for t in n], [self.randn(t, D) for t in n]
        k_old = [pack_keys_naive(x[:t].view(-1, group, D), bits) for x, t in zip(keys, nk, strict=True)]
        whole = [torch.cat([x[:t], 9 * self.randn(-t % group, D)]) for x, t in zip(values, nv, strict=True)]
        v_old = [pack_row(x, bits, group) for x in whole]  # the last group has codes that nobody may see
        self.args = {"length": self.ints(n), "k_len": self.ints(nk), "v_len": self.ints(nv)}
        self.place("k_start", k_code=[x[0] for x in k_old], k_scale=[x[1] for x in k_old], k_low=[x[2] for x in k_old])
        self.place("v_code_start", v_code=[x[0] for x in v_old])
        self.place("v_stat_start", v_scale=[x[1][:t] for x, t in zip(v_old, nv, strict=True)],
                   v_low=[x[2][:t] for x, t in zip(v_old, nv, strict=True)])  # fmt: skip
        self.place("k_new_start", k_new=[x[t:].to(dtype) for x, t in zip(keys, nk, strict=True)])
        self.place("v_new_start", v_new=[x[t:].to(dtype) for x, t in zip(values, nv, strict=True)])
        self.q, check = guard(self.randn(len(rows), M, D).to(dtype))
        self.checks.append((check, "q"))
        self.args |= {"bits": bits, "group": group, "scale": D**-0.5, "most": max(n)}

    def randn(self, *shape):
        return torch.randn(shape, generator=self.rng)

    def ints(self, numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    def place(self, start, **fields):
        """Lay rows one behind the other with spare slots before, between and behind them, all poisoned."""
        for name, rows in fields.items():
            starts = list(itertools.accumulate((len(x) + 3 for x in rows), initial=2))
            flat, check = guard(poison(rows[0].new_empty(starts.pop(), *rows[0].shape[1:])))
            for at, x in zip(starts, rows, strict=True):
                flat[at : at + len(x)] = x
            self.args |= {name: flat, start: torch.tensor(starts)}
            self.checks.append((check, name))

    def columns(self, forget=0.0, bias=False, T=1):
        """Number the tokens; some are forgotten, some positions lie ahead of the first of T queries."""
        n, M = [r[0] for r in self.rows], self.q.shape[1]
        pos = [torch.arange(t, dtype=torch.int32) for t in n]
        for x in pos:
            x[torch.rand(len(x), generator=self.rng) < forget] = HIDDEN
        self.place("col_start", pos=pos)
        if bias:
            self.place("col_start", bias=[self.randn(t) for t in n])
        last = self.args["length"][:, None] - T + torch.arange(T, dtype=torch.int32)  # (R, T)
        self.args["q_pos"] = last.repeat(1, M // T).int()
        return self

    def run(self, **options):
        out = decode_kivi_triton(self.q, **self.args, **options)
        for check, name in self.checks:
            check(name)
        return out

    def truth(self, **options):
        return decode_kivi_naive(self.q.double(), **self.args, **options)


def limit(case, ref):
    """Return the largest error allowed, relative to the RMS of ref: LIMITS, or more where PyTorch's fp32 needs more.

    An output that is one value, and far above the RMS, has that value's roundings, of minimum and sum, 2^-12 each.
    """
    if case.q.dtype == torch.float32:
        naive = decode_kivi_naive(case.q, **case.args)
        return max(LIMITS[torch.float32], 1.5 * error(naive, ref))
    return max(LIMITS[case.q.dtype], float(2**-11 * ref.abs().max() / ref.square().mean().sqrt()))


def close(case, **options):
    (o, lse), (ref, ref_lse) = case.run(lse=True, **options), case.truth(lse=True)
    most = limit(case, ref)
    assert error(o, ref) < most
    assert torch.equal(lse.isinf(), ref_lse.isinf()) and (lse - ref_lse).nan_to_num(0.0).abs().max() < max(most, 4e-5)
    if case.q.dtype != torch.bfloat16:  # which the interpreter truncates to
        assert torch.equal(case.run(**options), o.to(case.q.dtype))
    assert (o.double() - ref).square().mean() < (most / 4) ** 2 * ref.square().mean()


HALF, FULL = torch.float16, torch.float32
RAGGED = [(1, 0, 0), (15, 0, 7), (63, 32, 35), (500, 480, 372), (1023, 896, 895), (0, 0, 0)]  # tokens, nk, nv


@pytest.mark.parametrize("bits, dtype", [(2, HALF), (4, HALF), (8, HALF), (2, FULL)])
def test_ragged_rows_of_every_length(bits, dtype):
    case = Case(RAGGED, bits=bits, dtype=dtype)
    close(case)
    assert not case.run()[-1].any()  # an empty row


@pytest.mark.parametrize("M", [1, 4, 8, 24, 64])
def test_query_rows(M):
    close(Case([(150, 128, 100), (70, 32, 69)], M=M, bits=2, dtype=torch.float16))


@pytest.mark.parametrize("D, group", [(128, 32), (96, 32), (32, 32), (80, 16), (128, 64), (64, 16)])
@pytest.mark.parametrize("bits, dtype", [(2, HALF), (4, HALF), (8, HALF), (4, FULL)])
def test_channels_and_groups(D, group, bits, dtype):
    close(Case([(200, 128, 130), (65, 64, 33)], D=D, bits=bits, group=group, dtype=dtype))


@pytest.mark.parametrize("row", [(300, 288, 0), (300, 0, 172), (300, 0, 300), (288, 288, 0), (256, 256, 256),
                                 (300, 32, 299), (300, 64, 64), (33, 32, 1), (40, 0, 0)], ids=str)  # fmt: skip
def test_regions(row):
    """Keys and values that are quantised to different lengths, either way round, or not at all."""
    close(Case([row, (70, 64, 6)], bits=2))
    close(Case([row, (70, 64, 6)], bits=4, dtype=torch.float16))


def test_bf16():
    for bits in (2, 8):
        close(Case([(300, 256, 172), (31, 0, 31)], bits=bits, dtype=torch.bfloat16))


def test_large_queries_of_a_bf16_model():
    """Queries beyond fp16's range are divided before they are cast."""
    case = Case([(100, 64, 36)], bits=4, dtype=torch.bfloat16)
    case.q *= 1e5
    case.args["scale"] *= 1e-5
    close(case)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=["fp32", "fp16"])
def test_forgotten_slots_bias_and_probabilities(T, dtype):
    case = Case([(300, 256, 172), (1, 0, 0), (37, 32, 33), (0, 0, 0)], M=3 * T, dtype=dtype)
    case.columns(forget=0.4, bias=True, T=T)
    (o, _, p), (ref, p_ref) = case.run(lse=True, probs=True), case.truth(probs=True)
    assert error(o, ref) < limit(case, ref)
    assert p.shape == (4, 3 * T, 300) and error(p, p_ref) < 10 * LIMITS[dtype]
    assert (p[p_ref == 0] == 0).all()  # hidden, forgotten and beyond a row's length


def test_probabilities_alone():
    case = Case([(130, 96, 2), (257, 256, 129)], dtype=torch.float32)
    (o, p), (ref, p_ref) = case.run(probs=True, splits=1), case.truth(probs=True)
    assert error(o, ref) < 2e-6 and error(p, p_ref) < 2e-5 and torch.allclose(p.sum(-1), torch.ones(2, 3), atol=1e-5)


def test_bias_without_positions():
    case = Case([(130, 96, 2)]).columns(bias=True)
    del case.args["pos"], case.args["q_pos"]
    close(case)


def test_window():
    case = Case([(300, 256, 172), (90, 64, 62)]).columns()
    case.args["window"] = 50
    close(case)


def test_nothing_visible_gives_zeros():
    case = Case([(300, 256, 172), (90, 64, 62)]).columns()
    case.args["q_pos"][0] = -1
    o, p = case.run(probs=True)
    assert not o[0].any() and not p[0].any() and o[1].any()


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(splits):
    close(Case([(600, 512, 472), (90, 64, 62)]), splits=splits)


def test_same_bits_every_time():
    case = Case([(500, 480, 372), (63, 32, 35)], dtype=torch.float16)
    assert torch.equal(case.run(), case.run())


def test_naive_reads_what_the_stores_hold():
    """The twin's own dequantisation is that of the stores that KIVI keeps."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 96, 64), torch.randn(2, 77, 64)
    keys, values = PerChannel(2, 4, 32), PerToken(2, 4, 32)
    keys.add([0, 1], k)
    values.add([0, 1], v)
    q, k_new, v_new = torch.randn(2, 3, 64), torch.randn(2, 5, 64), torch.randn(2, 24, 64)

    def begin(rows):
        return torch.tensor(rows.start)

    def ints(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    args = {
        "k_code": keys.rows.data["code"], "k_scale": keys.rows.data["scale"], "k_low": keys.rows.data["low"],
        "k_start": begin(keys.rows), "k_len": ints(96, 96), "v_code": values.codes.data["code"],
        "v_code_start": begin(values.codes), "v_scale": values.stats.data["scale"],
        "v_low": values.stats.data["low"], "v_stat_start": begin(values.stats), "v_len": ints(77, 77),
        "k_new": k_new.flatten(0, 1), "k_new_start": torch.tensor([0, 5]), "v_new": v_new.flatten(0, 1),
        "v_new_start": torch.tensor([0, 24]), "length": ints(101, 101), "bits": 4, "group": 32, "scale": 0.125,
        "most": 101}  # fmt: skip
    k, v = torch.cat([keys.read(), k_new], 1), torch.cat([values.read(), v_new], 1)
    ref = (q @ k.mT * 0.125).softmax(-1) @ v
    assert error(decode_kivi_naive(q, **args), ref) < 2e-6
    assert error(decode_kivi_triton(q, **args), ref) < 2e-6


def test_refuses():
    with pytest.raises(NotImplementedError, match="bits"):
        decode_kivi_triton(**_with(bits=3))
    with pytest.raises(NotImplementedError, match="channels"):
        decode_kivi_triton(**_with(D=80))
    with pytest.raises(NotImplementedError, match="query rows"):
        decode_kivi_triton(**_with(M=65))
    with pytest.raises(ValueError, match="come together"):
        decode_kivi_triton(**_with(pos=torch.zeros(40)))


def _with(D=64, M=3, **more):
    case = Case([(40, 0, 0)], M=M)
    empty = torch.zeros(1, M, D)
    return {"q": empty, **case.args, "k_new": torch.zeros(40, D), "v_new": torch.zeros(40, D), **more}


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


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_packs_the_same_bits(bits, dtype):
    for D, group in ((64, 32), (80, 16), (192, 64)):  # the last takes two programs, the second of them half full
        k = torch.stack([x for _, x in inputs(group, D)]).to(dtype)
        v = torch.stack([x for _, x in inputs(group + 9, D, seed=1)]).to(dtype)
        at = [0, group - 1, 7, 1, 0, 3, 8, 15, 14, 2, 0][: len(v)]
        for mine, ref in ((pack_keys_triton(k, bits), pack_keys_naive(k, bits)),
                          (pack_values_triton(v, bits, group, at), pack_values_naive(v, bits, group, at))):  # fmt: skip
            for a, b in zip(mine, ref, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_packing_stays_within_its_memory(monkeypatch):
    import nanokv.kernels.pack as module

    checks = []

    def empty(*shape, dtype, device):
        inside, check = guard(torch.zeros(*shape, dtype=dtype))
        checks.append(check)
        return inside

    k, v = (guard(torch.randn(shape))[0] for shape in ((2, 32, 96), (2, 45, 96)))
    expected = pack_keys_naive(k, 2), pack_values_naive(v, 2, 32, [20, 0])
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", empty)
        out = pack_keys_triton(k, 2), pack_values_triton(v, 2, 32, [20, 0])
    assert len(checks) == 6
    for check in checks:
        check()
    for mine, ref in zip(out, expected, strict=True):
        assert all(map(torch.equal, mine, ref))


def test_packs_nothing():
    code, scale, low = pack_values_triton(torch.empty(1, 0, 64), 2, 32, [0])
    assert code.shape == (1, 0, 8, 64) and scale.shape == low.shape == (1, 0, 2)
    assert pack_keys_triton(torch.empty(0, 32, 64), 2)[0].shape == (0, 8, 64)


def test_packing_refuses():
    with pytest.raises(NotImplementedError, match="groups of 8"):
        pack_keys_triton(torch.zeros(1, 8, 64), 2)
    with pytest.raises(NotImplementedError, match="float64"):
        pack_values_triton(torch.zeros(1, 1, 64).double(), 2, 32, [0])
    with pytest.raises(ValueError, match="does not divide"):
        pack_values_triton(torch.zeros(1, 1, 48), 2, 32, [0])
