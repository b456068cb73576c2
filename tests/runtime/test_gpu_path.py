"""Runs the tests of ``tests/cuda_driver`` on the stand-in driver, in a process of their own.

A driver is loaded once a process; the tests of other folders must find none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "cuda_driver"
ELSEWHERE = ("test_torch_engine.py", "test_gpu_figures.py")
"""Run by the dry run in tests/tools/bench/test_gpu.py."""


def test_the_gpu_path_on_the_stand_in_driver(driver_library, compiled, pipeline_bundle):
    pytest.importorskip("cuda.bindings.driver")
    pytest.importorskip("onnxruntime")
    folders = {outputs: str(compiled("sd", outputs)[1].folder) for outputs in (1, 2)}
    pytest.importorskip("tokenizers")
    folders |= {kind: str(pipeline_bundle(kind).folder) for kind in ("sd", "sdxl")}
    environment = {
        **os.environ,
        "BLOCKCACHE_TEST_DRIVER": str(driver_library),
        "BLOCKCACHE_TEST_BUNDLES": json.dumps(folders),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "driver", "--tb=short", str(TESTS)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *(f"--ignore={TESTS / name}" for name in ELSEWHERE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
