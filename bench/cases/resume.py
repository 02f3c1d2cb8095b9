"""What it costs to take a run up again: blocks are calibrated, then the same run is asked for one more, and replays them.

The paper's recipe for W3A16 in groups of 64, with 16 sequential samples of 512 tokens. Replaying sends both streams of hidden states once
through each block; calibrating does so four times and three times more an epoch.
"""

import re

from harness import Failure

COLUMNS = {
    "ranks": "processes of one thread each",
    "epochs": "of the recipe",
    "calibrated_seconds": "the blocks, when they were calibrated",
    "replayed_seconds": "the same blocks, when the run was taken up again, by the run's own clock",
    "share": "`replayed_seconds` over `calibrated_seconds`",
    "limit": "the share by counting passes of a sample, a backward pass as two: 2 over 4 + 3 epochs",
}
LIMIT = ("`limit`: replaying cannot do with fewer than the two forward passes of the streams; it has no backward pass, quantizer or sum over "
         "ranks, so that a share below it is possible")


def options(parser):
    parser.add_argument("--ranks", type=int, default=1, help="default 1")
    parser.add_argument("--epochs", type=int, default=20, help="default 20, the paper's")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are replayed (4)")


def rows(bench, arguments):
    flags = ["--wbits", 3, "--group-size", 64, "--samples", 16, "--seqlen", 512, "--sampling", "sequential", "--epochs", arguments.epochs]
    store = bench.folder / "resumed"
    calibrated = bench.calibrate(arguments.ranks, [*flags, "--blocks", f"0:{arguments.blocks}"], store).blocks_seconds
    log = bench.calibrate(arguments.ranks, [*flags, "--blocks", f"0:{arguments.blocks + 1}"], store).log
    told = re.search(r"^blocks .* passed through in ([0-9.]+) s$", log, re.MULTILINE)
    if not told:
        raise Failure("calibrate did not say how long it took to pass through the stored blocks")
    replayed = float(told.group(1))
    yield {"ranks": arguments.ranks, "epochs": arguments.epochs, "calibrated_seconds": calibrated, "replayed_seconds": replayed,
           "share": replayed / calibrated, "limit": 2 / (4 + 3 * arguments.epochs)}
