"""Compile Triton kernels for GPUs that are not there, and read off what they cost: registers, spills, loads, loops.

Nothing here touches a driver. NVIDIA targets are disassembled with the tools inside the triton wheel; AMD's assembly
carries its own figures. A kernel that was decorated under TRITON_INTERPRET=1 cannot be compiled in the same process.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# multiply and add in one, which Triton warns it may leave some day
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanokv.kernels import decode, decode_codes, pack  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
COMPUTES = re.compile("MMA|FFMA|FMUL|HFMA2")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = ("split_len",)  # integers that are divisible by 16: only then loads are wide


@dataclass
class Case:
    """One configuration of a kernel: argument -> type or value, and by what the result is told apart.

    options: "cuda" or "hip" -> warps, stages. loop: the number of the loop that matters, in the order of the code.
    """

    kernel: object
    types: dict[str, str]
    constants: dict
    options: dict[str, dict] = field(default_factory=lambda: dict.fromkeys(("cuda", "hip"), {"num_warps": 4}))
    loop: int = 0


def cases() -> dict[str, Case]:
    """Return representative configurations, by name; those for AMD alone end in (AMD)."""
    out = {}
    half, brain, full = TYPES
    every = ("pos", "window", "bias")
    for dtype, M, D, DV, flags in (
        *((dtype, M, D, D, ()) for dtype, M, D in ((half, 3, 64), (brain, 3, 64), (full, 3, 64), (half, 8, 80))),
        *((dtype, M, D, D, ()) for dtype, M, D in ((half, 8, 96), (half, 4, 128), (half, 64, 128), (full, 4, 128))),
        *((half, M, D, D, every) for M, D in ((3, 64), (4, 128), (64, 128))),
        (half, 3, 64, 64, ("pos",)),
        *((dtype, 3, 32, 32, ()) for dtype in (half, brain, full)),  # coordinates of low rank
        *((half, M, D, DV, ()) for M, D, DV in ((3, 16, 48), (4, 7, 100), (4, 256, 256))),
        (full, 4, 256, 256, ()),
        *((dtype, 3, 64, 64, ("rope", "pos")) for dtype in (half, brain, full)),
        *((half, M, D, D, ("rope", "pos")) for M, D in ((8, 80), (8, 96), (4, 128))),
        (full, 4, 128, 128, ("rope", "pos")),
        *((half, M, D, D, ("rope", *every)) for M, D in ((3, 64), (16, 128))),
    ):
        out |= _decode(dtype, M, D, DV, flags)
    for dtype, bits, M, D, flags in (
        *((dtype, bits, M, D, ()) for dtype in TYPES for bits in (2, 4, 8) for M, D in ((3, 64), (4, 128))),
        *((half, bits, 3, 64, ()) for bits in (1, 3)),
        *((half, 2, 16, D, ()) for D in (64, 128)),
        (full, 4, 16, 128, ()),
        (half, 2, 3, 64, every),
    ):
        out |= _codes(dtype, bits, M, D, flags)
    types = {"p_part": "*fp32", "p_part_lse": "*fp32", "p_o": "*fp16", "p_lse": "*fp32", "n_splits": "i32"}
    for D in (64, 128, 256):
        out[f"combine D={D}"] = Case(decode.combine, types, {"M": 3, "DV": D, "BDV": D, "BS": decode.MOST_SPLITS})
    for name in TYPES.values():
        for bits in (2, 3, 4, 8):
            types = {"p_x": f"*{name}", "p_code": "*u8", "p_scale": "*fp16", "p_low": "*fp16", "n": "i32"}
            keys = {"BITS": bits, "N": 32 * 64, "L": 64, "AXIS": 1, "BS": pack.NUMBERS // (32 * 64)}
            values = {"BITS": bits, "N": 64, "L": 2, "AXIS": 2, "BS": pack.NUMBERS // 64}
            out[f"pack keys {name} {bits}-bit"] = Case(pack.encode, types, keys)
            out[f"pack values {name} {bits}-bit"] = Case(pack.encode, types, values)
    return out


def _decode(dtype, M: int, D: int, DV: int, flags: tuple) -> dict[str, Case]:
    rope = "rope" in flags
    title = f"decode {TYPES[dtype]} D={D}{f'+{DV}' * (DV != D)}"
    row = {"ROW_K": D if D == DV and D > 32 else D + DV}  # coordinates lie side by side
    constants = row | {"ROW_V": row["ROW_K"], "ROW_C": D if rope else 0}
    types = {"p_k": TYPES[dtype], "p_v": TYPES[dtype], "p_start": "i64", "p_cos": "fp32", "p_sin": "fp32"}
    constants |= {} if rope else {"p_cos": None, "p_sin": None}
    sizes = {target: decode.sizes(dtype, M, D, DV, rope, amd=target == "hip") for target in ("cuda", "hip")}
    return _split(title, decode.split, dtype, M, types, sizes, constants, flags)


def _codes(dtype, bits: int, M: int, D: int, flags: tuple) -> dict[str, Case]:
    types = dict.fromkeys(("p_k_start", "p_v_start", "p_k_new_start", "p_v_new_start"), "i64")
    types |= dict.fromkeys(("p_k_n", "p_v_n", "p_k_code", "p_v_code"), "i32")
    types |= dict.fromkeys(("p_k_scale", "p_k_low", "p_v_scale", "p_v_low"), "fp16")
    types |= dict.fromkeys(("p_k_new", "p_v_new"), TYPES[dtype])
    constants = {"BITS_K": bits, "BITS_V": bits, "GROUP_K": 32, "GROUP_V": 32}
    sizes = {t: decode_codes.sizes(dtype, bits, bits, 32, M, D, amd=t == "hip") for t in ("cuda", "hip")}
    title = f"kivi {TYPES[dtype]} {bits}-bit D={D}"
    return _split(title, decode_codes.split_codes, dtype, M, types, sizes, constants, flags)


def _split(title: str, kernel, dtype, M, pointers: dict, sizes: dict, constants: dict, flags: tuple) -> dict[str, Case]:
    """Return the cases of a split kernel, for NVIDIA and AMD."""
    pointers |= {"p_q": TYPES[dtype], "p_length": "i32", "p_o": "fp32", "p_lse": "fp32"}
    pointers |= {"p_pos": "i32", "p_q_pos": "i32", "p_bias": "fp32", "p_col": "i64"}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    types |= {"scale": "fp32", "window": "i32", "split_len": "i32", "n_splits": "i32", "n_pos": "i32"}
    absent = {"pos": ("p_pos", "p_q_pos"), "window": ("window",), "bias": ("p_bias",)}
    for flag, names in absent.items():
        constants |= {} if flag in flags else dict.fromkeys(names)
    constants |= {} if {"pos", "bias"} & {*flags} else {"p_col": None}
    title += f" M={M}" + "".join(f" {flag}" for flag in flags)
    out = {}
    for target, suffix in (("cuda", ""), ("hip", " (AMD)")):
        own = dict(sizes[target])
        options = {name: own.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in own}
        out[title + suffix] = Case(kernel, types, own | constants, {target: options})
    return out


def compile(case: Case, target: str, **options):
    """Compile a case ahead of time for one of TARGETS, with `options` in place of its own."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    wide = [i for i, n in enumerate(names) if n in ALIGNED or signature[n].startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in wide}
    constants = {n: case.constants[n] for n in names if n in case.constants}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attrs)
    options = options or case.options[kind(target)]
    return triton.compile(source, target=TARGETS[target], options=options)


