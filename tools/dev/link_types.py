"""Link the package's parts under ``build/typing/blockcache`` so that type checkers find it.

The import names (``blockcache.runtime``, ...) exist only in an installed wheel or an editable
install's import hook; type checkers follow neither.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = ROOT / "runtime" / "package" / "blockcache"
"""What a wheel installs at the top of the package: ``__init__.py`` and ``py.typed``."""


def main() -> None:
    """Make the links; existing ones are left alone."""
    package = ROOT / "build" / "typing" / "blockcache"
    package.mkdir(parents=True, exist_ok=True)
    rooms = [ROOT / name for name in ("export", "runtime", "kernels", "tools")]
    for part in (*rooms, *TOP.iterdir()):
        link = package / part.name
        if not link.exists() and part.name != "__pycache__":
            link.symlink_to(part)


if __name__ == "__main__":
    main()
