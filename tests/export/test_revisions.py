"""Revisions: a stage whose code has changed must say whether its results have."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from blockcache.export import revisions
from blockcache.export.revisions import REVISIONS, Revision
from blockcache.export.stages import stage_key
from blockcache.tools.dev.revisions import PACKAGE, TABLE, source_files, source_hash, write

ROOMS = ("unet", "parts", "measure", "align", "graph", "engines")
"""Rooms whose results are kept; presets, which choose and costs make, are made in each compile."""

NO_RESULT = {
    "export/graph/time_tables.py": "fills presets",
    "export/measure/control_images.py": "makes conditions: their hash is in every key",
    "export/unet/configs.py": "reads a model's folder",
    "export/unet/hub.py": "fetches a model",
    "export/unet/load.py": "loads a model: its hash is in every key",
    "export/unet/text.py": "makes conditions: their hash is in every key",
    "export/engines/cache.py": "keeps engines",
    "export/engines/log.py": "hears the builder",
    "export/engines/reference.py": "widens graphs to check engines with",
    "export/engines/report.py": "reports on engines",
    "export/engines/workers.py": "runs builders in processes",
}


@pytest.mark.parametrize("stage", REVISIONS)
def test_a_stage_whose_code_changed_says_whether_its_results_have(stage):
    assert source_hash(REVISIONS[stage]) == REVISIONS[stage].sha256, (
        f"The code of stage {stage!r} has changed. If its results change too: python -m "
        f"blockcache.tools.dev.revisions --bump {stage}. If they are the same: --confirm {stage}."
    )


def test_every_source_of_the_rooms_belongs_to_a_stage_or_makes_no_result():
    """A new file is declared where ``revisions.py`` lists a stage's sources, or here."""
    declared = {path for revision in REVISIONS.values() for path in source_files(revision)}
    there = {path for room in ROOMS for path in (PACKAGE / "export" / room).rglob("*.py")}
    undeclared = {
        path.relative_to(PACKAGE).as_posix()
        for path in there - declared
        if path.name != "__init__.py"
    }
    assert undeclared == set(NO_RESULT)


def test_the_number_is_part_of_the_key(monkeypatch):
    before = {stage: stage_key(stage, model="m") for stage in REVISIONS}
    assert len(set(before.values())) == len(REVISIONS), "so is the stage's name"
    bumped = dataclasses.replace(REVISIONS["profile"], number=REVISIONS["profile"].number + 1)
    monkeypatch.setitem(revisions.REVISIONS, "profile", bumped)
    changed = [stage for stage in REVISIONS if stage_key(stage, model="m") != before[stage]]
    assert changed == ["profile"]


# -- the hash --------------------------------------------------------------------------------------

CODE = """
def double(x):
    return 2 * x  # twice
"""
SAME = {
    "comments": CODE.replace("# twice", "# two times"),
    "layout": CODE.replace("2 * x", "(2\n        * x)"),
    "docstring": CODE.replace("    return", '    """Twice."""\n    return'),
    "module docstring": '"""Numbers."""\n' + CODE,
}
OTHER = {
    "a number": CODE.replace("2", "3"),
    "a name": CODE.replace("double", "twice"),
    "a default": CODE.replace("(x)", "(x=1)"),
    "a statement more": CODE + "double = None\n",
    "a text that is a value": CODE.replace("2 * x", '"2 * x"'),
}


def hash_of(folder, code):
    (folder / "a.py").write_text(code)
    return source_hash(Revision(1, "", ("*.py",)), folder)


@pytest.mark.parametrize("code", SAME.values(), ids=SAME)
def test_what_only_people_read_does_not_count(tmp_path, code):
    assert hash_of(tmp_path, code) == hash_of(tmp_path, CODE)


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_what_runs_counts(tmp_path, code):
    assert hash_of(tmp_path, code) != hash_of(tmp_path, CODE)


def test_a_file_more_counts_and_a_pattern_without_file_is_refused(tmp_path):
    before = hash_of(tmp_path, CODE)
    (tmp_path / "b.py").write_text("")
    assert hash_of(tmp_path, CODE) != before
    with pytest.raises(ValueError, match=r"expected files at 'c\.py', found none"):
        source_hash(Revision(1, "", ("c.py",)), tmp_path)


def test_the_hash_is_the_same_in_every_python(tmp_path):
    """Written down once: type comments, type parameters and the like come and go as fields."""
    assert hash_of(tmp_path, CODE) == "ba6e8803a2605d20"


# -- the tool --------------------------------------------------------------------------------------


def test_one_stage_is_written_and_the_others_stay(tmp_path):
    table = Path(shutil.copy(TABLE, tmp_path / "revisions.py"))
    write(table, "residuals", 12, "0123456789abcdef")
    found = {}
    exec(compile(table.read_text(), "revisions", "exec"), found)
    for stage, revision in found["REVISIONS"].items():
        written = REVISIONS[stage]
        assert revision.sources == written.sources
        if stage == "residuals":
            assert (revision.number, revision.sha256) == (12, "0123456789abcdef")
        else:
            assert (revision.number, revision.sha256) == (written.number, written.sha256)
    with pytest.raises(ValueError, match="expected one revision of 'profil', found 0"):
        write(table, "profil", 1, "")


def test_the_tool_prints_the_stages(tmp_path):
    command = [sys.executable, "-m", "blockcache.tools.dev.revisions"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in told.splitlines()] == list(REVISIONS)
    wrong = subprocess.run([*command, "--bump", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "expected stages of" in wrong.stderr
