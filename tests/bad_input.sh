#!/bin/bash
# bad_input.sh OMNIQUANT TEST_HELPER: every kind of bad input ends two ranks with one line that names the file, the key and the mend, exit status
# 2, and nothing left behind or touched. What hangs is stopped by launch and has another status.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
tokens=$work/tokens.h5 recipe=$work/recipe.yaml out=$work/out
sizes=(2 64 4 2 128 96 F32)

# All that is in the output folder, with the contents of files; nothing if there is no such folder.
listing() { (cd "$out" 2>/dev/null && find . -type f -exec sha256sum {} + -o -print | sort); }

# ends_well FILE KEY MEND COMMAND...: the checks on one run.
ends_well() {
  local file=$1 key=$2 mend=$3 before after status message
  shift 3
  before=$(listing)
  launch 2 "$@" >"$work/stdout" 2>"$work/stderr"
  status=$?
  message=$(grep '^omniquant: ' "$work/stderr")
  after=$(listing)
  echo "$message"
  [ "$status" = 2 ] || { echo "ended with $status" && cat "$work/stderr" && return 1; }
  [ "$(wc -l <<<"$message")" = 1 ] || { echo "not one line" && return 1; }
  [ -s "$work/stdout" ] && { echo "wrote on standard output" && return 1; }
  for part in "$file" "$key" "$mend"; do
    case $message in *"$part"*) ;; *) echo "does not say '$part'" && return 1 ;; esac
  done
  [ "$before" = "$after" ] || { echo "the output has changed: $after" && return 1; }
}

# calibrate_ends WHAT FILE KEY MEND FLAG...: of calibrate with a good model, tokens and settings but for the flags that follow.
calibrate_ends() {
  check "$1" ends_well "$2" "$3" "$4" calibrate --model "$work/model" --tokens "$tokens" --output "$out" --wbits 4 --group-size 32 --epochs 1 \
    --batch 2 --samples 4 --seqlen 32 "${@:5}"
  # The next case shall begin without it.
  [ ! -e "$out/omniquant.h5" ] || rm -rf "$out"
}

# eval_ends WHAT FILE KEY MEND FLAG...
eval_ends() {
  check "$1" ends_well "$2" "$3" "$4" eval --model "$work/model" --tokens "$tokens" --seqlen 32 --windows 4 "${@:5}"
}

# A fresh copy of the model to be damaged; $weights and $config are its files.
damaged() {
  rm -rf "$work/damaged"
  cp -R "$work/model" "$work/damaged"
  weights=$work/damaged/model.safetensors config=$work/damaged/config.json
}

# edit_header SED: changes the header of $weights.
edit_header() {
  local before after
  before=$("$helper" header "$weights")
  after=$(sed -E "$1" <<<"$before")
  [ "$before" != "$after" ] && "$helper" header "$weights" "$after"
}

"$helper" model "$work/model" "${sizes[@]}" && "$helper" tokens "$tokens" 400 96 1 || exit 1
bad=(--model "$work/damaged")

