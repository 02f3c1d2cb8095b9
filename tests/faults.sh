#!/bin/bash
# faults.sh OMNIQUANT TEST_HELPER: a call that fails on one of two ranks ends both, with a message and without a hang; what is left is whole,
# and the same command then makes what an undisturbed run makes. The calls are chosen at even distances over the run; OMNIQUANT_FAULT_COUNT=N:
# how many of each kind and rank (3; 0: all); OMNIQUANT_FAULT_KINDS="KIND...": of these kinds only.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
faulty=$(dirname "$helper")/omniquant_faults
count=${OMNIQUANT_FAULT_COUNT:-3}
sanitized && count=${OMNIQUANT_FAULT_COUNT:-1}

"$helper" tokens "$work/tokens.h5" 200 96 1 || exit 1
flags=(calibrate --model "$fixtures/llama_gqa_tied" --tokens "$work/tokens.h5" --wbits 3 --group-size 16 --let --abits 8 --lwc-init search
  --epochs 1 --samples 4 --batch 2 --seqlen 8 --stream-checkpoint 1)

# run NAME: on two ranks into $work/NAME; a hang is ended after a minute.
run() {
  timeout 60 mpirun --bind-to none --oversubscribe -np 2 "$faulty" "${flags[@]}" --output "$work/$1" --backend cpu --threads 1 \
    >"$work/log" 2>&1 </dev/null
}

# Of a failed run: no hang, a message unless MPI itself was what failed, whole blocks, and then an undisturbed run's codes.
ends_well() {
  local kind=$1 n=$2 rank=$3 status
  rm -rf "$work/out"
  OMNIQUANT_FAULT="$kind $n $rank" run out
  status=$?
  [ "$status" != 124 ] || { echo "hangs" && cat "$work/log" && return 1; }
  [ "$status" = 0 ] || grep -q '^omniquant: ' "$work/log" || { echo "no message" && cat "$work/log" && return 1; }
  if [ -e "$work/out/omniquant.h5" ]; then
    "$program" verify --json "$work/out" 2>/dev/null | grep -q '"damaged": \[\]' || { echo "damaged" && "$program" verify "$work/out" && return 1; }
  fi
  run out || { echo "does not go on" && cat "$work/log" && return 1; }
  "$helper" compare "$work/reference" "$work/out"
}

# Calls of a kind that a whole run makes on a rank: a call beyond the last cannot fail.
calls() {
  OMNIQUANT_FAULT_COUNT_CALLS=1 OMNIQUANT_FAULT="$1 1000000000 $2" run counted
  rm -rf "$work/counted"
  sed -n "s/^calls of $1 on rank $2: //p" "$work/log"
}

# Both ranks hold all weights by themselves when one of them cannot have memory in common.
does_without() {
  OMNIQUANT_FAULT="$1 1 $2" run alone || { cat "$work/log" && return 1; }
  grep -q 'memory in common cannot be had' "$work/log" && "$helper" compare "$work/reference" "$work/alone" && rm -rf "$work/alone"
}

check "an undisturbed run" run reference
check "nothing is said of memory in common" test -z "$(grep 'in common' "$work/log")"
check "memory in common that cannot be mapped" does_without map 1
check "memory in common that cannot be opened" does_without open 1
for kind in ${OMNIQUANT_FAULT_KINDS:-malloc read write open collective poll map}; do
  for rank in 0 1; do
    total=$(calls "$kind" $rank)
    [ "${total:-0}" -gt 0 ] || continue
    step=$((count == 0 || total <= count ? 1 : total / count))
    for ((n = 1 + (count ? step / 2 : 0); n <= total; n += step)); do
      check "$kind $n of $total on rank $rank" ends_well "$kind" $n $rank
    done
  done
done
finish
