"""Blocks from rank 0's file to every rank: gigabytes a second read and broadcast, and how much of a slow reader is hidden.

First `bench/stream.c`: blocks of the model are read, broadcast, and passed through the block stream as a run does, without work in between.
Then whole calibrations where reading a block is made to take half, as long and twice as long as calibrating it: while block i is calibrated
block i + 1 is read. W3 in groups of 64, batch 4, 8 sequential samples of 256 tokens, 4 epochs, one thread a rank.
"""

COLUMNS = {
    "ranks": "processes of one thread each",
    "block_mib": "bytes of a block in the checkpoint's type, as it is read and sent",
    "read_gb_s": "block bytes over seconds of reading by rank 0, values checked to be finite: of pages in memory where the machine keeps them, "
                 "since the files were read before; the median block",
    "broadcast_gb_s": "block bytes over seconds until every rank has a block by `world_broadcast`; the median block",
    "stream_gb_s": "block bytes over seconds from one block to the next in the block stream: read by rank 0's thread, sent in pieces, no work in "
                   "between; the median block",
    "limit_gb_s": "bytes a second of a copy of a block within rank 0's memory: reading copies once, a broadcast on one machine at least once for "
                  "each other rank",
    "read_seconds": "what the reader is made to sleep for each block",
    "reading_seconds": "a run that only rounds to nearest, with that reader: nearly all of it is reading",
    "calibrating_seconds": "a run that trains, with a reader that does not sleep",
    "both_seconds": "a run that trains, with that reader",
    "limit_seconds": "the longer of reading and calibrating, and one block of the other, which nothing can hide",
    "over_limit": "`both_seconds` over `limit_seconds`",
    "hidden": "the fraction of the shorter that is hidden: (reading + calibrating - both) over the smaller of reading and calibrating",
    "limit_hidden": "blocks but one over blocks",
}
LIMIT = ("`limit_gb_s`, memory's own speed; of the runs `limit_seconds` and `limit_hidden`: the first block cannot be calibrated before it is "
         "read, nor the last be read while it is calibrated")


def options(parser):
    parser.add_argument("--stream-ranks", type=int, nargs="+", default=[1, 2, 4], help="of the transfers (1 2 4)")
    parser.add_argument("--ranks", type=int, default=2, help="of the runs (2)")
    parser.add_argument("--blocks", type=int, default=6, help="of the runs (6)")
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 1, 2], help="reading over calibrating (0.5 1 2)")


def rows(bench, arguments):
    bench.need_model()
    for ranks in arguments.stream_ranks:
        yield bench.run_json(bench.mpirun(ranks, [bench.program("bench/stream"), bench.model]))
    flags = ["--wbits", 3, "--group-size", 64, "--batch", 4, "--blocks", f"0:{arguments.blocks}", "--samples", 8, "--seqlen", 256,
             "--sampling", "sequential"]  # fmt: skip
    calibrating = bench.calibrate(arguments.ranks, [*flags, "--epochs", 4]).run_seconds if arguments.factors else 0
    for factor in arguments.factors:
        read = factor * calibrating / arguments.blocks
        reading = bench.calibrate(arguments.ranks, [*flags, "--epochs", 0], read_seconds=read).run_seconds
        both = bench.calibrate(arguments.ranks, [*flags, "--epochs", 4], read_seconds=read).run_seconds
        shorter, longer = sorted((reading, calibrating))
        limit = longer + shorter / arguments.blocks
        yield {"ranks": arguments.ranks, "read_seconds": read, "reading_seconds": reading, "calibrating_seconds": calibrating, "both_seconds": both,
               "limit_seconds": limit, "over_limit": both / limit, "hidden": (reading + calibrating - both) / shorter,
               "limit_hidden": 1 - 1 / arguments.blocks}  # fmt: skip
