#!/usr/bin/env bash
# What several recipes in one pass save: two recipes, each in a run of its own and both in one pass.
# shellcheck source=bench/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: bench/one_pass.sh [--program FILE] [--model DIR] [--tokens FILE] [--ranks N] [--json FILE] [FLAG-OF-CALIBRATE...]
Columns:
  ranks     processes of one thread each, on this machine
  read s    seconds that reading a block is made to take (OMNIQUANT_TEST_READ_SECONDS): 0, as it is; else as from a slow file system
  epochs    of both recipes (W3 and W4, groups of 64, batch 1, 16 samples of 512 tokens, 2 blocks)
  two runs  seconds of the two runs together; of two repeats the faster
  one pass  seconds of one run with both recipes
  ratio     one pass over two runs
On one rank a pass saves the full-precision forward pass of the second run, and its reading. More ranks than the batch can use form teams
that calibrate the recipes side by side.
END
}

options "$@"
repeats=2
for bits in 3 4; do printf 'wbits: %d\ngroup_size: 64\n' $bits >"$work/w$bits.yaml"; done

# measure RANKS READ EPOCHS CONFIG...: sets seconds.
measure() {
  local flags=() summary config
  for config in "${@:4}"; do flags+=(--config "$work/$config.yaml"); done
  rm -rf "$work/out"
  summary=$(OMNIQUANT_TEST_READ_SECONDS=$2 mpirun --bind-to none --oversubscribe -np "$1" "$program" calibrate --model "$model" --tokens "$tokens" \
    --output "$work/out" --threads 1 --blocks 0:2 --samples 16 --seqlen 512 --sampling sequential --epochs "$3" "${flags[@]}" \
    ${settings[@]+"${settings[@]}"} 2>"$work/log" </dev/null) || {
    cat "$work/log" >&2
    fail "calibrate failed"
  }
  seconds=$(sed -n 's/.* a weight, \([0-9.]*\) s, .*/\1/p' <<<"$summary" | tail -n 1)
}

least() { if [ -z "$1" ] || [ "$(number "$2 < $1")" = 1 ]; then echo "$2"; else echo "$1"; fi; }

rows=''
printf '%6s %7s %7s %9s %9s %6s\n' ranks 'read s' epochs 'two runs' 'one pass' ratio
for case in "1 0 0" "1 0 1" "1 0 2" "1 8 1" "$ranks 0 1" "$ranks 0 2"; do
  read -r n read epochs <<<"$case"
  two='' one=''
  for ((i = 0; i < repeats; i++)); do
    measure "$n" "$read" "$epochs" w3 && first=$seconds
    measure "$n" "$read" "$epochs" w4 && two=$(least "$two" "$(number "$first + $seconds")")
    measure "$n" "$read" "$epochs" w3 w4 && one=$(least "$one" "$seconds")
  done
  ratio=$(number "$one / $two")
  printf '%6d %7s %7d %9.1f %9.1f %6.2f\n' "$n" "$read" "$epochs" "$two" "$one" "$ratio"
  rows+=${rows:+, }
  rows+="{\"ranks\": $n, \"read_seconds\": $read, \"epochs\": $epochs, \"two_runs_seconds\": $two, \"one_pass_seconds\": $one, \"ratio\": $ratio}"
done
[ -z "$json" ] || printf '{"benchmark": "one_pass", "rows": [%s]}\n' "$rows" >"$json"
