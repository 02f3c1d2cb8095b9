#!/usr/bin/env bash
# Builds the fuzzing harnesses with clang and runs them, one after the other, each for that long. A finding ends it with status 1; its input
# is named, and belongs into tests/fuzz/regressions/NAME/ once it is mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/setup.sh

folder=${OMNIQUANT_FUZZ_BUILD:-build-fuzz}
all=(safetensors config recipe tokens store)

usage() {
  cat <<'END_OF_USAGE'
Usage: tests/fuzz/run.sh SECONDS [safetensors|config|recipe|tokens|store]...
Builds in build-fuzz/ (or $OMNIQUANT_FUZZ_BUILD) and prints for each harness the inputs run, the edges of our code that were covered of all
that there are in it, the size of the corpus, and the processor time. What was found to be of use stays in build-fuzz/corpus/NAME/ for the next run.
END_OF_USAGE
}

# value PATTERN FILE: what the last line of the log that matches says in its group.
value() { sed -nE "s/$1/\1/p" "$2" | tail -n 1; }

# run NAME: status 1 and the end of the log for a finding.
run() {
  local name=$1 status=0 log=$folder/$1.log corpus=$folder/corpus/$1 seeds=() cpu
  mkdir -p "$corpus" "$folder/findings/$name"
  for from in "$folder/seeds/$name" "tests/fuzz/seeds/$name" "tests/fuzz/regressions/$name"; do
    if [ -d "$from" ]; then seeds+=("$from"); fi
  done
  TIMEFORMAT='%U %S'
  cpu=$({ time "$folder/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -print_final_stats=1 \
    -artifact_prefix="$folder/findings/$name/" "$corpus" "${seeds[@]}" >"$log" 2>&1; } 2>&1) || status=$?
  if [ "$status" != 0 ]; then
    grep -aE '^(expected|SUMMARY|Test unit written|.*runtime error)' "$log" || tail -n 20 "$log"
    return 1
  fi
  printf '%-12s %10s inputs, %5s of %5s edges, corpus of %5s inputs, %5.0f s of processor time\n' "$name" \
    "$(value '^stat::number_of_executed_units: *([0-9]+).*' "$log")" "$(value '.* cov: ([0-9]+).*' "$log")" \
    "$(value '.*\(([0-9]+) inline 8-bit counters\).*' "$log")" "$(value '.* corp: ([0-9]+).*' "$log")" "$(awk '{print $1 + $2}' <<<"$cpu")"
}

case ${1:-} in
--help) usage && exit 0 ;;
'' | *[!0-9]*) usage >&2 && exit 2 ;;
esac
seconds=$1
shift
[ $# -gt 0 ] || set -- "${all[@]}"
build "$folder" -DOMNIQUANT_FUZZ=ON -DOMNIQUANT_WERROR=ON -DCMAKE_C_COMPILER=clang
"$folder/tests/fuzz/fuzz_seeds" "$folder/seeds"
# Inputs become files, many a second: in memory, where that can be.
if [ -z "${TMPDIR:-}" ] && [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
findings=0
for name; do run "$name" || findings=1; done
exit $findings
