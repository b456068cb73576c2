"""The GPU run without a GPU: every command line it uses parses, and no failure stops it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockcache.tools.bench import gpu
from blockcache.tools.bench.gpu import Outcome, Part, gpu_name, parts, run_parts, summary

PYTHON = sys.executable


def all_parts(tmp_path, gpu="h100"):
    return parts(tmp_path / "out", tmp_path / "work", gpu)


def test_every_command_line_of_a_part_parses(tmp_path):
    typer = pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    from blockcache.tools import cli
    from blockcache.tools.bench import scale

    app = typer.main.get_command(cli._app())
    alone = typer.Typer()
    alone.command()(scale.main)
    seen = set()
    for part in all_parts(tmp_path):
        python, switch, module, *arguments = part.command
        assert python == "python"
        if module == "blockcache.tools.cli":
            name, *arguments = arguments
            app.commands[name].make_context(name, arguments)
            seen.add(name)
        elif module == "blockcache.tools.bench.scale":
            typer.main.get_command(alone).make_context("scale", arguments)
            seen.add("scale")
        else:
            assert (switch, module) in {("-m", "pytest"), ("-m", "blockcache.tools.bench.kernels")}
    assert seen == {"compile", "build", "check", "bench", "estimate", "scale"}


def test_the_wanted_order_fits_the_limits(tmp_path):
    found = all_parts(tmp_path)
    names = [part.name for part in found]
    assert len(set(names)) == len(names)
    assert names.index("demo-bench") < names.index("sd15-compile")
    without = [part.name for part in all_parts(tmp_path, gpu="")]
    assert set(names) - set(without) == {"demo-estimate", "sd15-estimate"}


def test_parts_go_on_after_a_failure_and_end_with_the_budget(tmp_path):
    now = [0.0]

    def clock():
        now[0] += 10.0
        return now[0]

    wanted = [
        Part("good", 5, ("python", "-c", "print('figures')")),
        Part("bad", 5, ("python", "-c", "raise SystemExit(3)")),
        Part("slow", 1.1, ("python", "-c", "import time; time.sleep(60)")),
        Part("absent", 5, ("no-such-program",)),
        Part("late", 5, ("python", "-c", "pass")),
    ]
    outcomes = run_parts(wanted, tmp_path, PYTHON, budget_s=75, clock=clock)
    assert [o.result for o in outcomes] == [
        "done", "failed (3)", "out of time", "failed (no such program)", "no time left",
    ]  # fmt: skip
    assert "figures" in (tmp_path / "good.log").read_text()


def test_the_summary_holds_every_report(tmp_path):
    (tmp_path / "demo-bench").mkdir()
    (tmp_path / "demo-bench" / "report.md").write_text("| table 1 |")
    (tmp_path / "demo-estimate.log").write_text("| roofline |")
    outcomes = [Outcome("demo-bench", 12.0, "done"), Outcome("kernels", 3.0, "failed (1)")]
    text = summary(outcomes, "NVIDIA H100\n", tmp_path)
    for expected in ("| kernels | failed (1) | 3 |", "| all | | 15 |", "table 1", "roofline"):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3, 550.54", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10G", ""),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("", ""),
    ],
)
def test_a_gpu_is_found_among_the_data_sheets(text, name):
    assert gpu_name(text) == name


def test_it_runs_where_nothing_is_installed():
    """The other machine has Python and PyTorch: blockcache itself is installed by ``run``."""
    bare = [PYTHON, "-I", "-S", gpu.__file__, "--help"]
    made = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stderr) == (0, "")
