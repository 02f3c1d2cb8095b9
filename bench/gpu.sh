#!/usr/bin/env bash
# Everything that is to be known of the CUDA backend on one GPU: its tests, whole runs, two ranks on the one card, compute-sanitizer, and the
# benchmarks with PyTorch beside them. Each result is written as soon as it is there, so that a call that is cut off keeps what it had; what fails
# or is skipped is named at the end, and the rest goes on.
# shellcheck disable=SC2317 # parts are called by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

usage() {
  cat <<'END'
Usage: bench/gpu.sh ARCHIVE [PART...]
Unpacks what bench/gpu_pack.sh packed and runs the parts (all of them: tests bench torch large quality ranks sanitizer).
Results go to $OUT (results-gpu): a file a step, and summary.txt.
END
}

case ${1:-} in
--help) usage && exit 0 ;;
'' | -*) usage >&2 && exit 2 ;;
esac
archive=$1
shift
parts=${*:-tests bench torch large quality ranks sanitizer}
out=${OUT:-results-gpu}
mkdir -p "$out" || exit
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
# Not every machine has xz; whoever has PyTorch has Python.
if command -v xz >/dev/null; then
  tar -C "$bundle" -xJf "$archive" || exit
else
  python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$archive" "$bundle" || exit
fi
libraries_before=${LD_LIBRARY_PATH:-}
# shellcheck disable=SC1091 # of the archive
. "$bundle/env.sh"
missing=$(ldd "$bundle/bin/omniquant_cuda.so" | awk '/not found/{print $1}' | sort -u | paste -sd' ')
if [ -n "$missing" ]; then
  echo "not here: $missing; put their folders into LD_LIBRARY_PATH" | tee -a "$out/summary.txt"
  exit 1
fi
# What no program of ours would find by itself: where the fixtures are, and that the card is used by the first rank of each node.
export OMNIQUANT_FIXTURES=$PWD/tests/fixtures

# step NAME SECONDS COMMAND...: its output in $out/NAME.txt, one line of it in the summary. Status 77: skipped.
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0 word='done'
  shift 2
  timeout -k 10 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.err" </dev/null || status=$?
  [ "$status" = 0 ] || word="FAILED ($status)"
  [ "$status" = 77 ] && word=skipped
  [ "$status" = 124 ] && word="CUT OFF after $limit s"
  [ -s "$out/$name.err" ] || rm -f "$out/$name.err"
  printf '%-28s %-14s %4d s  %s\n' "$name" "$word" $((SECONDS - begin)) "$(brief "$out/$name.txt" "$out/$name.err")" | tee -a "$out/summary.txt"
}

# brief FILE...: what of a result fits on a line; of one that says none of that its last line.
brief() {
  local line
  line=$(grep -hoE '"(step_ms|sample_ms|products_ms|memory_gb|attention_by_cudnn|mode|ratio)": [^,}]*' "$1" | paste -sd' ')
  [ -n "$line" ] || line=$(cat "$@" 2>/dev/null | grep -E 'skipped|ERROR|rror:|PASSED|FAILED|no device' | tail -n 1 | cut -c 1-120)
  [ -n "$line" ] || line=$(cat "$@" 2>/dev/null | grep . | tail -n 1 | cut -c 1-120)
  echo "$line"
}

tests() {
  step device 60 nvidia-smi
  step kernels 120 "$bundle/bin/test_cuda_kernels"
  step block 180 "$bundle/bin/test_cuda_block"
  step samples 120 "$bundle/bin/test_cuda_samples"
  step blocks-1 60 bash tests/ranks.bash 1 "$bundle/bin/test_cuda_stream"
}

gpu_step() { step "$1" "$2" "$bundle/bin/gpu_step" --config "bench/shapes/$3.json" "${@:4}"; }

bench() {
  gpu_step step-7b-batch-1 90 llama-2-7b
  gpu_step step-7b-own-attention 90 llama-2-7b --own-attention
  gpu_step step-7b-no-graphs 90 llama-2-7b --no-graphs
  gpu_step step-7b-small-panels 90 llama-2-7b --panel 8388608 # of which a gradient may stay in the second level's cache
  gpu_step step-7b-batch-8 120 llama-2-7b --batch 8 --steps 10
  gpu_step step-7b-let-w4a4 90 llama-2-7b --let --bits 4 --group 0 --abits 4
  gpu_step step-135m 60 smollm2-135m --tokens 512 --group 64 --steps 50
}

# With the libraries that it comes with: the archive's, of another system, are not for it.
torch_step() { step "$1" 240 env LD_LIBRARY_PATH="$libraries_before" python3 bench/torch_gpu_step.py "${@:2}"; }

torch() {
  torch_step torch-7b-batch-1
  torch_step torch-7b-batch-8 --batch 8 --steps 10
}

large() {
  gpu_step step-70b 150 llama-2-70b --steps 10
  gpu_step step-180b 240 falcon-180b --group 512 --steps 10
}

# With what scripts/quickstart.sh leaves in work/.
quality() {
  local file
  for file in work/smollm2/config.json work/calibration.h5 work/evaluation.h5; do
    [ -e "$file" ] || {
      echo "quality: $file is not here; scripts/quickstart.sh makes it" | tee -a "$out/summary.txt"
      return
    }
  done
  step quality-135m 400 bash bench/gpu_quality.sh "$bundle/bin/omniquant" work/smollm2 work/calibration.h5 work/evaluation.h5 512 40 \
    --config configs/quickstart.yaml
}

# Two ranks on the one card, which NCCL does not promise to serve: behind what needs one.
ranks() {
  step blocks-2-on-one-card 120 bash tests/ranks.bash 2 "$bundle/bin/test_cuda_stream"
  step sums-2-on-one-card 120 bash tests/ranks.bash 2 "$bundle/bin/test_cuda_allreduce"
  # What a step sums over ranks: SmolLM2-135M g64, LLaMA-2-7B g128, LLaMA-2-70B g128.
  step allreduce-2-on-one-card 90 bash tests/ranks.bash 2 "$bundle/bin/gpu_allreduce" 110593 3162113 13369345
  step whole-runs 300 bash tests/cuda_runs.sh "$bundle/bin/omniquant" "$bundle/bin/test_helper"
}

sanitizer() {
  local tool
  command -v compute-sanitizer >/dev/null || {
    echo "sanitizer: compute-sanitizer is not here" | tee -a "$out/summary.txt"
    return
  }
  for tool in memcheck racecheck synccheck initcheck; do
    step "sanitizer-$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$bundle/bin/test_cuda_kernels" --own-attention
  done
  "$bundle/bin/test_helper" tokens "$bundle/tokens.h5" 1000 96 1
  step sanitizer-run 300 compute-sanitizer --tool memcheck --error-exitcode 9 "$bundle/bin/omniquant" calibrate --backend cuda \
    --model tests/fixtures/llama_gqa_tied --tokens "$bundle/tokens.h5" --output "$bundle/store" --seqlen 32 --batch 4 --samples 8 --epochs 2
}

for part in $parts; do
  case $part in
  tests | bench | torch | large | quality | ranks | sanitizer) "$part" ;;
  *) usage >&2 && exit 2 ;;
  esac
done
grep -q 'FAILED\|CUT OFF' "$out/summary.txt" && exit 1
exit 0
