#!/usr/bin/env bash
# From a fresh Debian or Ubuntu to a quantized model and what it is worth: a small real model, W3A16 in groups of 64, on two ranks.
# What is there already is kept: run again, it only prints the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

recipe=configs/quickstart.yaml
ranks=2
eval_options=(--seqlen 512 --windows 40)

usage() {
  cat <<'END'
Usage: scripts/quickstart.sh [--fresh]
Builds omniquant in build/, brings SmolLM2-135M-Instruct and a text into work/, quantizes the model on two ranks and prints its perplexity.
  --fresh   quantize and evaluate anew; what was downloaded and built is kept
END
}

# fresh_enough FILE INPUT...: is FILE there and newer than all it is made from?
fresh_enough() {
  local file=$1 input
  shift
  [ -e "$file" ] || return 1
  for input; do [ "$file" -nt "$input" ] || return 1; done
}

# The English handbook comes as a package of pages, which are taken out without installing it.
get_text() {
  [ ! -f work/handbook.txt ] || return 0
  say "bringing the text: Debian's handbook"
  local folder=work/handbook.part pages=usr/share/doc/debian-handbook/html/en-US
  rm -rf "$folder" && mkdir "$folder"
  download_package "$folder" debian-handbook ||
    fail "the package debian-handbook could not be downloaded; run apt-get update as root, or put any text into work/handbook.txt"
  dpkg-deb --fsys-tarfile "$folder"/*.deb | tar -x -C "$folder" --wildcards "./$pages/*.html" ||
    fail "the package debian-handbook holds no English pages; put any text into work/handbook.txt"
  .venv/bin/python tools/handbook_text.py --output work/handbook.txt "$folder/$pages"
  rm -rf "$folder"
}

# download_package FOLDER PACKAGE: the .deb file into FOLDER, whether root or not.
download_package() (
  cd "$1" || exit
  download=(apt-get -q -o APT::Sandbox::User=root download "$2")
  if "${download[@]}" >/dev/null 2>&1 </dev/null; then exit 0; fi
  if is_root; then quietly apt-get -q update || exit; fi # a fresh machine may not know any package yet
  quietly "${download[@]}"
)

# make_tokens NAME OPTION...: a part of the text as tokens in work/NAME.h5.
make_tokens() {
  local file=work/$1.h5
  shift
  fresh_enough "$file" work/handbook.txt work/smollm2/tokenizer.json tools/tokenize.py ||
    .venv/bin/python tools/tokenize.py --model work/smollm2 --output "$file" "$@" work/handbook.txt
}

run_ranks() { mpirun -np "$ranks" build/omniquant "$@" --backend cpu </dev/null; }

# keep FILE COMMAND...: the command's standard output in FILE, there only if the command succeeds.
keep() {
  local file=$1
  shift
  "$@" >"$file.part" || fail "$file could not be made: ${*:2:1} failed; see its message above"
  mv "$file.part" "$file"
}

# quantize NAME FLAG...: a store in work/NAME, and calibrate's summary in work/NAME.summary, which shows that the store is whole.
quantize() {
  local store=work/$1
  shift
  fresh_enough "$store.summary" "$recipe" work/calibration.h5 work/smollm2/config.json && return
  rm -rf "$store" "$store.eval.json"
  say "quantizing into $store"
  keep "$store.summary" run_ranks calibrate --model work/smollm2 --tokens work/calibration.h5 --config "$recipe" --output "$store" "$@"
  cat "$store.summary"
}

# evaluate NAME FLAG...: the perplexity of the model, or with flags of the store, in work/NAME.eval.json.
evaluate() {
  local name=$1 result=work/$1.eval.json
  shift
  fresh_enough "$result" work/evaluation.h5 work/smollm2/config.json && return
  say "evaluating: $name"
  keep "$result" run_ranks eval --model work/smollm2 --tokens work/evaluation.h5 "${eval_options[@]}" "$@" --json
}

case ${1:-} in
'') ;;
--fresh) rm -rf work/rtn work/w3a16g64 work/*.summary work/*.eval.json ;;
--help) usage && exit 0 ;;
*) usage >&2 && exit 2 ;;
esac

started=$SECONDS
install_packages "${packages[@]}" python3-venv
build build -DOMNIQUANT_TESTS=OFF -DOMNIQUANT_BENCH=OFF
make_venv || fail "the Python environment .venv could not be made; see the message above and check the network"
mkdir -p work
if [ ! -d work/smollm2 ]; then say "bringing the model: SmolLM2-135M-Instruct"; fi
.venv/bin/python tools/demo_model.py --output work/smollm2
get_text
make_tokens calibration --end 60%
make_tokens evaluation --begin 60%

mpi_environment
if [ -t 2 ]; then export OMNIQUANT_PROGRESS=bar; fi # mpirun hides the terminal from the program
evaluate full
quantize rtn --epochs 0
evaluate rtn --quantized work/rtn
quantize w3a16g64
evaluate w3a16g64 --quantized work/w3a16g64

say "done in $((SECONDS - started)) s: SmolLM2-135M-Instruct, W3A16 in groups of 64, $ranks ranks; quantized model in work/w3a16g64"
.venv/bin/python scripts/table.py "full precision" work/full.eval.json - \
  "round to nearest" work/rtn.eval.json work/rtn.summary OmniQuant work/w3a16g64.eval.json work/w3a16g64.summary
