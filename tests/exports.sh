#!/bin/bash
# exports.sh OMNIQUANT TEST_HELPER: exports of a small model of every family and of every width, read back by numpy alone (export_reads.py): codes,
# scales, zero points and all other tensors are those of store and checkpoint. What cannot be held is refused, with what can, and nothing is written.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
here=${fixtures%/fixtures}
python=${PYTHON:-python3}
"$python" -c 'import gguf, h5py, numpy, tokenizers' 2>/dev/null || skip "$python lacks a package of tools/requirements.txt"

cd "$work" || exit 1
"$python" "$here/export_models.py" "$fixtures" models && "$helper" tokens tokens.h5 1000 380 1 || exit 1

# calibrate NAME MODEL FLAG...: a store in NAME.
calibrate() {
  timeout 120 "$program" calibrate --model "models/$2" --tokens tokens.h5 --output "$1" --seqlen 24 --samples 4 --batch 2 --backend cpu \
    --threads 1 "${@:3}" >log 2>&1 </dev/null || {
    cat log
    return 1
  }
}

# export_to OUTPUT MODEL STORE FORMAT FLAG...
export_to() {
  timeout 120 "$program" export --model "models/$2" --quantized "$3" --format "$4" --output "$1" "${@:5}" </dev/null
}

# refused PART... -- MODEL STORE FORMAT FLAG...: one line with all the parts, status 2, nothing written.
refused() {
  local parts=() status before message
  while [ "$1" != -- ]; do
    parts+=("$1")
    shift
  done
  shift
  before=$(ls -A)
  message=$(export_to refused "$@" 2>&1)
  status=$?
  echo "$message"
  [ "$status" = 2 ] && [ "$(wc -l <<<"$message")" = 1 ] || return 1
  for part in "${parts[@]}"; do
    case $message in *"$part"*) ;; *) echo "does not say '$part'" && return 1 ;; esac
  done
  [ "$before" = "$(ls -A)" ] || { echo "left something" && ls -A && return 1; }
}

# fails_with PART COMMAND...
fails_with() {
  local message
  message=$("${@:2}" 2>&1) && return 1
  echo "$message"
  case $message in *"$1"*) ;; *) return 1 ;; esac
}

reads=() # MODEL STORE EXPORT of all that is read in the end
# holds MODEL STORE FORMAT FLAG...: exports, to be read in the end.
holds() {
  local output=$2.$3
  check "$output is exported" export_to "$output" "$@"
  reads+=("models/$1" "$2" "$output")
}

