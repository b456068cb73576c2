#!/usr/bin/env bash
# Set up, then check everything: lint, types, tests. CI runs this.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup cpu,export,tensorrt-rtx,demo,evaluation,dev
# For CLIP's vocabulary, which it carries as a file (MIT). It is not imported: it needs torchvision.
.venv/bin/python -m pip install --quiet --no-compile --no-deps "open_clip_torch==3.3.0"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python tools/dev/link_types.py
.venv/bin/mypy -p blockcache
# One worker a core, one thread a worker; a file's tests share their fixtures, so they stay together.
# Files run in their order, not the longest first: single long tests would come last, one core idle.
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
