#!/usr/bin/env python3
"""How long a calibration takes on P ranks, and what the seconds go into: a simulation of omniquant's own order of work.

Usage: simulate.py FILE... [--ranks 1,2,4,...] [--batch N] [--jitter CV] [--collective NAME] [--json FILE] [--plot FILE.svg] ...

The files are JSON objects with the members `workload` and `cluster`, together in one or each in its own (docs/scaling.md has every field); flags override
single values. Prints a table, one row a number of ranks. Only --plot needs matplotlib.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

WORKLOAD = ("blocks", "samples", "batch", "steps_a_block", "fixed_seconds_a_step", "seconds_a_sample_step", "seconds_a_sample_forward",
            "forward_passes_a_block", "fixed_seconds_a_block", "block_bytes", "gradient_bytes", "output_bytes_a_block")  # fmt: skip
CLUSTER = ("ranks_a_node", "latency_seconds", "bytes_a_second", "node_latency_seconds", "node_bytes_a_second", "read_bytes_a_second",
           "write_bytes_a_second")  # fmt: skip
NOT_EVERYWHERE = {"early_bytes": 0.0, "seconds_beside_early": 0.0}  # of the workload
DEFAULTS = {"handshake_bytes": 65536, "bytes_a_poll": 786432}  # of the cluster: Open MPI over TCP; docs/scaling.md

CAUSES = {
    "samples": "forward and backward passes of samples",
    "fixed": "work that every rank does whatever its samples",
    "all-reduce": "sums over the ranks, once all are there",
    "stragglers": "waiting for ranks that took longer for as much work",
    "idle": "waiting because others have more samples of a step (ranks beyond `batch` have none)",
    "stream": "waiting for a block's weights",
    "write": "waiting for stored blocks to be written",
}


class Cluster:
    """Costs of messages between ranks of a cluster."""

    def __init__(self, values, ranks):
        for name in CLUSTER:
            setattr(self, name, values[name])
        for name, value in DEFAULTS.items():
            setattr(self, name, values.get(name, value))
        self.ranks = ranks
        self.node = max(1, int(self.ranks_a_node))

    def same_node(self, a, b):
        return a // self.node == b // self.node

    def message(self, count, inside, sharing=1):
        """Seconds of `count` bytes one way. Those beyond the handshake's size ask first. `sharing`: messages on a node's link at once."""
        latency, rate = (self.node_latency_seconds, self.node_bytes_a_second) if inside else (self.latency_seconds, self.bytes_a_second)
        trips = 3 if count > self.handshake_bytes and not inside else 1
        return trips * latency + sharing * count / rate

    def broadcast(self, count):
        """Seconds of the wire's own for a block in the stream. Open MPI's MPI_Ibcast: rank 0 sends to each of up to 4 ranks by itself; more are a chain
        of segments of 32 KiB."""
        if self.ranks == 1:
            return 0.0
        if self.ranks <= 4:
            near = sum(self.same_node(0, rank) for rank in range(1, self.ranks))
            return near * count / self.node_bytes_a_second + (self.ranks - 1 - near) * count / self.bytes_a_second
        one_node = self.ranks <= self.node
        rate = self.node_bytes_a_second if one_node else min(self.node_bytes_a_second, self.bytes_a_second)
        hops = self.ranks - 1
        between = (self.ranks - 1) // self.node
        fill = (hops - between) * self.message(32768, True) + between * self.message(32768, False)
        return count / rate + fill


def rounds_of(times, whole, counts, cluster):
    """Rounds of exchanges with the rank at distance 1, 2, 4, ...: `counts`: (distance, bytes) of each. Ranks beyond a power of two give theirs away
    first, `whole` bytes, and have the sum last. Times of the ranks, in place; returns each rank's seconds of transfer."""
    size = len(times)
    power = 1 << (size.bit_length() - 1)
    spent = [0.0] * size
    sharing = min(cluster.node, power)
    extra = range(power, size)
    for rank in extra:
        meet(times, spent, rank, rank - power, cluster.message(whole, cluster.same_node(rank, rank - power), len(extra)))
    for distance, count in counts:
        inside, across = cluster.message(count, True), cluster.message(count, False, sharing)
        for rank in range(power):
            if not rank & distance:
                meet(times, spent, rank, rank + distance, inside if cluster.same_node(rank, rank + distance) else across)
    for rank in extra:
        meet(times, spent, rank, rank - power, cluster.message(whole, cluster.same_node(rank, rank - power), len(extra)))
    return spent


