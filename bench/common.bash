# common.bash: what the benchmarks of whole runs share: their options, and one calibration whose seconds are read from its store.
# shellcheck shell=bash
# shellcheck disable=SC2034
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$root/build/omniquant model=$root/work/smollm2 tokens=$root/work/calibration.h5
ranks=2 json='' settings=()

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# options ARGUMENT...: what every benchmark of whole runs takes; the rest are flags of calibrate, over the benchmark's own.
options() {
  while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit 0 ;;
    --program | --model | --tokens | --ranks | --json)
      [ $# -gt 1 ] || fail "$1 needs an argument"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *)
      settings+=("$1")
      shift
      ;;
    esac
  done
  [ -x "$program" ] || fail "$program is not there; build it, or give --program"
  if [ ! -d "$model" ] || [ ! -e "$tokens" ]; then
    fail "$model or $tokens is not there; run scripts/quickstart.sh, or give --model and --tokens"
  fi
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMNIQUANT_PROGRESS=lines
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
}

# calibrate RANKS FLAG...: one run, one thread a rank. Sets total: seconds of the whole run; learning: those of its blocks together, each from
# waiting for its weights to being handed to the writer; count: how many.
calibrate() {
  local ranks=$1 summary
  shift
  rm -rf "$work/out"
  summary=$(mpirun --bind-to none --oversubscribe -np "$ranks" "$program" calibrate --model "$model" --tokens "$tokens" --output "$work/out" \
    --threads 1 "$@" ${settings[@]+"${settings[@]}"} 2>"$work/log" </dev/null) || {
    cat "$work/log" >&2
    fail "calibrate failed"
  }
  total=$(sed -n 's/.* a weight, \([0-9.]*\) s, .*/\1/p' <<<"$summary")
  learning=$("$program" inspect --json "$work/out" | grep -o '"seconds": [0-9.e+-]*' | head -n 1 | cut -d ' ' -f 2)
  count=$("$program" inspect --json "$work/out" | grep -o '"blocks_stored": [0-9]*' | cut -d ' ' -f 2)
}

# number EXPRESSION: what awk makes of it.
number() { awk "BEGIN { print ($1) }"; }
