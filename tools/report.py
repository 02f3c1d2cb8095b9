#!/usr/bin/env python3
"""Makes one self-contained HTML page of what calibrate stored: losses of each block, distributions of scales and clipping, bits a weight, sizes,
and where the time went, by phase and rank. Readable without having seen the run, and without a network.
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import html
import json
import os
import secrets
from pathlib import Path

try:
    import h5py
    import numpy as np
except ImportError as error:
    print(f"report.py: {error}; install what tools/requirements.txt lists: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

WIDTH, HEIGHT, MARGIN = 860, 240, 48
COLORS = ("#b5533c", "#c9a227", "#2f6f8f")
PHASE_COLORS = ("#9aa5ad", "#2f6f8f", "#6fa8a0", "#b5533c", "#c9a227", "#7d5a8c", "#dcdfe2", "#444444")
PHASES = {"wait": "waiting for the block's weights, which the first rank reads", "target": "unpacking them; what the block computes in full precision",
          "start": "the first clipping factors and transformation", "steps": "training", "measure": "what the quantized block computes, and its losses",
          "store": "packing, and writing the block before", "ranks": "sums over ranks, and waiting for slower ranks"}  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1,h2{line-height:1.2}h2{margin-top:2.2rem}table{border-collapse:collapse;font-size:14px}td,th{padding:.15rem .7rem;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}svg text{font-size:12px;fill:#444}
.note{color:#555}.key span{margin-right:1.2rem}.key b{display:inline-block;width:.8em;height:.8em;margin-right:.3em}"""


class Failure(Exception):
    """What went wrong, in one line with its mend."""


# ---- reading ----


def summarize_layer(name, group, calibration):
    bits, size, columns = (int(group.attrs[key]) for key in ("bits", "group_size", "in_features"))
    scale, zero = group["scale"][:].astype(np.float64), group["zero_point"][:]
    factors = {}
    for end, learned, logit in (("high", "f_hi", "gamma"), ("low", "f_lo", "beta")):
        if f"{name}/{learned}" in calibration:
            factors[end] = calibration[f"{name}/{learned}"][:].ravel()
        elif f"{name}/{logit}" in calibration:
            factors[end] = 1 / (1 + np.exp(-calibration[f"{name}/{logit}"][:].ravel()))
    return {"name": name, "weights": scale.shape[0] * columns, "bits": bits, "group_size": size, "bytes": group["codes"].size + 3 * scale.size,
            "scale": scale.ravel(), "zero": zero.ravel(), "factors": factors}  # fmt: skip


def summarize_block(number, block):
    layers, calibration = [], block["calibration"] if "calibration" in block else {}

    def take(name, item):
        if isinstance(item, h5py.Group) and not name.startswith("calibration") and "codes" in item:
            layers.append(summarize_layer(name, item, calibration))

    block.visititems(take)
    losses = {key: float(block.attrs[f"loss_{key}"]) for key in ("rtn", "start", "end")}
    epochs = calibration["loss"][:].tolist() if "loss" in calibration else []
    times = None
    if "timing" in block:
        times = {"phases": block["timing"].attrs["phases"].decode().split(","), "seconds": block["timing"][:].astype(np.float64)}
    return {"index": int(number), "times": times, "loss": losses, "kept": block.attrs["kept"].decode(), "seconds": float(block.attrs["seconds"]),
            "ranks": int(block.attrs["world_size"]), "skipped": int(block.attrs["skipped_steps"]), "layers": layers, "epochs": epochs}  # fmt: skip


def read_store(folder):
    path = folder / "omniquant.h5"
    if not path.is_file():
        raise Failure(f"{path}: not there; name the folder that calibrate made")
    with h5py.File(path) as store:
        if "format" not in store.attrs or store.attrs["format"].decode() != "omniquant":
            raise Failure(f"{folder}/omniquant.h5: not a store of omniquant; name the folder that calibrate made")
        blocks = [summarize_block(number, block) for number, block in store["blocks"].items()] if "blocks" in store else []
        if not blocks:
            raise Failure(f"{folder}: no block is stored yet; let calibrate get through one")
        return {"model": store.attrs["model_type"].decode(), "recipe": json.loads(store.attrs["recipe"]), "of": int(store.attrs["blocks"]),
                "tokens": store.attrs["tokens_sha256"].decode(), "blocks": blocks}  # fmt: skip