echo "# the model"
calibrate_ends "no such folder" "$work/none/config.json" "No such file" "--model needs a folder" --model "$work/none"
damaged
echo "{" >"$config"
calibrate_ends "config.json: not JSON" "$config:2" "not a JSON object" "expected" "${bad[@]}"
damaged
sed -i 's/"llama"/"gpt_next"/' "$config"
calibrate_ends "config.json: unknown model_type" "$config" model_type "llama" "${bad[@]}"
damaged
sed -i '/"hidden_size"/d' "$config"
calibrate_ends "config.json: a size is missing" "$config" hidden_size "has to be a whole number" "${bad[@]}"
damaged
rm "$weights"
calibrate_ends "safetensors: missing" "$work/damaged" model.safetensors "give a checkpoint folder" "${bad[@]}"
damaged
truncate -s -100 "$weights"
calibrate_ends "safetensors: truncated in the data" "$weights" lm_head.weight "download it again" "${bad[@]}"
damaged
truncate -s 100 "$weights"
calibrate_ends "safetensors: truncated in the header" "$weights" "header length" "download it again" "${bad[@]}"
damaged
truncate -s 0 "$weights"
calibrate_ends "safetensors: empty" "$weights" "0 bytes" "download it again" "${bad[@]}"
damaged
edit_header 's/("lm_head.weight".*\[[0-9]+,)([0-9]+)\]/\19\2]/' || exit 1
calibrate_ends "safetensors: offsets beyond the end" "$weights" lm_head.weight "download it again" "${bad[@]}"
damaged
edit_header 's/("model.norm.weight"[^[]*\[64\],"data_offsets":\[)([0-9]+)/\10/' || exit 1
calibrate_ends "safetensors: offsets that do not fit the shape" "$weights" model.norm.weight "download it again" "${bad[@]}"
damaged
norm=$("$helper" header "$weights" | grep -o '"model.layers.0.input_layernorm.weight"[^}]*}' | grep -o 'data_offsets.*')
edit_header "s/(\"model.layers.1.input_layernorm.weight\"[^}]*)data_offsets[^}]*\}/\1$norm/" || exit 1
calibrate_ends "safetensors: overlapping tensors" "$weights" "overlaps" "download it again" "${bad[@]}"
damaged
edit_header 's/model.layers.1.mlp.down_proj.weight/model.layers.1.mlp.down_proj.other/' || exit 1
calibrate_ends "safetensors: missing tensor" "$weights" model.layers.1.mlp.down_proj.weight "not whole" "${bad[@]}"
damaged
edit_header 's/("model.layers.1.mlp.up_proj.weight":\{"dtype":)"F32"/\1"I32"/' || exit 1
calibrate_ends "safetensors: wrong type" "$weights" model.layers.1.mlp.up_proj.weight "convert" "${bad[@]}"
damaged
edit_header 's/("model.layers.1.mlp.up_proj.weight":\{"dtype":"F32","shape":)\[128,64\]/\1[64,128]/' || exit 1
calibrate_ends "safetensors: wrong shape" "$weights" model.layers.1.mlp.up_proj.weight "[128, 64], which config.json says" "${bad[@]}"
for tensor in model.embed_tokens model.layers.0.input_layernorm model.layers.0.mlp.up_proj; do
  damaged
  "$helper" nan "$weights" $tensor.weight || exit 1
  calibrate_ends "safetensors: NaN in $tensor" "$weights" "$tensor.weight" "download it again" "${bad[@]}"
  eval_ends "safetensors: NaN in $tensor, eval" "$weights" "$tensor.weight" "download it again" "${bad[@]}"
done

damaged
"$helper" nan "$weights" model.layers.0.mlp.up_proj.weight || exit 1
mkdir "$out"
calibrate_ends "safetensors: NaN, and an empty output folder that was there" "$weights" mlp.up_proj.weight "download it again" "${bad[@]}"
rmdir "$out" || failures=$((failures + 1))
cp -R "$fixtures/llama_gqa_tied" "$work/shards"
shard=model-00002-of-00002.safetensors
rm "$work/shards/$shard"
calibrate_ends "safetensors: a shard is missing" "$work/shards" $shard "download" --model "$work/shards" --group-size 16

echo "# models of other families"
family() {
  rm -rf "$work/damaged"
  cp -R "$fixtures/$1" "$work/damaged"
  weights=$work/damaged/model.safetensors config=$work/damaged/config.json
}
family falcon_7b
sed -i 's/"alibi": false/"alibi": true/' "$config"
calibrate_ends "config.json: Falcon with ALiBi" "$config" alibi "only rotary positions" "${bad[@]}"
family falcon_7b
sed -i 's/"bias": false/"bias": true/' "$config"
calibrate_ends "config.json: Falcon with biases" "$config" bias "is not supported" "${bad[@]}"
family falcon_7b
edit_header 's/("transformer.h.1.self_attention.query_key_value.weight":\{"dtype":"BF16","shape":)\[72,48\]/\1[48,72]/' || exit 1
calibrate_ends "safetensors: wrong shape of q, k and v in one" "$weights" query_key_value.weight "[72, 48], which config.json says" "${bad[@]}"
family opt
sed -i 's/"enable_bias": true/"enable_bias": false/' "$config"
calibrate_ends "config.json: OPT without biases" "$config" enable_bias "is not supported" "${bad[@]}"
family opt
edit_header 's/embed_positions.weight/embed_places.weight/' || exit 1
calibrate_ends "safetensors: no positions" "$weights" model.decoder.embed_positions.weight "not whole" "${bad[@]}"
calibrate_ends "seqlen: more than there are positions" "$fixtures/opt" max_position_embeddings "lower --seqlen" --model "$fixtures/opt" --seqlen 65
eval_ends "seqlen: more than there are positions, eval" "$fixtures/opt" max_position_embeddings "lower --seqlen" --model "$fixtures/opt" --seqlen 65
family mixtral
edit_header 's/layers.1.block_sparse_moe.experts.7.w2/layers.1.block_sparse_moe.experts.8.w2/' || exit 1
calibrate_ends "safetensors: an expert is missing" "$weights" model.layers.1.block_sparse_moe.experts.7.w2.weight "not whole" "${bad[@]}"
family mixtral
sed -i 's/"num_local_experts": 8/"num_local_experts": 65/' "$config"
calibrate_ends "config.json: too many experts" "$config" num_local_experts "than the 64 that are supported" "${bad[@]}"

