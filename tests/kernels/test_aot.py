"""Every kernel compiled for GPUs that are not there: nothing spills, loads are wide, loops are short.

In a process of its own: a kernel that was decorated for the interpreter cannot be compiled. The installed Triton is the
newest promised; the slow test takes the oldest.
"""

import json
import os
import subprocess
import sys

import pytest

from nanokv.kernels import OLDEST

REPORT = ("-m", "nanokv.eval.kernels.report", "--json", "-")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB that one block may have


def run(*args, **more):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=1200)


def report(*args, **more) -> list[dict]:
    done = run(*REPORT, *args, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def records():
    return report()


def test_all_kernels_are_there_for_all_targets(records):
    names = {r["case"] for r in records}
    assert len(records) == len(names) * len(TARGETS)
    for kernel in ("decode fp16 D=64 M=3 rope pos", "D=16+48", "kivi fp16 2-bit", "kivi fp16 4-bit", "pack", "combine"):
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
    records = report("--targets", "gfx942", "--only", many)
    assert len(records) >= 2 and {r["case"]: r["spills"] for r in records if r["spills"]} == {}


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kernel", ["decode fp16", "kivi fp16 2-bit", "kivi fp16 4-bit"])
def test_the_payload_is_loaded_16_bytes_at_a_time(records, kernel, D):
    found = [r for r in records if r["case"].startswith(f"{kernel} D={D}")]
    assert {r["target"] for r in found} == set(TARGETS)
    for r in found:
        wide = {int(k): n for k, n in r["loads"].items()}
        assert wide.get(16, 0) >= 2, f"{r['case']} on {r['target']}: {wide}"  # keys and values


@pytest.mark.parametrize(
    "case,most", [("decode fp16", 9), ("kivi fp16 4-bit", 18), ("kivi fp16 2-bit", 16), ("kivi fp16 1-bit", 16)]
)
def test_the_inner_loop_is_short(records, case, most):
    (r,) = [r for r in records if r["case"] == f"{case} D=64 M=3" and r["target"] == "sm_90"]
    assert 0 < r["per_token"] <= most  # warp instructions per token and KV head


def test_the_loop_of_a_quantised_cache_is_that_of_its_codes():
    """It is the shorter of two; the other one, at the ends, reads exact numbers as well, half a tile at a time."""
    code = """
from nanokv.eval.kernels import aot
case = aot.cases()["kivi fp16 2-bit D=64 M=3"]
compiled = aot.compile(case, "sm_90")
print(*(aot.cost(compiled, i)["loop"] / (1, 0.5)[i] for i in (0, 1)))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    codes, ends = map(float, done.stdout.split())
    assert 0 < codes < ends


def test_a_bad_configuration_is_seen():
    """Half the tile's registers for sixteen times the tile: the figures above would catch it."""
    code = """
from nanokv.eval.kernels import aot
case = aot.cases()["decode fp16 D=128 M=4"]
case.constants |= {"BT": 128}
print(aot.cost(aot.compile(case, "sm_90", num_warps=1, num_stages=1))["spills"])
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


def test_cases_name_every_argument():
    code = """
from nanokv.eval.kernels import aot
for name, case in aot.cases().items():
    missing = {*case.kernel.arg_names} - {*case.types, *case.constants}
    assert not missing, (name, missing)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_oldest_promised_triton_compiles_them_too(tmp_path):
    """Fetched from the package index, beside the installed one."""
    version = ".".join(map(str, OLDEST["triton"])) + ".0"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"triton=={version}"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton {version} could not be fetched: {done.stderr.strip()[-200:]}")
    older = {"PYTHONPATH": str(tmp_path)}
    assert run("-c", "import triton; print(triton.__version__)", **older).stdout.strip() == version
    records = report("--targets", "sm_80", "sm_90", **older)
    assert len(records) > 20 and all(r["instructions"] > 0 for r in records)


def test_bad_calls_get_one_line(monkeypatch):
    done = run(*REPORT[:2], "--only", "nonsense")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, *REPORT[:2]], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "unset" in done.stderr
