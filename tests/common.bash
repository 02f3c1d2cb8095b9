# common.bash: what the tests of the whole program share. Sourced with the test's arguments: NAME.sh OMNIQUANT TEST_HELPER.
# shellcheck shell=bash
# shellcheck disable=SC2034
set -u
program=$1
helper=$2
fixtures=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/fixtures
skip() {
  echo "skipped: $*"
  exit 77
}
sanitized() { grep -q __asan_init "$program"; }

command -v mpirun >/dev/null || skip "no mpirun"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMNIQUANT_PROGRESS=lines
# Open MPI unloads its plugins before leaks are looked for, which then have no names to be suppressed by.
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
# A launcher around this test is none of the program's business.
unset OMPI_COMM_WORLD_RANK PMIX_RANK PMI_RANK PALS_RANKID SLURM_PROCID

work=$(mktemp -d "${TMPDIR:-/tmp}/omniquant test XXXXXX") || exit 1
# For traps on EXIT: whether this is the test's own shell. A child that a signal ends before it has become another program runs them, too.
here() { [ "$BASHPID" = $$ ]; }
trap '! here || rm -rf "$work"' EXIT
failures=0

# check WHAT COMMAND...: one line that says whether the command succeeded, and what it printed if not.
check() {
  local what=$1 said
  shift
  if said=$("$@" 2>&1); then
    echo "ok - $what"
  else
    echo "not ok - $what"
    [ -z "$said" ] || printf '#   %s\n' "${said//$'\n'/$'\n'#   }"
    failures=$((failures + 1))
  fi
}

# launch RANKS ARGUMENT...: calibrate or eval on that many ranks of the CPU, one thread each.
launch() {
  local ranks=$1
  shift
  timeout 120 mpirun --bind-to none --oversubscribe -np "$ranks" "$program" "$@" --backend cpu --threads 1 </dev/null
}

# near A B RELATIVE: whether two numbers are that close.
near() {
  awk -v a="$1" -v b="$2" -v most="$3" 'BEGIN {
    difference = a > b ? a - b : b - a
    if (a > 0 && b > 0 && difference <= most * a) exit 0
    print a " and " b " are not within " most
    exit 1
  }'
}

# Ends the test: status 1 if any check failed.
finish() {
  [ $failures = 0 ] || echo "$failures failed"
  exit $((failures > 0))
}