echo "# NaN in a block that is reached at work: what was stored before stays, whole"
damaged
"$helper" nan "$weights" model.layers.1.mlp.up_proj.weight || exit 1
names() { (cd "$out" && find . -type f | sort | tr '\n' ' '); }
late() {
  out=$work/none ends_well "$weights" model.layers.1.mlp.up_proj.weight "download it again" calibrate "${bad[@]}" --tokens "$tokens" \
    --output "$work/out" --wbits 4 --group-size 32 --epochs 1 --batch 2 --samples 4 --seqlen 32
}
check "NaN in block 1" late
check "NaN in block 1: only block 0 is stored" test "$(names)" = "./blocks/0000.h5 ./omniquant.h5 "
check "NaN in block 1: the store can be read" "$program" inspect "$out"
calibrate_ends "NaN in block 1: a second try touches nothing" "$out" "another run" "choose another --output"

echo "# the tokens"
calibrate_ends "tokens: no such file" "$work/none.h5" "No such file" "tools/tokenize.py" --tokens "$work/none.h5"
calibrate_ends "tokens: not HDF5" "$work/model/config.json" "not an HDF5 file" "tools/tokenize.py" --tokens "$work/model/config.json"
"$helper" tokens "$work/large.h5" 400 97 1
calibrate_ends "tokens: an id beyond the vocabulary" "$work/large.h5" "is 96 but must be in 0..95" "tokenize with" --tokens "$work/large.h5" --sampling sequential --samples 12
eval_ends "tokens: an id beyond the vocabulary, eval" "$work/large.h5" "is 96 but must be in 0..95" "tokenize with" --tokens "$work/large.h5" --windows 12
calibrate_ends "tokens: too few" "$tokens" "13 sequential samples" "lower --samples" --sampling sequential --samples 13
calibrate_ends "tokens: too few for one" "$tokens" tokens "--seqlen" --seqlen 401
eval_ends "tokens: too few, eval" "$tokens" tokens "--windows" --windows 13

echo "# the recipe"
calibrate_ends "recipe: no such file" "$recipe" "No such file" "" --config "$recipe"
printf 'wbits: 3\n# a comment\ngroupsize: 64\n' >"$recipe"
calibrate_ends "recipe: unknown key" "$recipe:3" groupsize "group_size" --config "$recipe"
printf 'wbits: 9\n' >"$recipe"
calibrate_ends "recipe: value out of range" "$recipe:1" wbits "2..8" --config "$recipe"
printf 'group_size: 64\nlwc_lr: fast\n' >"$recipe"
calibrate_ends "recipe: not a number" "$recipe:2" lwc_lr "fast" --config "$recipe"
calibrate_ends "recipe: batch above samples" batch "5" "raise samples" --batch 5
calibrate_ends "recipe: kv_bits of 1" kv_bits "1 is neither" "2..16" --kv-bits 1
calibrate_ends "recipe: let_up without let" let_up "let, which is false" "set let to true" --let-up
calibrate_ends "recipe: let that cannot move" let_lr "0 would learn nothing" "raise it" --let --let-lr 0
calibrate_ends "recipe: let_up through GELU" let_up GELU "set it to false" --model "$fixtures/falcon_7b" --let --let-up
calibrate_ends "blocks that the model has not" "--blocks" "1:3" "0 to 1" --blocks 1:3

