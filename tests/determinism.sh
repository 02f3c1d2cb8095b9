#!/bin/bash
# determinism.sh OMNIQUANT TEST_HELPER: what is stored and what is measured do not depend on the number of ranks, nor on the day.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

"$helper" tokens "$work/tokens.h5" 1000 96 1 || exit 1

# calibrate NAME MODEL RANKS FLAG...: a store in $work/NAME; its output in $work/NAME.log.
calibrate() {
  local name=$1 model=$2 ranks=$3
  shift 3
  launch "$ranks" calibrate --model "$fixtures/$model" --tokens "$work/tokens.h5" --output "$work/$name" --seqlen 32 --batch 4 --epochs 3 \
    "$@" >"$work/$name.log" 2>&1 || {
    cat "$work/$name.log"
    return 1
  }
}

differ() { ! "$helper" compare "$work/$1" "$work/$2"; }

# same_for_all_ranks NAME MODEL FLAG...: the samples never fill the last batch, and on 4 ranks not every rank has as many.
same_for_all_ranks() {
  local name=$1 ranks
  for ranks in 1 2 4; do check "$name: $ranks ranks finish" calibrate "$name $ranks" "$2" "$ranks" "${@:3}"; done
  check "$name: 2 ranks finish again" calibrate "$name again" "$2" 2 "${@:3}"
  check "$name: 1 and 2 ranks store the same" "$helper" compare "$work/$name 1" "$work/$name 2"
  check "$name: 1 and 4 ranks store the same" "$helper" compare "$work/$name 1" "$work/$name 4"
  check "$name: the second run stores the same" "$helper" compare "$work/$name 2" "$work/$name again"
  check "$name: without training" calibrate "$name rtn" "$2" 1 "${@:3}" --epochs 0
  check "$name: training changes what is stored" differ "$name 1" "$name rtn"
}

same_for_all_ranks "paper" golden/model_llama --wbits 3 --group-size 16 --samples 7
same_for_all_ranks "search and sign" llama_gqa_tied --wbits 4 --group-size 0 --lwc-init search --optimizer sign --sign-span 1 --samples 6
same_for_all_ranks "products in bf16" llama_mha --wbits 3 --group-size 16 --bf16-products --samples 6
same_for_all_ranks "both losses" qwen3 --wbits 2 --group-size 32 --aug-loss --symmetric --samples 6 --sampling sequential

check "3 ranks finish" calibrate three llama_mha 3 --wbits 3 --group-size 16 --samples 7
check "8 ranks finish" calibrate eight llama_mha 8 --wbits 3 --group-size 16 --samples 9
check "8 ranks: some have nothing to do" grep -q '^8 ranks share 4 samples a step: 4 of them have nothing to do' "$work/eight.log"
check "8 ranks: told once" test "$(grep -c 'nothing to do' "$work/eight.log")" = 1

# perplexity RANKS FLAG...: of 7 windows.
perplexity() {
  local ranks=$1
  shift
  launch "$ranks" eval --model "$fixtures/golden/model_llama" --tokens "$work/tokens.h5" --seqlen 32 --windows 7 --json "$@" 2>"$work/eval.log" |
    sed -n 's/^ *"perplexity": \(.*\),$/\1/p'
}

full=$(perplexity 1)
stored=$(perplexity 1 --quantized "$work/paper 1")
for ranks in 2 3; do
  check "eval on $ranks ranks: full precision" near "$full" "$(perplexity "$ranks")" 1e-6
  check "eval on $ranks ranks: a store" near "$stored" "$(perplexity "$ranks" --quantized "$work/paper 1")" 1e-6
done
check "eight bits" calibrate "eight bits" golden/model_llama 2 --wbits 8 --group-size 32 --epochs 0 --samples 7
check "eight bits are nearly full precision" near "$full" "$(perplexity 2 --quantized "$work/eight bits")" 1e-2
finish
