"""What sums that do not depend on the number of ranks cost: the ordered tree of `world_allreduce` beside `MPI_Allreduce`, which may add in any order.

`bench/allreduce.c`, on host memory of one machine. Sizes: what a step sums over the ranks, the gradients of gamma and beta of all groups of a
block and the loss.
"""

COLUMNS = {
    "size": "whose gradients: model and group",
    "ranks": "processes; more than the cores take turns on them",
    "mib": "of the floats that are summed",
    "tree_seconds": "`world_allreduce`, until all ranks have the sum; the median of 9",
    "mpi_seconds": "`MPI_Allreduce`, in place, of the MPI library; the median of 9",
    "ratio": "`tree_seconds` over `mpi_seconds`: what determinism costs",
    "tree_gb_s": "bytes summed over `tree_seconds` (not what goes over the wires: the algorithm's speed)",
    "mpi_gb_s": "the same of `mpi_seconds`",
    "limit_gb_s": "the same of an allreduce that sends no byte too much, 2 (ranks - 1) / ranks of them from each rank, at the speed of an "
                  "exchange of the whole message between two neighbours, both ways at once, that was measured beside it",
}
LIMIT = ("`limit_gb_s`: each rank has to send 2 (ranks - 1) / ranks of the bytes, which the tree does, in halves, quarters, ... to one partner "
         "after the other")

SIZES = {  # floats: 2 * weights of a block / group, and the loss
    "SmolLM2-135M g64": 2 * 3_538_944 // 64 + 1,
    "LLaMA-2-7B g128": 2 * 202_375_168 // 128 + 1,
    "LLaMA-2-70B g128": 2 * 855_638_016 // 128 + 1,
}


def options(parser):
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--floats", type=int, nargs="*", help="sizes in place of the models'")


def rows(bench, arguments):
    sizes = {f"{count} floats": count for count in arguments.floats} if arguments.floats else SIZES
    for ranks in arguments.ranks:
        for size, count in sizes.items():
            yield {"size": size, **bench.run_json(bench.mpirun(ranks, [bench.program("bench/allreduce"), count]))}
