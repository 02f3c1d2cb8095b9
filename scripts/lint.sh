#!/usr/bin/env bash
# Looks for bugs with clang-tidy (.clang-tidy has the checks). Needs a configured build folder for its compile commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

folder=${1:-build-test}
[ -f "$folder/compile_commands.json" ] || fail "$folder/compile_commands.json is not there; run scripts/test.sh first"
say "looking for bugs with clang-tidy"
# Files that this build compiles by themselves: the CPU kernels are part of level.c, and what needs CUDA may be left out.
sources() {
  find src io mpi kernels bench -name '*.c' -print0 | while IFS= read -r -d '' file; do
    if grep -qF "$PWD/$file\"" "$folder/compile_commands.json"; then printf '%s\0' "$file"; fi
  done
}

# -fopenmp stays out: the analyzer follows neither its pragmas nor the functions made of them.
sources |
  xargs -0 -n 1 -P "$(nproc)" clang-tidy -p "$folder" --quiet --extra-arg=-fno-openmp --extra-arg=-Wno-unknown-pragmas 2>/dev/null