# ---- drawing ----


def ticks(low, high, logarithmic):
    if logarithmic:
        return [10.0**k for k in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1)] or [low, high]
    return list(np.linspace(low, high, 5))


def number(value):
    return "–" if value is None or not np.isfinite(value) else f"{value:.4g}"


def frame(low, high, logarithmic, labels):
    """Axes, and a function from a value to its height."""

    def height(value):
        share = np.log(value / low) / np.log(high / low) if logarithmic else (value - low) / (high - low)
        return HEIGHT - MARGIN / 2 - share * (HEIGHT - MARGIN)

    lines = [f'<line x1="{MARGIN}" x2="{WIDTH}" y1="{height(t):.1f}" y2="{height(t):.1f}" stroke="#e4e4e4"/>'
             f'<text x="{MARGIN - 6}" y="{height(t) + 4:.1f}" text-anchor="end">{t:.3g}</text>' for t in ticks(low, high, logarithmic)]  # fmt: skip
    lines += [f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{text}</text>' for x, text in labels]
    return lines, height


def position(i, count):
    return MARGIN + (i + 0.5) * (WIDTH - MARGIN) / count


def block_labels(blocks):
    step = max(1, len(blocks) // 16)
    return [(position(i, len(blocks)), block["index"]) for i, block in enumerate(blocks) if i % step == 0]


def draw_lines(blocks, series, logarithmic):
    """series: (name, values by block; None where not measured). A dot stands for each value."""
    known = [value for _, values in series for value in values if value is not None and np.isfinite(value) and (value > 0 or not logarithmic)]
    if not known:
        return '<p class="note">Not measured.</p>'
    low, high = min(known), max(known)
    low, high = (low / 1.2, high * 1.2) if logarithmic else (min(0.0, low), high * 1.05 or 1.0)
    shapes, height = frame(low, high, logarithmic, block_labels(blocks))
    for (_, values), color in zip(series, COLORS):
        points = [(position(i, len(values)), height(v)) for i, v in enumerate(values) if v is not None and np.isfinite(v) and (v > 0 or not logarithmic)]
        shapes.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in points]
    key = "".join(f'<span><b style="background:{color}"></b>{name}</span>' for (name, _), color in zip(series, COLORS))
    return f'<p class="key">{key}</p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def draw_spread(blocks, values):
    """Of each block's values the range from 1 % to 99 %, the middle half, and the median."""
    quantiles = [np.quantile(v, (0.01, 0.25, 0.5, 0.75, 0.99)) if v is not None and v.size else None for v in values]
    known = [q for q in quantiles if q is not None]
    if not known:
        return '<p class="note">Not learned in this run.</p>'
    low, high = min(q[0] for q in known), max(q[4] for q in known)
    logarithmic = low > 0 and high > 8 * low
    low, high = (low / 1.1, high * 1.1) if logarithmic else (low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    shapes, height = frame(low, high, logarithmic, block_labels(blocks))
    half = min(10.0, (WIDTH - MARGIN) / len(blocks) / 3)
    for i, q in enumerate(quantiles):
        if q is None:
            continue
        x, y = position(i, len(quantiles)), [height(v) for v in q]
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y[0]:.1f}" y2="{y[4]:.1f}" stroke="{COLORS[2]}"/>'
                      f'<rect x="{x - half:.1f}" y="{y[3]:.1f}" width="{2 * half:.1f}" height="{max(0.5, y[1] - y[3]):.1f}" fill="#a9cbd9"/>'
                      f'<line x1="{x - half:.1f}" x2="{x + half:.1f}" y1="{y[2]:.1f}" y2="{y[2]:.1f}" stroke="{COLORS[0]}" stroke-width="2"/>')  # fmt: skip
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def draw_times(columns, labels, phases):
    """columns: seconds of each phase, stacked; labels: what stands below them, (place, text)."""
    shapes, height = frame(0.0, 1.05 * max(float(column.sum()) for column in columns) or 1.0, False, labels)
    half = min(24.0, (WIDTH - MARGIN) / len(columns) / 2.6)
    for i, column in enumerate(columns):
        below = 0.0
        for seconds, phase, color in zip(column, phases, PHASE_COLORS * len(phases)):
            x, top, bottom = position(i, len(columns)) - half, height(below + seconds), height(below)
            shapes.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{2 * half:.1f}" height="{max(0.0, bottom - top):.1f}" fill="{color}">'
                          f'<title>{html.escape(phase)}: {seconds:.3g} s</title></rect>')  # fmt: skip
            below += seconds
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


