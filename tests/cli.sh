#!/bin/bash
# cli.sh OMNIQUANT: the command line from outside: help, version, and one line and exit status 2 for each kind of wrong usage.
set -u
program=$1
here=$(cd "$(dirname "$0")" && pwd)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# A launcher around this test is none of the program's business.
unset OMPI_COMM_WORLD_RANK PMIX_RANK PMI_RANK PALS_RANKID SLURM_PROCID
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

fail() {
  echo "FAILED: $*" >&2
  failures=$((failures + 1))
}

# ok PATTERN ARGUMENTS...: exit status 0, nothing on stderr, PATTERN in stdout
ok() {
  local pattern=$1
  shift
  "$program" "$@" >"$work/out" 2>"$work/err" || fail "'$*' ended with $?"
  [ -s "$work/err" ] && fail "'$*' wrote on stderr: $(cat "$work/err")"
  grep -q -e "$pattern" "$work/out" || fail "'$*' did not print '$pattern'"
}

# refused MESSAGE ARGUMENTS...: exit status 2, nothing on stdout, the one line "omniquant: MESSAGE" on stderr
refused() {
  local message=$1 status
  shift
  "$program" "$@" >"$work/out" 2>"$work/err"
  status=$?
  [ $status = 2 ] || fail "'$*' ended with $status"
  [ -s "$work/out" ] && fail "'$*' wrote on stdout: $(cat "$work/out")"
  [ "$(cat "$work/err")" = "omniquant: $message" ] || fail "'$*' said: $(cat "$work/err")"
  [ "$(wc -l <"$work/err")" = 1 ] || fail "'$*' did not say one line"
}

ok '^Usage: omniquant ' --help
ok '^omniquant [0-9]*\.[0-9]*\.[0-9]*$' --version
ok '^Usage: omniquant ' --usage
for command in calibrate eval export inspect plan verify; do
  ok " $command " --help
  ok "^Usage: omniquant $command " $command --help
  ok "^Usage: omniquant $command " $command --usage
  ok '^omniquant [0-9]' $command --version
  # The manual tells every option that there is, and no other.
  sections=$(sed 's/\\-/-/g' "$here/../docs/omniquant.1" | awk -v title="^[.]SS .*$command" '/^[.]S[HS] / { on = $0 ~ title } on')
  for option in $("$program" $command --help | grep -o -e '--[a-z][a-z-]*' | sort -u); do
    case $option in --help | --usage | --version) continue ;; esac
    grep -q -e "$option\($\|[^a-z-]\)" <<<"$sections" || fail "the manual's $command does not tell $option"
  done
  # shellcheck disable=SC2013 # options hold no spaces
  for option in $(grep -o -e '--[a-z][a-z-]*' <<<"$sections" | sort -u); do
    "$program" $command --help | grep -q -e "$option\($\|[^a-z-]\)" || fail "the manual's $command tells $option, which is none"
  done
done
# --help counts wherever it stands, and nothing behind it.
ok '^Usage: omniquant calibrate ' calibrate --wbits 3 --help --nonsense

