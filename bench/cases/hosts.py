"""Simulation against measurement: calibrations over hosts on this machine, joined by links of several rates and delays (`tests/hosts/`), each beside
what `bench/simulate.py` says from a workload measured on one rank and a network measured between two.

Needs root, what `tests/hosts.sh` needs, and a build with the tests (`--build build-test`).
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import measure_workload
import simulate
from harness import ROOT, Failure

SEPARATE = True

# Small groups and short samples: large gradients for little work, so that the network counts on a small machine.
MODEL = {"blocks": 3, "hidden": 256, "heads": 4, "kv_heads": 4, "ffn": 512, "vocabulary": 96}
FLAGS = ["--wbits", "3", "--group-size", "4", "--seqlen", "16", "--sampling", "sequential", "--lwc-lr", "1e-3"]
SAMPLES, BATCH, EPOCHS = 16, 4, 4
COLUMNS = {
    "link": "bits a second and one-way delay that the hosts' links are given",
    "sends": "how Open MPI sends large messages over TCP: put, its default, or send (--mca btl_tcp_flags send,inplace)",
    "ranks": "processes of one thread, each on a host of its own; all hosts share this machine's cores",
    "latency_us": "one way, measured between pairs of the ranks, all pairs at once",
    "mb_a_second": "each way, measured between pairs that exchange and add, all pairs at once: of 4 ranks on 2 cores it is what the cores leave of the link",
    "slowed": "seconds of as many runs of one rank each, side by side and without a word to each other, over what the workload says of one alone: what"
    " sharing this machine costs each rank at that time, and the factor by which computing is taken to be slower",
    "measured": "seconds of all blocks, as the store tells them; the fastest of the repeats",
    "slowest": "the slowest of the repeats",
    "simulated": "seconds that simulate.py says",
    "error": "simulated over measured, less 1",
    "network": "share of the simulated seconds that are sums over the ranks",
}
LIMIT = "the switch and TCP run on the cores that also compute, so that fast links are slower than asked for; ranks beyond the cores share them"

# In one process, because the hosts end with it: RATE DELAY RANKS REPEATS SENDS, in the folder $work.
HOSTS = r"""
set -u
. "$root/tests/hosts/cluster.bash"
cd /
trap hosts_stop EXIT
hosts_start "$build/tests/test_switch" "$most" "$1" "$2" "$work" "$build" || { cat "$work"/hosts.*/switch.log >&2; exit 1; }
sends=()
[ "$5" = put ] || sends=(--mca btl_tcp_flags send,inplace)
for ranks in $3; do
  [ "$ranks" = 1 ] || hosts_mpirun "$ranks" "${sends[@]}" "$build/bench/network" >"$work/network-$ranks" || exit
done
for repeat in $(seq "$4"); do
  for ranks in $3; do
    rm -rf "$work/$ranks-$repeat"
    hosts_mpirun "$ranks" "${sends[@]}" "$build/omniquant" calibrate --model "$work/model" --tokens "$work/tokens.h5" \
      --output "$work/$ranks-$repeat" $flags --backend cpu --threads 1 </dev/null >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  done
done
"""


def hosts(work, build, most, link, ranks, repeats, sends):
    """Runs on hosts of these links, for each number of ranks: what the network is with as many of them using it, and the seconds of the runs' blocks."""
    flags = [*FLAGS, "--samples", SAMPLES, "--batch", BATCH, "--epochs", EPOCHS]
    variables = {"root": ROOT, "build": build, "work": work, "most": most, "flags": " ".join(map(str, flags))}
    command = ["setpriv", "--pdeathsig", "TERM", "bash", "-c", HOSTS, "hosts", *map(str, link), " ".join(map(str, ranks)), str(repeats), sends]
    done = subprocess.run(command, env={**measure_workload.environment(), **{name: str(value) for name, value in variables.items()}})
    if done.returncode:
        raise Failure(f"the runs with links of {link[0]:g} bit/s and {link[1]:g} s failed")
    network = {rank: json.loads((work / f"network-{rank}").read_text()) for rank in ranks if rank > 1}
    network[1] = network[min(network)]
    found = {rank: [measure_workload.inspect(build / "omniquant", work / f"{rank}-{i + 1}")["seconds"] for i in range(repeats)] for rank in ranks}
    return network, found


