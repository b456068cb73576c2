"""Pictures of files: in colour, as masks, as depths."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from blockcache.runtime import ConfigError
from blockcache.tools.sources.pictures import read_depths, read_mask, read_picture


def test_a_picture_is_read_in_colour_and_resized_on_demand(tmp_path):
    Image.new("L", (6, 4), 90).save(tmp_path / "grey.png")
    read = read_picture(tmp_path / "grey.png")
    assert (read.shape, read.dtype, set(read.flat)) == ((4, 6, 3), np.uint8, {90})
    assert read_picture(tmp_path / "grey.png", (8, 2)).shape == (8, 2, 3)


def test_a_mask_is_how_white_it_is(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1:3] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), pixels[:, :, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depths_keep_their_order_and_get_the_latents_size(tmp_path, dtype):
    depths = np.linspace(0, np.iinfo(dtype).max, 12).round().astype(dtype).reshape(3, 4)
    Image.fromarray(depths).save(tmp_path / "depth.png")
    np.save(tmp_path / "depth.npy", depths)
    for file in (tmp_path / "depth.png", tmp_path / "depth.npy"):
        read = read_depths(file, (3, 4))
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, depths, rtol=1e-6)
        assert read_depths(file, (6, 8)).shape == (6, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 2, 2)), r"Expected depths as finite numbers \[h, w\] .* \[1, 2, 2\]"),
        (np.full((2, 2), np.nan), "Expected depths as finite numbers"),
        (np.array([["a"]]), "Expected depths as finite numbers"),
        (np.array([[{}]]), "Expected depths in .*allow_pickle"),
    ],
)
def test_a_table_that_holds_no_depths_is_refused(tmp_path, values, message):
    np.save(tmp_path / "depth.npy", values)
    with pytest.raises(ConfigError, match=message):
        read_depths(tmp_path / "depth.npy", (2, 2))


@pytest.mark.parametrize("read", [read_picture, read_mask, lambda file: read_depths(file, (2, 2))])
def test_what_is_no_picture_is_refused_by_name(tmp_path, read):
    (tmp_path / "x.png").write_text("no picture")
    for name in ("x.png", "lacking.png"):
        with pytest.raises(ConfigError, match=rf"Expected a picture in .*{name}, got:"):
            read(tmp_path / name)
