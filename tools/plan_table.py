#!/usr/bin/env python3
"""Prints what `omniquant plan` says of several models as a Markdown table.

Usage: plan_table.py [--program FILE] [--ranks N] MODEL... [-- FLAG-OF-PLAN...]   e.g. plan_table.py tests/plans/* -- --config R.yaml --gpu h100
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import json
import subprocess
from pathlib import Path

GIB = 2**30


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def main():
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[end + 1 :]
    parser = argparse.ArgumentParser(description="Print what `omniquant plan` says of several models.")
    parser.add_argument("--program", default="build/omniquant")
    parser.add_argument("--ranks", default="8")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    arguments = parser.parse_args(sys.argv[1:end])
    print("| model | parameters | a rank's device, GiB | of it streams | host of rank 0, GiB | output, GiB | gradients a step, MiB | a step, ms | "
          "of it products, attention, quantizer | a block, s | run | GPU hours | ranks worth having |")  # fmt: skip
    print("| --- " * 13 + "|")
    for model in arguments.models:
        command = [arguments.program, "plan", "--json", "--model", model, "--ranks", arguments.ranks, *flags]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if answer.returncode:
            sys.exit(answer.returncode)  # it has said why
        plan = json.loads(answer.stdout)
        memory, step = plan["memory_bytes"], plan["step_seconds"]
        shares = ", ".join(f"{100 * step[part] / step['sum']:.0f} %" for part in ("products", "attention", "quantizer"))
        print(f"| {Path(model).name} | {plan['parameters'] / 1e9:.1f}e9 | {memory['device'] / GIB:.1f} | {(memory['streams'] - memory['streams_on_host']) / GIB:.1f} | "
              f"{memory['host'] / GIB:.1f} | {plan['output_bytes'] / GIB:.1f} | {plan['gradient_bytes'] / 2**20:.0f} | {1e3 * step['sum']:.1f} | {shares} | "
              f"{plan['block_seconds']['sum']:.1f} | {duration(plan['run_seconds'])} | {plan['gpu_hours']:.2f} | {plan['useful_ranks']} |")  # fmt: skip


if __name__ == "__main__":
    main()
