#!/usr/bin/env bash
# What a slow reader costs: a run where reading a block takes half, as long and twice as long as calibrating it. While block i is calibrated
# block i + 1 is read, so that both together take as long as the longer, and the other's time for one block.
# shellcheck source=bench/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: bench/overlap.sh [--program FILE] [--model DIR] [--tokens FILE] [--ranks N] [--json FILE] [FLAG-OF-CALIBRATE...]
Columns, in seconds of whole runs:
  read         what the reader is made to sleep for each block
  reading      a run that only rounds to nearest, with that reader: nearly all of it is reading
  calibrating  a run that trains, with a reader that does not sleep
  both         a run that trains, with that reader
  bound        the longer of reading and calibrating, and one block of the other
  sum          reading and calibrating one after the other
END
}

options "$@"
training=(--wbits 3 --group-size 64 --batch 4 --blocks 0:6 --samples 8 --seqlen 256 --sampling sequential --epochs 4)
calibrate "$ranks" "${training[@]}"
calibrating=$total rows=''
printf '%10s %10s %12s %10s %10s %10s %12s\n' read reading calibrating both bound sum both/bound
for factor in 0.5 1 2; do
  OMNIQUANT_TEST_READ_SECONDS=$(number "$factor * $calibrating / $count")
  export OMNIQUANT_TEST_READ_SECONDS
  settings+=(--epochs 0)
  calibrate "$ranks" "${training[@]}"
  reading=$total
  unset 'settings[-1]' 'settings[-1]'
  calibrate "$ranks" "${training[@]}"
  bound=$(number "$reading > $calibrating ? $reading + $calibrating / $count : $calibrating + $reading / $count")
  sum=$(number "$reading + $calibrating")
  ratio=$(number "$total / $bound")
  printf '%10.2f %10.1f %12.1f %10.1f %10.1f %10.1f %12.2f\n' "$OMNIQUANT_TEST_READ_SECONDS" "$reading" "$calibrating" "$total" "$bound" \
    "$sum" "$ratio"
  rows+=${rows:+, }
  rows+="{\"read_seconds\": $OMNIQUANT_TEST_READ_SECONDS, \"reading_seconds\": $reading, \"calibrating_seconds\": $calibrating, "
  rows+="\"both_seconds\": $total, \"bound_seconds\": $bound, \"sum_seconds\": $sum, \"both_over_bound\": $ratio}"
done
[ -z "$json" ] || printf '{"benchmark": "overlap", "ranks": %d, "blocks": %d, "rows": [%s]}\n' "$ranks" "$count" "$rows" >"$json"
