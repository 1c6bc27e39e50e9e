"""Texts to evaluate on: files and data sets on the hub, which is not reached here."""

import huggingface_hub
import pytest

from nanokv.eval import __main__ as command
from nanokv.eval import tasks


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let the hub hold two files of a data set; note what is asked for."""
    asked = []

    def hf_hub_download(repo, file, repo_type=None):
        asked.append((repo, file, repo_type))
        path = tmp_path / file.replace("/", "-")
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404\nno {file}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    (tmp_path / "a-b.txt").write_text("prose of the hub")
    return tmp_path, asked


def test_a_file_of_a_data_set_is_read(hub):
    assert tasks.prose("hub:owner/name/a/b.txt") == "prose of the hub"
    assert hub[1] == [("owner/name", "a/b.txt", "dataset")]


def test_wikitext_is_the_text_column_of_its_test_set(hub):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"text": ["", " = Title = \n", None, " One line . \n"]})
    parquet.write_table(table, hub[0] / "wikitext-2-raw-v1-test-00000-of-00001.parquet")
    assert tasks.prose("wikitext2") == " = Title = \n One line . \n"
    assert hub[1][0][0] == "Salesforce/wikitext"
    parquet.write_table(pyarrow.table({"other": [1]}), hub[0] / "x.parquet")
    with pytest.raises(ValueError, match="no column of text"):
        tasks.prose("hub:a/b/x.parquet")


@pytest.mark.parametrize("text, why", [
    ("hub:owner/name/none.txt", "cannot download hub:owner/name/none.txt: EntryNotFoundError: 404"),
    ("hub:owner", "hub:OWNER/NAME/FILE"),
    ("/no/such/file", "cannot read /no/such/file: No such file"),
    (".", "cannot read .: Is a directory"),
])  # fmt: skip
def test_a_text_that_cannot_be_had_is_one_line_and_exit_code_two(hub, capsys, text, why):
    assert command.main(["full", "--text", text]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1