def distances(size):
    return [1 << i for i in range(size.bit_length() - 1)]


def doubling(times, count, cluster):
    """Recursive doubling, nearest ranks first, the whole message in each round."""
    return rounds_of(times, count, [(distance, count) for distance in distances(len(times))], cluster)


def halving(times, count, cluster):
    """The same tree of sums in shares: in each round partners exchange the halves of what they have and each sums one; then the shares go back the
    same way."""
    there = [(distance, count / distance / 2) for distance in distances(len(times))]
    return rounds_of(times, count, there + there[::-1], cluster)


def meet(times, spent, a, b, seconds):
    times[a] = times[b] = max(times[a], times[b]) + seconds
    spent[a] += seconds
    spent[b] += seconds


def together(times, seconds):
    """All ranks wait for the last and then take as long."""
    end = max(times) + seconds
    for rank in range(len(times)):
        times[rank] = end
    return [seconds] * len(times)


def ring(times, count, cluster):
    """The alternative without a fixed order: each rank sums a P-th of the values, in 2 (P - 1) rounds."""
    size = len(times)
    return together(times, 2 * (size - 1) * cluster.message(count / size, size <= cluster.node))


def tree(times, count, cluster):
    """The alternative of a binomial tree to rank 0 and back; between nodes one rank of each."""
    rounds = math.ceil(math.log2(len(times)))
    near = min(rounds, math.ceil(math.log2(cluster.node)))
    return together(times, 2 * (near * cluster.message(count, True) + (rounds - near) * cluster.message(count, False)))


def program(times, count, cluster):
    """world_allreduce: the same bits either way (mpi/tree.c)."""
    return (doubling if count < 4 * 4096 else halving)(times, count, cluster)


COLLECTIVES = {"program": program, "doubling": doubling, "halving": halving, "ring": ring, "tree": tree}


class Stream:
    """The next block, read by rank 0 and broadcast while this one is calibrated: moved on when a rank polls or waits in MPI."""

    def __init__(self, workload, cluster):
        self.bytes = workload["block_bytes"]
        self.cluster = cluster
        self.read_seconds = self.bytes / cluster.read_bytes_a_second
        self.wire = cluster.broadcast(self.bytes)

    def begin(self, now):
        self.ready, self.left = now + self.read_seconds, self.wire

    def compute(self, begin, end, polls):
        """Ranks compute from begin to end and poll now and then, each time for some of it."""
        most = polls * self.cluster.bytes_a_poll / self.bytes * self.wire
        self.left -= min(max(0.0, end - max(begin, self.ready)), most, self.left)

    def beside(self, begin, seconds):
        """Ranks move something else over the same links for so long: both get half while both have something. The seconds that this takes longer."""
        if self.ready > begin or self.left <= 0:
            return 0.0
        moved = min(seconds, self.left)
        self.left -= moved
        return moved

    def end(self, now):
        """All ranks wait for it."""
        return max(now, self.ready) + self.left