echo "# several recipes of one pass"
mkdir "$work/other"
printf 'seed: 1\n' >"$work/a.yaml"
printf 'seed: 2\n' >"$work/b.yaml"
printf 'seed: 1\n' >"$work/other/a.yaml"
calibrate_ends "recipes: another seed" "$work/a.yaml" "$work/b.yaml: seed differs" "give it as --seed" --config "$work/a.yaml" --config "$work/b.yaml"
calibrate_ends "recipes: the same name" "$work/a.yaml and $work/other/a.yaml" "stored as $out/a" "rename one" --config "$work/a.yaml" --config "$work/other/a.yaml"
calibrate_ends "recipes: one is missing" "$work/c.yaml" "No such file" "" --config "$work/a.yaml" --config "$work/c.yaml"
printf 'seed: 1\nwbits: 9\n' >"$work/b.yaml"
calibrate_ends "recipes: a value out of range" "$work/b.yaml:2" wbits "2..8" --config "$work/a.yaml" --config "$work/b.yaml"

echo "# the output"
touch "$work/file"
calibrate_ends "output: below a regular file" "$work/file" "Not a directory" "choose another --output" --output "$work/file/a/b"
calibrate_ends "output: a regular file" "$work/file" "Not a directory" "choose another --output" --output "$work/file"
[ ! -d /proc/1 ] || calibrate_ends "output: where nothing can be made" "/proc/omniquant" "cannot be made" "choose another --output" --output /proc/omniquant/a
mkdir "$out" && echo "mine" >"$out/file"
calibrate_ends "output: holds another's file" "$out" "not empty" "choose another --output"
rm -r "$out"
launch 2 calibrate --model "$work/model" --tokens "$tokens" --output "$out" --epochs 0 --samples 4 --seqlen 32 >"$work/log" 2>&1 || cat "$work/log"
store=$work/store
cp -R "$out" "$store"
calibrate_ends "output: holds another run" "$out" "another run" "choose another --output"

echo "# the store"
eval_ends "store: no such folder" "$work/none/omniquant.h5" "No such file" "calibrate" --quantized "$work/none"
eval_ends "store: a model's folder" "$work/model/omniquant.h5" "No such file" "calibrate" --quantized "$work/model"
eval_ends "store: a regular file" "$tokens/omniquant.h5" "Not a directory" "calibrate" --quantized "$tokens"
cp "$tokens" "$store/omniquant.h5"
eval_ends "store: another HDF5 file" "$store/omniquant.h5" "format" "not made by this program" --quantized "$store"
rm -r "$store" && launch 1 calibrate --model "$work/model" --tokens "$tokens" --output "$store" --epochs 0 --samples 4 --seqlen 32 >"$work/log" 2>&1
truncate -s -100 "$store/blocks/0001.h5"
eval_ends "store: a block cut short" "$store/blocks/0001.h5" "cut short" "damaged" --quantized "$store"
rm "$store/blocks/0001.h5"
eval_ends "store: a block is missing" "$store" "block 1 is not there" "did not end" --quantized "$store"
"$helper" model "$work/longer" 3 "${sizes[@]:1}" || exit 1
eval_ends "store: of another model" "$store" "2 blocks" "the model it was made from" --quantized "$store" --model "$work/longer"

echo "# a rank that gets no memory: all end, with its message and status 1"
cat >"$work/limited" <<'END'
[ "$OMPI_COMM_WORLD_RANK" != 1 ] || ulimit -d 400000
exec "$@"
END
"$helper" tokens "$work/many.h5" 4000000 96 1 || exit 1

# without_memory FLAG...
without_memory() {
  timeout 60 mpirun --bind-to none --oversubscribe -np 2 bash "$work/limited" "$program" "$@" --model "$work/model" --tokens "$work/many.h5" \
    --seqlen 1024 --backend cpu --threads 1 >"$work/log" 2>&1 </dev/null
  [ $? = 1 ] && grep -q '^omniquant: rank 1: out of memory .* use more ranks$' "$work/log" && return
  cat "$work/log"
  return 1
}

if ! sanitized; then
  check "calibrate: a rank without memory" without_memory calibrate --output "$out" --wbits 4 --samples 2400 --batch 2
  check "calibrate: nothing is left" test ! -e "$out"
  check "eval: a rank without memory" without_memory eval --windows 3600
fi
finish
