#!/bin/bash
# plan.sh OMNIQUANT TEST_HELPER: what `plan` says of memory and disk is what runs take, within a tenth; and its command line.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

"$helper" tokens "$work/tokens.h5" 40000 256 1 && "$helper" model "$work/model" 3 384 6 2 1536 256 F16 || exit 1
common=(--model "$work/model" --samples 32 --seqlen 256 --epochs 1 --group-size 64 --backend cpu --threads 1)

# number KEY: of the plan's JSON, the first of that name.
number() { sed -n 's/^ *"'"$1"'": \([0-9.e+]*\).*/\1/p' "$work/plan" | head -n 1; }

# memory_near RANKS FLAG...: peak memory of the largest rank, of which rank 0 has the most to hold.
memory_near() {
  local ranks=$1 peak
  shift
  rm -rf "$work/out"
  "$program" plan --json --ranks "$ranks" "${common[@]}" "$@" >"$work/plan" || return
  peak=$(launch "$ranks" calibrate --tokens "$work/tokens.h5" --output "$work/out" "${common[@]}" "$@" 2>"$work/log" |
    sed -n 's/.*peak memory \([0-9]*\) MiB a rank.*/\1/p')
  [ -n "$peak" ] || { cat "$work/log" && return 1; }
  echo "# $ranks ranks $*: $peak MiB, planned $(awk -v bytes="$(number host)" 'BEGIN { printf "%.0f", bytes / 1048576 }') MiB" >&3
  near "$(awk -v bytes="$(number host)" 'BEGIN { print bytes / 1048576 }')" "$peak" 0.1
}

exec 3>&1
if ! sanitized; then # sanitizers keep freed memory, and take as much again
  check "memory: one rank" memory_near 1 --wbits 3
  check "memory: two ranks" memory_near 2 --wbits 4 --batch 2
  check "memory: LET and quantized activations" memory_near 1 --wbits 4 --abits 4 --let --aug-loss
  check "disk: as planned" near "$(number output_bytes)" "$(cat "$work"/out/blocks/*.h5 | wc -c)" 0.1
fi

json() { python3 -c 'import json, sys; json.load(sys.stdin)'; }
measured() { "$program" plan "${common[@]}" --wbits 3 --measure "$work/here.json" --json >"$work/plan" && [ -s "$work/here.json" ]; }
check "measure: times this host and keeps it" measured
if python3 -c pass 2>/dev/null; then
  check "measure: the file is JSON" json <"$work/here.json"
  check "plan: is JSON" json <"$work/plan"
fi
planned=$(number run_seconds)
again() {
  "$program" plan "${common[@]}" --wbits 3 --measured "$work/here.json" --json >"$work/plan" && near "$planned" "$(number run_seconds)" 1e-6
}
check "measured: the same plan from the file" again

# refused MESSAGE FLAG...
refused() {
  local message=$1 said
  shift
  said=$("$program" plan --model "$work/model" "$@" 2>&1 >/dev/null)
  [ $? = 2 ] && [ "$(wc -l <<<"$said")" = 1 ] && grep -qF -- "$message" <<<"$said" && return
  echo "$said"
  return 1
}
check "refused: an unknown card" refused "'h500' is neither h100, h200, a100 nor a file" --gpu h500
check "refused: no ranks" refused "--ranks: 0 is not in" --ranks 0
check "refused: a recipe that does not fit together" refused "batch" --batch 500
check "refused: samples that are too many tokens" refused "2048 positions" --model "$(dirname "$0")/plans/opt-66b" --seqlen 4096
check "refused: no model" refused "config.json: No such file or directory" --model "$work"
finish
