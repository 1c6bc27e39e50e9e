"""The bench without a GPU: its contestants compute the same attention, and its command fails in one line."""

import json

import interpret  # noqa: F401
import pytest
import torch

from nanokv.eval.kernels import bench


@pytest.fixture(scope="module")
def field():
    return bench.contestants("SmolLM2-135M", 96, 2, torch.float32, torch.device("cpu"), copies=2)


def test_every_contestant_runs(field):
    assert list(field) == ["sdpa", "decode", "decode, 1/4 kept", "kivi 4-bit", "kivi 2-bit"]
    out = {name: [run().reshape(6, 3, 64) for run in runs] for name, (runs, _) in field.items()}
    for i in range(2):
        o = {name: copies[i] for name, copies in out.items()}
        assert interpret.error(o["decode"], o["sdpa"]) < 1e-5  # fp32, sums in another order
        rms = {name: float((x - o["sdpa"]).square().mean() / o["sdpa"].square().mean()) ** 0.5 for name, x in o.items()}
        assert 0 < rms["kivi 4-bit"] < 0.5 * rms["kivi 2-bit"] < 0.5  # steps of 4 bits are 5 times smaller
        assert all(torch.isfinite(x).all() for x in o.values())
    assert not torch.equal(*out["sdpa"])  # two caches, not one twice


def test_bytes_to_read(field):
    whole = 2 * 6 * 96 * 64 * 4  # keys and values, rows, tokens, channels, fp32
    assert field["sdpa"][1] == field["decode"][1] == whole and field["decode, 1/4 kept"][1] == whole // 4
    for bits in (4, 2):  # codes, and an fp16 scale and minimum per 32
        assert field[f"kivi {bits}-bit"][1] == 2 * 6 * 96 * 64 * (bits / 8 + 4 / 32)


def test_copies_flush_the_cache():
    assert bench.needed(10 << 20, 50 << 20) == 15 and bench.needed(1 << 40, 50 << 20) == 2
    assert bench.needed(1, 50 << 20) == bench.MOST_COPIES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert bench.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "GPU" in err


def test_the_whole_command_as_on_a_gpu(monkeypatch, capsys, tmp_path):
    """Only the clock, the bandwidth and the device are replaced; the figures mean nothing."""
    real = bench.contestants
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("Properties", (), {"L2_cache_size": 1000}))
    monkeypatch.setattr("nanokv.eval.speed.bandwidth", lambda device, size: 1e9)
    monkeypatch.setattr(bench, "contestants", lambda m, T, B, dtype, _, n: real(m, T, B, dtype, torch.device("cpu"), n))
    monkeypatch.setattr(
        bench, "time_all", lambda field, rounds: {n: 10.0 + runs[0]().numel() * 0 for n, (runs, _) in field.items()}
    )
    file = tmp_path / "out.json"
    assert bench.main(["--contexts", "64", "--batch", "1", "--dtype", "float32", "--json", str(file)]) == 0
    out = json.loads(file.read_text())
    assert out["about"]["gpu"] == "no GPU" and len(out["records"]) == 2 * 5
    sdpa = out["records"][0]
    assert sdpa["name"] == "sdpa" and sdpa["share"] == pytest.approx(2 * 3 * 64 * 64 * 4 / 10e-6 / 1e9)
    text = capsys.readouterr().out
    assert "Llama-3-8B" in text and "1.00" in text and not list(tmp_path.glob("*.part"))
