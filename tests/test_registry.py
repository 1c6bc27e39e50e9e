"""How specs are read, and methods found by name and by path."""

import pytest
import tiny

from nanokv import KVCache
from nanokv.methods import find, terms

HEADER = '"""Do nothing.\n\nPaper: -\nAxis: none\nIdea: -\nStores: -\nBytes: -\nActs: never\nDiffers: -\n"""\n'
BODY = "from dataclasses import dataclass\n\nfrom nanokv.method import Policy\n\n\n@dataclass\nclass Mine(Policy):\n"
BODY += "    budget: int = 5\n"


@pytest.mark.parametrize("spec, expected", [
    ("full", [("full", {})]),
    (" a + b ", [("a", {}), ("b", {})]),
    ("a(x=1)+b(y=-2.5, z='p+q', w=[1, 2])", [("a", {"x": 1}), ("b", {"y": -2.5, "z": "p+q", "w": [1, 2]})]),
    ("dir/my-own.py(budget=3)+kivi", [("dir/my-own.py", {"budget": 3}), ("kivi", {})]),
    ("./a.py", [("./a.py", {})]),
    ("a()", [("a", {})]),
])  # fmt: skip
def test_terms(spec, expected):
    assert terms(spec) == expected


@pytest.mark.parametrize(
    "spec", ["", "+", "a+", "a(1)", "a(x=", "a(x=y)", "a)(", "a(**{})", "a(x=1))", "a b", "a(x=1)b"]
)
def test_what_cannot_be_read_is_refused_in_one_line(spec):
    with pytest.raises(ValueError, match="cannot read .* write for example") as error:
        terms(spec)
    assert "\n" not in str(error.value)


def test_a_method_in_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HEADER + BODY)
    m = tiny.model()
    cache = KVCache(m, f"{file}(budget=7)+kivi")
    assert cache.policies[0].budget == 7 and cache.policies[0].name == "mine"
    tiny.feed(m, cache, tiny.ids(20))
    cache.save(tmp_path / "c")
    assert KVCache.load(tmp_path / "c", m).policies[0].budget == 7


@pytest.mark.parametrize("source, words", [
    (BODY, "header lacks Paper, Axis"),
    (HEADER, "ends with one Storage, Basis, Policy or Plan, and there is none"),
    (HEADER + BODY.replace(" = 5", ""), "budget has no default"),
    (HEADER + "1 / 0", "ZeroDivisionError"),
    (HEADER + "def", "SyntaxError"),
    (HEADER + "import nothing_of_that_name", "ModuleNotFoundError"),
])  # fmt: skip
def test_a_file_that_is_no_method_is_refused_in_one_line(source, words, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=words) as error:
        find(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ValueError, match="cannot load the method nowhere.py: FileNotFoundError"):
        find("nowhere.py")