echo "# families"
for model in models/*; do
  model=${model#models/}
  check "$model is calibrated" calibrate "$model" "$model" --wbits 4 --group-size 32 --let --epochs 3
  for format in hf compressed-tensors gptq gguf; do
    case $model-$format in
    opt*-gguf) check "$model: llama.cpp knows it not" refused "does not know models of type opt" "compressed-tensors" -- "$model" "$model" gguf ;;
    *) holds "$model" "$model" "$format" ;;
    esac
  done
done

echo "# widths"
for bits in 2 3 4 5 6 7 8; do
  for kind in asymmetric symmetric; do
    store=w$bits-$kind group=32 flags=()
    [ $kind = asymmetric ] || flags=(--symmetric)
    [ $bits != 4 ] || group=0
    check "$store is calibrated" calibrate "$store" llama_mha --wbits "$bits" --group-size $group --epochs 0 "${flags[@]}"
    holds llama_mha "$store" hf
    holds llama_mha "$store" compressed-tensors
    case $bits in
    2 | 3 | 4 | 8) holds llama_mha "$store" gptq ;;
    *) check "$store: not in GPTQ" refused "2, 3, 4 and 8 bits, not of $bits" "compressed-tensors, gguf, hf" -- llama_mha "$store" gptq ;;
    esac
    case $store in
    w8-asymmetric) check "$store: not in GGUF" refused "asymmetric weights of 8 bits" "--f16-fallback" "gptq, compressed-tensors, hf" -- llama_mha "$store" gguf ;;
    *) holds llama_mha "$store" gguf ;;
    esac
  done
done
check "version 2 of GPTQ" export_to v2 llama_mha w4-symmetric gptq --checkpoint-format gptq_v2
check "8 bits as F16" export_to f16 llama_mha w8-asymmetric gguf --f16-fallback
check "4 bits without rounding" export_to exact4 llama_mha w4-asymmetric gguf --exact
check "5 bits without rounding" export_to exact5 llama_mha w5-asymmetric gguf --exact
check "an embedding in 8 bits" export_to rounded llama_mha w4-symmetric gguf --embedding q8_0
check "weights in bfloat16" export_to bf16 llama_mha w8-symmetric hf --dtype bfloat16
check "weights in float32" export_to f32 llama_mha w3-asymmetric hf --dtype float32
check "in shards" export_to shards llama_mha w8-asymmetric compressed-tensors --shard-size 1
reads+=(models/llama_mha w4-symmetric v2 models/llama_mha w8-asymmetric f16 models/llama_mha w4-symmetric rounded
  models/llama_mha w4-asymmetric exact4 models/llama_mha w5-asymmetric exact5 models/llama_mha w8-symmetric bf16 models/llama_mha w3-asymmetric f32
  models/llama_mha w8-asymmetric shards)
many() { [ "$(find shards -name 'model-*.safetensors' -size -1100k | wc -l)" -gt 1 ]; }
check "several files, none too large" many

echo "# activations"
for bits in 8 6 4; do
  check "w${bits}a$bits is calibrated" calibrate "w${bits}a$bits" llama_mha --wbits $bits --symmetric --abits $bits --let --epochs 1
  holds llama_mha "w${bits}a$bits" compressed-tensors
  holds llama_mha "w${bits}a$bits" hf
done
check "W4A4: not in GPTQ" refused "no quantized activations" "W4A4" "compressed-tensors, hf" -- llama_mha w4a4 gptq
check "W4A4: not in GGUF" refused "no quantized activations" "compressed-tensors, hf" -- llama_mha w4a4 gguf
said() { grep -q "queries, keys and values of 4 bits, which engines do not quantize" w4a4.compressed-tensors/README.md; }
check "the card says what engines do not do" said
check "W4A4 asymmetric is calibrated" calibrate w4a4-asymmetric llama_mha --wbits 4 --abits 4 --epochs 0
check "W4A4 asymmetric: folders alone" refused "symmetric, a scale a row" ": hf" -- llama_mha w4a4-asymmetric compressed-tensors

echo "# what is refused"
check "g48 is calibrated" calibrate g48 llama_mha --wbits 4 --group-size 48 --epochs 0
check "g48: GPTQ" refused "16, 32, 64, ... 1024" "not 48" ": hf" -- llama_mha g48 gptq
check "g48: groups do not divide the columns" refused "mlp.down_proj.weight" "divide the layer's 320 columns" ": hf" -- llama_mha g48 compressed-tensors
check "g48: blocks do not divide the groups" refused "blocks have 32 columns" "--f16-fallback" -- llama_mha g48 gguf
check "version 1 of GPTQ, asymmetric" refused "zero points of 0" "--checkpoint-format" -- llama_mha w4-asymmetric gptq --checkpoint-format gptq
check "8 bits, asymmetric, in bfloat16" refused "too coarse" "--dtype float16" -- llama_mha w8-asymmetric hf --dtype bfloat16
check "an unknown format" refused "'awq' is not one of gptq, compressed-tensors, gguf, hf" -- llama_mha w4-asymmetric awq
check "another model" refused "give the model it was made from" -- qwen2 w4-asymmetric hf
check "no store" refused "nowhere" -- llama_mha nowhere hf
check "no result" refused "none.json" -- llama_mha w4-asymmetric hf --result none.json
mkdir -p refused
check "a target that is there" refused "refused: it is there already" -- llama_mha w4-asymmetric hf
rmdir refused
cp -R models/llama_mha models/odd
sed -i 's/"individual_digits": *true/"individual_digits": false/' models/odd/tokenizer.json
check "an unknown way to split text" refused "tokenizer.json" "pre_tokenizer" "--pre-tokenizer" -- odd w4-asymmetric gguf
check "a way to split text by name" export_to named odd w4-asymmetric gguf --pre-tokenizer smollm
cp -R w4-asymmetric half && rm half/blocks/0001.h5
check "a store that is not whole" refused "block 1 is not there" -- llama_mha half hf
rm models/odd/tokenizer.json
check "no tokenizer" refused "tokenizer.json" "No such file" -- odd w4-asymmetric gguf
# altered NEW MODEL CONFIG PATTERN NAME VALUE: a copy of a model whose config.json has these keys too, and for each tensor whose name the pattern
# matches one of that name: as many zeros as it has rows, or in its own place of its shape, the first of them the value.
altered() {
  cp -R "models/$2" "models/$1" && "$python" - "models/$1" "${@:3}" <<'END'
import json, math, pathlib, re, struct, sys
folder, (config, pattern, name, value) = pathlib.Path(sys.argv[1]), sys.argv[2:]
keys = json.loads((folder / "config.json").read_text()) | json.loads(config)
(folder / "config.json").write_text(json.dumps(keys))
raw = (folder / "model.safetensors").read_bytes()
length = struct.unpack("<Q", raw[:8])[0]
header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
for old, tensor in list(header.items()):
    if pattern and old != "__metadata__" and re.search(pattern, old):
        new = re.sub(pattern, name, old)
        shape = tensor["shape"] if new == old else tensor["shape"][:1]
        values = struct.pack("<f", float(value)) + bytes(4 * (math.prod(shape) - 1))
        header[new] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
kept, at = b"", 0
for old, tensor in header.items():
    if old != "__metadata__":
        first, end = tensor["data_offsets"]
        tensor["data_offsets"], at = [at, at + end - first], at + end - first
        kept += data[first:end]
text = json.dumps(header).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + kept)
END
}
"$helper" model models/narrow 2 96 4 1 128 380 F32 || exit 1
check "narrow layers, 3 bits" calibrate narrow3 narrow --wbits 3 --epochs 0
check "narrow layers: GPTQ packs more" refused "k_proj.weight" "packs 32 codes of 3 bits together" "[24, 96]" ": compressed-tensors" -- narrow narrow3 gptq
check "narrow layers, groups of 64" calibrate narrow4 narrow --wbits 4 --group-size 64 --epochs 0
check "narrow layers: GPTQ's groups" refused "groups have to divide the layer's 96 columns, 64 do not" ": hf" -- narrow narrow4 gptq
check "another model of that type" refused "block 0: self_attn.q_proj: another shape" -- narrow w4-asymmetric hf
check "12 bits of activations are calibrated" calibrate w8a12 llama_mha --wbits 8 --symmetric --abits 12 --epochs 0
check "12 bits of activations" refused "activations of up to 8 bits, not of 12" ": hf" -- llama_mha w8a12 compressed-tensors
check "a scale a tensor is calibrated" calibrate w8a8-tensor llama_mha --wbits 8 --symmetric --abits 8 --act-granularity tensor --epochs 0
check "a scale a tensor" refused "act_granularity is another" ": hf" -- llama_mha w8a8-tensor compressed-tensors
check "W4A8 in groups is calibrated" calibrate w4a8-groups llama_mha --wbits 4 --symmetric --abits 8 --group-size 32 --epochs 0
check "W4A8 in groups" refused "symmetric, a scale a row" ": hf" -- llama_mha w4a8-groups compressed-tensors
check "one block is calibrated" calibrate second llama_mha --wbits 4 --blocks 1:2 --epochs 0
check "blocks in full precision" refused "second: blocks before 1 stayed full precision (--blocks)" -- llama_mha second hf
altered relu falcon_7b '{"activation": "relu"}' '' '' 0
check "Falcon with ReLU: llama.cpp has GELU" refused "falcon has GELU" "compressed-tensors" -- relu falcon_7b gguf
altered serial falcon_7b '{"parallel_attn": false}' 'input_layernorm[.](.*)' 'post_attention_layernorm.\1' 1
check "Falcon in series: llama.cpp has it side by side" refused "side by side" "compressed-tensors" -- serial falcon_7b gguf
altered biased qwen3 '{"attention_bias": true}' '(self_attn.*_proj)[.]weight' '\1.bias' 1
check "Qwen3 with biases: llama.cpp has none" refused "qwen3 has no biases" "compressed-tensors" -- biased qwen3 gguf
altered large llama_mha '{}' '(up_proj.weight)' '\1' -1e5
check "a large weight is calibrated" calibrate large large --wbits 4 --epochs 0
check "a large weight: not in float16" refused "up_proj" "a weight of -1" "--dtype bfloat16" -- large large hf --dtype float16
check "a large weight: not in Q4_1" refused "up_proj" "minimum is too large for F16" "another format" -- large large gguf
check "an empty name" fails_with "--output: is empty" export_to '' llama_mha w4-asymmetric hf
mkdir shut && chmod 555 shut
unwritable() { ! export_to shut/in llama_mha w4-asymmetric hf 2>said && grep -q "shut/in: cannot be made" said; }
[ "$(id -u)" = 0 ] || check "a folder that cannot be written" unwritable

echo "# signals"
# stopped SIGNAL: sent while the first block is written, which takes 20 seconds then; status 75, and not even a hidden folder is left.
stopped() {
  local before status
  before=$(ls -A)
  OMNIQUANT_TEST_READ_SECONDS=20 "$program" export --model models/llama_mha --quantized w4-symmetric --format hf --output stopped 2>said </dev/null &
  until compgen -G '.stopped.*/config.json' >/dev/null; do
    kill -0 $! || return 1
    sleep 0.02
  done
  kill -"$1" $!
  wait $!
  status=$?
  cat said
  [ "$status" = 75 ] && [ "$(wc -l <said)" = 1 ] && grep -q "stopped by a signal; nothing is left of the export" said && [ "$before" = "$(ls -A)" ]
}
touch said
check "SIGTERM" stopped TERM
check "SIGINT" stopped INT

