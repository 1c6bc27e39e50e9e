"""The storage with exact ends and a packed middle, under quantisers and bases made for these tests."""

import pytest
import tiny
import torch
from methods_for_tests import Joint, Rounded

from nanokv import KVCache, generate, generate_batch
from nanokv.method import Basis, Policy
from nanokv.packed import Packed


class Turn(Basis):
    """A random orthonormal basis of `n` columns that is made anew when a row has doubled."""

    learns = True
    least = 6

    def __init__(self, n=32):
        self.n, self.fits = n, []

    def fit(self, x, which, at):
        self.fits.append((which, len(x), at.layer, tuple(at.sequence), tuple(at.head)))
        rng = torch.Generator().manual_seed(len(x))
        return torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=rng))[0][:, : self.n]


def read(m, spec, n=40, more=0, B=1):
    cache = KVCache(m, spec)
    tiny.feed(m, cache, tiny.ids(n, batch=B))
    if more:
        tiny.steps(m, cache, tiny.ids(more, seed=4, batch=B))
    return cache, cache.layers[0].storage


def truth(m, n=40, more=0, B=1):
    return read(m, "full", n, more, B)[0].layers[0].storage.read()


# Exact ends


def test_ends_are_exact_and_the_middle_is_packed():
    m = tiny.model(dtype=torch.float64, n_layers=1)
    cache, storage = read(m, Rounded(n_sink=3, residual=7), 40, 5)
    k, v = storage.read()
    k0, v0 = truth(m, 40, 5)
    packed = storage.packed("k")
    assert packed.shape == (2, 45) and packed.sum(1).tolist() == [35, 35] and not packed[:, :3].any()
    for x, x0 in ((k, k0), (v, v0)):
        assert torch.equal(x[~packed], x0[~packed]) and torch.equal(x[packed], x0[packed].round())
    row = cache.ledger()["layers"][0]
    assert row["residual"] == 2 * 10 * 2 * 32 * 8 and row["payload"] == 2 * 35 * 2 * 32 * 8


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("residual", [0, 8])
def test_blocks_and_how_far_ahead(block, residual):
    m = tiny.model(n_layers=1)
    cache, storage = read(m, Rounded(residual=residual, block=block), 30)
    for i in range(40):
        n, ahead = storage.new["v"].n[0], cache.ahead()
        assert residual <= n < residual + block
        tiny.steps(m, cache, tiny.ids(1, seed=i))
        assert (ahead == 1) == (storage.new["v"].n[0] < n + 1)


def test_keys_and_values_are_packed_apart():
    m = tiny.model(dtype=torch.float64, n_layers=1)
    cache, storage = read(m, "kivi(bits_k=4, bits_v=2, group=16, residual=16)", 40, 3)
    assert storage.packed("k").sum(1).tolist() == [32, 32] and storage.packed("v").sum(1).tolist() == [27, 27]
    assert storage.width == {"k": 4, "v": 2} and storage.newest() == [11, 11]


def test_an_error_term_is_added_when_read():
    m = tiny.model(dtype=torch.float64, n_layers=1)
    plain, repaired = (read(m, Rounded(repair=repair), 40, 5)[1] for repair in (False, True))
    k0, v0 = truth(m, 40, 5)
    assert tiny.rms(plain.read()[0], k0) > 0.05
    assert tiny.rms(repaired.read()[0], k0) < 1e-12 and tiny.rms(repaired.read()[1], v0) < 1e-12
    assert set(repaired.old["k"].data) == {"x", "error"}


def test_joint_rows_hold_all_heads_of_a_token():
    m = tiny.model(dtype=torch.float64, n_layers=1)
    cache, storage = read(m, Joint(), 40, 5)
    assert storage.widths == {64} and len(storage.old["k"].n) == 1
    for x, x0 in zip(storage.read(), truth(m, 40, 5), strict=True):
        assert x.shape == (2, 45, 32) and torch.equal(x, x0)
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (50, 12)]
    for spec in (Joint(), ["adakv(budget=16, window=4)", Joint()], ["h2o(budget=16)", Joint()]):
        got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 15), strict=True))
        assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 15)) for t in texts]
    exact = list(generate(m, KVCache(m, ["adakv(budget=16, window=4)"]), texts[0], 15))
    assert list(generate(m, KVCache(m, ["adakv(budget=16, window=4)", Joint()]), texts[0], 15)) == exact


# Bases


def test_a_basis_is_made_for_each_row_once_there_is_enough_and_again_when_it_has_doubled():
    m, basis = tiny.model(dtype=torch.float64, n_layers=2), Turn()
    cache, storage = read(m, [basis], 8)
    assert not basis.fits and storage.U["k"] == [None, None]  # 4 sinks and 4 others: 6 are wanted
    tiny.steps(m, cache, tiny.ids(40, seed=4))
    made = [f for f in basis.fits if f[0] == "k" and f[2] == 0]  # of the first layer
    assert [n for _, n, *_ in made] == [7, 7, 18, 18, 40, 40]
    assert {(layer, b, h) for *_, layer, b, h in made} == {(0, (0,), (0,)), (0, (0,), (1,))}
    k0, v0 = truth(m, 8, 40)
    assert tiny.rms(storage.read()[0], k0) < 1e-6 and tiny.rms(storage.read()[1], v0) < 1e-6


