"""Which stages' code has changed since their revision was written, and writing it anew.

python -m blockcache.tools.dev.revisions [--bump STAGE] [--confirm STAGE]
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from blockcache.export import revisions
from blockcache.export.revisions import REVISIONS, Revision

TABLE = Path(revisions.__file__).resolve()
PACKAGE = TABLE.parents[1]
"""The folder that holds ``export`` and ``runtime``."""

Stages = Annotated[list[str] | None, typer.Option(help="A stage, repeatable, or all.")]


def main(bump: Stages = None, confirm: Stages = None) -> None:
    """Print every stage's revision; with options, write the table anew.

    ``--bump``: the stage's results change, so its number goes up and nothing old is reused.
    ``--confirm``: the results stay the same, only the hash is written.
    """
    for names, step in ((bump, 1), (confirm, 0)):
        for stage in _named(names or []):
            write(TABLE, stage, REVISIONS[stage].number + step, source_hash(REVISIONS[stage]))
    if bump or confirm:
        print(f"wrote {TABLE}")
        return
    for stage, revision in REVISIONS.items():
        state = "as written" if source_hash(revision) == revision.sha256 else "CHANGED"
        print(f"{stage:<12} {revision.number:>3}  {state}")


def _named(names: list[str]) -> list[str]:
    unknown = set(names) - {*REVISIONS, "all"}
    if unknown:
        raise typer.BadParameter(f"expected stages of {[*REVISIONS, 'all']}, got {sorted(unknown)}")
    return list(REVISIONS) if "all" in names else names


def source_files(revision: Revision, package: Path = PACKAGE) -> list[Path]:
    """The files that a revision's patterns name; each pattern must name one at least."""
    found: set[Path] = set()
    for pattern in revision.sources:
        files = set(package.glob(pattern))
        if not files:
            raise ValueError(f"{TABLE}: expected files at {pattern!r}, found none. Correct it.")
        found |= files
    return sorted(found)


def source_hash(revision: Revision, package: Path = PACKAGE) -> str:
    """What a stage's sources do, as 16 hex digits: names of files, and their syntax trees."""
    digest = hashlib.sha256()
    for path in source_files(revision, package):
        tree = _plain(ast.parse(path.read_text()))
        digest.update(f"{path.relative_to(package).as_posix()} {json.dumps(tree)}\n".encode())
    return digest.hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without docstrings and empty fields.

    Python's own ``ast.dump`` differs between versions of Python, which add (empty) fields.
    """
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in _fields(node) if value not in (None, [])}
        return [type(node).__name__, *([name, _plain(value)] for name, value in fields.items())]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return repr(node)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Names and values of a node's fields; a body without what only documents."""
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            yield name, [line for line in value if not _is_text(line)]
        else:
            yield name, value


def _is_text(line: ast.AST) -> bool:
    """A docstring, or the text below an assignment."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def write(table: Path, stage: str, number: int, sha256: str) -> None:
    """Put a stage's number and hash in the file of the table."""
    entry = rf'("{re.escape(stage)}": Revision\(\s*)\d+(,\s*)"[0-9a-f]*"'
    text, count = re.subn(entry, rf'\g<1>{number}\g<2>"{sha256}"', table.read_text())
    if count != 1:
        raise ValueError(f"{table}: expected one revision of {stage!r}, found {count}. Correct it.")
    table.write_text(text)


if __name__ == "__main__":
    typer.run(main)