def file_rates(work, count):
    """Bytes a second that a file is read with as the kernel holds it, and written and synced with."""
    data = os.urandom(count)
    begin = time.perf_counter()
    with open(work / "rate", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    (work / "rate").read_bytes()
    return {"read_bytes_a_second": count / (time.perf_counter() - written), "write_bytes_a_second": count / (written - begin)}


def side_by_side(work, build, count):
    """Mean seconds of runs of one rank each that go on at once."""
    program, flags = build / "omniquant", [*FLAGS, "--samples", SAMPLES, "--batch", BATCH, "--epochs", EPOCHS, "--backend", "cpu", "--threads", 1]
    command = [program, "calibrate", "--model", work / "model", "--tokens", work / "tokens.h5", *flags]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        outputs = [f"{folder}/{i}" for i in range(count)]
        running = [subprocess.Popen([str(part) for part in [*command, "--output", output]], env=measure_workload.environment(),
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for output in outputs]  # fmt: skip
        if any([process.wait() for process in running]):
            raise Failure("a run side by side with others failed")
        return sum(measure_workload.inspect(program, output)["seconds"] for output in outputs) / count


def slowdowns(work, build, sizes, repeats, alone):
    """For each number of ranks, what sharing this machine costs each; `alone`: what one takes by the workload."""
    best = {}
    for _ in range(repeats):
        for count in sizes:
            seconds = side_by_side(work, build, count)
            best[count] = min(seconds, best.get(count, seconds))
    return {count: seconds / alone for count, seconds in best.items()}


def simulated(workload, network, rates, ranks, slowed):
    """A row of simulate.py."""
    slow = {name: value * slowed if "seconds" in name else value for name, value in workload.items()}
    cluster = {**network, **rates, "ranks_a_node": 1, "node_latency_seconds": network["latency_seconds"],
               "node_bytes_a_second": network["bytes_a_second"]}  # fmt: skip
    options = argparse.Namespace(seed=0, jitter=0.0, slow_rank=0.0, collective="program", simulated_blocks=workload["blocks"])
    return simulate.simulate(slow, cluster, [ranks], options)[0]


def options(parser):
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--links", default="1e9:1e-4,1e9:1e-3,1e10:1e-4,1e10:1e-3,1e8:1e-3", help="bits a second : seconds, with commas")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")


def rows(bench, arguments):
    build, work = bench.build.resolve(), bench.folder
    links = [tuple(float(part) for part in text.split(":")) for text in arguments.links.split(",")]
    helper = bench.program("tests/test_helper")
    bench.program("tests/test_switch")
    bench.run([helper, "tokens", work / "tokens.h5", 20000, MODEL["vocabulary"], 1])
    bench.run([helper, "model", work / "model", *MODEL.values(), "F32"])
    single = argparse.Namespace(program=build / "omniquant", model=work / "model", tokens=work / "tokens.h5", samples=SAMPLES, batch=BATCH,
                                epochs=EPOCHS, repeats=arguments.repeats)  # fmt: skip
    workload = measure_workload.measure(single, FLAGS)
    rates = file_rates(work, workload["block_bytes"])
    alone = simulated(workload, {"latency_seconds": 0, "bytes_a_second": 1e12}, rates, 1, 1)["seconds"]
    for link, sends in [(link, "send") for link in links] + [(links[0], "put")]:
        network, found = hosts(work, build, max(arguments.ranks), link, arguments.ranks, arguments.repeats, sends)
        slowed = slowdowns(work, build, arguments.ranks, arguments.repeats, alone)
        for ranks in arguments.ranks:
            between = network[ranks]
            row = simulated(workload, between, rates, ranks, slowed[ranks])
            measured = min(found[ranks])
            yield {"link": f"{link[0] / 1e9:g}G {link[1] * 1e3:g}ms", "sends": sends, "ranks": ranks, "latency_us": between["latency_seconds"] * 1e6,
                   "mb_a_second": between["bytes_a_second"] / 1e6, "slowed": slowed[ranks], "measured": measured, "slowest": max(found[ranks]),
                   "simulated": row["seconds"], "error": row["seconds"] / measured - 1, "network": row["all-reduce"] / row["seconds"]}  # fmt: skip
