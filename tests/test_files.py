"""Files that are written whole or not at all."""

import os
import stat

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


def test_links_are_followed_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            files.write(path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
