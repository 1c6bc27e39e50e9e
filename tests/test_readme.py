"""The README and the notebooks say what is true."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from nanokv.__main__ import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_made_from_their_headers():
    inside = re.search(r"<!-- methods: .*? -->\n(.*?)<!-- end of methods -->", README, re.S)[1]
    assert inside.strip() == table(), "run: python -m nanokv"


def test_paths_in_the_readme_exist():
    assert "@@" not in README
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_code_in_the_readme_runs(smollm2, capsys):
    use = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "generate(" in b)
    exec(compile(use, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert len(out.split()) > 20 and "'payload'" in out


def test_the_example_of_a_method_is_one(tmp_path):
    import tiny

    from nanokv import KVCache
    from nanokv.methods import sections

    source = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class Half" in b)
    scope = {"__name__": "half"}
    exec(compile(source, "half.py", "exec"), scope)
    assert set(sections(scope["__doc__"])) == {"Paper", "Axis", "Idea", "Stores", "Bytes", "Acts", "Differs"}
    m = tiny.model()
    cache = KVCache(m, [scope["Half"](recent=10)])
    tiny.feed(m, cache, tiny.ids(60))
    assert cache.live_positions(0, 0).tolist() == [*range(0, 50, 2), *range(50, 60)]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path, smollm2):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
