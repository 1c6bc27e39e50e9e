"""bench.py without a GPU: its contestants compute the same attention, and its command fails in one line."""

import json

import interpret  # noqa: F401
import pytest
import torch

from nanokv.kernels import bench


@pytest.fixture(scope="module")
def field():
    return bench.contestants("SmolLM2-135M", 96, 2, torch.float32, torch.device("cpu"))


def test_every_contestant_runs(field):
    assert list(field) == ["sdpa", "decode", "decode, 1/4 kept", "kivi 4-bit", "kivi 2-bit"]
    out = {name: run().reshape(6, 3, 64) for name, (run, _) in field.items()}
    assert interpret.error(out["decode"], out["sdpa"]) < 1e-5  # fp32, sums in another order
    rms = {
        n: float((o - out["sdpa"]).square().mean().sqrt() / out["sdpa"].square().mean().sqrt()) for n, o in out.items()
    }
    assert 0 < rms["kivi 4-bit"] < 0.5 * rms["kivi 2-bit"] < 0.5  # steps of 4 bits are 5 times smaller
    assert all(torch.isfinite(o).all() for o in out.values())


def test_bytes_to_read(field):
    whole = 2 * 6 * 96 * 64 * 4  # keys and values, rows, tokens, channels, fp32
    assert field["sdpa"][1] == field["decode"][1] == whole and field["decode, 1/4 kept"][1] == whole // 4
    for bits in (4, 2):  # codes, and an fp16 scale and minimum per 32
        assert field[f"kivi {bits}-bit"][1] == 2 * 6 * 96 * 64 * (bits / 8 + 4 / 32)


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
    monkeypatch.setattr("nanokv.eval.speed.bandwidth", lambda device, size: 1e9)
    monkeypatch.setattr(bench, "contestants", lambda *a: real(*a[:-1], torch.device("cpu")))
    monkeypatch.setattr(
        bench, "time_all", lambda field, rounds: {n: 10.0 + run().numel() * 0 for n, (run, _) in field.items()}
    )
    assert (
        bench.main(["--contexts", "64", "--batch", "1", "--dtype", "float32", "--json", str(tmp_path / "out.json")])
        == 0
    )
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["about"]["gpu"] == "no GPU" and len(out["records"]) == 2 * 5
    sdpa = out["records"][0]
    assert sdpa["name"] == "sdpa" and sdpa["share"] == pytest.approx(2 * 3 * 64 * 64 * 4 / 10e-6 / 1e9)
    text = capsys.readouterr().out
    assert "Llama-3-8B" in text and "1.00" in text and not list(tmp_path.glob("*.part"))
