#!/usr/bin/env bash
# The paper's Table 1, and every alignment and policy beside it, on the demo model:
#   bash tools/dev/table1.sh [SOLVER ...]        results in table1-out/SOLVER, half an hour each
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup cpu,export,demo
out=table1-out
.venv/bin/python -m blockcache.tools.demo data

table() {
  local solver=$1
  local presets=()
  # Three fractions of the uncached cost, each beside as many steps as it pays for.
  for preset in 20 16 20:t1.25:history 20:x1.25:history 12 20:x1.67:history \
    14 20:t1.43 20:t1.43:least-squares 20:t1.43:history 20:c1.43:history \
    20:x1.43 20:x1.43:least-squares 20:x1.43:history \
    50 30 50:t1.67 50:t1.67:least-squares 50:x1.67 50:x1.67:history; do
    presets+=(--preset "$solver:$preset")
  done
  if [ "$solver" = dpm ]; then # what does not depend on the solver is shown once
    for preset in 20:t1.43:distil 20:every2:history 20:deepcache3:history 20:smooth0.2:history; do
      presets+=(--preset "$solver:$preset")
    done
  fi
  .venv/bin/blockcache compile demo "$out/$solver/bundle" --guidance 3 --profile-seeds 1 "${presets[@]}"
  .venv/bin/blockcache evaluate "$out/$solver/bundle" --images 256 --out "$out/$solver" \
    --reference-work "${BLOCKCACHE_DEMO_WORK:-$HOME/.cache/blockcache/demo}/cpu"
}

for solver in "${@:-dpm}"; do table "$solver"; done
