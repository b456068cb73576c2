#!/usr/bin/env bash
# Set up, then run the main job on the demo model: profile, compile, denoise, picture.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup cpu,export,demo
.venv/bin/blockcache demo "$@"
