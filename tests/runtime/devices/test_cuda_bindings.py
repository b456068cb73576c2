"""cuda-bindings 12.x and 13.x: what the runtime calls has the same names and arguments in both.

The golden file was recorded with both versions installed, one after the other; nothing differed.
The tests on the stand-in driver passed with each of them, too. To record a further version:

    BLOCKCACHE_RECORD=1 pytest tests/runtime/devices/test_cuda_bindings.py
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "cuda_bindings.json"
ENUMS = (
    *("CUdevice_attribute", "CUmemorytype", "CUpointer_attribute"),
    *("CUstream_flags", "CUstreamCaptureMode"),
)


def used():
    """Functions and values of enumerations that the runtime's sources name."""
    text = "\n".join(path.read_text() for path in (ROOT / "runtime").rglob("*.py"))
    functions = set(re.findall(r'"(cu[A-Z]\w+)"|(?:driver\(\)|bindings)\.(cu[A-Z]\w+)', text))
    return {name for pair in functions for name in pair if name}, set(
        re.findall(r"\bCU_[A-Z0-9_]+", text)
    )


def installed():
    """The first line of each function's documentation, which is its signature; each value."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    functions, values = used()
    enums = [getattr(bindings, name) for name in ENUMS]
    return {
        "functions": {
            name: getattr(bindings, name).__doc__.strip().splitlines()[0] for name in functions
        },
        "values": {v: int(getattr(e, v)) for v in values for e in enums if hasattr(e, v)},
    }


def test_what_the_runtime_calls_is_in_each_version():
    recorded = json.loads(GOLDEN.read_text())
    functions, values = used()
    assert {name.split(".")[0] for name in recorded} >= {"12", "13"}
    for each in recorded.values():
        assert set(each["functions"]) == functions
        assert set(each["values"]) == values
        assert each == recorded["13.5.0"]  # so that no place has to tell them apart


def test_the_installed_version_is_as_recorded():
    found = installed()
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("BLOCKCACHE_RECORD"):
        recorded[version("cuda-bindings")] = found
        GOLDEN.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    assert found in recorded.values()
