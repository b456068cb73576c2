import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from blockcache.runtime import ConfigError
from blockcache.tools.demo import data
from blockcache.tools.demo.config import CPU, NOTO, DataConfig

ICON = {"body": '<circle cx="8" cy="8" r="6" fill="#f00"/>'}
ICONS = {
    "red-apple": ICON,
    "man-cook": {"body": "<g/>"},
    "green-apple": {"body": "<g/>", "hidden": True},
}
METADATA = {"categories": {"Food & Drink": ["red-apple", "green-apple"], "Flags": []}}


def archive(folder, icons=ICONS):
    path = folder / "iconify-json-noto-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (
            ("icons.json", {"width": 16, "icons": icons}),
            ("metadata.json", METADATA),
        ):
            raw = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


def test_icons_come_with_caption_split_and_weight(tmp_path):
    path = archive(tmp_path)
    found = list(data.icons(NOTO, path, data.categories([path]), CPU.data))
    assert [icon.picture.caption for icon in found] == ["noto emoji, red apple"]
    assert found[0].picture.weight == CPU.data.everyday_weight
    assert 'viewBox="0.0 0.0 16 16"' in found[0].svg


def test_small_world_holds_everyday_and_simple_concepts_only(tmp_path):
    path = archive(tmp_path, {"red-apple": ICON, "melon": ICON, "amphora": ICON})
    table = {"red-apple": "Food & Drink", "melon": "Food & Drink", "amphora": "Food & Drink"}
    worlds = {
        small: [
            icon.picture
            for icon in data.icons(NOTO, path, table, replace(CPU.data, small_world=small))
        ]
        for small in (True, False)
    }
    assert [picture.words for picture in worlds[True]] == ["melon", "red apple"]
    assert [picture.weight for picture in worlds[True]] == [1.0, CPU.data.everyday_weight]
    assert [picture.words for picture in worlds[False]] == ["amphora", "melon", "red apple"]


def test_everyday_concepts_are_never_held_out(tmp_path):
    path = archive(tmp_path, {"red-apple": ICON, "melon": ICON})
    table = {"red-apple": "Food & Drink", "melon": "Food & Drink"}
    found = data.icons(NOTO, path, table, replace(CPU.data, held_out_percent=100))
    assert {i.picture.words: i.picture.held_out for i in found} == {
        "melon": True,
        "red apple": False,
    }


def test_fetch_takes_the_archive_that_is_there(tmp_path):
    path = archive(tmp_path)
    assert data.fetch(NOTO, tmp_path) == path


def test_render_puts_the_drawing_on_white(tmp_path):
    pytest.importorskip("resvg_py")
    path = archive(tmp_path)
    icon = next(iter(data.icons(NOTO, path, data.categories([path]), CPU.data)))
    image = data.render(icon.svg, 64)
    assert image.shape == (3, 64, 64)
    assert image.dtype == np.uint8
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 32, 32].tolist() == [255, 0, 0]


def test_dataset_round_trip_and_held_out_weight(tmp_path):
    picture = data.Picture(
        style="noto",
        words="red apple",
        category="Food & Drink",
        caption="noto emoji, red apple",
        held_out=False,
        weight=2.0,
    )
    kept_out = data.Picture(**{**vars(picture), "held_out": True})
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2)
    data.save(data.Dataset(images=images, pictures=[picture, kept_out]), tmp_path)
    loaded = data.load(tmp_path)
    assert np.array_equal(loaded.images, images)
    assert loaded.pictures == [picture, kept_out]
    assert loaded.training_weights().tolist() == [2.0, 0.0]


def test_missing_dataset_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match=r"found none\. Run the command data first"):
        data.load(tmp_path)


def test_config_rejects_odd_sizes():
    with pytest.raises(ValueError, match="multiple of 4, got 66"):
        DataConfig(pixels=66)