class Run:
    """One calibration on `ranks` ranks."""

    def __init__(self, workload, cluster, ranks, options):
        self.w, self.cluster, self.size = workload, Cluster(cluster, ranks), ranks
        self.random = random.Random(options.seed)
        self.sigma = math.sqrt(math.log(1 + options.jitter**2))
        self.pace = [1.0] * ranks
        if options.slow_rank:
            self.pace[-1] = options.slow_rank
        self.reduce = COLLECTIVES[options.collective]
        self.times = [0.0] * ranks
        self.spent = {cause: [0.0] * ranks for cause in CAUSES}
        batch = workload["batch"]
        self.slots = [(rank * batch // ranks, (rank + 1) * batch // ranks) for rank in range(ranks)]
        self.steps_an_epoch = -(-workload["samples"] // batch)
        self.owned = [sum(self.present(rank, step) for step in range(self.steps_an_epoch)) for rank in range(ranks)]

    def present(self, rank, step):
        """Samples that a rank has of a step; the last step of an epoch takes what is left."""
        left = self.w["samples"] - step * self.w["batch"]
        begin, end = self.slots[rank]
        return max(0, min(end, left) - begin)

    def add(self, cause, rank, seconds):
        self.spent[cause][rank] += seconds
        self.times[rank] += seconds

    def work(self, counts, sample_seconds, fixed_seconds):
        """Every rank computes its samples and what is fixed; the ranks are not together afterwards."""
        begin, most = max(self.times), max(counts)
        for rank in range(self.size):
            pace = self.pace[rank] * (self.random.lognormvariate(-self.sigma**2 / 2, self.sigma) if self.sigma else 1.0)
            self.add("samples", rank, counts[rank] * sample_seconds * pace)
            self.add("fixed", rank, fixed_seconds * pace)
        self.stream.compute(begin, max(self.times), most)
        return [(most - count) * sample_seconds for count in counts]

    def sum(self, count, fewer):
        """The ranks' sum; `fewer`: seconds that each had less to do than the busiest."""
        if self.size == 1:
            return
        before = list(self.times)
        transfer = self.reduce(self.times, count, self.cluster)
        longer = self.stream.beside(max(before), statistics.fmean(transfer)) if count > self.cluster.handshake_bytes else 0.0
        for rank in range(self.size):
            waited = self.times[rank] - before[rank] - transfer[rank]
            idle = min(max(0.0, waited), fewer[rank])
            self.spent["all-reduce"][rank] += transfer[rank] + longer
            self.spent["idle"][rank] += idle
            self.spent["stragglers"][rank] += waited - idle
            self.times[rank] += longer

    def sum_beside(self, count, seconds, fewer):
        """The sum of gradients that were there so long ago; what has not gone by since is waited for."""
        if self.size == 1 or not count:
            return
        before = [moment - seconds for moment in self.times]
        ends = list(before)
        transfer = self.reduce(ends, count, self.cluster)
        for rank in range(self.size):
            longer = max(0.0, ends[rank] - self.times[rank])
            waited = min(longer, max(0.0, ends[rank] - before[rank] - transfer[rank]))
            idle = min(waited, fewer[rank])
            fewer[rank] -= idle
            self.add("all-reduce", rank, longer - waited)
            self.add("idle", rank, idle)
            self.add("stragglers", rank, waited - idle)

    def wait_until(self, moment, cause):
        """All ranks, together."""
        for rank in range(self.size):
            if moment > self.times[rank]:
                self.add(cause, rank, moment - self.times[rank])

    def block(self, first, more):
        w = self.w
        nothing = [0.0] * self.size
        if first:
            self.stream.begin(0.0)
        self.sum(4, nothing)
        self.wait_until(self.stream.end(max(self.times)), "stream")
        if more:
            self.stream.begin(max(self.times))
        else:
            self.stream.ready = math.inf
        passes = max(1, round(w["forward_passes_a_block"]))
        each = w["forward_passes_a_block"] / passes
        for _ in range(passes):
            fewer = self.work(self.owned, each * w["seconds_a_sample_forward"], w["fixed_seconds_a_block"] / passes)
            self.sum(4 * w["samples"], fewer)
        for step in range(w["steps_a_block"]):
            self.sum(4, nothing)  # whether any rank is to stop
            fewer = self.work([self.present(rank, step % self.steps_an_epoch) for rank in range(self.size)], w["seconds_a_sample_step"],
                              w["fixed_seconds_a_step"])  # fmt: skip
            self.sum_beside(w["early_bytes"], w["seconds_beside_early"], fewer)
            self.sum(w["gradient_bytes"] - w["early_bytes"], fewer)
        self.sum(4, nothing)
        self.wait_until(self.written, "write")
        self.written = max(self.times) + w["output_bytes_a_block"] / self.cluster.write_bytes_a_second

    def simulate(self, most_blocks):
        """Seconds of the run, and by cause as a mean over the ranks. Blocks are alike: those beyond `most_blocks` take what the middle ones do."""
        self.stream = Stream(self.w, self.cluster)
        self.written = 0.0
        blocks = self.w["blocks"]
        simulated = min(blocks, max(3, most_blocks))
        marks = []
        for index in range(simulated):
            self.block(index == 0, index + 1 < simulated)
            marks.append({cause: statistics.fmean(values) for cause, values in self.spent.items()})
        self.wait_until(self.written, "write")
        causes = {cause: statistics.fmean(values) for cause, values in self.spent.items()}
        if blocks > simulated:
            for cause in CAUSES:
                middle = (marks[-2][cause] - marks[0][cause]) / (simulated - 2)
                causes[cause] += middle * (blocks - simulated)
        return sum(causes.values()), causes


def with_batch(workload, batch):
    """The same epochs in steps of another batch."""
    epochs = workload["steps_a_block"] / -(-workload["samples"] // workload["batch"])
    return {**workload, "batch": batch, "steps_a_block": round(epochs * -(-workload["samples"] // batch))}


def simulate(workload, cluster, ranks, options):
    """A row a number of ranks."""
    rows = []
    quiet = argparse.Namespace(**{**vars(options), "jitter": 0.0, "slow_rank": 0.0})
    alone, alone_causes = Run(workload, cluster, 1, quiet).simulate(options.simulated_blocks)
    for size in ranks:
        seconds, causes = Run(workload, cluster, size, options).simulate(options.simulated_blocks)
        row = {"ranks": size, "seconds": seconds, "speed-up": alone / seconds, "efficiency": alone / size / seconds}
        row.update(causes)
        row["losses"] = {cause: (causes[cause] - alone_causes[cause] / size) / seconds for cause in CAUSES}
        rows.append(row)
    return rows


# ---- input and output ----


def read_inputs(paths):
    merged = {}
    for path in paths:
        try:
            merged.update(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            sys.exit(f"simulate.py: {path}: {error}")
    for member, names in (("workload", WORKLOAD), ("cluster", CLUSTER)):
        values = merged.get(member)
        missing = [name for name in names if not isinstance(values, dict) or not isinstance(values.get(name), (int, float))]
        if missing:
            sys.exit(f"simulate.py: {', '.join(paths)}: {member}: no number for {', '.join(missing)}; docs/scaling.md says what they are")
    merged["workload"] = {**NOT_EVERYWHERE, **merged["workload"]}
    return merged


def print_table(rows):
    columns = ["ranks", "seconds", "speed-up", "efficiency", *CAUSES]
    print(" ".join(f"{column:>11}" for column in columns))
    for row in rows:
        print(" ".join(f"{row[column]:>11d}" if column == "ranks" else f"{row[column]:>11.4g}" for column in columns))


def plot(path, rows, title, caption):
    """What becomes of the ranks' time: efficiency and, above it, each loss."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "omniquant", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    colours = {"fixed": "#9aa7b1", "all-reduce": "#d1603d", "stragglers": "#e9b44c", "idle": "#7d5ba6", "stream": "#3c7d5f", "write": "#b08968",
               "samples": "#d9d9d9"}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 5))
    names = [str(row["ranks"]) for row in rows]
    bottom = [0.0] * len(rows)

    def bar(label, values, colour):
        axes.bar(names, values, 0.7, bottom, label=label, color=colour)
        bottom[:] = [b + v for b, v in zip(bottom, values)]

    bar("efficiency", [100 * row["efficiency"] for row in rows], "#2f5d8a")
    for cause in CAUSES:
        values = [max(0.0, 100 * row["losses"][cause]) for row in rows]
        if max(values) >= 0.5:
            bar(cause, values, colours[cause])
    for i, row in enumerate(rows):
        axes.text(i, 50 * row["efficiency"], f"{100 * row['efficiency']:.0f} %", ha="center", va="center", color="white", fontsize=8)
        hours = row["seconds"] / 3600
        axes.text(i, 101, f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min", ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("ranks (a GPU each)")
    axes.set_ylabel("share of the ranks' time, %")
    axes.set_ylim(0, 107)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.text(0.02, 0.01, caption, fontsize=7.5, va="bottom")
    figure.subplots_adjust(left=0.09, right=0.84, bottom=0.2 + 0.02 * caption.count("\n"), top=0.92)
    figure.savefig(path, metadata={"Date": None})


def parse():
    parser = argparse.ArgumentParser(description="Simulate a calibration on P ranks.", epilog="docs/scaling.md explains the model and its fields.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="JSON with the members workload and cluster, or one of them")
    parser.add_argument("--workload", action="append", default=[], metavar="FILE", help="the same")
    parser.add_argument("--cluster", action="append", default=[], metavar="FILE", help="the same")
    parser.add_argument("--ranks", help="numbers of ranks, with commas (default: 1, 2, 4, ... to the cluster's `ranks`)")
    parser.add_argument("--batch", type=int, help="samples of a step, with as many epochs")
    parser.add_argument("--ranks-a-node", type=int)
    parser.add_argument("--latency-seconds", type=float)
    parser.add_argument("--bytes-a-second", type=float)
    parser.add_argument("--jitter", type=float, default=0.0, help="coefficient of variation of a rank's seconds of work (log-normal)")
    parser.add_argument("--slow-rank", type=float, default=0.0, metavar="FACTOR", help="the last rank takes that many times as long")
    parser.add_argument("--collective", choices=COLLECTIVES, default="program", help="program: halving, and for short messages doubling, as omniquant does")
    parser.add_argument("--simulated-blocks", type=int, default=3, help="the others are taken to be alike (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--title", default="")
    parser.add_argument("--caption", default="", help="\\n begins a new line")
    options = parser.parse_args()
    options.paths = options.files + options.workload + options.cluster
    if not options.paths:
        parser.error("no FILE given")
    try:
        options.sizes = [int(text) for text in options.ranks.split(",")] if options.ranks else []
    except ValueError:
        parser.error(f"--ranks {options.ranks}: not numbers with commas")
    if min(options.sizes, default=1) < 1 or (options.batch is not None and options.batch < 1) or options.jitter < 0:
        parser.error("--ranks and --batch begin at 1, --jitter at 0")
    return options


def main():
    options = parse()
    inputs = read_inputs(options.paths)
    workload, cluster = inputs["workload"], inputs["cluster"]
    if options.batch:
        workload = with_batch(workload, options.batch)
    for name in ("ranks_a_node", "latency_seconds", "bytes_a_second"):
        if getattr(options, name) is not None:
            cluster = {**cluster, name: getattr(options, name)}
    sizes = options.sizes or [1 << i for i in range(max(1, int(cluster.get("ranks", 16))).bit_length())]
    rows = simulate(workload, cluster, sizes, options)
    print_table(rows)
    if options.json:
        result = {"workload": workload, "cluster": cluster, "jitter": options.jitter, "slow_rank": options.slow_rank,
                  "collective": options.collective, "rows": rows, "columns": CAUSES}  # fmt: skip
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(options.plot, rows, options.title or "simulated", options.caption.replace("\\n", "\n"))


if __name__ == "__main__":
    main()
