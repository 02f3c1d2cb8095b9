#!/usr/bin/env bash
# What a model that was quantized on the GPU is worth beside one quantized on the CPU: the same recipe on both, both evaluated on both.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bench/gpu_quality.sh OMNIQUANT MODEL TOKENS EVALUATION WINDOW WINDOWS [FLAG...]
Quantizes MODEL with TOKENS (and calibrate's flags) by both backends and prints one JSON object: perplexities on so many windows of so many tokens
of EVALUATION, named by where the model was quantized and where it was evaluated, and `ratio`: quantized on the GPU over quantized on the CPU,
both evaluated there.
END
}

case ${1:-} in
--help) usage && exit 0 ;;
esac
[ $# -ge 6 ] || { usage >&2 && exit 2; }
omniquant=$1 model=$2 tokens=$3 evaluation=$4 window=$5 windows=$6
stores=$(mktemp -d)
trap 'rm -rf "$stores"' EXIT

# perplexity QUANTIZED_ON EVALUATED_ON
perplexity() {
  "$omniquant" eval --backend "$2" --model "$model" --tokens "$evaluation" --quantized "$stores/$1" --seqlen "$window" --windows "$windows" \
    --json | grep -oE '"perplexity": *[0-9.e+]+' | grep -oE '[0-9.e+]+$'
}

for backend in cuda cpu; do
  "$omniquant" calibrate --backend "$backend" --model "$model" --tokens "$tokens" --output "$stores/$backend" "${@:7}" >&2
done
cuda_cuda=$(perplexity cuda cuda)
cuda_cpu=$(perplexity cuda cpu)
cpu_cuda=$(perplexity cpu cuda)
cpu_cpu=$(perplexity cpu cpu)
printf '{"cuda_cuda": %s, "cuda_cpu": %s, "cpu_cuda": %s, "cpu_cpu": %s, "ratio": %s}\n' "$cuda_cuda" "$cuda_cpu" "$cpu_cuda" "$cpu_cpu" \
  "$(awk -v a="$cuda_cpu" -v b="$cpu_cpu" 'BEGIN {printf "%.5f", a / b}')"
