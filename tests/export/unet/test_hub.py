"""Folders as users have them, and snapshots of the hub that hold what is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import ConfigError

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("torch")
from blockcache.export.unet.hub import local_folder, model_name, needed_files  # noqa: E402
from blockcache.export.unet.load import load_model  # noqa: E402

COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"


# -- local folders ---------------------------------------------------------------------------------


def refusal(source):
    with pytest.raises(ConfigError) as caught:
        local_folder(source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["absent", "./absent", "a/b/c", "/nowhere/absent", "../x"])
def test_a_missing_folder_is_refused(name):
    assert refusal(name) == (
        f"Expected a diffusers folder or a hub id such as 'owner/model', got {name!r}; "
        f"no folder of that name exists."
    )


def test_a_single_file_says_how_to_convert_it(tmp_path):
    file = tmp_path / "dream-v1.safetensors"
    file.write_bytes(b"")
    assert refusal(file) == (
        f"Expected a diffusers folder or a hub id, got the single-file checkpoint {file}. Convert "
        f"it once, in Python:\n"
        f"    from diffusers import StableDiffusionPipeline  # XL: StableDiffusionXLPipeline\n"
        f"    pipeline = StableDiffusionPipeline.from_single_file('{file}')\n"
        f"    pipeline.save_pretrained('{tmp_path}/dream-v1')\n"
        f"Then give the folder {tmp_path}/dream-v1."
    )


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    for name in ("diffusion_pytorch_model.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path / "notes.txt").endswith(f"got the file {tmp_path}/notes.txt.")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    assert refusal(weights).endswith(f"got the file {weights}. Give the folder it lies in.")


def test_the_folder_unet_stands_for_its_pipeline_only_where_there_is_one(tmp_path, monkeypatch):
    unet = tmp_path / "model" / "unet"
    unet.mkdir(parents=True)
    assert local_folder(unet) == unet
    (tmp_path / "model" / "scheduler").mkdir()
    assert local_folder(unet) == tmp_path / "model"
    monkeypatch.chdir(unet)
    assert local_folder(".") == tmp_path / "model"


def test_a_model_is_named_for_its_folder_not_for_a_commit(tmp_path):
    snapshot = tmp_path / "models--owner--my-model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "my-model"
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == "my-model"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert model_name(plain) == "plain"


# -- what is fetched -------------------------------------------------------------------------------

SDXL = [
    ".gitattributes", "LICENSE.md", "README.md", "01.png", "model_index.json",
    "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors",
    "scheduler/scheduler_config.json",
    *(f"{folder}/{name}" for folder in ("text_encoder", "text_encoder_2") for name in (
        "config.json", "model.safetensors", "model.fp16.safetensors", "model.onnx",
        "flax_model.msgpack", "openvino_model.bin", "openvino_model.xml")),
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in (
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(f"unet/{name}" for name in (
        "config.json", "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors", "diffusion_flax_model.msgpack",
        "model.onnx", "model.onnx_data", "openvino_model.bin")),
    *(f"{folder}/{name}" for folder in ("vae", "vae_1_0") for name in (
        "config.json", "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors")),
    "vae_decoder/config.json", "vae_decoder/model.onnx", "vae_encoder/config.json",
]  # fmt: skip
"""Names as in a repository with every variant, some 77 GB."""


def weights(parts, names=SDXL, variant=None):
    """What is fetched, less the small files."""
    needed = needed_files(names, parts, "owner/model", variant)
    assert set(needed) <= set(names)
    return [name for name in needed if name.endswith((".safetensors", ".bin", ".onnx", ".index"))]


def test_a_u_net_needs_one_file_of_weights():
    assert weights(["unet"]) == ["unet/diffusion_pytorch_model.safetensors"]
    asked = weights(["unet"], variant="fp16")
    assert asked == ["unet/diffusion_pytorch_model.fp16.safetensors"]


def test_text_encoders_and_vae_are_fetched_where_they_are_asked_for():
    assert weights(["text_encoder"]) == [
        "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
    ]  # fmt: skip
    assert "tokenizer_2/merges.txt" in needed_files(SDXL, ["text_encoder"], "owner/model")
    assert weights(["vae"])[0] == "vae/diffusion_pytorch_model.safetensors"


def test_the_small_files_are_fetched_always():
    small = {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "vae/config.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    assert small <= set(needed_files(SDXL, ["unet"], "owner/model"))


def test_a_bare_u_net_lies_at_the_top():
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert needed_files(names, ["unet"], "owner/model") == names[1:]


def test_shards_are_fetched_with_their_index():
    names = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert needed_files(names, ["unet"], "owner/model") == names


def test_a_pickle_is_refused_before_anything_is_fetched():
    with pytest.raises(ConfigError, match=r"in owner/model/unet, found the pickle diffusion_p"):
        needed_files(["unet/diffusion_pytorch_model.bin"], ["unet"], "owner/model")


@given(st.sets(st.sampled_from(["unet", "vae", "text_encoder"])))
def test_no_folder_gives_two_variants(parts):
    fetched = weights(sorted(parts))
    assert len({name.rpartition("/")[0] for name in fetched}) == len(fetched)


@pytest.fixture
def snapshot(tiny_models, tmp_path):
    """A snapshot as the hub's cache holds it: links to files that are named for their content."""
    model = tiny_models("sd").unet
    model.save_pretrained(tmp_path / "unet")
    repository = tmp_path / "hub" / "models--owner--my-model"
    folder = repository / "snapshots" / COMMIT / "unet"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "unet").iterdir())):
        blob = path.rename(repository / "blobs" / f"{number:064}")
        (folder / path.name).symlink_to(f"../../../blobs/{blob.name}")
    return folder.parent


