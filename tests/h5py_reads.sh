#!/bin/bash
# h5py_reads.sh OMNIQUANT TEST_HELPER: a store is read by h5py alone, without this program.
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
set -e
python=${PYTHON:-python3}
"$python" -c 'import h5py' 2>/dev/null || skip "$python has no h5py"
OMNIQUANT_KEEP_STORE="$work/out" "$(dirname "$program")/tests/test_store" >/dev/null 2>&1
mv "$work/out" "$work/moved" # links are relative
"$python" - "$work/moved/omniquant.h5" <<'END'
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
    assert block["timing"].attrs["phases"].decode().split(",") == ["wait", "steps"] and block["timing"].dtype == "float32"
    assert block["timing"][:].tolist() == [[0, 0.125], [0.25, 0.375], [0.5, 0.625], [0.75, 0.875]]  # a row a rank
END

"$helper" model "$work/model" 2 32 4 2 64 100 F32
"$helper" tokens "$work/tokens.h5" 400 100 1
launch 2 calibrate --model "$work/model" --tokens "$work/tokens.h5" --output "$work/two" --seqlen 32 --samples 4 --batch 2 --epochs 2 \
  --group-size 16 >"$work/log" 2>&1 || { cat "$work/log" && exit 1; }
"$python" - "$work/two/omniquant.h5" <<'END'
import sys
import h5py

with h5py.File(sys.argv[1], "r") as file:
    for block in file["blocks"].values():
        phases, seconds = block["timing"].attrs["phases"].decode().split(","), block["timing"][:]
        assert phases == ["wait", "target", "start", "steps", "measure", "store", "ranks"]
        assert seconds.shape == (2, 7) and (seconds >= 0).all() and (seconds[:, 3] > 0).all()
        assert abs(seconds[0].sum() / block.attrs["seconds"] - 1) < 1e-5  # every moment of the first rank is in one phase
END
echo "h5py reads the store"
