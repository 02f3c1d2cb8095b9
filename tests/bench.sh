#!/usr/bin/env bash
# bench.sh OMNIQUANT: the benchmarks' driver lists its cases, runs one of them, and leaves JSON with every member that bench/README.md tells;
# that page defines every column. No figure is looked at.
set -eu
build=$(cd "$(dirname "$1")" && pwd)
bench=$(cd "$(dirname "$0")/../bench" && pwd)
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
  echo "skipped: no Python 3.9"
  exit 77
fi
if [ ! -x "$build/bench/store" ]; then
  echo "skipped: the benchmarks are not built"
  exit 77
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 "$bench/run.py" --list >"$scratch/list"
for case in "$bench"/cases/*.py; do
  grep -q "^$(basename "$case" .py) " "$scratch/list" || { echo "--list does not name $case" && exit 1; }
  python3 "$bench/run.py" "$(basename "$case" .py)" --build "$build" -- --help >/dev/null
done
python3 "$bench/run.py" --definitions >"$scratch/definitions"
sed '1,/^## Definitions$/d' "$bench/README.md" | sed 1d | diff - "$scratch/definitions" ||
  { echo "bench/README.md: its definitions are not those of the cases; bring them up to date from bench/run.py --definitions" && exit 1; }

python3 "$bench/run.py" io --build "$build" --json "$scratch/results" -- --hidden 64 --ffn 128 --repeats 1 >"$scratch/table"
python3 "$bench/run.py" step --build "$build" --json "$scratch/results" -- --steps 1 --variants fp32 --sizes "--hidden 64 --heads 2 --kv-heads 1 --ffn 128 --tokens 16" >>"$scratch/table"
python3 - "$scratch" <<'END'
import datetime, json, sys
from pathlib import Path

folder = Path(sys.argv[1])
files = sorted((folder / "results").glob("*.json"))
results = {result["case"]: result for result in (json.loads(file.read_text()) for file in files)}
assert set(results) == {"io", "step"} and len(files) == 2, files
for file, result in zip(files, map(json.loads, (file.read_text() for file in files))):
    assert list(result) == ["case", "date", "machine", "versions", "command", "load", "rows", "limit", "columns"], list(result)
    assert file.name == f"{datetime.datetime.fromisoformat(result['date']):%Y-%m-%d}-{result['case']}.json"
    assert list(result["machine"]) == ["cpu", "cores", "memory_gib", "kernel", "gpu"] and result["machine"]["cores"] >= 1
    assert {"omniquant", "build", "compiler", "openmpi", "onednn", "hdf5", "python"} == set(result["versions"])
    assert result["command"].startswith(f"bench/run.py {result['case']} -- ") and len(result["load"]) == 2 and result["limit"]
    assert result["rows"] and {column for row in result["rows"] for column in row} == set(result["columns"])
    assert file.with_suffix(".txt").read_text() in (folder / "table").read_text()
assert [row["bits"] for row in results["io"]["rows"]] == [2, 3, 4, 5, 6, 7, 8]
operations = {row["operation"]: row["calls"] for row in results["step"]["rows"] if "operation" in row}
assert operations["linear_forward"] == operations["quantize_forward"] == 7 and operations["attention_backward"] == 1, operations
END
echo "ok"
