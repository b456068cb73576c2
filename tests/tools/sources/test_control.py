"""Folders of control pictures."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime import ConfigError
from blockcache.tools.sources.control import check_control, control_files, read_control_images

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    """Two pictures of different sizes and modes, and a file that is none."""
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (8, 8), 128).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_are_read_by_name_in_rgb_and_one_size(folder):
    grey, red = read_control_images(folder, (24, 16))
    assert grey.shape == red.shape == (24, 16, 3)
    assert np.unique(grey).tolist() == [128]
    assert red[0, 0].tolist() == [255, 0, 0]


def test_what_is_no_folder_of_pictures_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="Expected a folder of control pictures at"):
        control_files(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"Expected pictures \(\.png, .*\) in"):
        control_files(empty)
    (folder / "c.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"Expected a picture in .*c\.png, got:"):
        read_control_images(folder, (8, 8))


def test_each_controlnet_has_its_folder(folder):
    check_control([str(folder)], [folder], needed=True)
    check_control([str(folder)], [], needed=False)
    for nets, pictures, needed in (
        ([str(folder)], [], True),
        ([str(folder)], [folder, folder], False),
        ([], [folder], False),
    ):
        with pytest.raises(
            ConfigError,
            match=f"Expected --control-images FOLDER once for each --controlnet.*"
            f"{len(nets)}; got {len(pictures)}",
        ):
            check_control(nets, pictures, needed=needed)
    with pytest.raises(ConfigError, match="Expected a diffusers folder or a hub id"):
        check_control(["no such folder"], [], needed=False)
