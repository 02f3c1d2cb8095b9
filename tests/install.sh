#!/usr/bin/env bash
# `cmake --install` puts the program, its man page, the recipes and the tools into a prefix, and what is there works.
# shellcheck source=tests/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

cd "$fixtures/../.." || exit 1
prefix="$work/a prefix"
cmake --install "$(dirname "$program")" --prefix "$prefix" >"$work/log" 2>&1
check "cmake --install succeeds" test $? = 0
check "the installed program runs" "$prefix/bin/omniquant" --version
check "the man page is there" test -s "$prefix/share/man/man1/omniquant.1"
for file in configs/*.yaml slurm/*.sbatch tools/*.py tools/requirements.txt; do
  check "$file is installed" cmp -s "$file" "$prefix/share/omniquant/$file"
done
finish
