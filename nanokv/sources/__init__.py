"""Where a model's files come from: a folder in the hub's layout, a GGUF file, the hub, or a wheel with the default.

A *source* is something a model can be read from, one tensor at a time. Everything that a user can get wrong raises
LoadError with one line. Nothing is ever unpickled.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from nanokv.tokenizer import Tokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REFUSED = "nanokv does not read pickles, which can run code; use safetensors or GGUF"


class LoadError(ValueError):
    """Say in one line why a model cannot be loaded."""

    def __init__(self, message: object):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= 500 else line[:500] + " ...")


class Source(Protocol):
    """What `weights.load` reads: a hub-style config, and tensors under their names in the hub's layout."""

    path: Path
    config: dict  # as config.json has it
    shapes: dict[str, tuple]  # of every tensor, by name; known without reading one

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in a floating-point dtype. Raises LoadError where its type is not supported."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ValueError where it cannot be read."""


def first_pickle(names: Iterable[str]) -> str:
    """Return the first file name that is a pickle of weights, or ""."""
    return next((n for n in sorted(names) if n.endswith(PICKLES)), "")