def test_attention_in_parts_is_attention_over_what_is_read():
    m = tiny.model(dtype=torch.float64, n_layers=2)
    for n in (32, 12):
        cache, storage = read(m, [Turn(n), Rounded()], 90)
        layer = cache.layers[0]
        q, pos = torch.randn(1, 6, 1, 32, dtype=torch.float64), torch.tensor([[89]])
        p = layer.probs(q, pos)[0].unflatten(0, (2, 3))[:, :, 0].double()
        assert len(storage.parts("k")) == 3
        assert tiny.rms(storage.attend(q, pos, layer)[0, :, 0], (p @ storage.read()[1]).flatten(0, 1)) < 1e-5


def test_a_row_with_too_few_survivors_stays_exact():
    m = tiny.model(dtype=torch.float64)
    for spec in ("knorm(budget=2)+kivi(group=16, residual=16, n_sink=4)", ["knorm(budget=2)", Turn()]):
        cache, storage = read(m, spec, 40)
        assert storage.first["k"].n == [0, 0] and storage.new["k"].n == [2, 2]
        tiny.steps(m, cache, tiny.ids(30, seed=4))
        texts = [tiny.ids(n, seed=n)[0].tolist() for n in (40, 3)]
        got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 15), strict=True))
        assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 15)) for t in texts]


def test_bases_of_fewer_channels_need_whole_bytes():
    m = tiny.model()
    cache = KVCache(m, "pca(rank=4, least=8)+kivi(bits=5, group=16, residual=16)")
    with pytest.raises(NotImplementedError, match="4 numbers of 5 bits do not fill whole bytes"):
        tiny.feed(m, cache, tiny.ids(60))
    assert KVCache(m, "pca(rank=8, least=8)+kivi(bits=5, group=16, residual=16)").storage.name == "kivi"


# Overwriting and forgetting


def test_what_is_not_packed_yet_can_be_written():
    m = tiny.model(dtype=torch.float64, n_layers=1)
    cache, storage = read(m, Rounded(n_sink=2, residual=8), 30)
    before = [t.clone() for t in storage.read()]
    new = torch.randn(2, 2, 32, dtype=torch.float64)
    storage.write(torch.tensor([[25, -1], [-1, 29]]), new, -new)
    k, v = storage.read()
    assert torch.equal(k[0, 25], new[0, 0]) and torch.equal(v[1, 29], -new[1, 1])
    same = torch.ones(2, 30, dtype=torch.bool)
    same[0, 25] = same[1, 29] = False
    assert torch.equal(k[same], before[0][same]) and torch.equal(v[same], before[1][same])
    for slot in (2, 21, 0):
        with pytest.raises(ValueError, match="rounded cannot overwrite entries that it has packed"):
            storage.write(torch.tensor([[slot], [-1]]), new[:, :1], new[:, :1])


def test_policies_write_before_a_prompts_entries_are_packed():
    class Doubles(Policy):
        def after_prompt(self, cache):
            k, v = cache.read()
            index = torch.arange(cache.N).expand(cache.B, cache.config.n_kv_heads, -1)
            cache.write(index, k, 2 * v)

    m = tiny.model(dtype=torch.float64, n_layers=1)
    _, storage = read(m, [Doubles(), Rounded(repair=True)], 30)
    assert tiny.rms(storage.read()[1], 2 * truth(m, 30)[1]) < 1e-12


@pytest.mark.parametrize("spec", ["kivi(group=8, residual=16)", "kivi(group=8, residual=16, n_sink=3)"])
def test_a_group_dies_with_its_last_entry_and_nothing_is_packed_twice(spec):
    class Scatter(Policy):
        def after_step(self, cache, q, pos):
            if cache.next_position == [70]:
                cache.keep((cache.token % 8 == 5) | (cache.token >= 50) | (cache.token < 3))
            if cache.next_position == [120]:
                cache.keep((cache.token >= 80) | (cache.token == 21))

    m = tiny.model(dtype=torch.float64, n_layers=1)
    cache, storage = read(m, [Scatter(), spec], 69)
    values = {}
    for step in range(90):
        tiny.steps(m, cache, tiny.ids(1, seed=step))
        layer = cache.layers[0]
        k, packed = storage.read()[0], storage.packed("k")
        token = layer.token.expand(1, 2, -1)[0]
        for h in range(2):
            for slot, t in enumerate(token[h].tolist()):
                if t < 1000 and packed[h, slot]:
                    old = values.setdefault((h, t), k[h, slot].clone())
                    assert torch.equal(old, k[h, slot]), "packed again"
    assert cache.live_positions(0, 0).tolist() == [21, *range(80, 159)]
    assert layer.n_slots[0] < 80 + 16 + 1 + 16


def test_batches_of_unequal_lengths_under_a_basis_and_codes():
    m = tiny.model(dtype=torch.float64)
    spec = ["snapkv(budget=24, window=4)", "adakv", "pca(rank=8, least=8)", "kivi(group=8, residual=8, n_sink=2)"]
    texts = [tiny.ids(n, seed=n)[0].tolist() for n in (60, 25, 3)]
    got = list(zip(*generate_batch(m, KVCache(m, spec), texts, 40), strict=True))
    assert [list(g) for g in got] == [list(generate(m, KVCache(m, spec), t, 40)) for t in texts]


@pytest.mark.parametrize("given, words", [
    ({"bits": 9}, "bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9"),
    ({"bits_v": -1}, "bits_v must be one of 0, 1"),
    ({"residual": -1}, "residual must be at least 0"),
    ({"block": 0}, "block must be at least 1"),
])  # fmt: skip
def test_parameters_out_of_range(given, words):
    with pytest.raises(ValueError, match=words):
        Packed(**given)
