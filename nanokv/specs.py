"""Reading specs, such as "snapkv(budget=512)+kivi(bits=2)"."""

import ast
import re

from nanokv.cache import Method, Plan, Policy, Storage
from nanokv.methods import find


def parse(spec) -> tuple[Storage, list[Policy], Plan | None]:
    """Turn "snapkv(budget=512)+kivi(bits=2)", or a list of methods, into a storage, policies and a plan or None.

    Raises ValueError for what cannot be read, and for two storages or two plans.
    """
    made = []
    for part in [spec] if isinstance(spec, (str, Method)) else list(spec or [None]):
        if not isinstance(part, (str, Method)):
            raise ValueError(f"a cache is made of methods or their names, not of {part!r}")
        made += _terms(part) if isinstance(part, str) else [part]
    kinds = {kind: [m for m in made if isinstance(m, kind)] for kind in (Storage, Policy, Plan)}
    kinds[Policy] = [m for m in kinds[Policy] if not isinstance(m, Plan)]
    for kind in (Storage, Plan):
        if len(kinds[kind]) > 1:
            names = " and ".join(m.name for m in kinds[kind])
            raise ValueError(f"{names} are both {kind.__name__.lower()}s; a cache has at most one")
    storage = kinds[Storage][0] if kinds[Storage] else find("full")()
    return storage, kinds[Policy], kinds[Plan][0] if kinds[Plan] else None


def terms(spec: str) -> list[tuple[str, dict]]:
    """Split a spec into (method name or path, parameters) pairs."""
    out = []
    for term in re.split(r"\+(?![^(]*\))", spec):
        match = re.fullmatch(r"\s*([^()+\s]+)\s*(?:\((.*)\))?\s*", term, re.S)
        try:
            call = ast.parse(f"f({match[2] or ''})", mode="eval").body
            names = [k.arg for k in call.keywords]
            if call.args or None in names or len(set(names)) < len(names):
                raise ValueError
            out.append((match[1], {k.arg: ast.literal_eval(k.value) for k in call.keywords}))
        except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
            example = "streamingllm(budget=512)+kivi(bits=2)"
            raise ValueError(f"cannot read {spec!r}; write for example {example}") from None
    return out


def _terms(spec: str) -> list[Method]:
    return [find(name)(**parameters) for name, parameters in terms(spec)]
