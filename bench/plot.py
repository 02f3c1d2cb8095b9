#!/usr/bin/env python3
"""Draws into docs/: scaling.svg and step.svg from the newest results of the cases scaling and step; scaling-7b.svg and scaling-70b.svg as
bench/simulate.py has them. Needs matplotlib."""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BLUE, RED, GREY = "#2f6f8f", "#b5533c", "#999999"
PARTS = {"products": "matrix products of linear layers", "attention": "attention", "quantizer": "quantizer", "activations": "activations", "norms": "norms"}
# The others are small, and drawn as one.
SIMULATED = {  # workload: title, ranks
    "llama-2-7b": ("LLaMA-2 7B, W3A16 g128, batch 64: simulated", "1,2,4,8,16,32,64"),
    "llama-2-70b": ("LLaMA-2 70B, W3A16 g128, batch 128: simulated", "8,16,32,64,128,256,512,1024"),
}
JITTER = 0.03
ASSUMED = (
    "Simulated, not measured: the work by `omniquant plan` at rates assumed of H100s (650 TFLOP/s, 2.85 TB/s), 8 a node,\\n"
    "300 GB/s within a node, 40 GB/s between nodes, read 2 GB/s, write 1 GB/s; seconds of work vary by 3 %."
)


def newest(folder, case):
    """The latest result of a case; None without any."""
    files = sorted(folder.glob(f"*-{case}.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def caption(result):
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {result['date'][:10]}, load {result['load'][0]} to {result['load'][1]}"


def save(figure, path):
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw_scaling(result, path):
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    for mode, color, marker in (("strong", BLUE, "o"), ("weak", RED, "s")):
        rows = sorted((row for row in result["rows"] if row["mode"] == mode), key=lambda row: row["ranks"])
        axes.plot([row["ranks"] for row in rows], [row["speedup"] for row in rows], color=color, marker=marker, label=f"{mode} scaling")
        for row in rows[1:]:
            at = (row["ranks"], row["speedup"])
            axes.annotate(f"{row['efficiency']:.0%}", at, textcoords="offset points", xytext=(4, -14), color=color, fontsize=9)
    ranks = sorted({row["ranks"] for row in result["rows"]})
    ideal = [max(row["ideal"] for row in result["rows"] if row["ranks"] == count) for count in ranks]
    axes.plot(ranks, ideal, color=GREY, linestyle="--", label="ideal")
    axes.set(xlabel="ranks, one thread each", ylabel="work a second, one rank = 1", xticks=ranks, ylim=(0, None))
    axes.legend(frameon=False)
    axes.set_title(caption(result), fontsize=8, color="#555555")
    save(figure, path)


def shares(rows):
    """Milliseconds of each part, and what they would be at the machine's limit."""
    spent, bound = defaultdict(float), defaultdict(float)
    for row in rows:
        part = PARTS.get(row["part"], "all else")
        spent[part] += row["ms"]
        bound[part] += row["limit_ms"] or 0
    return spent, bound


def draw_step(result, path):
    variants = [row["variant"] for row in result["rows"] if "step_ms" in row and row["variant"] != "pytorch"]
    parts = [*PARTS.values(), "all else"]
    colors = dict(zip(parts, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(figsize=(7.2, 0.6 + 0.8 * len(variants)))
    for i, variant in enumerate(variants):
        spent, bound = shares(row for row in result["rows"] if row["variant"] == variant and "part" in row)
        for values, height, offset, strength in ((spent, 0.42, -0.12, 1.0), (bound, 0.2, 0.25, 0.45)):
            left = 0.0
            for part in parts:
                label = part if i == 0 and values is spent and spent[part] else None
                axes.barh(i + offset, values[part], height, left, color=colors[part], alpha=strength, label=label)
                left += values[part]
        share = spent[PARTS["products"]] / sum(spent.values())
        axes.annotate(f"{share:.0%} products", (sum(spent.values()), i - 0.12), textcoords="offset points", xytext=(4, -3), fontsize=8)
    axes.set(xlabel="ms a step; below each, paler: at the machine's limit", yticks=range(len(variants)), yticklabels=variants)
    axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.35))
    axes.set_title(caption(result), fontsize=8, color="#555555")
    save(figure, path)


def draw_simulated(folder):
    for workload, (title, ranks) in SIMULATED.items():
        path = folder / f"scaling-{workload.rsplit('-', 1)[1]}.svg"
        subprocess.run([sys.executable, ROOT / "bench/simulate.py", ROOT / f"bench/workloads/{workload}.json", "--ranks", ranks, "--jitter", str(JITTER),
                        "--title", title, "--caption", ASSUMED, "--plot", path], check=True)  # fmt: skip
        print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="what bench/run.py --json wrote (bench/results)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="default docs")
    arguments = parser.parse_args()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "omniquant", "axes.spines.top": False, "axes.spines.right": False})
    for case, draw in (("scaling", draw_scaling), ("step", draw_step)):
        result = newest(arguments.results, case)
        if not result:
            print(f"plot.py: {arguments.results}: holds no result of {case}; run bench/run.py {case} --json {arguments.results}", file=sys.stderr)
            return 2
        draw(result, arguments.output / f"{case}.svg")
    draw_simulated(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