echo "# the page of what is stored, and the card of what is exported"
report() {
  "$python" "$here/../tools/report.py" mixtral --output report.html && grep -q '</html>' report.html && grep -q 'experts.7.w1' report.html &&
    grep -q '<td>steps</td><td>training</td>' report.html && grep -q '<title>measure: ' report.html &&
    [ "$(grep -o '<circle' report.html | wc -l)" -gt 10 ] # losses before and after, of two blocks, and more
}
check "a report" report
result() {
  launch 1 eval --model models/mixtral --quantized mixtral --tokens tokens.h5 --seqlen 24 --windows 2 --json >result.json 2>log &&
    export_to with-result mixtral mixtral hf --result result.json &&
    grep -q "^| quantized | 2 x 24, from token 0 | 16, 16 | $(sed -n 's/^ *"perplexity": \([0-9]*\)\..*/\1/p' result.json)\." with-result/README.md
}
check "a perplexity on the card" result

echo "# read back"
check "everything is as in store and checkpoint" "$python" "$here/export_reads.py" "${reads[@]}"
# A reader that sees no difference would prove nothing.
damaged() {
  cp -R w4-asymmetric.gptq damaged || return
  printf '\x5a' | dd of=damaged/model.safetensors bs=1 seek=$(($(stat -c %s damaged/model.safetensors) / 2)) conv=notrunc status=none
  ! "$python" "$here/export_reads.py" models/llama_mha w4-asymmetric damaged
}
check "a changed byte is noticed" damaged
finish
