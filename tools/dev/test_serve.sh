#!/usr/bin/env bash
# The tests that start Ray Serve, which the default suite leaves out. It installs the extra ray.
# Set-up takes a minute, the tests one to two. Where BLOCKCACHE_TEST_TRACES names the same folder for
# test.sh and for this, models are traced once for both.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup cpu,export,ray,dev
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q -m serve --durations=5 tests/tools/serve "$@"
