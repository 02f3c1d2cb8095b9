#!/usr/bin/env bash
# Builds what bench/gpu.sh runs and packs it with every shared library it needs, but for CUDA's own, into one archive for an x86-64 Linux machine
# with an NVIDIA GPU where nothing is installed. There: bench/gpu.sh ARCHIVE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

usage() {
  cat <<'END'
Usage: bench/gpu_pack.sh [ARCHIVE]
Builds in build-gpu/ and packs programs and libraries into ARCHIVE (build-gpu/gpu.tar.xz).
END
}

case ${1:-} in
--help) usage && exit 0 ;;
-*) usage >&2 && exit 2 ;;
esac
archive=${1:-build-gpu/gpu.tar.xz}
programs=(omniquant omniquant_cuda.so bench/gpu_step bench/gpu_allreduce tests/test_helper tests/test_cuda_kernels tests/test_cuda_block
  tests/test_cuda_samples tests/test_cuda_stream tests/test_cuda_allreduce)

# libraries_of FILE...: the shared libraries that they load, one path a line, without the C library's and CUDA's.
libraries_of() {
  local own='^(ld-linux|libc|libm|libdl|librt|libpthread|libutil|libresolv|libgcc_s|libstdc\+\+|libcuda|libcudart|libcublas|libcublasLt|libcudnn.*|libnccl|libnvidia.*|libnvrtc.*)[.-]'
  local file library
  for file; do ldd "$file" 2>/dev/null | awk '/=> \//{print $3}'; done | sort -u | while read -r library; do
    [[ $(basename "$library") =~ $own ]] || echo "$library"
  done
}

# put FOLDER FILE...: copies what links point at.
put() {
  mkdir -p "$1"
  cp -Ln "${@:2}" "$1"
}

# Open MPI loads its parts by name from its own folder, and its launcher's from PMIx's.
pack_mpi() {
  local to=$1 plugins pmix
  plugins=$(find /usr/lib /usr/local/lib -name mca_pml_ob1.so -printf '%h' -quit)
  [ -n "$plugins" ] || fail "Open MPI's plugins are not under /usr/lib or /usr/local/lib"
  put "$to/bin" "$(command -v mpirun)" "$(command -v orted)"
  put "$to/openmpi/lib/openmpi" "$plugins"/*.so
  rm -f "$to"/openmpi/lib/openmpi/*{ofi,ucx,psm,verbs,openib,usnic,monitoring,slurm,tm,gridengine,singularity}*
  mkdir -p "$to/openmpi/share" && cp -rL /usr/share/openmpi "$to/openmpi/share/"
  pmix=$(find /usr/lib -type d -path '*pmix2/lib/pmix' -print -quit)
  [ -z "$pmix" ] || put "$to/pmix/pmix" "$pmix"/*.so
}

# What has to be sourced there, once a shell.
write_environment() {
  cat <<'END'
b=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# CUDA's libraries: of the Python packages that PyTorch takes them from, wherever they are, or of an installation.
packages=$(python3 -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null)
mapfile -t places < <(printf '%s\n' "$packages" | grep .; ls -d /usr/local/cuda*/ /opt /usr/lib 2>/dev/null)
gpu=$(find "${places[@]}" -maxdepth 9 \( -name 'libcublasLt.so.1*' -o -name 'libcudart.so.1*' -o -name 'libcudnn.so.9' \
  -o -name 'libnccl.so.2' -o -name 'libnvrtc.so.1*' \) -printf '%h\n' 2>/dev/null | awk '!seen[$0]++' | paste -sd:)
export PATH=$b/bin:$PATH:/usr/local/cuda/bin LD_LIBRARY_PATH=$b/lib${gpu:+:$gpu}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export OPAL_PREFIX=$b/openmpi OPAL_LIBDIR=$b/openmpi/lib OPAL_PKGLIBDIR=$b/openmpi/lib/openmpi OPAL_BINDIR=$b/bin
export OPAL_DATADIR=$b/openmpi/share OPAL_PKGDATADIR=$b/openmpi/share/openmpi
if [ -d "$b/pmix" ]; then export PMIX_PREFIX=$b/pmix PMIX_INSTALL_PREFIX=$b/pmix PMIX_MCA_mca_base_component_path=$b/pmix/pmix; fi
export OMPI_MCA_mca_base_component_path=$b/openmpi/lib/openmpi OMPI_MCA_btl=self,vader,tcp OMPI_MCA_pml=ob1 OMPI_MCA_plm_rsh_agent=sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
END
}

options=(-DOMNIQUANT_CUDA=ON -DOMNIQUANT_WERROR=ON)
if get_cudnn_frontend build-cudnn-frontend; then
  options+=("-DCUDNN_FRONTEND_INCLUDE_DIR=$PWD/build-cudnn-frontend/include")
else
  say "cuDNN's front end is not to be had: attention by own kernels"
fi
build build-gpu "${options[@]}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
put "$folder/bin" "${programs[@]/#/build-gpu/}"
strip "$folder"/bin/*
pack_mpi "$folder"
mapfile -t needed < <(libraries_of "$folder"/bin/* "$folder"/openmpi/lib/openmpi/*.so "$folder"/pmix/pmix/*)
put "$folder/lib" "${needed[@]}"
write_environment >"$folder/env.sh"
XZ_OPT=-T0 tar -C "$folder" -cJf "$archive" .
say "$archive: $(($(stat -c %s "$archive") / 1048576)) MiB; on the machine with the GPU, in a copy of this tree: bench/gpu.sh $archive"