def kind(target: str) -> str:
    """Return under which name a case holds its options for a target."""
    return "hip" if target.startswith("gfx") else "cuda"


def cost(compiled, loop: int = 0) -> dict:
    """Return registers, spills, shared (bytes), loads (bytes per thread -> count), mma, loop, instructions and bytes.

    `loop` counts the instructions, per warp and iteration, of the innermost loop that computes and has this number in
    the order of the code; bytes are those of the machine code.
    """
    return _nvidia(compiled, loop) if "cubin" in compiled.asm else _amd(compiled)


def _nvidia(compiled, loop: int) -> dict:
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
    inner = _loops(code, places)
    return {
        "registers": registers,
        "spills": sum(n for x, n in names.items() if re.match("LDL|STL", x)) + stack + local,
        "shared": compiled.metadata.shared,
        "loads": _ptx_loads(compiled.asm["ptx"]),
        "mma": sum(n for x, n in names.items() if "MMA" in x and not x.startswith("HFMA2")),  # which loads constants
        "loop": inner[loop] if loop < len(inner) else 0,
        "instructions": len(code),
        "bytes": 16 * len(code),
    }


def _loops(code: list[str], places: dict[str, int]) -> list[int]:
    """Return the lengths of the innermost loops that compute, in the order of the code; places: label -> index."""
    loops = set()
    for i, x in enumerate(code):
        back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", x)
        first = places.get(back[1], i) if back else i
        if first < i - 1 and COMPUTES.search(" ".join(code[first : i + 1])):
            loops.add((first, i + 1))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [b - a for a, b in sorted(inner)]


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
        "bytes": len(compiled.asm["hsaco"]),
    }


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
