"""Prints the table of quickstart.sh. Arguments, three a row: name, output of `eval --json`, output of `calibrate` or - for none."""
import json
import re
import sys

HEAD = ("", "perplexity", "bits a weight", "seconds", "peak MiB a rank")
SUMMARY = re.compile(r": \d+ blocks, ([\d.]+) bits a weight, ([\d.]+) s, peak memory (\d+) MiB a rank")


def row(name, evaluation, summary):
    """A row's cells: perplexity from the evaluation, the cost from the run that made the store."""
    with open(evaluation, encoding="utf-8") as file:
        perplexity = f"{json.load(file)['perplexity']:.2f}"
    if summary == "-":
        return name, perplexity, "16", "-", "-"
    with open(summary, encoding="utf-8") as file:
        return name, perplexity, *SUMMARY.search(file.read()).groups()


arguments = sys.argv[1:]
table = [HEAD] + [row(*arguments[i : i + 3]) for i in range(0, len(arguments), 3)]
widths = [max(map(len, column)) for column in zip(*table)]
for cells in table:
    print(cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])), sep="  ")
