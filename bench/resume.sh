#!/usr/bin/env bash
# What it costs to take a run up again: four blocks are calibrated, then the same run is asked for a fifth, and replays the four.
# shellcheck source=bench/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: bench/resume.sh [--program FILE] [--model DIR] [--tokens FILE] [--ranks N] [--json FILE] [FLAG-OF-CALIBRATE...]
The paper's recipe for W3A16 g64, with 16 samples of 512 tokens. Columns, in seconds:
  calibrated   four blocks, when they were calibrated
  replayed     the same blocks, when the run was taken up again
  share        replayed / calibrated
END
}

options "$@"
recipe=(--wbits 3 --group-size 64 --samples 16 --seqlen 512 --sampling sequential --epochs 20)
calibrate "$ranks" "${recipe[@]}" --blocks 0:4
calibrated=$learning
mpirun --bind-to none --oversubscribe -np "$ranks" "$program" calibrate --model "$model" --tokens "$tokens" --output "$work/out" --threads 1 \
  "${recipe[@]}" --blocks 0:5 ${settings[@]+"${settings[@]}"} >/dev/null 2>"$work/log" </dev/null || fail "calibrate failed: $(tail -n 3 "$work/log")"
replayed=$(sed -n 's/^blocks .* passed through in \([0-9.]*\) s$/\1/p' "$work/log")
share=$(number "$replayed / $calibrated")
printf '%10s %10s %10s\n%10.1f %10.1f %10.4f\n' calibrated replayed share "$calibrated" "$replayed" "$share"
[ -z "$json" ] ||
  printf '{"benchmark": "resume", "ranks": %d, "blocks": 4, "calibrated_seconds": %s, "replayed_seconds": %s, "share": %s}\n' "$ranks" "$calibrated" \
    "$replayed" "$share" >"$json"
