#!/bin/bash
# one_pass.sh OMNIQUANT TEST_HELPER: several recipes in one pass store what each stores in a run of its own.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

"$helper" tokens "$work/tokens.h5" 1000 96 1 || exit 1
common=$'seqlen: 24\nsamples: 6\nbatch: 2\nepochs: 2\ngroup_size: 32\n'
printf '%s' "$common" $'wbits: 3\naug_loss: true\n' >"$work/clip.yaml"
printf '%s' "$common" $'wbits: 4\nabits: 6\nlet: true\nlet_up: true\n' >"$work/both.yaml"
printf '%s' "$common" $'wbits: 4\nsymmetric: true\nepochs: 1\nlwc_init: search\noptimizer: sign\n' | sed '/^epochs: 2/d' >"$work/short.yml"

# calibrate RANKS NAME CONFIG...
calibrate() {
  local flags=() config
  for config in "${@:3}"; do flags+=(--config "$work/$config"); done
  launch "$1" calibrate --model "$fixtures/$model" --tokens "$work/tokens.h5" --output "$work/$2" "${flags[@]}" >"$work/log" 2>&1 || {
    cat "$work/log"
    return 1
  }
}

for model in llama_gqa_tied mixtral; do
  for config in clip.yaml both.yaml short.yml; do check "$model: $config by itself" calibrate 1 "$model $config" $config; done
  for ranks in 1 2; do
    check "$model: three recipes on $ranks ranks" calibrate $ranks "$model pass $ranks" clip.yaml both.yaml short.yml
    check "$model: a line for each" test "$(grep -c 'bits a weight' "$work/log")" = 3
    for config in clip.yaml both.yaml short.yml; do
      check "$model: $config as by itself" "$helper" compare "$work/$model $config" "$work/$model pass $ranks/${config%.*}"
    done
  done
done

# More ranks than the batch can use: teams. On 8 ranks two recipes go to one of them.
for ranks in 4 8; do
  check "$ranks ranks in teams" calibrate $ranks "teams $ranks" clip.yaml both.yaml short.yml
  check "$ranks ranks: said so" grep -q '^2 teams of' "$work/log"
  check "$ranks ranks: a line for each" test "$(grep -c 'bits a weight' "$work/log")" = 3
  for config in clip.yaml both.yaml short.yml; do
    check "$ranks ranks: $config as by itself" "$helper" compare "$work/$model $config" "$work/teams $ranks/${config%.*}"
  done
done

check "blocks 1:2 of two recipes" launch 1 calibrate --model "$fixtures/mixtral" --tokens "$work/tokens.h5" --output "$work/second" \
  --config "$work/clip.yaml" --config "$work/both.yaml" --blocks 1:2
finish
