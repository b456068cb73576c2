#!/usr/bin/env bash
# The paper's Table 1 on the demo model, with every alignment and policy beside the paper's:
#   bash tools/research/table1.sh [dpm-20] [ddim-20] [dpm-50] [ddim-50] [peers-20] [delta-20] [resnets-20]
# Results in table1-out/GROUP, five to fifty minutes each on two cores. IMAGES=512 for tighter
# intervals.
source "$(dirname "${BASH_SOURCE[0]}")/../dev/setup.sh"
[ -n "${SKIP_SETUP:-}" ] || setup cpu,export,demo,evaluation
out=${OUT:-table1-out}
work=${DEMO_WORK:-$HOME/.cache/blockcache/demo}
.venv/bin/python -m blockcache.tools.demo data --work "$work"

presets_of() { # S uncached, as few steps as the cached runs pay for, and the cached runs
  case $1 in
    dpm-20) echo 20 16 14 12 10 8 6 20:t1.43 20:t1.43:scale-shift 20:t1.43:distil \
      20:t1.43:history 20:t1.43:history-distil 20:blocks1.25:history 20:blocks1.43 \
      20:blocks1.43:scale-shift 20:blocks1.43:distil 20:blocks1.43:history \
      20:blocks1.43:history-distil 20:blocks1.67:history \
      20:t1.25 20:t1.25:scale-shift 20:t1.25:history \
      20:t1.67 20:t1.67:scale-shift 20:t1.67:history \
      20:t2 20:t2:scale-shift 20:t2:distil 20:t2:history 20:t2:history-distil ;;
    ddim-20) echo 20 16 14 12 10 8 6 20:t1.43 20:t1.43:scale-shift 20:t1.43:history 20:blocks1.43 \
      20:blocks1.25:history 20:blocks1.43:history ;;
    *-50) echo 50 40 35 30 25 20 15 50:t1.67 50:t1.67:scale-shift 50:t1.67:history \
      50:blocks1.25:history 50:blocks1.43:history 50:blocks1.67:history ;;
    peers-20) echo 20 16 14 20:c1.43:history 20:every2:history 20:deepcache2:history \
      20:smooth0.2:history 20:blocks1.43:history ;;
    delta-20) echo 20 20:0.1 20:0.2 20:0.3 20:0.4 20:0.5 ;; # the paper's Fig. 7
    resnets-20) echo 20 16 20:t1.25 20:t1.25:history ;;     # the paper's Fig. 8
    *) echo "unknown group $1" >&2; return 1 ;;
  esac
}

for group in "${@:-dpm-20}"; do
  presets=$(presets_of "$group") # an unknown group ends here
  solver=${group%-*} options=()
  case $solver in peers | delta | resnets) solver=dpm ;; esac
  if [ "$group" = resnets-20 ]; then options+=(--blocks resnets); fi
  for preset in $presets; do options+=(--preset "$solver:$preset"); done
  .venv/bin/blockcache compile demo "$out/$group/bundle" --guidance 3 --profile-seeds 1 "${options[@]}"
  .venv/bin/blockcache evaluate "$out/$group/bundle" --images "${IMAGES:-256}" --out "$out/$group" \
    --reference-work "$work/cpu" --yardstick uncached
done
