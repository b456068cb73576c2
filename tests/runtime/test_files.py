"""Writing files: whole or not at all, and never through a link."""

from __future__ import annotations

import contextlib
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.runtime import files
from blockcache.runtime.files import (
    remove_partials,
    replacing,
    replacing_folder,
    write_bytes,
    write_text,
)


@given(old=st.none() | st.binary(), new=st.binary())
@settings(deadline=None)
def test_a_file_is_replaced_by_exactly_what_was_written(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("w") / "inner" / "file"
    if old is not None:
        write_bytes(path, old)
    write_bytes(path, new)
    assert path.read_bytes() == new
    assert list(path.parent.iterdir()) == [path]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "f", "δ ≤ 0.5\n")
    assert (tmp_path / "f").read_bytes() == "δ ≤ 0.5\n".encode()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "manifest.json"
    write_text(path, "old")

    def killed(*args):
        raise KeyboardInterrupt

    place = files.os if failing == "fsync" else files.Path
    monkeypatch.setattr(place, failing, killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    write_text(path, "old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_its_goal_left_alone(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "in" / "file"
    outside.write_text("mine")
    path.parent.mkdir()
    path.symlink_to(outside)
    write_text(path, "new")
    assert outside.read_text() == "mine"
    assert not path.is_symlink()
    assert path.read_text() == "new"


def test_a_second_name_of_a_file_keeps_its_content(tmp_path):
    """A hard link shares the file's bytes: writing in place would change both names."""
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("old")
    os.link(path, other)
    write_text(path, "new")
    assert other.read_text() == "old"


def test_a_foreseen_temporary_name_is_refused_and_not_followed(tmp_path, monkeypatch):
    """Even where someone guesses the random name: a link there is no way out."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / f".guessed{files.PARTIAL}").symlink_to(outside)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "new")
    assert outside.read_text() == "mine"


def test_temporary_names_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "file") as file:
            names.add(file.name)
    assert len(names) == 3


def test_a_new_file_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "old").write_text("")
    with contextlib.suppress(KeyboardInterrupt), replacing_folder(folder) as fresh:
        (fresh / "new").write_text("")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["old"]
    with replacing_folder(folder) as fresh:
        (fresh / "new").write_text("")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / f".0123{files.PARTIAL}").write_text("half")
    (tmp_path / f".4567{files.PARTIAL}").mkdir()
    (tmp_path / f".4567{files.PARTIAL}" / "a").write_text("half")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("")
    (tmp_path / f".89ab{files.PARTIAL}").symlink_to(outside)
    (tmp_path / "whole").write_text("")
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "whole"]
    assert (outside / "mine").is_file()
