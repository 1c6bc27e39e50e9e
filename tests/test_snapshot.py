"""Saving, loading and cloning a cache."""

import os
import random
import threading

import pytest
import tiny
import torch

from nanokv import KVCache, generate, methods
from nanokv.method import Policy

SPECS = [
    "full",
    "kivi(bits=2,residual=32)",
    "streamingllm(budget=40)",
    "streamingllm(budget=90)+kivi(bits=4,residual=32)",
]


@pytest.fixture(scope="module")
def m():
    return tiny.model()


@pytest.mark.parametrize("spec", SPECS)
def test_continuing_from_a_file_or_a_clone_is_bit_identical(m, spec, tmp_path):
    cache = KVCache(m, spec)
    text = list(generate(m, cache, tiny.ids(120)[0], 30))
    cache.save(tmp_path / "cache.safetensors")
    loaded, clone = KVCache.load(tmp_path / "cache.safetensors", m), cache.clone()
    assert loaded.spec == clone.spec == cache.spec and loaded.ledger() == clone.ledger() == cache.ledger()
    want = list(generate(m, cache, text[-1:], 60))
    assert list(generate(m, clone, text[-1:], 60)) == want
    assert list(generate(m, loaded, text[-1:], 60)) == want
    logits = [m(tiny.ids(1), c) for c in (cache, clone, loaded)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert [f.name for f in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_clone_shares_nothing_that_changes(m):
    cache = KVCache(m, "kivi(bits=4,residual=32)")
    tiny.feed(m, cache, tiny.ids(100))
    before = m(tiny.ids(1), cache.clone())
    branch = cache.clone()
    tiny.steps(m, branch, tiny.ids(50, seed=9))
    branch.layers[0].storage.new["k"]["x"].zero_()
    assert torch.equal(m(tiny.ids(1), cache), before)
    first = branch.layers[0]
    assert branch.model is m and first.attn is m.layers[0].self_attn


def test_an_empty_cache_can_be_saved(m, tmp_path):
    KVCache(m, "kivi").save(tmp_path / "c")
    assert torch.equal(m(tiny.ids(9), KVCache.load(tmp_path / "c", m)), m(tiny.ids(9), KVCache(m)))


def test_parameters_are_saved_whatever_way_they_were_given(m, tmp_path):
    kivi = next(i for i in methods() if i.name == "kivi")
    KVCache(m, [kivi(bits=8, residual=64)]).save(tmp_path / "c")
    storage = KVCache.load(tmp_path / "c", m).storage
    assert (storage.bits, storage.group, storage.residual) == (8, 32, 64)


def test_columns_and_notes_are_saved(m, tmp_path, monkeypatch):
    class Mark(Policy):
        """Change everything there is to change."""

        def after_prompt(self, cache):
            cache.set_column("mark", cache.column("mark") + 1)
            cache.notes["budget"] = [7.5]
            cache.keep(cache.token % 3 != 1)

    cache = KVCache(m, [Mark()])
    tiny.feed(m, cache, tiny.ids(40))
    cache.methods = []  # so that the spec can be read back; what matters here is the layer's state
    cache.save(tmp_path / "c")
    loaded = KVCache.load(tmp_path / "c", m)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(a.column("mark"), b.column("mark")) and b.notes == {"budget": [7.5]}
        assert torch.equal(a.token, b.token)


def test_another_model_is_refused(m, tmp_path):
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(20))
    cache.save(tmp_path / "c")
    for other in (tiny.model(seed=1), tiny.model(dtype=torch.bfloat16), tiny.model(rope_theta=500.0)):
        with pytest.raises(ValueError, match="another model"):
            KVCache.load(tmp_path / "c", other)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_saved_cache_is_a_file_as_any_other(m, mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        KVCache(m).save(tmp_path / "c")
    finally:
        os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("path", ["missing/c", ""])
def test_where_nothing_can_be_written_it_is_an_os_error(m, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):
        KVCache(m).save(path)
    assert not list(tmp_path.iterdir())


def test_two_may_save_to_one_path(m, tmp_path):
    long, tries = tmp_path / ("c" * 250), []

    def save():
        for _ in range(20):
            KVCache(m).save(long)
            tries.append(KVCache.load(long, m))

    threads = [threading.Thread(target=save) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(tries) == 60 and [f.name for f in tmp_path.iterdir()] == [long.name]


def test_a_failed_save_leaves_the_old_file(m, tmp_path, monkeypatch):
    cache = KVCache(m)
    tiny.feed(m, cache, tiny.ids(20))
    cache.save(tmp_path / "c")
    old = (tmp_path / "c").read_bytes()
    tiny.feed(m, cache, tiny.ids(20))
    monkeypatch.setattr("nanokv.snapshot._checksum", lambda f: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        cache.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_thousand_damaged_files_are_all_refused(tmp_path):
    m = tiny.model(n_layers=1, head_dim=32)
    cache = KVCache(m, "streamingllm(budget=20)+kivi(bits=2,residual=32)")
    tiny.feed(m, cache, tiny.ids(40), 4)
    cache.save(tmp_path / "c")
    good, rng = (tmp_path / "c").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(1000):
        bad = bytearray(good)
        if i % 4 == 0:
            del bad[rng.randrange(len(bad)) :]
        else:  # half of the flips in the header, where they could do most
            bad[rng.randrange(header if i % 2 else len(bad))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="damaged") as error:
            KVCache.load(tmp_path / "bad", m)
        assert "\n" not in str(error.value)
    KVCache.load(tmp_path / "c", m)


def test_a_future_format_is_refused_by_name(m, tmp_path, monkeypatch):
    monkeypatch.setattr("nanokv.snapshot.FORMAT", "2")
    KVCache(m).save(tmp_path / "c")
    monkeypatch.setattr("nanokv.snapshot.FORMAT", "1")
    with pytest.raises(ValueError, match="format 2.*reads format 1"):
        KVCache.load(tmp_path / "c", m)


def test_what_is_made_from_the_model_is_shared_not_saved(m, tmp_path):
    cache = KVCache(m, "xquant(group=32,mode='latent')")
    tiny.feed(m, cache, tiny.ids(70))
    cache.save(tmp_path / "c")
    loaded = KVCache.load(tmp_path / "c", m)
    ours, theirs = (c.layers[0].storage.constants() for c in (cache, loaded))
    assert len(ours) == 4 and all(a is b for a, b in zip(ours, theirs, strict=True))
    assert loaded.ledger() == cache.ledger() and (tmp_path / "c").stat().st_size < 2 * cache.nbytes
