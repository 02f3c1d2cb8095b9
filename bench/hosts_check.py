#!/usr/bin/env python3
"""Simulation against measurement: calibrations over hosts on this machine, joined by links of several rates and delays (tests/hosts/), each beside what
bench/simulate.py says from a workload measured on one rank and a network measured between two.

Usage: hosts_check.py [--build DIR] [--repeats N] [--links 1e9:1e-4,...] [--ranks 1,2,4] [--results DIR]

Needs root, and what tests/hosts.sh needs. Takes 5 minutes on an idle machine. Writes DATE-hosts.json and .txt to the folder of results.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure_workload
import simulate

ROOT = Path(__file__).resolve().parent.parent
# Small groups and short samples: large gradients for little work, so that the network counts on a small machine.
MODEL = {"blocks": 3, "hidden": 256, "heads": 4, "kv_heads": 4, "ffn": 512, "vocabulary": 96}
FLAGS = ["--wbits", "3", "--group-size", "4", "--seqlen", "16", "--sampling", "sequential", "--lwc-lr", "1e-3"]
SAMPLES, BATCH, EPOCHS = 16, 4, 4
COLUMNS = {
    "link": "bits a second and one-way delay that the hosts' links are given",
    "sends": "how Open MPI sends large messages over TCP: put, its default, or send (--mca btl_tcp_flags send,inplace)",
    "ranks": "processes of one thread, each on a host of its own; all hosts share this machine's cores",
    "latency_us": "one way, measured between two ranks",
    "MB_a_second": "each way, measured between two ranks that exchange and add",
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
hosts_mpirun 2 "${sends[@]}" "$build/bench/network" >"$work/network" || exit
for repeat in $(seq "$4"); do
  for ranks in $3; do
    rm -rf "$work/$ranks-$repeat"
    hosts_mpirun "$ranks" "${sends[@]}" "$build/omniquant" calibrate --model "$work/model" --tokens "$work/tokens.h5" \
      --output "$work/$ranks-$repeat" $flags --threads 1 </dev/null >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  done
done
"""


def hosts(work, build, most, link, ranks, repeats, sends):
    """Runs on hosts of these links: what the network is, and for each number of ranks the seconds of its runs' blocks."""
    flags = [*FLAGS, "--samples", SAMPLES, "--batch", BATCH, "--epochs", EPOCHS]
    variables = {"root": ROOT, "build": build, "work": work, "most": most, "flags": " ".join(map(str, flags))}
    command = ["setpriv", "--pdeathsig", "TERM", "bash", "-c", HOSTS, "hosts", *map(str, link), " ".join(map(str, ranks)), str(repeats), sends]
    done = subprocess.run(command, env={**measure_workload.environment(), **{name: str(value) for name, value in variables.items()}})
    if done.returncode:
        sys.exit(f"hosts_check.py: the runs with links of {link[0]:g} bit/s and {link[1]:g} s failed")
    network = json.loads((work / "network").read_text())
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
    program, flags = build / "omniquant", [*FLAGS, "--samples", SAMPLES, "--batch", BATCH, "--epochs", EPOCHS, "--threads", 1]
    command = [program, "calibrate", "--model", work / "model", "--tokens", work / "tokens.h5", *flags]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        outputs = [f"{folder}/{i}" for i in range(count)]
        running = [subprocess.Popen([str(part) for part in [*command, "--output", output]], env=measure_workload.environment(),
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for output in outputs]  # fmt: skip
        if any([process.wait() for process in running]):
            sys.exit("hosts_check.py: a run side by side with others failed")
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
    return cluster, simulate.simulate(slow, cluster, [ranks], options)[0]


def first_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


def machine():
    cpus = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpus[0] if cpus else platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "kernel": platform.release(),
            "gpu": ""}  # fmt: skip


def table(rows):
    columns = [column for column in COLUMNS]
    text = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *text]) for i in range(len(columns))]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in [columns, *text]) + "\n"


def check(options, work):
    build = options.build
    sizes = [int(text) for text in options.ranks.split(",")]
    links = [tuple(float(part) for part in text.split(":")) for text in options.links.split(",")]
    helper = build / "tests/test_helper"
    measure_workload.run([helper, "tokens", work / "tokens.h5", 20000, MODEL["vocabulary"], 1])
    measure_workload.run([helper, "model", work / "model", *MODEL.values(), "F32"])
    single = argparse.Namespace(program=build / "omniquant", model=work / "model", tokens=work / "tokens.h5", samples=SAMPLES, batch=BATCH,
                                epochs=EPOCHS, repeats=options.repeats)  # fmt: skip
    workload = measure_workload.measure(single, FLAGS)
    rates = file_rates(work, workload["block_bytes"])
    alone = simulated(workload, {"latency_seconds": 0, "bytes_a_second": 1e12}, rates, 1, 1)[1]["seconds"]
    cases = [(link, "send") for link in links] + [(links[0], "put")]
    rows, clusters = [], []
    for link, sends in cases:
        network, found = hosts(work, build, max(sizes), link, sizes, options.repeats, sends)
        slowed = slowdowns(work, build, sizes, options.repeats, alone)
        for ranks in sizes:
            cluster, row = simulated(workload, network, rates, ranks, slowed[ranks])
            measured = min(found[ranks])
            rows.append({
                "link": f"{link[0] / 1e9:g}G {link[1] * 1e3:g}ms", "sends": sends, "ranks": ranks, "latency_us": network["latency_seconds"] * 1e6,
                "MB_a_second": network["bytes_a_second"] / 1e6, "slowed": slowed[ranks], "measured": measured, "slowest": max(found[ranks]),
                "simulated": row["seconds"], "error": row["seconds"] / measured - 1, "network": row["all-reduce"] / row["seconds"],
            })  # fmt: skip
            print(table(rows).splitlines()[-1], flush=True)
        clusters.append({"link": link, "sends": sends, **cluster})
    return workload, clusters, rows


def main():
    parser = argparse.ArgumentParser(description="Check bench/simulate.py against runs over hosts on this machine.")
    parser.add_argument("--build", type=lambda text: Path(text).resolve(), default=ROOT / "build-test", help="with the tests and benchmarks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--links", default="1e9:1e-4,1e9:1e-3,1e10:1e-4,1e10:1e-3,1e8:1e-3", help="bits a second : seconds, with commas")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="omniquant-hosts-", dir="/tmp") as folder:
        workload, clusters, rows = check(options, Path(folder))
    load.append(os.getloadavg()[0])
    versions = {"omniquant": first_line("git", "rev-parse", "--short", "HEAD"), "openmpi": first_line("mpirun", "--version")}
    result = {"case": "hosts", "date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine(), "versions": versions,
              "command": " ".join(["bench/hosts_check.py", *sys.argv[1:]]), "load": load, "rows": rows, "limit": LIMIT, "columns": COLUMNS,
              "workload": workload, "clusters": clusters}  # fmt: skip
    base = options.results / f"{datetime.date.today().isoformat()}-hosts"
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".txt").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