# ---- the page ----


def join(arrays):
    arrays = list(arrays)
    return np.concatenate(arrays) if arrays else None


def table(heads, rows):
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def totals(store):
    layers = [layer for block in store["blocks"] for layer in block["layers"]]
    weights, stored = sum(layer["weights"] for layer in layers), sum(layer["bytes"] for layer in layers)
    seconds = sum(block["seconds"] for block in store["blocks"])
    return table(("what", "value"), [
        ("model", store["model"]), ("blocks stored", f'{len(store["blocks"])} of {store["of"]}'), ("quantized weights", f"{weights:,}"),
        ("bits a weight, scales and zero points included", f"{8 * stored / weights:.4f}"), ("their size", f"{stored / 2**20:.1f} MiB"),
        ("the same in 16 bits", f"{2 * weights / 2**20:.1f} MiB"), ("time", f"{seconds:.1f} s on {store['blocks'][0]['ranks']} ranks"),
        ("calibration tokens", f"SHA-256 {store['tokens'][:16]}…" if store["tokens"] else "none")])  # fmt: skip


def block_table(blocks):
    rows = [(b["index"], *(number(b["loss"][key]) for key in ("rtn", "start", "end")), b["kept"],
             f'{100 * (1 - b["loss"][b["kept"]] / b["loss"]["rtn"]):.1f} %' if b["loss"]["rtn"] > 0 else "–", b["skipped"],
             number(b["seconds"])) for b in blocks]  # fmt: skip
    return table(("block", "rounded to nearest", "before training", "after training", "kept", "less loss than rounding", "steps skipped", "seconds"), rows)


def layer_table(blocks):
    kinds = {}
    for block in blocks:
        for layer in block["layers"]:
            kinds.setdefault(layer["name"], []).append(layer)
    rows = []
    for name, layers in kinds.items():
        scale, clipped = join(layer["scale"] for layer in layers), join(f for layer in layers for f in layer["factors"].values())
        weights, stored = sum(layer["weights"] for layer in layers), sum(layer["bytes"] for layer in layers)
        rows.append((name, f"{8 * stored / weights:.3f}", number(float(np.median(scale))), number(float(scale.max())),
                     number(float(np.mean(clipped))) if clipped is not None else "–", f"{join(layer['zero'] for layer in layers).mean():.2f}"))  # fmt: skip
    return table(("layer", "bits a weight", "median scale", "largest scale", "mean clipping factor", "mean zero point"), rows)


