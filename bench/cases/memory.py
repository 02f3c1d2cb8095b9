"""What a rank holds: the peak memory of real calibrations, by ranks and batch.

W3 in groups of 64, 16 sequential samples of 512 tokens, one epoch, two blocks, one thread a rank.
"""

import json

from harness import Failure

COLUMNS = {
    "ranks": "processes of one thread each",
    "batch": "samples a step, over all ranks",
    "peak_mib": "the largest resident set that any rank had (`ru_maxrss`), as calibrate prints it: libraries, MPI and the reader's buffer included",
    "planned_mib": "what `omniquant plan` says of the same run, for the rank that takes most; not there where the program has no plan",
    "limit_mib": "what the method has to hold by its own account: a block's weights in fp32 twice, and the three streams of a rank's samples in fp32 "
                 "(`x_fp`, `x_q`, and `x_q` behind the block)",
    "over_limit_mib": "`peak_mib` less `limit_mib`: activations and gradients of one sample, the factors, one block in the checkpoint's types, program and libraries",
}
LIMIT = "`limit_mib`: these are there at the same time in every run; a design that recomputes or spills them could hold less"


def options(parser):
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16; those below the ranks are left out")
    parser.add_argument("--samples", type=int, default=16, help="default 16")


def block_elements(model):
    """Elements of the first block's tensors, by the safetensors header."""
    with open(model / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, tensor in header.items():
        if ".layers.0." in name:
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
    return total


def planned_mib(bench, ranks, flags):
    """None where the program has no plan."""
    try:
        plan = json.loads(bench.run([bench.omniquant, "plan", "--json", "--model", bench.model, "--ranks", ranks, *flags])[0])
    except Failure:
        return None
    return plan["memory"]["rank_0_bytes"] / 2**20


def rows(bench, arguments):
    bench.need_model()
    has_plan = " plan " in bench.run([bench.omniquant, "--help"])[0]
    config = json.loads((bench.model / "config.json").read_text(encoding="utf-8"))
    for ranks in arguments.ranks:
        for batch in arguments.batch:
            if batch < ranks:
                continue
            flags = ["--wbits", 3, "--group-size", 64, "--batch", batch, "--samples", arguments.samples, "--seqlen", 512, "--sampling", "sequential", "--epochs", 1]
            peak = bench.calibrate(ranks, [*flags, "--blocks", "0:2"]).peak_mib
            limit = (2 * block_elements(bench.model) + 3 * arguments.samples / ranks * 512 * config["hidden_size"]) * 4 / 2**20
            row = {"ranks": ranks, "batch": batch, "peak_mib": peak, "limit_mib": limit, "over_limit_mib": peak - limit}
            yield {**row, "planned_mib": planned_mib(bench, ranks, flags)} if has_plan else row
