"""Files that are written whole or not at all."""

import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path):
    """Yield a temporary name beside `path`; what is written there takes its place at the end, or nothing does."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write(path, text: str) -> Path:
    """Write text (UTF-8); return the path. OSError where that fails."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path, value) -> Path:
    """Write a value as JSON, likewise."""
    return write(path, json.dumps(value, indent=1))