def test_a_snapshot_of_links_is_loaded(snapshot):
    assert load_model(snapshot).name == "my-model"
    assert load_model(snapshot / "unet").blocks


class Hub:
    """Stands in for the hub: lists files, and gives a snapshot of those that are asked for."""

    def __init__(self, monkeypatch, snapshot, names=SDXL):
        self.asked = []
        self.snapshot, self.names = snapshot, names
        monkeypatch.setattr(hub, "model_info", self.model_info)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)

    def model_info(self, source):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, source, allow_patterns=None, local_files_only=False):
        self.asked.append((source, allow_patterns, local_files_only))
        if self.snapshot is None:
            raise FileNotFoundError("not in the cache")
        return str(self.snapshot)


def test_a_hub_id_is_loaded_from_the_hubs_cache(snapshot, monkeypatch):
    faked = Hub(monkeypatch, snapshot)
    assert load_model("owner/my-model").name == "my-model"
    assert faked.asked == [
        ("owner/my-model", needed_files(SDXL, ["unet"], "owner/my-model"), False)
    ]


def unreachable(source):
    raise ConnectionError("no route to host")


def test_without_a_network_the_snapshot_at_hand_is_taken(snapshot, monkeypatch):
    faked = Hub(monkeypatch, snapshot)
    monkeypatch.setattr(hub, "model_info", unreachable)
    assert load_model("owner/my-model").name == "my-model"
    assert faked.asked == [("owner/my-model", None, True)]


def test_a_hub_that_cannot_be_reached_is_reported_with_its_reason(monkeypatch):
    Hub(monkeypatch, None)
    monkeypatch.setattr(hub, "model_info", unreachable)
    assert refusal("owner/model") == (
        "'owner/model' is no local folder and could not be fetched from the hub: no route to host. "
        "Give the path of a folder that save_pretrained wrote."
    )


def test_a_download_that_fails_is_reported_with_its_reason(monkeypatch):
    Hub(monkeypatch, None)
    assert "could not be fetched from the hub: not in the cache. Give" in refusal("owner/model")
