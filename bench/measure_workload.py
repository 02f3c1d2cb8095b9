#!/usr/bin/env python3
"""Makes the `workload` that bench/simulate.py reads, from short runs of omniquant calibrate on one rank of one thread.

Usage: measure_workload.py --model DIR --tokens FILE [--program FILE] [--epochs N] [--repeats N] [--json FILE] [FLAG-OF-CALIBRATE...]

Five kinds of run take turns, and of each the fastest counts. A block takes fixed + passes x samples x forward, and each step of it fixed-a-step and
its samples' seconds; runs without training on N and on 2 N samples give the forward pass, one epoch and more of them in steps of 1 the step, and the
same epochs in steps of N what of a step is fixed. Needs a model whose blocks are alike.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSES = 4  # target, and the losses rounded to nearest, at the start and at the end


def environment():
    return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMNIQUANT_PROGRESS": "lines"}


def run(command):
    done = subprocess.run([str(part) for part in command], env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def inspect(program, store):
    """What is stored; the last block's choice has to be the end of training, else there was another pass."""
    return json.loads(run([program, "inspect", "--json", store]))


def tensor_bytes(model, block):
    """Bytes of one block in the checkpoint, and (rows, columns) of its linear layers."""
    total, layers = 0, []
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            if f".layers.{block}." not in name:
                continue
            total += tensor["data_offsets"][1] - tensor["data_offsets"][0]
            if len(tensor["shape"]) == 2:
                layers.append(tensor["shape"])
    return total, layers


def gradient_bytes(layers, group):
    """Two clipping factors a group, and the loss, in fp32."""
    return 4 * (1 + sum(2 * rows * (-(-columns // group) if group else 1) for rows, columns in layers))


class Measurement:
    def __init__(self, options, flags):
        self.options, self.flags = options, flags
        self.best = {}

    def seconds(self, name, samples, batch, epochs):
        """Seconds of a block."""
        o = self.options
        with tempfile.TemporaryDirectory() as folder:
            run([o.program, "calibrate", "--model", o.model, "--tokens", o.tokens, "--output", f"{folder}/out", *self.flags, "--samples", samples,
                 "--batch", batch, "--epochs", epochs, "--backend", "cpu", "--threads", 1])  # fmt: skip
            found = inspect(o.program, f"{folder}/out")
            self.output_bytes = sum(path.stat().st_size for path in Path(folder).glob("out/blocks/*.h5")) / found["blocks_stored"]
        passes = sum(block["kept"] != "end" for block in found["blocks"]) if epochs else 0
        if passes:
            print(f"measure_workload.py: {name}: {passes} blocks took another pass, because training did not help them", file=sys.stderr)
        self.group, self.blocks = found["recipe"]["group_size"], found["blocks_stored"]
        return found["seconds"] / found["blocks_stored"]

    def take(self, name, *arguments):
        seconds = self.seconds(name, *arguments)
        self.best[name] = min(seconds, self.best.get(name, seconds))

    def workload(self):
        o, n, more = self.options, self.options.samples, self.options.epochs
        for _ in range(o.repeats):
            self.take("n samples", n, n, 0)
            self.take("2 n samples", 2 * n, n, 0)
            self.take("one epoch", n, 1, 1)
            self.take("small steps", n, 1, more)
            self.take("large steps", n, n, more)
        best = self.best
        forward = (best["2 n samples"] - best["n samples"]) / (2 * n)
        step = (best["small steps"] - best["one epoch"]) / ((more - 1) * n)
        fixed = (best["small steps"] - best["large steps"]) / (more * (n - 1))
        block_bytes, layers = tensor_bytes(o.model, 0)
        return {
            "blocks": self.blocks, "samples": n, "batch": o.batch, "steps_a_block": more * -(-n // o.batch),
            "fixed_seconds_a_step": fixed, "seconds_a_sample_step": step - fixed, "seconds_a_sample_forward": forward,
            "forward_passes_a_block": PASSES, "fixed_seconds_a_block": best["one epoch"] - n * (PASSES * forward + step),
            "block_bytes": block_bytes, "gradient_bytes": gradient_bytes(layers, self.group), "output_bytes_a_block": self.output_bytes,
        }  # fmt: skip


def measure(options, flags):
    workload = Measurement(options, flags).workload()
    bad = [name for name, value in workload.items() if value < 0]
    if bad:
        print(f"measure_workload.py: {', '.join(bad)} below zero: the runs are too short for this machine's noise", file=sys.stderr)
    return {name: max(0, value) for name, value in workload.items()}


def main():
    parser = argparse.ArgumentParser(description="Measure a workload for bench/simulate.py.", allow_abbrev=False)
    parser.add_argument("--program", default=ROOT / "build/omniquant")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="of the workload that is simulated")
    parser.add_argument("--epochs", type=int, default=5, help="at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options, flags = parser.parse_known_args()
    if options.epochs < 2 or options.samples < 2:
        parser.error("--epochs and --samples begin at 2")
    text = json.dumps({"workload": measure(options, flags)}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
