"""Equal models give equal bytes: the pass alone, then two processes that hash differently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ir = pytest.importorskip("onnx_ir")
from blockcache.export.graph.passes.canonical import canonical  # noqa: E402


def graph_with(names, note):
    """x plus a constant for each of ``names``, registered in that order."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = {}
    for name in names:
        tensor = ir.tensor(np.full(2, ord(name), np.float32), name=name)
        constants[name] = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
        )
        constants[name].metadata_props["from"] = note
    nodes, last = [], x
    for name in sorted(names):
        made = ir.Value(name=f"sum_{name}", shape=x.shape, type=x.type)
        nodes.append(ir.Node("", "Add", [last, constants[name]], outputs=[made], name=made.name))
        nodes[-1].metadata_props["stack"] = made.metadata_props["stack"] = note
        nodes[-1].doc_string = note
        last = made
    graph = ir.Graph(
        [x], [last], nodes=nodes, initializers=list(constants.values()), opset_imports={"": 22}
    )
    graph.doc_string = x.doc_string = note
    return graph


def content(graph):
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(deterministic=True)


NAMES = "abcdef"


@given(st.permutations(NAMES), st.text(max_size=5))
@settings(deadline=None)
def test_order_and_notes_leave_no_trace(names, note):
    graph, plain = graph_with(names, note), graph_with(NAMES, "")
    canonical(graph)
    canonical(plain)
    assert content(graph) == content(plain)
    assert list(graph.initializers) == sorted(NAMES)


def test_without_the_pass_the_bytes_differ():
    assert content(graph_with("ab", "")) != content(graph_with("ba", ""))


EXPORT = """
import importlib.util, json, sys
from pathlib import Path
where, folder = sys.argv[1:]
spec = importlib.util.spec_from_file_location("tiny_models", where)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
from blockcache.export.graph.to_onnx import ExportOptions, export_segments
from blockcache.runtime.bundles.manifest import FileEntry
export_segments(tiny.make_tiny_model("small"), Path(folder), ExportOptions())
print(json.dumps({file.name: FileEntry.of(file).sha256 for file in Path(folder).iterdir()}))
"""


def test_another_process_exports_the_same_bytes(compiled, tmp_path):
    """Sets are ordered by hashes, which another process and another seed make anew."""
    _, bundle = compiled("small")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    conftest = Path(__file__).resolve().parents[2] / "conftest.py"
    made = subprocess.run(
        [sys.executable, "-c", EXPORT, str(conftest), str(tmp_path / "segments")],
        env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    assert json.loads(made.stdout.splitlines()[-1]) == {
        name.split("/")[-1]: sha256
        for name, sha256 in files.items()
        if name.startswith("segments/")
    }


def test_nothing_of_the_machine_is_in_the_graphs(compiled):
    _, bundle = compiled("sd")
    for path in bundle.folder.glob("segments/*/*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.home()).encode() + b"/" not in content
        assert str(bundle.folder).encode() not in content