def time_section(blocks):
    """Where the time went, of the blocks that as many ranks as the last one calibrated."""
    last = next((b["times"] for b in reversed(blocks) if b["times"]), None)
    if not last:
        return '<p class="note">This store does not say where the time went.</p>'
    timed = [b for b in blocks if b["times"] and b["times"]["phases"] == last["phases"] and b["times"]["seconds"].shape == last["seconds"].shape]
    phases, ranks = last["phases"], sum(b["times"]["seconds"] for b in timed)
    rows = [(phase, PHASES.get(phase, ""), number(column.mean()), f"{100 * column.mean() / max(ranks.sum(1).mean(), 1e-30):.1f} %",
             f"{number(column.min())} (rank {column.argmin()})", f"{number(column.max())} (rank {column.argmax()})")
            for phase, column in zip(phases, ranks.T)]  # fmt: skip
    key = "".join(f'<span><b style="background:{color}"></b>{html.escape(phase)}</span>' for phase, color in zip(phases, PHASE_COLORS * len(phases)))
    step = max(1, len(ranks) // 16)
    return f"""<p class="note">A rank is one process of the run. Of {len(timed)} blocks by {len(ranks)} ranks; every moment of a rank is in one phase.</p>
{table(("phase", "what", "seconds, mean of ranks", "share", "least", "most"), rows)}
<h3>Each block</h3><p class="note">Seconds, mean of its ranks.</p><p class="key">{key}</p>
{draw_times([b["times"]["seconds"].mean(0) for b in timed], block_labels(timed), phases)}
<h3>Each rank</h3><p class="note">Seconds, over these blocks. Ranks are in step: the one with least of <i>ranks</i> is the one that the others waited for.</p>
<p class="key">{key}</p>
{draw_times(list(ranks), [(position(i, len(ranks)), f"rank {i}") for i in range(0, len(ranks), step)], phases)}"""


def page(store, name):
    blocks, recipe = store["blocks"], store["recipe"]
    losses = [(title, [block["loss"][key] for block in blocks])
              for key, title in (("rtn", "rounded to nearest"), ("start", "before training"), ("end", "after training"))]  # fmt: skip
    epochs = [("first epoch", [b["epochs"][0] if b["epochs"] else None for b in blocks]),
              ("last epoch", [b["epochs"][-1] if b["epochs"] else None for b in blocks])]  # fmt: skip
    scales = [join(layer["scale"] for layer in block["layers"]) for block in blocks]
    factors = [join(f for layer in block["layers"] for f in layer["factors"].values()) for block in blocks]
    spread = '<p class="note">Of each block: 1 % to 99 % (line), the middle half (box), the median (red).</p>'
    settings = table(("setting", "value"), [(key, json.dumps(value)) for key, value in recipe.items()])
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title><style>{STYLE}</style>
<h1>{html.escape(name)}</h1>
<p>A language model's weights were rounded to {recipe.get("wbits", "?")} bits, block by block. For each block its output was compared with the full-precision
block's on calibration text: the loss is the mean square of the difference. Lower is better; what was best is what was kept.</p>
{totals(store)}
<h2>Loss of each block</h2>
<p class="note">On all calibration samples, logarithmic. Blocks of one model differ by orders of magnitude: compare the lines, not the blocks.</p>
{draw_lines(blocks, losses, True)}
<details><summary>As a table</summary>{block_table(blocks)}</details>
<h2>Training loss</h2>{draw_lines(blocks, epochs, True)}
<h2>Clipping factors</h2>
<p class="note">What part of each group's range the codes cover: 1 is all of it, less gives finer steps and clips the largest weights.</p>{spread}
{draw_spread(blocks, factors)}
<h2>Scales</h2><p class="note">The step from one code to the next.</p>{spread}{draw_spread(blocks, scales)}
<h2>Layers</h2>{layer_table(blocks)}
<h2>Time</h2><p class="note">Seconds a block; all ranks work on the same block.</p>{draw_lines(blocks, [("seconds", [b["seconds"] for b in blocks])], False)}
{time_section(blocks)}
<h2>Recipe</h2>{settings}
</html>
"""


def main():
    parser = argparse.ArgumentParser(description="Make one HTML page of what calibrate stored.")
    parser.add_argument("store", type=Path, metavar="OUT", help="folder that calibrate made")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="page to write, over an old one")
    arguments = parser.parse_args()
    output = arguments.output
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.part")
    try:
        text = page(read_store(arguments.store), arguments.store.resolve().name)
        try:
            temporary.touch(exist_ok=False)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
        return 0
    except Failure as failure:
        print(f"report.py: {failure}", file=sys.stderr)
    except OSError as error:
        print(f"report.py: {error.filename or arguments.store}: {error.strerror or error}; check the path and its permissions", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
