"""Finding methods: one file of this folder is one method, named after the file. `nanokv.methods()` lists them.

A method file has a header (Paper, Axis, Idea, Stores, Bytes, Acts, Differs) and one class derived from Storage, Policy
or Plan. The parameters of its constructor are its hyper-parameters, on the command line too. Nothing else registers it.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanokv.cache import Method, Plan, Policy, Storage


@dataclass(frozen=True)
class Info:
    """Describe one method: kind is storage, policy or plan; axis what it shrinks; parameters name -> default."""

    name: str
    kind: str
    axis: str
    paper: str
    parameters: dict
    header: str
    cls: type
    source: str = ""  # the path of a file outside this folder

    def __call__(self, **parameters) -> Method:
        """Construct the method; ValueError names what is wrong with a parameter."""
        unknown = [p for p in parameters if p not in self.parameters]
        if unknown:
            has = ", ".join(self.parameters) or "none"
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}; it has: {has}")
        required = [p for p, v in self.parameters.items() if v is inspect.Parameter.empty and p not in parameters]
        if required:
            raise ValueError(f"{self.name} needs {' and '.join(required)}, for example {required[0]}=512")
        for p, value in parameters.items():
            _check_type(self.name, p, self.parameters[p], value)
        method = self.cls(**parameters)
        method.source = self.source or self.name
        return method


def _check_type(method: str, name: str, default, value) -> None:
    """Refuse a value of another type than the default's; without a default, or with None, any type will do."""
    if default is None or default is inspect.Parameter.empty:
        return
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"{method}: {name} must be {kinds[-1].__name__}, got {value!r}")


def sections(header: str) -> dict[str, str]:
    """Split a method file's header into its sections, {"Paper": ..., "Idea": ...}, with line breaks folded."""
    parts = re.split(r"^(Paper|Axis|Idea|Stores|Bytes|Acts|Differs):", inspect.cleandoc(header), flags=re.M)
    return {k: " ".join(v.split()) for k, v in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def _info(name: str) -> Info:
    return _describe(importlib.import_module(f"{__name__}.{name}"), name)


def from_file(path: str) -> Info:
    """Return the method in a file outside this folder; ValueError says what is wrong with it."""
    name = Path(path).stem
    try:
        found = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except Exception as error:  # a user's file may fail in any way
        raise ValueError(f"cannot load the method {path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    return _describe(module, name, path)


def _describe(module, name: str, source: str = "") -> Info:
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method)]
    own = [c for c in classes if c.__module__ == module.__name__]
    if len(own) != 1:
        raise ValueError(f"{name}: a method file holds exactly one Storage, Policy or Plan, found {len(own)}")
    kind = next(k.__name__.lower() for k in (Storage, Plan, Policy) if issubclass(own[0], k))
    head = sections(module.__doc__ or "")
    missing = [s for s in ("Paper", "Axis", "Idea", "Stores", "Bytes", "Acts", "Differs") if s not in head]
    if missing:
        raise ValueError(f"{name}: the header lacks {', '.join(missing)}")
    params = {p.name: p.default for p in list(inspect.signature(own[0].__init__).parameters.values())[1:]}
    return Info(name, kind, head["Axis"], head["Paper"], params, inspect.cleandoc(module.__doc__), own[0], source)


def _names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def available() -> list[Info]:
    """List the methods there are, by name."""
    return [_info(name) for name in sorted(_names())]


def find(name: str) -> Info:
    """Return the method called `name`, or the one in the file of that path; ValueError lists what there is."""
    if name.endswith(".py"):
        return from_file(name)
    if name not in _names():
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(sorted(_names()))}")
    return _info(name)


class _Methods(types.ModuleType):
    """This package, which can be called as well as imported from."""

    def __call__(self) -> list[Info]:
        return available()


sys.modules[__name__].__class__ = _Methods
