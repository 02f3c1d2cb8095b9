"""What more ranks bring: the same calibration on 1 and on more ranks of one thread each, on this machine.

Strong scaling divides one batch among the ranks; weak scaling gives each rank a batch of its own. Runs of all kinds take turns, so that a
machine whose speed drifts is fair to each, and the fastest of each counts. W3 in groups of 64, sequential samples of 512 tokens, 2 epochs.
"""

import os

COLUMNS = {
    "mode": "`strong`: the same batch and samples on all numbers of ranks; `weak`: as many times more of both as there are ranks",
    "ranks": "processes of one thread each",
    "batch": "samples a step, over all ranks",
    "blocks_seconds": "all blocks together, as the store tells them: from waiting for a block's weights to handing the block to the writer; the "
                      "fastest run",
    "run_seconds": "that whole run: with opening files, embedding and writing",
    "speedup": "work a second over that of one rank: strong, `blocks_seconds` of one rank over these; weak, that times the ranks",
    "ideal": "the limit: ranks, but no more than the batch has samples or the machine cores",
    "efficiency": "`speedup` over `ranks`",
}
LIMIT = ("`ideal`, if nothing but the samples' own work were done; quantizing the weights and the optimizer's step are done on every rank "
         "whatever its samples, the sum over ranks moves the gradients once a step, and ranks share the machine's memory bandwidth")


def options(parser):
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2; more than the cores take turns on them")
    parser.add_argument("--batch", type=int, default=4, help="samples a step on one rank (4)")
    parser.add_argument("--steps", type=int, default=4, help="steps an epoch (4)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model (4)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")


def rows(bench, arguments):
    every = sorted({1, *arguments.ranks})
    kinds = [(mode, ranks, arguments.batch * (ranks if mode == "weak" else 1)) for mode in ("strong", "weak") for ranks in every]
    best = {}
    for _ in range(arguments.repeats):
        for kind in kinds:
            _, ranks, batch = kind
            if kind == ("weak", 1, arguments.batch):
                continue  # the same run as strong on one rank
            run = bench.calibrate(ranks, ["--wbits", 3, "--group-size", 64, "--batch", batch, "--samples", batch * arguments.steps, "--seqlen", 512,
                                          "--sampling", "sequential", "--epochs", 2, "--blocks", f"0:{arguments.blocks}"])  # fmt: skip
            if kind not in best or run.blocks_seconds < best[kind].blocks_seconds:
                best[kind] = run
    one = best["weak", 1, arguments.batch] = best["strong", 1, arguments.batch]
    for kind in kinds:
        mode, ranks, batch = kind
        speedup = one.blocks_seconds / best[kind].blocks_seconds * (ranks if mode == "weak" else 1)
        yield {"mode": mode, "ranks": ranks, "batch": batch, "blocks_seconds": best[kind].blocks_seconds, "run_seconds": best[kind].run_seconds,
               "speedup": speedup, "ideal": min(ranks, batch, len(os.sched_getaffinity(0))), "efficiency": speedup / ranks}
