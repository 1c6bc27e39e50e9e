"""Files that are written whole or not at all."""

import errno
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path):
    """Yield a temporary file beside `path`; what is written there takes its place at the end, or nothing does.

    Links are followed. OSError for what is there and is no regular file, such as a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    handle, part = tempfile.mkstemp(".part", f".{path.name[:100]}.", path.parent)
    os.close(handle)
    try:
        yield Path(part)
        os.umask(mask := os.umask(0))  # a temporary file is private, this one is as any other
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write(path, text: str) -> Path:
    """Write text (UTF-8); return the path. OSError where that fails."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path, value) -> Path:
    """Write a value as JSON, likewise."""
    return write(path, json.dumps(value, indent=1))
