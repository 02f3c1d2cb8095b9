#!/usr/bin/env bash
# Builds omniquant with all its tests and runs them. The last line says how many passed and failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

format_version=14 # of clang-format: others lay out a few lines differently

usage() {
  cat <<'END'
Usage: scripts/test.sh [--sanitize]
Builds in build-test/ with warnings as errors, checks the layout of the sources and runs all tests.
  --sanitize   build in build-asan/ with AddressSanitizer and UndefinedBehaviorSanitizer instead
END
}

check_format() {
  if ! clang-format --version 2>/dev/null | grep -q "version $format_version\."; then
    say "layout not checked: no clang-format $format_version here"
    return 0
  fi
  say "checking the layout"
  find src io mpi kernels tests bench \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cpp' \) -print0 | xargs -0 clang-format --dry-run --Werror
}

# Runs ctest, shows its output and sets passed, failed and skipped.
run_tests() {
  local log summary
  log=$(mktemp)
  ctest --test-dir "$1" --output-on-failure --no-tests=error --timeout 300 -j "$(nproc)" </dev/null 2>&1 | tee "$log" || true
  summary=$(sed -n 's/^[0-9]*% tests passed, \([0-9]*\) tests\{0,1\} failed out of \([0-9]*\)$/\1 \2/p' "$log")
  skipped=$(grep -c '[*][*][*]Skipped' "$log" || true)
  rm -f "$log"
  [ -n "$summary" ] || fail "ctest found no tests in $1; see its message above"
  failed=${summary% *}
  passed=$((${summary#* } - failed - skipped))
}

folder=build-test
options=(-DOMNIQUANT_WERROR=ON)
case ${1:-} in
'') ;;
--sanitize) folder=build-asan options=(-DOMNIQUANT_SANITIZE=ON -DOMNIQUANT_BENCH=OFF) ;;
--help) usage && exit 0 ;;
*) usage >&2 && exit 2 ;;
esac

install_packages "${packages[@]}" g++ libcmocka-dev iproute2 python3-venv valgrind
layout=0
if [ "$folder" = build-test ]; then
  check_format || layout=1
  # Where CUDA's backend is built, attention by cuDNN is too.
  if command -v nvcc >/dev/null && get_cudnn_frontend build-cudnn-frontend; then
    options+=("-DCUDNN_FRONTEND_INCLUDE_DIR=$PWD/build-cudnn-frontend/include")
  fi
fi
build "$folder" "${options[@]}"
# Tests that read what the program writes with h5py find it through PYTHON; without, they are skipped.
if make_venv; then
  export PYTHON=$PWD/.venv/bin/python
else
  say "no Python environment: tests that need h5py are skipped"
fi
mpi_environment
run_tests "$folder"
[ "$layout" = 0 ] || printf 'the layout of the sources differs: run clang-format -i on the files named above\n'
printf '%d passed, %d failed' "$passed" $((failed + layout))
if [ "$skipped" -gt 0 ]; then printf ', %d skipped' "$skipped"; fi
printf '\n'
[ $((failed + layout)) = 0 ]
