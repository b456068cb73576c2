"""What a script prints of an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockcache.runtime import ConfigError
from blockcache.tools.report.errors import one_line_errors


def test_an_expected_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise ConfigError("Expected this, got that. Do so.")
    assert stopped.value.code == 1
    assert capsys.readouterr() == ("", "error: Expected this, got that. Do so.\n")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (["demo", "unet", "--work", "."], "Expected latents.safetensors in cpu, found none."),
        (["bench.scale", "out", "--model", "sd3"], "--model: expected sd15 or sdxl, got 'sd3'."),
    ],
)
def test_a_script_prints_one_line(tmp_path, script, message):
    pytest.importorskip("diffusers")
    pytest.importorskip("typer")
    module, *arguments = script
    ran = subprocess.run(
        [sys.executable, "-m", f"blockcache.tools.{module}", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in ran.stderr
