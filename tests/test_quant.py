"""Groups, scales, and codes of 1 to 8 bits in bytes."""

import pytest
import torch

from nanokv import quant

WIDTHS = range(1, 9)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [8, 24, 64])
def test_packing_is_undone_and_takes_the_bytes_it_should(bits, n):
    codes = torch.randint(0, 2**bits, (3, 2, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = quant.pack(codes, bits)
    assert packed.dtype is torch.uint8 and packed.shape == (3, 2, n * bits // 8)
    assert torch.equal(quant.unpack(packed, bits), codes)


def test_codes_of_each_byte_are_far_apart():
    packed = quant.pack(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8), 2)
    assert packed.tolist() == [1 | 3 << 2 | 1 << 4 | 3 << 6, 2 | 0 << 2 | 2 << 4 | 0 << 6]
    with pytest.raises(NotImplementedError, match="4 numbers of 3 bits do not fill whole bytes"):
        quant.pack(torch.zeros(4, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_is_at_most_half_a_step(bits):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(bits)) * 3
    codes, scale, low = quant.quantise(x, bits)
    assert codes.dtype is torch.uint8 and scale.dtype is low.dtype is torch.float16 and int(codes.max()) < 2**bits
    error = (quant.dequantise(codes, scale, low) - x).abs()
    rounding = low.float().abs() * 2**-11 + scale.float() * 2**-11 * (2**bits - 1) + 1e-6  # of minimum and scale
    assert (error <= scale.float()[:, None] / 2 + rounding[:, None]).all()


def test_groups_that_are_constant_huge_or_tiny():
    x = torch.tensor([[5.0] * 8, [1e30, -1e30, *[0.0] * 6], [1e-9 * i for i in range(8)]])
    codes, scale, low = quant.quantise(x, 4)
    back = quant.dequantise(codes, scale, low)
    assert back[0].tolist() == [5.0] * 8 and not codes[0].any() and scale[0] == 1
    assert back.isfinite().all() and back[1, 0] > 6e4 and back[1, 1] < -6e4
    assert back[2].abs().max() < 1e-7


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens, group", [(16, 0), (1, 8), (4, 16)])
def test_slots_come_back(bits, tokens, group):
    x = torch.randn(5, tokens, 48, generator=torch.Generator().manual_seed(7))
    fields = quant.encode(x, bits, group)
    assert fields["code"].shape == (5, tokens * 48 * bits // 8)
    assert fields["scale"].shape == ((5, tokens, 48 // group) if group else (5, 48))
    back = quant.decode(**fields, bits=bits, tokens=tokens, group=group)
    want = quant.dequantise(*quant.quantise(x.unflatten(-1, (-1, group)) if group else x.mT, bits))
    assert torch.equal(back, want.flatten(-2) if group else want.mT)


def test_a_group_that_does_not_divide_is_made_smaller():
    assert [quant.divisor(48, g) for g in (64, 48, 40, 17, 7, 1)] == [48, 48, 24, 16, 6, 1]
    assert quant.encode(torch.randn(2, 1, 24), 4, 32)["scale"].shape == (2, 1, 1)
