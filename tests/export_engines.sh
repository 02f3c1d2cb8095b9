#!/bin/bash
# export_engines.sh OMNIQUANT TEST_HELPER: exports of a small model of every family in the engines themselves, by tools/verify_export.py. Needs a
# Python with engines: OMNIQUANT_ENGINES=VENV/bin/python. An engine that does not know a family is named below, with what it lacks.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
here=${fixtures%/fixtures}
[ -n "${OMNIQUANT_ENGINES:-}" ] || skip "OMNIQUANT_ENGINES does not name a Python with engines"
python=$OMNIQUANT_ENGINES
cd "$work" || exit 1
"$python" "$here/export_models.py" "$fixtures" models && "$helper" tokens tokens.h5 1000 380 1 || exit 1

# field FILE NAME: the first number of that name.
field() { sed -n "s/^ *\"$2\": \([-0-9.e]*\),*$/\1/p" "$1" | head -n 1; }
below() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a != "" && a + 0 <= b + 0) }' || { echo "$1 is not at most $2" && return 1; }; }

# verified MODEL STORE EXPORT: in fp32 logits differ by less than 1e-3, perplexity is that of eval within 0.1 %, and the engine's own unpacking gives
# the store's weights. Where llama.cpp multiplies in 8 bits (it was built without a BLAS, and experts always) there are other bars; its Q4_1 rounds each
# group's minimum to F16, which moves logits by more than 1e-3.
verified() {
  local perplexity abits all
  timeout 600 "$python" "$here/../tools/verify_export.py" --model "models/$1" --quantized "$2" --tokens tokens.h5 --seqlen 32 --windows 2 "$3" \
    >verified.json 2>log </dev/null || { tail -n 5 log && return 1; }
  cat verified.json
  echo "# $3: relative error of logits $(field verified.json relative_error), KL divergence $(field verified.json kl)" >>results
  abits=$(field verified.json abits)
  perplexity=$(launch 1 eval --model "models/$1" --quantized "$2" --tokens tokens.h5 --seqlen 32 --windows 2 --abits "$abits" --kv-bits 16 --json \
    2>log | sed -n 's/^ *"perplexity": \(.*\),$/\1/p')
  near "$perplexity" "$(field verified.json reference)" 1e-4 || return 1
  case $3 in
  *.gguf)
    if grep -q "products in fp32" verified.json; then
      below "$(field verified.json relative_error)" 3e-3 && near "$perplexity" "$(field verified.json engine)" 1e-3
    else
      below "$(field verified.json kl)" 5e-3 && near "$perplexity" "$(field verified.json engine)" 1e-2
    fi
    ;;
  *)
    all=$(field verified.json of)
    if [ "$all" != "$(field verified.json exact)" ] && { [[ $3 != *.hf ]] || [ "$all" != "$(field verified.json rounded)" ]; }; then
      echo "other weights than the store's" && return 1
    fi
    below "$(field verified.json relative_error)" 1e-3 && near "$perplexity" "$(field verified.json engine)" 1e-3
    ;;
  esac
}

calibrate() {
  timeout 120 "$program" calibrate --model "models/$2" --tokens tokens.h5 --output "$1" --seqlen 24 --samples 4 --batch 2 --backend cpu \
    --threads 1 "${@:3}" >log 2>&1 </dev/null || { cat log && return 1; }
}

tokenizers=()
for model in models/*; do
  model=${model#models/}
  check "$model is calibrated" calibrate "$model" "$model" --wbits 4 --group-size 32 --let --epochs 3
  for format in hf compressed-tensors gptq gguf; do
    case $model-$format in
    opt*-gguf) continue ;;                              # llama.cpp knows no OPT
    mixtral-gptq | mixtral-compressed-tensors) continue ;; # transformers 5 has an expert's layers in one tensor, GPTQModel other names
    esac
    # bfloat16, which is what hf would take for some of them, is coarser than the bar.
    check "$model.$format is exported" "$program" export --model "models/$model" --quantized "$model" --format $format --output "$model.$format" \
      --dtype float16
    check "$model.$format is verified" verified "$model" "$model" "$model.$format"
    [ $format != gguf ] || tokenizers+=("models/$model" "$model.gguf")
  done
done
check "llama.cpp splits text as tokenizer.json does" "$python" "$here/export_tokens.py" "$fixtures/make_models.py" "${tokenizers[@]}"
cat results
finish
