"""What a rank holds: the peak memory of real calibrations, by ranks and batch, beside what `omniquant plan` says of them.

W3 in groups of 64, 16 samples of 512 tokens, one epoch, two blocks, one thread a rank.
"""

import json

COLUMNS = {
    "ranks": "processes of one thread each",
    "batch": "samples a step, over all ranks",
    "peak_mib": "the largest resident set that any rank had (`ru_maxrss`), as calibrate prints it: program, libraries and MPI included",
    "planned_mib": "what `omniquant plan` says of rank 0",
    "of_plan": "`peak_mib` over `planned_mib`",
    "limit_mib": "what the method holds all the time, by the plan: a block's weights in fp32 twice, and the streams of hidden states of a rank's "
                 "samples",
    "over_limit_mib": "`peak_mib` less `limit_mib`: activations and gradients of one sample, the factors, blocks being read and stored, program "
                      "and libraries",
}
LIMIT = "`limit_mib`: these are there at the same time in every run; a design that makes them again or spills them could hold less"

MIB = 2**20


def options(parser):
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16; those below the ranks are left out")
    parser.add_argument("--samples", type=int, default=16, help="default 16")


def rows(bench, arguments):
    for ranks in arguments.ranks:
        for batch in arguments.batch:
            if batch < ranks:
                continue
            flags = ["--wbits", 3, "--group-size", 64, "--batch", batch, "--samples", arguments.samples, "--seqlen", 512, "--epochs", 1]
            peak = bench.calibrate(ranks, [*flags, "--blocks", "0:2"]).peak_mib
            command = [bench.omniquant, "plan", "--json", "--model", bench.model, "--ranks", ranks, "--threads", 1, *flags]
            plan = json.loads(bench.run(command)[0])["memory_bytes"]
            limit = (plan["weights"] + plan["effective"] + plan["streams"]) / MIB
            yield {"ranks": ranks, "batch": batch, "peak_mib": peak, "planned_mib": plan["host"] / MIB, "of_plan": peak * MIB / plan["host"],
                   "limit_mib": limit, "over_limit_mib": peak - limit}  # fmt: skip
