# setup.sh: what quickstart.sh and test.sh share: packages, the build, the Python environment, MPI on one machine.
# Sourced with the project's root as working directory, so that every path is relative to it.
# shellcheck shell=bash

# What the program's build and run need beside the minimal system.
# shellcheck disable=SC2034
packages=(gcc libc6-dev make cmake pkg-config libopenmpi-dev openmpi-bin libhdf5-dev libdnnl-dev libjansson-dev libyaml-dev libssl-dev)

say() { printf '==> %s\n' "$*"; }

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Runs a command in silence; its last lines are shown if it fails.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null || status=$?
  [ "$status" = 0 ] || tail -n 40 "$log" >&2
  rm -f "$log"
  return "$status"
}

is_root() { [ "$(id -u)" = 0 ]; }

# Is that package's content there? Tools count wherever they come from.
has_package() {
  case $1 in
  gcc | g++ | make | cmake | pkg-config | valgrind | clang | clang-format | clang-tidy | shellcheck) command -v "$1" >/dev/null ;;
  python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
  *) dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed ;;
  esac
}

# Installs those of the packages that are missing; without root, says how.
install_packages() {
  local missing=() package
  command -v apt-get >/dev/null || fail "no apt-get here: install by hand what these Debian packages hold, then build with cmake: $*"
  for package; do has_package "$package" || missing+=("$package"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  is_root || fail "packages are missing; run: sudo apt-get install --no-install-recommends ${missing[*]}"
  say "installing ${missing[*]}"
  quietly apt-get -q update || fail "apt-get update failed; check the network and the package sources"
  DEBIAN_FRONTEND=noninteractive quietly apt-get -q -y --no-install-recommends install "${missing[@]}" ||
    fail "apt-get could not install ${missing[*]}; see its message above"
}

# build FOLDER OPTION...: configures with the options of cmake and builds.
build() {
  local folder=$1
  shift
  # A clone that was moved keeps a cache that cmake refuses.
  if [ -f "$folder/CMakeCache.txt" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$folder/CMakeCache.txt"; then rm -rf "$folder"; fi
  say "building in $folder"
  quietly cmake -S . -B "$folder" "$@" || fail "cmake could not configure $folder; see its message above"
  quietly cmake --build "$folder" -j "$(nproc)" || fail "the build in $folder failed; see the compiler's message above"
}

# Makes .venv with what the helpers in tools/ need. Fails without a message of its own.
make_venv() {
  if [ -x .venv/bin/python ] && cmp -s tools/requirements.txt .venv/requirements.txt; then return 0; fi
  say "making the Python environment .venv"
  quietly python3 -m venv --clear .venv || return 1
  quietly .venv/bin/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt || return 1
  cp tools/requirements.txt .venv/requirements.txt
}

# Puts cuDNN's C++ front end, headers alone, into FOLDER/include; its Python package carries them. Fails without a message of its own.
get_cudnn_frontend() {
  [ -f "$1/include/cudnn_frontend.h" ] ||
    quietly python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$1" 'nvidia-cudnn-frontend>=1.32'
}

# Lets mpirun start two ranks on any machine: Open MPI counts cores, not hardware threads, and refuses root unless told twice.
mpi_environment() {
  export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
  export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
  if is_root; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}
