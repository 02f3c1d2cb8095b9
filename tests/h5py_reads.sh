#!/usr/bin/env bash
# h5py_reads.sh: a store is read by h5py alone, without this program. Called with the path of the omniquant program.
set -eu
python=${PYTHON:-python3}
if ! "$python" -c 'import h5py' 2>/dev/null; then
  echo "skipped: $python has no h5py"
  exit 77
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
OMNIQUANT_KEEP_STORE="$scratch/out" "$(dirname "$1")/tests/test_store" >/dev/null 2>&1
mv "$scratch/out" "$scratch/moved" # links are relative
"$python" - "$scratch/moved/omniquant.h5" <<'END'
import json, sys
import h5py

with h5py.File(sys.argv[1], "r") as file:
    assert file.attrs["format"].decode() == "omniquant" and file.attrs["version"] == 1 and file.attrs["blocks"] == 3
    assert json.loads(file.attrs["recipe"]) == {"wbits": 3}
    assert json.loads(file.attrs["model_config"])["name"] == "caf\u00e9"
    assert sorted(file["blocks"]) == ["0000", "0001"]
    assert file["blocks"].get("0001", getlink=True).filename == "blocks/0001.h5"
    block = file["blocks/0001"]
    assert block.attrs["index"] == 1 and block.attrs["kept"].decode() == "end" and block.attrs["loss_rtn"] == 0.5
    linear = block["self_attn.q_proj"]
    assert dict(linear.attrs) == {"bits": 3, "group_size": 16, "in_features": 37, "symmetric": 0}
    assert linear["codes"].shape == (5, 14) and linear["codes"].dtype == "uint8" and linear["codes"].fletcher32
    assert linear["codes"][1, 2] == (16 * 37 + 33) % 256
    assert linear["scale"].shape == (5, 3) and linear["scale"].dtype == "float16" and linear["scale"][0, 0] == 2.0**-7
    assert linear["zero_point"][0].tolist() == [0, 1, 2]
    assert block["mlp.gate.weight"].shape == (3, 5) and block["mlp.gate.weight"].dtype == "float32"
    assert block["calibration/self_attn.q_proj/gamma"].shape == (5, 3)
    assert block["calibration/loss"].shape == (0,)
END
echo "h5py reads the store"
