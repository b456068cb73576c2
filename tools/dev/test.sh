#!/usr/bin/env bash
# Set up, then check everything: lint, types, tests. CI runs this.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup cpu,export,tensorrt-rtx,demo,evaluation,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python tools/dev/link_types.py
.venv/bin/mypy -p blockcache
.venv/bin/python -m pytest -q --durations=15 "$@"
