#!/bin/bash
# cuda_runs.sh OMNIQUANT TEST_HELPER: whole runs on a GPU, or emulated by a program of that name: two ranks store what one does, bit for bit, and
# the store is worth about what the CPU's is. Both ranks may share one device (ranks.bash).
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

"$helper" tokens "$work/tokens.h5" 1000 96 1 || exit 1

# run RANKS ARGUMENT...: the program on that many ranks, one thread each.
run() {
  local ranks=$1
  shift
  bash "$(dirname "$0")/ranks.bash" "$ranks" "$program" "$@" --threads 1
}

# calibrate NAME MODEL RANKS BACKEND FLAG...: a store in $work/NAME; its output in $work/NAME.log.
calibrate() {
  local name=$1 model=$2 ranks=$3 backend=$4
  shift 4
  run "$ranks" calibrate --backend "$backend" --model "$fixtures/$model" --tokens "$work/tokens.h5" --output "$work/$name" --seqlen 32 \
    --batch 4 --samples 8 --epochs 3 "$@" >"$work/$name.log" 2>&1 || {
    cat "$work/$name.log"
    return 1
  }
}

# perplexity NAME MODEL BACKEND: of a store.
perplexity() {
  run 1 eval --backend "$3" --model "$fixtures/$2" --quantized "$work/$1" --tokens "$work/tokens.h5" --seqlen 32 --json 2>/dev/null |
    grep -o '"perplexity": [0-9.]*' | cut -d ' ' -f 2
}

# compare_worth NAME MODEL: the GPU's store on the GPU against the CPU's on the CPU.
compare_worth() {
  local gpu cpu
  gpu=$(perplexity "$1 1" "$2" cuda) cpu=$(perplexity "$1 cpu" "$2" cpu)
  echo "$gpu on the GPU, $cpu on the CPU"
  near "$gpu" "$cpu" 0.02
}

# same_for_all_ranks NAME MODEL FLAG...
same_for_all_ranks() {
  check "$1: one rank finishes" calibrate "$1 1" "$2" 1 cuda "${@:3}"
  check "$1: two ranks finish" calibrate "$1 2" "$2" 2 cuda "${@:3}"
  check "$1: the CPU finishes" calibrate "$1 cpu" "$2" 1 cpu "${@:3}"
  check "$1: 1 and 2 ranks store the same" "$helper" compare "$work/$1 1" "$work/$1 2"
  check "$1: perplexity within 2 % of the CPU's" compare_worth "$1" "$2"
}

# On the emulation a device of just as much memory as is held back from the samples has room for everything else.
export_memory() {
  export OMNIQUANT_EMULATED_MEMORY=$((1 << 30)) OMNIQUANT_EMULATED_LATE=$1
}

# calibrate_on_host NAME RANKS LATE MODEL FLAG...: stores what NAME holds, which was made with all samples on the device.
calibrate_on_host() (
  local name=$1 ranks=$2 model=$4
  export_memory "$3"
  rm -rf "$work/host"
  calibrate host "$model" "$ranks" cuda "${@:5}" || return 1
  grep -q 'pinned host memory' "$work/host.log" || { cat "$work/host.log" && return 1; }
  "$helper" compare "$work/$name" "$work/host"
)

# take_up_on_host NAME MODEL FLAG...: a run whose last block is lost stores it again.
take_up_on_host() (
  local name=$1 model=$2
  export_memory copies
  rm -rf "$work/host"
  calibrate host "$model" 2 cuda "${@:3}" || return 1
  rm "$work/host/blocks/0001.h5" || return 1
  calibrate host "$model" 2 cuda "${@:3}" && "$helper" compare "$work/$name" "$work/host"
)

perplexity_on_host() (
  local on_device on_host
  on_device=$(perplexity "$1" "$2" cuda)
  export_memory work
  on_host=$(perplexity "$1" "$2" cuda)
  echo "$on_device on the device, $on_host on the host"
  [ -n "$on_device" ] && [ "$on_device" = "$on_host" ]
)

if sanitized; then skip "too slow with sanitizers; the kernels' and the block's tests run with them"; fi
calibrate probe llama_mha 1 cuda --epochs 0 >/dev/null
if grep -q 'not built in\|no device' "$work/probe.log"; then skip "$(grep -m 1 'not built in\|no device' "$work/probe.log")"; fi

same_for_all_ranks "clipping" llama_gqa_tied --wbits 4 --group-size 32
same_for_all_ranks "experts" mixtral --wbits 4 --group-size 32
if [ "$(basename "$program")" = omniquant_emulated ]; then # which is slow
  check "samples on the host, one rank" calibrate_on_host "clipping 1" 1 copies llama_gqa_tied --wbits 4 --group-size 32
  check "samples on the host, two ranks" calibrate_on_host "clipping 1" 2 work llama_gqa_tied --wbits 4 --group-size 32
  check "a run is taken up, samples on the host" take_up_on_host "clipping 1" llama_gqa_tied --wbits 4 --group-size 32 --stream-checkpoint 1
  check "perplexity of samples on the host" perplexity_on_host "clipping 1" llama_gqa_tied
  finish
fi
same_for_all_ranks "search and sign" llama_mha --wbits 4 --group-size 32 --lwc-init search --optimizer sign --sign-span 0.1
same_for_all_ranks "transformation" llama_mha --wbits 4 --group-size 0 --let --abits 8
finish
