# Sourced by demo.sh and test.sh: a virtual environment in .venv with blockcache installed.
# The pin keeps set-up quick and reproducible; pyproject.toml accepts any recent torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

setup() {
  local extras=$1
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv || {
      echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  # Python compiles a module at its first import; pip would compile all of torch for half a minute.
  local install=(.venv/bin/python -m pip install --quiet --no-compile)
  "${install[@]}" --upgrade pip
  "${install[@]}" "torch==2.13.0"
  "${install[@]}" --editable ".[$extras]"
}
