"""Files that are written whole or not at all."""

import json
from pathlib import Path


def write(path, text: str) -> Path:
    """Write text (UTF-8) to a temporary name beside `path` and rename it; return the path. OSError where that fails."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        return part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path, value) -> Path:
    """Write a value as JSON, likewise."""
    return write(path, json.dumps(value, indent=1))
