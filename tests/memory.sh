#!/bin/bash
# memory.sh OMNIQUANT TEST_HELPER: peak memory does not grow with the number of blocks, in calibrate and in eval, by the program's own count, and in
# export, by the kernel's; nor there with a block's layers.
# Reader, writer and work go on side by side, and what they hold at once is chance: of calibrate's peaks the least of three runs counts.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
! sanitized || skip "a build with sanitizers, which keeps freed memory"
most=0.05 # relative difference
block=(384 6 2 1024 256 F32) # 6 MiB

# calibrate_peak BLOCKS: sets peak to the MiB of the rank that took most.
calibrate_peak() {
  peak=$(launch 2 calibrate --model "$work/model $1" --tokens "$work/tokens.h5" --output "$work/out $1" --wbits 4 --group-size 64 --epochs 1 \
    --batch 2 --samples 4 --seqlen 32 2>"$work/log" | sed -n 's/.*peak memory \([0-9]*\) MiB a rank.*/\1/p')
  [ -n "$peak" ] || cat "$work/log"
}

# eval_peak BLOCKS FLAG...
eval_peak() {
  peak=$(launch 2 eval --model "$work/model $1" --tokens "$work/tokens.h5" --seqlen 32 --windows 4 --json "${@:2}" 2>"$work/log" |
    sed -n 's/^ *"peak_rss_mib": \([0-9.]*\).*/\1/p')
  [ -n "$peak" ] || cat "$work/log"
}

# compare WHAT FEW MANY
compare() {
  echo "# $1: $2 MiB for 4 blocks, $3 MiB for 32"
  check "$1: 32 blocks take no more than 4" near "$2" "$3" "$most"
}

"$helper" tokens "$work/tokens.h5" 200 256 1 || exit 1
for blocks in 4 32; do "$helper" model "$work/model $blocks" $blocks "${block[@]}" || exit 1; done
# least_peak BLOCKS: the same of three runs.
least_peak() {
  local least=''
  for _ in 1 2 3; do
    rm -rf "$work/out $1"
    calibrate_peak "$1"
    if [ -z "$least" ] || [ "${peak:-0}" -lt "$least" ]; then least=$peak; fi
  done
  peak=$least
}
least_peak 4 && few=$peak
least_peak 32
compare "calibrate" "$few" "$peak"
eval_peak 4 && few=$peak
eval_peak 32
compare "eval" "$few" "$peak"
eval_peak 4 --quantized "$work/out 4" && few=$peak
eval_peak 32 --quantized "$work/out 32"
compare "eval of a store" "$few" "$peak"

# export_peak BLOCKS FORMAT
export_peak() {
  peak=$(python3 -c 'import os, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdin=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)' "$program" export --model "$work/model $1" --quantized "$work/out $1" \
    --format "$2" --output "$work/export $1 $2" 2>"$work/log") || cat "$work/log"
}
if python3 -c pass 2>/dev/null; then
  for format in hf gptq compressed-tensors; do
    export_peak 4 $format && few=$peak
    [ $format != gptq ] || small=$few
    export_peak 32 $format
    # The names of 28 blocks' tensors may take something; their codes alone would be 21 MiB.
    echo "# export as $format: $few MiB for 4 blocks, $peak MiB for 32"
    check "export as $format: 32 blocks take no more than 4" awk -v few="$few" -v many="$peak" 'BEGIN { exit !(few > 0 && many < few + 4) }'
  done
  # One block of seven layers, 4 MiB of codes each: the layer at work may be there twice, packed and as it is written.
  "$helper" model "$work/model large" 1 2048 16 16 2048 256 BF16 || exit 1
  launch 1 calibrate --model "$work/model large" --tokens "$work/tokens.h5" --output "$work/out large" --wbits 8 --symmetric --group-size 64 \
    --epochs 0 --batch 1 --samples 1 --seqlen 8 >"$work/log" 2>&1 || cat "$work/log"
  export_peak large gptq
  echo "# export as gptq: $small MiB for small blocks, $peak MiB for one with 28 MiB of codes"
  check "export as gptq: a large block is not held as a whole" awk -v small="$small" -v large="$peak" 'BEGIN { exit !(small > 0 && large < small + 14) }'
fi
finish
