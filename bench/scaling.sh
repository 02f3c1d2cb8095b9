#!/usr/bin/env bash
# What more ranks bring: the same calibration on 1 rank and on more, one thread each.
# shellcheck source=bench/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: bench/scaling.sh [--program FILE] [--model DIR] [--tokens FILE] [--ranks N] [--json FILE] [FLAG-OF-CALIBRATE...]
Columns:
  ranks     processes of one thread each, on this machine
  blocks s  seconds of all blocks together, as the store tells them; of three runs the fastest
  run s     seconds of that run, with opening files, embedding and writing
  speed-up  blocks s on one rank over blocks s on this many
  ideal     the speed-up that dividing the work would give: ranks, up to the batch and the cores
Runs alternate between the numbers of ranks, so that a machine whose speed drifts is fair to both.
END
}

options "$@"
batch=4 repeats=3
# measure RANKS: sets best[RANKS] and run[RANKS] if this run was faster than those before.
measure() {
  calibrate "$1" --wbits 3 --group-size 64 --batch $batch --blocks 0:4 --samples 16 --seqlen 512 --sampling sequential --epochs 2
  if [ -z "${best[$1]:-}" ] || [ "$(number "$learning < ${best[$1]}")" = 1 ]; then best[$1]=$learning run[$1]=$total; fi
}

best=() run=() rows=''
for ((i = 0; i < repeats; i++)); do for n in 1 "$ranks"; do measure "$n"; done; done
printf '%6s %10s %10s %10s %8s\n' ranks 'blocks s' 'run s' speed-up ideal
for n in 1 "$ranks"; do
  speedup=$(number "${best[1]} / ${best[$n]}")
  ideal=$n
  for limit in "$batch" "$(nproc)"; do [ "$ideal" -le "$limit" ] || ideal=$limit; done
  printf '%6d %10.2f %10.1f %10.2f %8d\n' "$n" "${best[$n]}" "${run[$n]}" "$speedup" "$ideal"
  rows+=${rows:+, }
  rows+="{\"ranks\": $n, \"blocks_seconds\": ${best[$n]}, \"run_seconds\": ${run[$n]}, \"speedup\": $speedup, \"ideal\": $ideal}"
done
[ -z "$json" ] || printf '{"benchmark": "scaling", "blocks": %d, "batch": %d, "rows": [%s]}\n' "$count" "$batch" "$rows" >"$json"
