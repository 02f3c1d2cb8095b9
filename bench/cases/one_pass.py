"""What several recipes in one pass save: two recipes, each in a run of its own and both in one pass.

W3 and W4 in groups of 64, batch 1, 16 sequential samples of 512 tokens, two blocks. More ranks than the batch can use form teams that
calibrate the recipes side by side.
"""

COLUMNS = {
    "ranks": "processes of one thread each",
    "read_seconds": "what reading a block is made to take longer (`OMNIQUANT_TEST_READ_SECONDS`): 0, as it is; else as from a slow file system",
    "epochs": "of both recipes",
    "two_runs_seconds": "the two whole runs together; of the repeats the fastest",
    "one_pass_seconds": "one whole run with both recipes; of the repeats the fastest",
    "ratio": "`one_pass_seconds` over `two_runs_seconds`",
    "limit": "on one rank that does not wait for reading, by counting passes of a sample, a backward pass as two: a run has 4 + 3 epochs (2 "
             "without epochs), of which the second recipe saves 1; elsewhere 1/2, since both recipes take no less than one",
}
LIMIT = "`limit`: what is shared is the reading and the full-precision stream, everything else is each recipe's own"


def options(parser):
    parser.add_argument("--ranks", type=int, default=2, help="of the runs with teams (2)")
    parser.add_argument("--repeats", type=int, default=2, help="default 2")


def limit_of(ranks, read, epochs):
    passes = 4 + 3 * epochs if epochs else 2
    return 0.5 if ranks > 1 or read else 1 - 1 / (2 * passes)


def rows(bench, arguments):
    configs = []
    for bits in (3, 4):
        configs.append(bench.folder / f"w{bits}.yaml")
        configs[-1].write_text(f"wbits: {bits}\ngroup_size: 64\n", encoding="utf-8")

    def seconds(ranks, read, epochs, *chosen):
        flags = [word for config in chosen for word in ("--config", config)]
        return bench.calibrate(ranks, [*flags, "--samples", 16, "--seqlen", 512, "--sampling", "sequential", "--epochs", epochs, "--blocks", "0:2"],
                               read_seconds=read).run_seconds  # fmt: skip

    kinds = [(1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 8, 1), (arguments.ranks, 0, 1), (arguments.ranks, 0, 2)]
    for ranks, read, epochs in kinds:
        two, one = [], []
        for _ in range(arguments.repeats):
            two.append(sum(seconds(ranks, read, epochs, config) for config in configs))
            one.append(seconds(ranks, read, epochs, *configs))
        two, one = min(two), min(one)
        yield {"ranks": ranks, "read_seconds": read, "epochs": epochs, "two_runs_seconds": two, "one_pass_seconds": one, "ratio": one / two,
               "limit": limit_of(ranks, read, epochs)}
