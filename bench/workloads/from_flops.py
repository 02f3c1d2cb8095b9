#!/usr/bin/env python3
"""Provisional workloads for bench/simulate.py, from arithmetic: what a calibration of a LLaMA would take on GPUs of given rates. `omniquant plan --json`
counts the program's own operations instead.

Usage: from_flops.py SHAPE.json BLOCKS [--group N] [--seqlen N] [--samples N] [--batch N] [--epochs N] [--flops RATE] [--memory RATE] ...
"""

import argparse
import json
from pathlib import Path


def workload(shape, o):
    hidden, ffn, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    weights = hidden * (2 * hidden + 2 * hidden * shape["num_key_value_heads"] // heads + 3 * ffn)
    factors = 2 * weights // o.group
    forward_flops = 2 * weights * o.seqlen + 4 * o.seqlen**2 * hidden  # linear layers; scores and their products with values, not halved
    forward = forward_flops / o.flops
    # A weight's gradient is written, and read with the weight for those of its factors: 12 bytes.
    step = 3 * forward + 12 * weights / o.memory
    # Weights are read and written quantized (8 bytes); AdamW reads and writes a factor, its parameter and two moments beside the gradient (32 bytes).
    fixed_step = (8 * weights + 32 * factors) / o.memory
    # Weights come to the device (2 bytes) and are converted; the losses' three quantizations; rank 0 packs a byte a weight.
    fixed_block = 2 * weights / o.upload + 34 * weights / o.memory + weights / o.packing
    return {
        "blocks": o.blocks, "samples": o.samples, "batch": o.batch, "steps_a_block": o.epochs * -(-o.samples // o.batch),
        "fixed_seconds_a_step": fixed_step, "seconds_a_sample_step": step, "seconds_a_sample_forward": forward, "forward_passes_a_block": 4,
        "fixed_seconds_a_block": fixed_block, "block_bytes": 2 * (weights + 2 * hidden), "gradient_bytes": 4 * (factors + 1),
        "output_bytes_a_block": weights * o.bits // 8 + 3 * factors // 2,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="A workload from arithmetic.")
    parser.add_argument("shape", type=Path)
    parser.add_argument("blocks", type=int)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--flops", type=float, default=2e14, help="a second, of matrix products as they come")
    parser.add_argument("--memory", type=float, default=2e12, help="bytes a second of the device's memory")
    parser.add_argument("--upload", type=float, default=2e10, help="bytes a second to the device")
    parser.add_argument("--packing", type=float, default=1e9, help="weights a second that rank 0 packs")
    o = parser.parse_args()
    assumed = {name: getattr(o, name) for name in ("group", "bits", "seqlen", "epochs", "flops", "memory", "upload", "packing")}
    print(json.dumps({"provisional": "from_flops.py; not measured", "assumed": assumed, "workload": workload(json.loads(o.shape.read_text()), o)},
                     indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