configs=()
for i in {1..17}; do configs+=(--config "$i.yaml"); done
refused "a subcommand is missing; 'omniquant --help' lists them"
refused "'quantize' is not a subcommand; 'omniquant --help' lists them" quantize
refused "unrecognized option '--model'; see 'omniquant --help'" --model m calibrate
refused "unrecognized option '--wbit-s'; see 'omniquant calibrate --help'" calibrate --wbit-s 4
refused "unrecognized option '--a?b'; see 'omniquant calibrate --help'" calibrate $'--a\tb'
refused "option '--tokens' requires an argument; see 'omniquant calibrate --help'" calibrate --model m --tokens
refused "option '--no-lwc' doesn't allow an argument; see 'omniquant calibrate --help'" calibrate --no-lwc=1
refused "--model DIR is missing: checkpoint folder with config.json and *.safetensors" calibrate --tokens t --output o
refused "--output OUT is missing: folder to make, for the quantized model in HDF5" calibrate --tokens t --model m
refused "--model: is empty" calibrate --model "" --tokens t --output o
refused "--blocks: '3:2' is not A:B with 0 <= A < B" calibrate --model m --tokens t --output o --blocks 3:2
refused "--blocks: 'all' is not A:B with 0 <= A < B" calibrate --model m --tokens t --output o --blocks all
refused "--wbits: 9 is not in 2..8" calibrate --wbits 9
refused "--lwc-lr: '1e-2x' is not a number" calibrate --lwc-lr 1e-2x
refused "--sampling: 'some?thing' is not one of random|sequential" calibrate --sampling $'some\nthing'
refused "--abits: 17 is not in 2..16" calibrate --abits 17
refused "--alpha: 1.5 is not in 0..1" calibrate --alpha 1.5
refused "--act-granularity: 'row' is not one of token|tensor|group" calibrate --act-granularity row
refused "--config: is empty" calibrate --config ""
refused "--config: given more than 16 times" calibrate "${configs[@]}"
refused "--backend: 'abacus' is not one of auto|cpu|cuda" calibrate --model m --tokens t --output o --backend abacus
refused "--threads: -1 is not in 0..65536" calibrate --threads -1
refused "'more' is one argument too many" calibrate --model m more
refused "--tokens FILE is missing: text to predict, as made by tools/tokenize.py" eval --model m
refused "--seqlen: 1 is not in 2..16777216" eval --seqlen 1
refused "--kv-bits: 17 is not in 0..16" eval --kv-bits 17
refused "--abits: 1 is neither 0 nor in 2..16" eval --model m --tokens t --abits 1
refused "OUT is missing" inspect
refused "'b' is one argument too many" inspect a b

# What a program started without even its own name does.
(exec -a '' "$program" --version) | grep -q '^omniquant ' || fail "an empty program name"
# Output that cannot be written is a failure at work.
if [ -w /dev/full ]; then
  "$program" --help >/dev/full 2>"$work/err"
  status=$?
  [ $status = 1 ] || fail "--help into a full device ended with $status: $(cat "$work/err")"
fi

# Under a launcher each message comes once and all ranks end with its status. (Sanitizers cannot name leaks of MPI's unloaded parts.)
if command -v mpirun >/dev/null; then
  export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
  launch() { timeout 60 mpirun --oversubscribe -np 2 "$program" "$@" >"$work/out" 2>"$work/err"; }
  launch calibrate --wbits 9
  status=$?
  [ $status = 2 ] || fail "2 ranks: ended with $status"
  [ "$(grep -c '^omniquant: ' "$work/err")" = 1 ] || fail "2 ranks: the message did not come once: $(cat "$work/err")"
  grep -q '^omniquant: --wbits: 9 is not in 2..8$' "$work/err" || fail "2 ranks: another message: $(cat "$work/err")"
  launch calibrate --model m --tokens t --output o --config "$work/none.yaml"
  status=$?
  [ $status = 2 ] || fail "2 ranks, no recipe: ended with $status"
  [ "$(grep -c '^omniquant: ' "$work/err")" = 1 ] || fail "2 ranks, no recipe: the message did not come once: $(cat "$work/err")"
  [ -e o ] && fail "something was made"
  # Several recipes are read by rank 0 alone.
  printf 'seqlen: 64\n' >"$work/a.yaml" && printf 'seqlen: 32\n' >"$work/b.yaml"
  launch calibrate --model m --tokens t --output o --config "$work/a.yaml" --config "$work/b.yaml"
  status=$?
  [ $status = 2 ] || fail "2 ranks, two recipes: ended with $status"
  [ "$(grep -c '^omniquant: .*a.yaml and .*b.yaml: seqlen differs' "$work/err")" = 1 ] || fail "2 ranks, two recipes: $(cat "$work/err")"
  [ -e o ] && fail "something was made"
  launch --version || fail "2 ranks: --version ended with $?"
  [ "$(grep -c '^omniquant ' "$work/out")" = 1 ] || fail "2 ranks: the version did not come once"
fi

[ $failures = 0 ] && echo "command line: all as it should be"
exit $((failures > 0))
