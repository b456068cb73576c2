"""The lock of a folder: one writer, no link followed, free again after a kill."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("filelock")

from blockcache.export.sole_writer import LOCK, sole_writer
from blockcache.runtime.errors import BundlePathError, ConfigError


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path):
    with sole_writer(tmp_path, "build"):
        with pytest.raises(ConfigError) as caught, sole_writer(tmp_path, "compile"):
            pass
        assert str(caught.value) == (
            f"Another compile is writing to {tmp_path}. Wait for it: what it finishes is kept."
        )
    with sole_writer(tmp_path, "compile"):
        pass


def test_a_writer_that_fails_or_is_killed_leaves_the_folder_free(tmp_path):
    with pytest.raises(KeyError), sole_writer(tmp_path, "build"):
        raise KeyError
    killed = (
        "import os, sys, pathlib\n"
        "from blockcache.export.sole_writer import sole_writer\n"
        "with sole_writer(pathlib.Path(sys.argv[1]), 'build'): os.kill(os.getpid(), 9)"
    )
    assert (
        subprocess.run([sys.executable, "-c", killed, str(tmp_path)], timeout=60).returncode == -9
    )
    with sole_writer(tmp_path, "build"):
        pass


def test_a_link_inside_the_bundle_is_replaced_and_its_goal_left_alone(tmp_path):
    """As in a snapshot of the hub, where every file is a link."""
    goal = tmp_path / "manifest.json"
    goal.write_text("content")
    (tmp_path / LOCK).symlink_to(goal)
    with sole_writer(tmp_path, "compile"):
        assert not (tmp_path / LOCK).is_symlink()
    assert goal.read_text() == "content"


def test_a_link_out_of_the_bundle_is_refused(tmp_path):
    folder, outside = tmp_path / "bundle", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("content")
    (folder / LOCK).symlink_to(outside)
    refused = pytest.raises(BundlePathError, match=r"'\.lock' links to .*outside")
    with refused, sole_writer(folder, "compile"):
        pass
    assert outside.read_text() == "content"
