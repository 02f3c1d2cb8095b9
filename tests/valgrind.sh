#!/bin/bash
# valgrind.sh OMNIQUANT TEST_HELPER: one block calibrated and a model evaluated without a leak and without a wrong access to memory.
# What Open MPI leaves behind is suppressed by its own file and by valgrind.supp.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
command -v valgrind >/dev/null || skip "no valgrind"
! sanitized || skip "a build with sanitizers"

suppressions=(--suppressions="$(dirname "$0")/valgrind.supp")
for file in /usr/share/openmpi /usr/lib/*/openmpi/share/openmpi; do
  [ ! -e "$file/openmpi-valgrind.supp" ] || suppressions+=(--suppressions="$file/openmpi-valgrind.supp")
done

# clean ARGUMENT...: the program under valgrind, one rank; valgrind's findings are its output.
clean() {
  valgrind --quiet --leak-check=full --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect --error-exitcode=9 \
    --keep-debuginfo=yes --num-callers=50 "${suppressions[@]}" "$program" "$@" --backend cpu --threads 1 \
    >"$work/log" 2>&1 && ! grep '^==' "$work/log" && return
  cat "$work/log"
  return 1
}

"$helper" tokens "$work/tokens.h5" 200 96 1 || exit 1
model=(--model "$fixtures/llama_gqa_tied" --tokens "$work/tokens.h5" --seqlen 16)
calibrate=(calibrate "${model[@]}" --wbits 3 --group-size 32 --epochs 2 --batch 2 --samples 3)
check "calibrate one block" clean "${calibrate[@]}" --output "$work/one" --blocks 0:1
check "calibrate, search, sign and both losses" clean "${calibrate[@]}" --output "$work/all" --lwc-init search --optimizer sign --aug-loss
check "calibrate experts with LET and activations" clean calibrate --model "$fixtures/mixtral" --tokens "$work/tokens.h5" --seqlen 16 --samples 2 \
  --epochs 1 --wbits 4 --group-size 32 --abits 6 --let --let-up --output "$work/let"
check "eval" clean eval "${model[@]}" --windows 2 --quantized "$work/all"
finish
