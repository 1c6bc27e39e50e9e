"""Compile Triton kernels for GPUs that are not there, and read off what they cost: registers, spills, loads, loops.

Nothing here touches a driver. NVIDIA targets are disassembled with the tools inside the triton wheel; AMD's assembly
carries its own figures. A kernel that was decorated under TRITON_INTERPRET=1 cannot be compiled in the same process.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault(
    "TRITON_DEFAULT_FP_FUSION", "1"
)  # multiply and add in one, which Triton warns it may leave some day

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COMPUTES = re.compile("MMA|FFMA|FMUL|HFMA2")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile(fn, types: dict, constants: dict, target: str, aligned: tuple = (), **options):
    """Compile a @triton.jit function ahead of time.

    `types` maps run-time arguments to "*fp16", "i32" and the like, `constants` maps tl.constexpr ones to values.
    Pointers, and the integers named in `aligned`, are divisible by 16: only then loads are wide.
    """
    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    wide = [i for i, n in enumerate(names) if n in aligned or signature[n].startswith("*")]
    source = ASTSource(fn, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in wide})
    return triton.compile(source, target=TARGETS[target], options=options)


def cost(compiled) -> dict:
    """Return registers, spills, shared (bytes), loads (bytes per thread -> count), mma, loop and instructions.

    `loop` counts the instructions of the longest innermost loop that computes, per warp and iteration.
    """
    return (_nvidia if "cubin" in compiled.asm else _amd)(compiled)


def _nvidia(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        lines = _run("nvdisasm", "-c", path).splitlines()
    registers, stack, local = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK", "LOCAL"))
    places, code = {}, []
    for line in lines:
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            places[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", x).split()[0] for x in code)
    loops = []
    for i, x in enumerate(code):
        back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", x)
        if back and places.get(back[1], i) < i - 1 and COMPUTES.search(" ".join(code[places[back[1]] : i + 1])):
            loops.append((places[back[1]], i + 1))
    inner = [b - a for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return {
        "registers": registers,
        "spills": sum(n for x, n in names.items() if re.match("LDL|STL", x)) + stack + local,
        "shared": compiled.metadata.shared,
        "loads": _ptx_loads(compiled.asm["ptx"]),
        "mma": sum(n for x, n in names.items() if "MMA" in x and not x.startswith("HFMA2")),  # which loads constants
        "loop": max(inner, default=0),
        "instructions": len(code),
    }


def _ptx_loads(ptx: str) -> dict[int, int]:
    """Count the loads from global memory by bytes per thread, those that go straight to shared memory too."""
    out = Counter(int(b, 0) for b in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx))
    for v, bits in re.findall(r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        out[int(v or 1) * int(bits) // 8] += 1
    return dict(sorted(out.items(), reverse=True))


def _amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def figure(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
    loads = Counter()
    for kind, n in re.findall(
        r"\b(?:global|buffer)_load_(ubyte|sbyte|ushort|sshort|short|dword)(?:_d16\w*)?(?:x(\d))?", text
    ):
        loads[widths[kind] * int(n or 1)] += 1
    return {
        "registers": figure("vgpr_count"),
        "spills": sum(map(figure, ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"))),
        "shared": figure("group_segment_fixed_size"),
        "loads": dict(sorted(loads.items(), reverse=True)),
        "mma": len(re.findall(r"\bv_mfma_\w+", text)),
        "loop": 0,  # not read off this assembly
        "instructions": len(re.findall(r"^\s+(?:[vs]|ds|global|buffer)_\w+", text, re.M)),
    }


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
