#!/bin/bash
# fuzz.sh OMNIQUANT TEST_HELPER: each fuzzing harness for some seconds (tests/fuzz/run.sh), where there is clang. What was found before is
# replayed by the tests replay_*, without clang.
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
seconds=8

if sanitized; then skip "the harnesses have sanitizers of their own: once is enough"; fi
command -v clang >/dev/null || skip "no clang"
echo 'int LLVMFuzzerTestOneInput(const char *b, unsigned long n) { return n && !b; }' >"$work/try.c"
clang -fsanitize=fuzzer,address,undefined -o "$work/try" "$work/try.c" 2>/dev/null || skip "clang has no libFuzzer or sanitizers here"

unset ASAN_OPTIONS # leaks of ours count here
export OMNIQUANT_FUZZ_BUILD=${program%/*}/fuzz
rm -rf "$OMNIQUANT_FUZZ_BUILD/corpus" # a test begins anew each time
check "nothing is found in $seconds seconds each" "$(dirname "$0")/fuzz/run.sh" "$seconds"
finish
