"""Files that are written whole or not at all."""

import pytest

from nanokv import files


def test_a_file_appears_whole(tmp_path):
    assert files.write_json(tmp_path / "a.json", {"x": [1]}) == tmp_path / "a.json"
    assert (tmp_path / "a.json").read_text() == '{\n "x": [\n  1\n ]\n}'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    path = files.write(tmp_path / "a", "old")

    def fail(self, text, encoding):
        self.write_bytes(text[:1].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="No space"):
        files.write(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(OSError):
        files.write(tmp_path / "none" / "a", "new")
