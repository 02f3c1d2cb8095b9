#!/bin/bash
# families.sh OMNIQUANT TEST_HELPER: the whole program on a small model of every family: perplexity is what transformers gives, and a
# calibration with everything there is to learn stores the same on 1 and 2 ranks, can be evaluated, and quantizes activations in eval too.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

"$helper" tokens "$work/tokens.h5" 1000 96 1 || exit 1

# perplexity MODEL TOKENS FLAG...
perplexity() {
  launch 1 eval --model "$fixtures/$1" --tokens "$2" --seqlen 24 --windows 2 --json "${@:3}" 2>"$work/eval.log" |
    sed -n 's/^ *"perplexity": \(.*\),$/\1/p'
}

# calibrate NAME MODEL RANKS FLAG...
calibrate() {
  launch "$3" calibrate --model "$fixtures/$2" --tokens "$work/tokens.h5" --output "$work/$1" --seqlen 24 --samples 6 --batch 4 --epochs 2 \
    --wbits 4 --group-size 32 --abits 6 "${@:4}" >"$work/log" 2>&1 || {
    cat "$work/log"
    return 1
  }
}

differ() { [ -n "$1" ] && [ -n "$2" ] && [ "$1" != "$2" ]; }

for model in llama_mha llama_gqa_tied mistral qwen2 qwen3 opt opt_post falcon_7b falcon_40b falcon_11b mixtral; do
  want=$("$helper" expected "$work/ids.h5" "$fixtures/$model/expected.safetensors")
  check "$model: perplexity is that of transformers" near "$want" "$(perplexity $model "$work/ids.h5")" 1e-4
  up=--let-up
  case $model in falcon*) up=--no-let-up ;; esac
  check "$model: 1 rank" calibrate "$model 1" $model 1 --let $up
  check "$model: 2 ranks" calibrate "$model 2" $model 2 --let $up
  check "$model: 1 and 2 ranks store the same" "$helper" compare "$work/$model 1" "$work/$model 2"
  six=$(perplexity $model "$work/ids.h5" --quantized "$work/$model 1")
  check "$model: a store is evaluated" near "$want" "$six" 0.2
  check "$model: with quantized activations" differ "$six" "$(perplexity $model "$work/ids.h5" --quantized "$work/$model 1" --abits 16)"
done

# Folding is exact: with weights of eight bits, not clipped, little is lost. The blocks are kept as LET left them; opt's has shifts too, which are
# there where activations are quantized.
for model in "opt 12" "falcon_40b 12" "mixtral 16"; do
  read -r model bits <<<"$model"
  want=$("$helper" expected "$work/ids.h5" "$fixtures/$model/expected.safetensors")
  check "$model: eight bits" calibrate "$model 8" "$model" 1 --let --no-lwc --wbits 8 --abits "$bits" --epochs 1
  check "$model: with LET" grep -q 'kept \(start\|end\)' "$work/log"
  check "$model: eight bits are nearly full precision" near "$want" "$(perplexity "$model" "$work/ids.h5" --quantized "$work/$model 8")" 5e-3
done
finish
