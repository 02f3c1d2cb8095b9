#!/bin/bash
# simulate.sh OMNIQUANT TEST_HELPER: bench/simulate.py against what can be said by hand: closed forms where nothing is random, and bounds.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
command -v python3 >/dev/null || skip "no python3"
simulate=$(cd "$(dirname "$0")/../bench" && pwd)/simulate.py

# case NAME CHANGE: the same workload and cluster with some fields changed, in $work/NAME.json.
case_of() {
  python3 - "$work/$1.json" "$2" <<'END'
import json, sys
case = {"workload": {"blocks": 4, "samples": 16, "batch": 8, "steps_a_block": 6, "fixed_seconds_a_step": 0.5, "seconds_a_sample_step": 2,
                     "seconds_a_sample_forward": 0.25, "forward_passes_a_block": 4, "fixed_seconds_a_block": 3, "block_bytes": 1000,
                     "gradient_bytes": 4000, "output_bytes_a_block": 1},
        "cluster": {"ranks_a_node": 1, "latency_seconds": 0, "bytes_a_second": 1e15, "node_latency_seconds": 0, "node_bytes_a_second": 1e15,
                    "read_bytes_a_second": 1e15, "write_bytes_a_second": 1e15}}
for member, changes in json.loads(sys.argv[2]).items():
    case[member].update(changes)
json.dump(case, open(sys.argv[1], "w"))
END
}

# holds EXPRESSION OPTION... CASE: of rows[ranks], what simulate.py says.
holds() {
  local expression=$1
  shift
  python3 "$simulate" --json "$work/result.json" "${@:1:$#-1}" "$work/${*: -1}.json" >/dev/null || return
  python3 - "$work/result.json" "$expression" <<'END'
import json, math, sys
result = json.load(open(sys.argv[1]))
rows = {row["ranks"]: row for row in result["rows"]}
near = lambda a, b: math.isclose(a, b, rel_tol=1e-6)
causes = lambda row: sum(row[cause] for cause in result["columns"])
if not eval(sys.argv[2]):
    print(sys.argv[2], json.dumps(rows, indent=1))
    sys.exit(1)
END
}

case_of plain '{}'
check "one rank: the sum of its parts" holds 'near(rows[1]["seconds"], 4 * (3 + 4 * 16 * 0.25 + 6 * (0.5 + 8 * 2)))' --ranks 1 plain
check "8 ranks share the samples alone" holds 'near(rows[8]["seconds"], 4 * (3 + 4 * 2 * 0.25 + 6 * (0.5 + 2)))' --ranks 8 plain
check "16 ranks: half have nothing to do" holds 'near(rows[16]["seconds"], rows[8]["seconds"]) and near(rows[16]["idle"], 4 * (2 + 6 * 2) / 2)' \
  --ranks 8,16 plain
check "3 ranks: the slowest has 3 of 8 slots" holds 'near(rows[3]["seconds"], 4 * (3 + 4 * 6 * 0.25 + 6 * (0.5 + 3 * 2)))' --ranks 3 plain
check "the causes are the whole" holds 'all(near(causes(rows[p]), rows[p]["seconds"]) for p in rows)' --ranks 1,2,3,5,8,16 --jitter 0.2 plain
check "and the losses what efficiency lacks" holds \
  'all(near(sum(rows[p]["losses"].values()), 1 - rows[p]["efficiency"]) for p in rows)' --ranks 1,2,3,8 --jitter 0.2 plain
check "jitter costs, and no less on more ranks" holds '0 == rows[1]["stragglers"] and rows[8]["seconds"] > 4 * (5 + 15)' --ranks 1,8 --jitter 0.3 plain
check "a slow rank is waited for" holds 'near(rows[8]["seconds"], 3 * 4 * (3 + 4 * 2 * 0.25 + 6 * (0.5 + 2)))' --ranks 8 --slow-rank 3 plain

# 4000 bytes at 1000 a second, in each of three rounds; small sums take nothing without latency but their 4 or 64 bytes.
case_of slow '{"cluster": {"bytes_a_second": 1000}, "workload": {"block_bytes": 1}}'
small='(8 * 0.004 + 4 * 0.064)' # a block: 2 agreements and 6 steps; 4 gathers of losses
check "doubling: the whole in every round" holds "abs(rows[8]['all-reduce'] - 4 * 3 * (6 * 4 + $small)) < 0.1" --ranks 8 slow
check "halving: twice all but a share" holds "abs(rows[8]['all-reduce'] - 4 * 2 * 0.875 * (6 * 4 + $small)) < 0.1" --ranks 8 --collective halving slow
check "a ring: as much" holds "abs(rows[8]['all-reduce'] - 4 * 2 * 0.875 * (6 * 4 + $small)) < 0.1" --ranks 8 --collective ring slow
check "a node's ranks share its link" holds "abs(rows[8]['all-reduce'] - 4 * 2 * (6 * 4 + $small) * 2) < 0.1" --ranks 8 --ranks-a-node 2 slow
case_of beside '{"cluster": {"bytes_a_second": 1000}, "workload": {"block_bytes": 1, "early_bytes": 3000, "seconds_beside_early": 100}}'
check "early gradients go beside the work" holds "abs(rows[8]['all-reduce'] - 4 * 3 * (6 * 1 + $small)) < 0.1" --ranks 8 beside
case_of partly '{"cluster": {"bytes_a_second": 1000}, "workload": {"block_bytes": 1, "early_bytes": 3000, "seconds_beside_early": 1}}'
check "what has not gone by then is waited for" holds "abs(rows[8]['all-reduce'] - 4 * (3 * (6 * 4 + $small) - 6)) < 0.1" --ranks 8 partly
case_of late '{"cluster": {"latency_seconds": 0.125}}'
check "latency: a round, and a question before large messages" holds "near(rows[2]['all-reduce'], 4 * 0.125 * (8 + 4 + 6))" --ranks 2 late

# A reader that takes longer than a block: it is all that counts, but for the last block.
case_of reader '{"cluster": {"read_bytes_a_second": 1}}'
check "a slow reader" holds 'near(rows[8]["seconds"], 4 * 1000 + 20)' --ranks 8 reader
case_of half '{"cluster": {"read_bytes_a_second": 50}}'
check "a reader as fast as the work is hidden behind it" holds 'near(rows[8]["seconds"], 20 + 4 * 20) and near(rows[8]["stream"], 20)' --ranks 8 half
case_of writer '{"cluster": {"write_bytes_a_second": 0.01}}'
check "a slow writer" holds 'near(rows[8]["seconds"], 20 + 4 * 100)' --ranks 8 writer
case_of many '{"workload": {"blocks": 40}}'
check "blocks are alike" holds 'near(rows[8]["seconds"], 40 * 20)' --ranks 8 many
check "another batch has as many epochs" holds 'near(rows[16]["seconds"], 4 * (3 + 4 * 0.25 + 3 * (0.5 + 2)))' --ranks 16 --batch 16 plain

refused() {
  python3 "$simulate" "$work/bad.json" >"$work/log" 2>&1 && return 1
  [ "$(wc -l <"$work/log")" = 1 ] && grep -q 'workload: no number for batch' "$work/log"
}
case_of bad '{"workload": {"batch": "many"}}'
check "a field that is not a number is named" refused
finish
