"""What `omniquant plan` says beside what real calibrations take: seconds of a block, and peak memory.

The operations of a block are timed first (`plan --measure`), by as many processes at the same time as the run has ranks; the slowest one's figures make
the plan. The first block of a run, which comes with the opening of everything, is left out where there are more. One thread a rank.
"""

import json
import subprocess

COLUMNS = {
    "run": "the recipe: bits, groups, samples x tokens",
    "ranks": "processes of one thread each, on this machine",
    "planned_seconds": "of a block, by the plan",
    "block_seconds": "the median of the blocks, as the store tells them",
    "time_of_plan": "`block_seconds` over `planned_seconds`",
    "planned_mib": "of rank 0, by the plan",
    "peak_mib": "the largest resident set that any rank had",
    "memory_of_plan": "`peak_mib` over `planned_mib`",
}
LIMIT = "a plan of what was measured a minute before cannot be better than the machine is steady"

RUNS = [
    ("W3 g64, 16 x 512", 1, ["--wbits", 3, "--group-size", 64, "--epochs", 4]),
    ("W3 g64, 16 x 512, batch 2", 2, ["--wbits", 3, "--group-size", 64, "--epochs", 4, "--batch", 2]),
    ("W4A4 LET, 16 x 512", 1, ["--wbits", 4, "--abits", 4, "--let", "--epochs", 4]),
    ("W3 g64 search, sign, 16 x 1024", 1, ["--wbits", 3, "--group-size", 64, "--epochs", 2, "--seqlen", 1024, "--lwc-init", "search", "--optimizer", "sign"]),
]


def options(parser):
    parser.add_argument("--blocks", type=int, default=4, help="of each run (4)")


def measure(bench, ranks, flags):
    """The machine's file of the slowest of as many processes as there are ranks."""
    files = [bench.folder / f"machine-{rank}.json" for rank in range(ranks)]
    commands = [[bench.omniquant, "plan", "--model", bench.model, "--measure", file, *flags] for file in files]
    running = [subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL) for command in commands]
    if any([process.wait() for process in running]):
        bench.run(commands[0])  # says why
    return max(files, key=lambda file: sum(row["seconds"] for row in json.loads(file.read_text(encoding="utf-8"))["operations"].values()))


def rows(bench, arguments):
    for name, ranks, flags in RUNS:
        flags = ["--samples", 16, "--sampling", "sequential", "--backend", "cpu", "--threads", 1,
                 *([] if "--seqlen" in flags else ["--seqlen", 512]), *flags]  # fmt: skip
        machine = measure(bench, ranks, flags)
        plan = json.loads(bench.run([bench.omniquant, "plan", "--json", "--model", bench.model, "--ranks", ranks, "--ranks-a-node", ranks,
                                     "--measured", machine, *flags])[0])  # fmt: skip
        store = bench.folder / "store"
        run = bench.calibrate(ranks, [*flags, "--blocks", f"0:{arguments.blocks}"], output=store)
        blocks = json.loads(bench.run([bench.omniquant, "inspect", "--json", store])[0])["blocks"]
        bench.run(["rm", "-r", store])
        seconds = sorted(block["seconds"] for block in blocks[1:] or blocks)
        median, planned, mib = seconds[len(seconds) // 2], plan["block_seconds"]["sum"], plan["memory_bytes"]["host"] / 2**20
        yield {"run": name, "ranks": ranks, "planned_seconds": planned, "block_seconds": median, "time_of_plan": median / planned, "planned_mib": mib,
               "peak_mib": run.peak_mib, "memory_of_plan": run.peak_mib / mib}  # fmt: skip
