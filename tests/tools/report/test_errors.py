"""What a script prints of an error."""

from __future__ import annotations

import runpy
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
def test_a_script_prints_one_line(tmp_path, monkeypatch, capsys, script, message):
    pytest.importorskip("diffusers")
    pytest.importorskip("typer")
    module, *arguments = script
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"blockcache.tools.{module}", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in printed
