#!/bin/bash
# module.sh OMNIQUANT TEST_HELPER: the CUDA backend is a library of its own: the program needs nothing of CUDA, finds the library beside itself and where
# it is installed, and says in one line what is wrong with one that cannot be loaded; and what --backend means where there is no device.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"

export CUDA_VISIBLE_DEVICES= # of those that may be here none is seen
"$helper" tokens "$work/tokens.h5" 1000 96 1 || exit 1
built=$(dirname "$program")
library=omniquant_cuda.so

# calibrate PROGRAM FLAG...: the end of its output.
calibrate() {
  rm -rf "$work/out"
  timeout 60 "$1" calibrate --model "$fixtures/llama_mha" --tokens "$work/tokens.h5" --output "$work/out" --seqlen 32 --samples 4 --epochs 0 \
    --threads 1 "${@:2}" 2>&1 </dev/null
}

# ends MESSAGE PROGRAM FLAG...: in failure, with one line that has the message, and without a store.
ends() {
  local said
  said=$(calibrate "${@:2}") && echo "it did not fail" && return 1
  [ "$(wc -l <<<"$said")" = 1 ] && grep -qF -e "$1" <<<"$said" && [ ! -e "$work/out" ] && return
  echo "$said" && return 1
}

# on_cpus PROGRAM FLAG...: it finishes, with nothing to say about GPUs.
on_cpus() {
  local said
  said=$(calibrate "$@") && [ -e "$work/out/omniquant.h5" ] && ! grep -qi gpu <<<"$said" && return
  echo "$said" && return 1
}

# lean PROGRAM: nothing of CUDA has to be there for it to start.
lean() {
  local needed
  needed=$(readelf -d "$1" | grep NEEDED) && ! grep -i 'cuda\|cublas\|nccl' <<<"$needed"
}

check "the program needs nothing of CUDA" lean "$program"

# A program in a folder of its own, without a library and with wrong ones.
mkdir "$work/bin" && cp "$program" "$work/bin/omniquant" && alone=$work/bin/omniquant || exit 1
check "without the library: the CPU computes" on_cpus "$alone"
check "without the library: --backend cuda is refused" ends "--backend cuda: not built in; build with CUDA, or use cpu" "$alone" --backend cuda
echo "no library" >"$work/bin/$library"
check "no library: named, with the reason and the mend" \
  ends "--backend cuda: $work/bin/$library cannot be loaded: " "$alone" --backend cuda
check "no library: the mend" ends "into LD_LIBRARY_PATH, or use --backend cpu" "$alone" --backend cuda
check "no library: without a device nobody looks" on_cpus "$alone"
cp "$(ldd "$program" | awk '/libjansson/ { print $3 }')" "$work/bin/$library"
check "another library: named" ends "$work/bin/$library cannot be loaded: undefined symbol: omniquant_module" "$alone" --backend cuda
cp "$built/tests/other_module.so" "$work/bin/$library"
check "of another version: refused" ends "$work/bin/$library belongs to another build of omniquant; " "$alone" --backend cuda

if [ -e "$built/$library" ]; then
  check "beside the program: loaded" ends "--backend cuda: no device: " "$program" --backend cuda
  check "beside the program: the CPU computes without a device" on_cpus "$program"
  cmake --install "$built" --prefix "$work/prefix" >"$work/log" 2>&1
  installed=$(find "$work/prefix" -name $library)
  check "installed: the library is there" test -s "$installed"
  check "installed: loaded" ends "--backend cuda: no device: " "$work/prefix/bin/omniquant" --backend cuda
  rm "$installed"
  check "installed: and no other" ends "--backend cuda: not built in" "$work/prefix/bin/omniquant" --backend cuda
else
  echo "# without CUDA's compiler: $library is not built"
fi
finish
