"""Finding methods and reading specs such as "snapkv(budget=256)+pca(rank=48)+kivi(bits=4)".

One file of this folder is one method, named after the file; `nanokv.methods()` lists them. A method file has a header
(Paper, Axis, Idea, Stores, Bytes, Acts, Differs) and ends with its method, a dataclass derived from Storage, Basis,
Policy or Plan. The fields of that class are its hyper-parameters, on the command line too. Nothing else registers it.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
import sys
import types
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

from nanokv.method import Basis, Method, Plan, Policy, Storage

SECTIONS = ("Paper", "Axis", "Idea", "Stores", "Bytes", "Acts", "Differs")
KINDS = (Storage, Basis, Plan, Policy)
EXAMPLE = "streamingllm(budget=512)+kivi(bits=2)"


@dataclass(frozen=True)
class Info:
    """Describe one method: kind is storage, basis, policy or plan; axis what it shrinks; parameters name -> default.

    Parameters of a plan include those of the policy that it brings where none is written.
    """

    name: str
    kind: str
    axis: str
    paper: str
    parameters: dict
    header: str
    cls: type
    source: str = ""  # the path of a file outside this folder

    def __call__(self, /, **parameters) -> Method:
        """Construct the method; ValueError names what is wrong with a parameter."""
        own = [f.name for f in fields(self.cls)]
        unknown = [p for p in parameters if p not in own]
        if unknown:
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}; it has: {', '.join(own) or 'none'}")
        return self.cls(**parameters)


def sections(header: str) -> dict[str, str]:
    """Split a method file's header into its sections, {"Paper": ..., "Idea": ...}, with line breaks folded."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(header), flags=re.M)
    return {k: " ".join(v.split()) for k, v in zip(parts[1::2], parts[2::2], strict=True)}


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


def from_file(path: str) -> Info:
    """Return the method in a file outside this folder; ValueError says what is wrong with it."""
    name = Path(path).stem
    try:
        found = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        raise ValueError(f"cannot load the method {path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    return _describe(module, name, path)


def parse(spec, n_prompt: int | None = None) -> list[Method]:
    """Turn "snapkv(budget=512)+kivi(bits=2)", a method, or a list of either, into methods in the order written.

    A plan written without a policy brings its paper's, and hands it the parameters that it does not know. `ratio` in
    place of a budget is the share kept of n_prompt tokens, rounded, at least 1 entry. Raises ValueError for what
    cannot be read, and for two storages.
    """
    made: list[Method] = []
    left: list[tuple[Plan, dict]] = []
    for part in [spec] if isinstance(spec, (str, Method)) else list(spec or []):
        if not isinstance(part, (str, Method)):
            raise ValueError(f"a cache is made of methods or their names, not of {part!r}")
        for name, given in terms(part) if isinstance(part, str) else ():
            info = find(name)
            own = {f.name for f in fields(info.cls)}
            rest = {}
            if info.kind == "plan" and info.cls.brings:
                rest = {k: given.pop(k) for k in list(given) if k not in own}
            made.append(info(**_budget(info.name, given, own, n_prompt)))
            if rest:
                left.append((made[-1], rest))
        made += [part] if isinstance(part, Method) else []
    scored = [m for m in made if isinstance(m, Policy) and not isinstance(m, Plan)]
    for plan in [m for m in made if isinstance(m, Plan) and m.brings] if not scored else ():
        name, usual = plan.brings
        info, rest = find(name), dict(next((r for p, r in left if p is plan), {}))
        given = _budget(plan.name, usual | rest, {f.name for f in fields(info.cls)}, n_prompt)
        made.insert(made.index(plan), info(**given))
        left = [(p, r) for p, r in left if p is not plan]
        break
    for plan, rest in left:
        scorer = next(m for m in made if isinstance(m, Policy) and not isinstance(m, Plan))
        raise ValueError(f"{plan.name} has no parameter {next(iter(rest))!r}; write it with {scorer.name}")
    storages = [m.name for m in made if isinstance(m, Storage)]
    if len(storages) > 1:
        raise ValueError(f"{storages[0]} and {storages[1]} are both storages; a cache has at most one")
    return made


def terms(spec: str) -> list[tuple[str, dict]]:
    """Split a spec into (method name or path, parameters) pairs."""
    out = []
    for term in _split(spec):
        name, bracket, rest = (s.strip() for s in term.partition("("))
        try:
            if not name or re.search(r"[)\s]", name) or (bracket and not rest.endswith(")")):
                raise ValueError
            call = ast.parse(f"f({rest[:-1]})", mode="eval").body
            names = [k.arg for k in call.keywords]
            if call.args or None in names or len(set(names)) < len(names):
                raise ValueError
            out.append((name, {k.arg: ast.literal_eval(k.value) for k in call.keywords}))
        except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
            raise ValueError(f"cannot read {spec!r}; write for example {EXAMPLE}") from None
    return out


def _split(spec: str) -> list[str]:
    """Split at each + outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in spec:
        if c == "+" and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        parts[-1] += c
    return parts


def _budget(name: str, given: dict, own: set, n_prompt: int | None) -> dict:
    """Return parameters with `ratio`, where the method knows no such thing, as a budget."""
    if "ratio" not in given or "ratio" in own or "budget" not in own:
        return given
    ratio = given["ratio"]
    if "budget" in given or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"{name}: ratio, in place of budget, must be above 0 and at most 1, got {ratio}")
    if n_prompt is None:
        raise ValueError(f"{name}: ratio is a share of a prompt whose length is not known; KVCache(..., n_prompt=...)")
    return {k: v for k, v in given.items() if k != "ratio"} | {"budget": max(1, math.floor(ratio * n_prompt + 0.5))}


@cache
def _info(name: str) -> Info:
    return _describe(importlib.import_module(f"{__name__}.{name}"), name)


def _describe(module, name: str, source: str = "") -> Info:
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method)]
    own = [c for c in classes if c.__module__ == module.__name__]
    if not own:
        raise ValueError(f"{name}: a method file ends with one Storage, Basis, Policy or Plan, and there is none")
    cls = own[-1]
    cls.name, cls.source = name, source
    if bare := [f.name for f in fields(cls) if f.default is MISSING]:
        raise ValueError(f"{name}: the hyper-parameter {bare[0]} has no default")
    head = sections(module.__doc__ or "")
    if missing := [s for s in SECTIONS if s not in head]:
        raise ValueError(f"{name}: the header lacks {', '.join(missing)}")
    parameters = {f.name: f.default for f in fields(cls)}
    if issubclass(cls, Plan) and cls.brings:
        scorer, usual = cls.brings
        parameters |= {k: v for k, v in (_info(scorer).parameters | usual).items() if k not in parameters}
    kind = next(k.__name__.lower() for k in KINDS if issubclass(cls, k))
    return Info(name, kind, head["Axis"], head["Paper"], parameters, inspect.cleandoc(module.__doc__), cls, source)


def _names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


class _Methods(types.ModuleType):
    """This package, which can be called as well as imported from."""

    def __call__(self) -> list[Info]:
        return available()


sys.modules[__name__].__class__ = _Methods
