"""The GPU run without a GPU: its commands parse, no failure stops it, and a whole dry run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from blockcache.tools.bench import gpu
from blockcache.tools.bench.gpu import Outcome, Part, first_stage, report, run_parts, second_stage

PYTHON = sys.executable
FACTS = {"device, driver": "NVIDIA H100, 580.159", "date": "2026-11-26"}


def all_parts(tmp_path):
    folders = tmp_path / "out", tmp_path / "bundles"
    return [*first_stage(*folders, False), *second_stage(*folders, lambda name: True)]


def test_every_command_line_of_a_part_parses(tmp_path, monkeypatch):
    typer = pytest.importorskip("typer")
    from blockcache.tools import cli

    app, seen = typer.main.get_command(cli._app()), set()
    for part in all_parts(tmp_path):
        _, _, module, *arguments = part.command[part.command.index("python") :]
        seen.add(module)
        if module == "blockcache.tools.cli":
            name, *arguments = arguments
            app.commands[name].make_context(name, arguments)
        elif module == "pytest":
            (tests,) = (word for word in arguments if word.startswith("tests/"))
            assert (Path(__file__).parents[3] / tests).exists()
            assert tests.split("/")[1] in gpu.TESTS
    assert seen == {
        *("blockcache.tools.cli", "pytest"),
        *("blockcache.tools.bench.kernels", "blockcache.tools.bench.gpu_figures"),
    }


def test_what_is_not_there_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    first = {p.name: p.left_out for p in first_stage(tmp_path, tmp_path, False)}
    assert [name for name, why in first.items() if why] == ["kernels-sanitizer"]
    dry = {p.name: p.left_out for p in first_stage(tmp_path, tmp_path, True)}
    assert [name for name, why in dry.items() if not why] == ["engine-tests", "figures"]
    second = {p.name: p.left_out for p in second_stage(tmp_path, tmp_path, "tensorrt".__eq__)}
    assert second["trt-build"] == ""
    assert second["ort-cuda-bench"] == "no onnxruntime-gpu"
    nothing = second_stage(tmp_path, tmp_path, lambda name: False)
    assert all(part.left_out for part in nothing)


def test_what_is_installed():
    assert gpu.installed("pytest")
    assert not gpu.installed("no_such_module")
    assert not gpu.installed("onnxruntime.capi.onnxruntime_providers_cuda")  # the CPU's


def test_parts_go_on_after_a_failure_and_end_with_the_budget(tmp_path):
    now = [0.0]

    def clock():
        now[0] += 10.0
        return now[0]

    wanted = [
        Part("good", 5, ("python", "-c", "print('figures')")),
        Part("bad", 5, ("python", "-c", "raise SystemExit(3)")),
        Part("absent library", 5, ("python", "-c", "raise SystemExit(4)"), "it is not installed"),
        Part("slow", 1.1, ("python", "-c", "import time; time.sleep(60)")),
        Part("absent", 5, ("no-such-program",)),
        Part("late", 5, ("python", "-c", "pass")),
    ]
    outcomes = run_parts(wanted, tmp_path, tmp_path, {}, budget_s=95, clock=clock)
    assert [o.result for o in outcomes] == [
        "done", "failed (3)", "left out: it is not installed", "out of time",
        "failed (no such program)", "no time left",
    ]  # fmt: skip
    assert "figures" in (tmp_path / "good.log").read_text()


def test_tests_that_are_all_skipped_are_no_success(tmp_path):
    (tmp_path / "test_a.py").write_text("import pytest\ndef test_b():\n    pytest.skip()\n")
    outcome = run_parts([Part("tests", 60, ("python", "-m", "pytest"))], tmp_path, tmp_path, {})
    assert outcome[0].result == "failed (every test was skipped)"


def test_the_report_holds_figures_and_the_end_of_what_failed(tmp_path):
    (tmp_path / "trt-bench").mkdir()
    (tmp_path / "trt-bench" / "report.md").write_text("| table 1 |")
    (tmp_path / "figures.md").write_text("| split / whole |")
    (tmp_path / "engine-tests.log").write_text("\n".join(f"line {n}." for n in range(40)))
    outcomes = [Outcome("figures", 12.0, "done"), Outcome("engine-tests", 3.0, "failed (1)")]
    text = report(outcomes, FACTS, tmp_path)
    assert text.startswith("# A run of gpu.py on a GPU\n")
    for expected in ("NVIDIA H100, 580.159", "| engine-tests | failed (1) | 3 |", "split / whole",
                     "table 1", "line 39.", "line 15."):  # fmt: skip
        assert expected in text
    assert "line 14." not in text
    dry = report(outcomes, {"device, driver": "no GPU: the stand-in driver"}, tmp_path)
    assert "**No GPU took part and no CUDA kernel ran.**" in dry


def test_wheels_are_unpacked_where_their_modules_are_missing(tmp_path):
    for name, module in [("absent_one-1", "absent_one"), ("pytest-9", "pytest"),
                         ("blockcache-0", "blockcache")]:  # fmt: skip
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "")
            wheel.writestr(f"{name}.dist-info/METADATA", "")
    used = gpu.unpack(tmp_path, tmp_path / "site")
    assert used == ["absent_one-1-py3-none-any.whl", "blockcache-0-py3-none-any.whl"]
    assert sorted(p.name for p in (tmp_path / "site").iterdir() if p.suffix != ".dist-info") == [
        "absent_one", "blockcache",
    ]  # fmt: skip


def test_it_runs_where_nothing_is_installed():
    """The other machine has Python and PyTorch: blockcache itself comes with the kit."""
    bare = [PYTHON, "-I", "-S", gpu.__file__, "--help"]
    made = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stderr) == (0, "")


@pytest.mark.timeout(1500)  # 25 seconds of CPU time, on a machine that may be busy
def test_a_dry_run_on_the_stand_in_driver(driver_library, compiled, tmp_path):
    """All of it but wheels and kernels: the kit's tests and bundles, the report and its data."""
    pytest.importorskip("cuda.bindings.driver")
    kit, out = tmp_path / "kit", tmp_path / "out"
    gpu.copy_tests(Path(gpu.__file__).resolve().parents[2], kit)
    (kit / "wheels").mkdir()
    for name, outputs in {"sd-1": 1, "sd-2": 2}.items():
        shutil.copytree(compiled("sd", outputs)[1].folder, kit / "bundles" / name)
    command = [PYTHON, str(kit / "gpu.py"), "run", str(kit), str(out)]
    made = subprocess.run(
        [*command, "--stand-in", str(driver_library)], capture_output=True, text=True, check=False
    )
    text = (out / "report.md").read_text()
    assert made.returncode == 0, made.stdout + made.stderr + text
    data = json.loads((out / "report.json").read_text())
    done = {part["name"]: part["result"] for part in data["parts"]}
    assert done["engine-tests"] == done["figures"] == "done"
    assert all(r.startswith("left out: ") for n, r in done.items() if n.partition("-")[0] == "trt")
    assert data["figures"]["machine"]["device"] == "Stand-in GPU 0"
    for shown in ("# A dry run of gpu.py", "| figures | done |", "| cached, by graphs |"):
        assert shown in text
    assert not (out / "work").exists()
