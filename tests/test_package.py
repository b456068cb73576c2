"""The package itself: what ``import blockcache`` gives, and what it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import blockcache
from blockcache import runtime

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", sorted(set(blockcache.__all__) - {"__version__"}))
def test_the_top_level_names_are_those_of_the_runtime(name):
    assert getattr(blockcache, name) is getattr(runtime, name)
    assert name in dir(blockcache)


def test_the_version_is_that_of_the_distribution():
    assert blockcache.__version__ == version("blockcache")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'blockcache' has no attribute 'nothing'"):
        blockcache.nothing  # noqa: B018


def test_importing_the_package_imports_no_library_at_all(tmp_path):
    script = (
        "import blockcache, sys; "
        "print({'numpy', 'safetensors', 'torch', 'onnx', 'typer', 'rich'} & set(sys.modules))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (made.stdout.strip(), made.stderr) == ("set()", "")


def test_the_demo_weights_have_the_version_of_the_code():
    text = (ROOT / "tools" / "demo" / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1) == blockcache.__version__


def test_missing_demo_weights_say_what_to_install(monkeypatch, tmp_path):
    model = pytest.importorskip("blockcache.tools.demo.model")
    monkeypatch.setattr(model, "MODEL_DIR", tmp_path)
    with pytest.raises(runtime.MissingExtraError, match="pip install blockcache-demo"):
        model.prompt_embeddings(["twitter emoji, rocket"])
