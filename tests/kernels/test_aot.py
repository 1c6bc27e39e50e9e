"""Every kernel compiled for GPUs that are not there: nothing spills, loads are wide, loops are short.

In a process of its own: a kernel that was decorated for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB that one block may have


def run(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def records():
    done = run("-m", "nanokv.kernels.report", "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_all_kernels_are_there_for_all_targets(records):
    names = {r["case"] for r in records}
    assert len(records) == len(names) * len(TARGETS)
    for kernel in ("decode fp16", "rope", "latent", "kivi fp16 2-bit", "kivi fp16 4-bit", "pack", "rmsnorm", "swiglu"):
        assert any(kernel in n for n in names), kernel


def test_nothing_spills_and_nothing_outgrows_a_processor(records):
    for r in records:
        where = f"{r['case']} on {r['target']}"
        assert r["spills"] == 0, where
        assert r["registers"] <= (512 if r["target"].startswith("gfx") else 255), where
        assert r["shared"] <= SHARED[r["target"]] * 1024, where


@pytest.mark.parametrize("many", ["M=64", "M=16"])
def test_many_query_rows_do_not_spill_either(many):
    """On the target where registers are scarcest; these are not in the default report."""
    done = run("-m", "nanokv.kernels.report", "--json", "-", "--targets", "gfx942", "--only", many)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout)
    assert len(records) >= 2 and {r["case"]: r["spills"] for r in records if r["spills"]} == {}


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kernel", ["decode fp16", "kivi fp16 2-bit", "kivi fp16 4-bit"])
def test_the_payload_is_loaded_16_bytes_at_a_time(records, kernel, D):
    found = [r for r in records if r["case"].startswith(f"{kernel} D={D}")]
    assert {r["target"] for r in found} == set(TARGETS)
    for r in found:
        wide = {int(k): n for k, n in r["loads"].items()}
        assert wide.get(16, 0) >= 2, f"{r['case']} on {r['target']}: {wide}"  # keys and values


@pytest.mark.parametrize("case,most", [("decode fp16", 14), ("kivi fp16 4-bit", 24), ("kivi fp16 2-bit", 20)])
def test_the_inner_loop_is_short(records, case, most):
    (r,) = [r for r in records if r["case"] == f"{case} D=64 M=3" and r["target"] == "sm_90"]
    assert 0 < r["per_token"] <= most  # warp instructions per token and KV head


def test_a_bad_configuration_is_seen():
    """Half the tile's registers for sixteen times the tile: the figures above would catch it."""
    code = """
from nanokv.kernels import aot, decode
fn, types, constants, aligned, _ = decode.aot_cases()["decode fp16 D=128 M=4"]
out = aot.cost(aot.compile(fn, types, constants | {"BT": 128}, "sm_90", aligned, num_warps=1, num_stages=1))
print(out["spills"], max(out["loads"]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 0


def test_bad_calls_get_one_line(monkeypatch):
    done = run("-m", "nanokv.kernels.report", "--only", "nonsense")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-m", "nanokv.kernels.report"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "unset" in done.stderr
