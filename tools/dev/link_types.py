"""Link the four folders under ``build/typing/blockcache`` so that type checkers find the package.

The import names (``blockcache.runtime``, ...) exist only in an installed wheel or an editable
install's import hook; type checkers follow neither.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Make the links; existing ones are left alone."""
    package = ROOT / "build" / "typing" / "blockcache"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("export", "runtime", "kernels", "tools"):
        link = package / name
        if not link.exists():
            link.symlink_to(ROOT / name, target_is_directory=True)


if __name__ == "__main__":
    main()
