#!/usr/bin/env python3
"""Measures exports in llama.cpp on CPU: size, memory, tokens a second reading a prompt and generating. Prints a Markdown table.

Usage: deploy.py [--threads N] [--runs N] [--prompt N] [--generate N] [--clock wall|cpu] NAME=DIR_OR_FILE.gguf ...   the first is what the others are compared with

Every file is loaded in a process of its own and the files take turns, so that a change of the machine's load meets all of them. A figure is the
median over the runs. On a machine that others use, `--threads 1 --clock cpu` counts the seconds that the process had instead of those that passed. Memory is the largest resident set of the process less what the process had before it loaded the model. Needs llama-cpp-python.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def measure(path, arguments):
    """One run, in this process."""
    from llama_cpp import Llama

    def resident():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = resident()
    model = Llama(str(path), n_ctx=arguments.prompt + arguments.generate, n_batch=512, n_threads=arguments.threads,
                  n_threads_batch=arguments.threads, verbose=False)  # fmt: skip
    prompt = [5 + 7 * i % 1000 for i in range(arguments.prompt)]
    model.eval(prompt[:8])  # pages come in
    model.reset()
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    begin = clock()
    model.eval(prompt)
    read = clock()
    for i in range(arguments.generate):
        model.eval([5 + 11 * i % 1000])
    end = clock()
    return {"prompt": arguments.prompt / (read - begin), "generate": arguments.generate / (end - read), "memory": resident() - before}


def main():
    parser = argparse.ArgumentParser(description="Measure exports in llama.cpp on CPU.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=64, help="tokens to generate")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds that passed, or that the process had")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("models", nargs="+", metavar="NAME=PATH")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.models[0], arguments)))
        return
    models = {}
    for given in arguments.models:
        name, path = given.split("=", 1)
        models[name] = Path(path) / "model.gguf" if Path(path).is_dir() else Path(path)
    options = [f"--{key}={getattr(arguments, key)}" for key in ("threads", "prompt", "generate", "clock")]
    load, runs = os.getloadavg()[0], {name: [] for name in models}
    for _ in range(arguments.runs):
        for name, path in models.items():
            command = [sys.executable, __file__, "--one", *options, str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    first = None
    print(f"{arguments.threads} threads, prompt of {arguments.prompt} tokens, {arguments.generate} generated, median of {arguments.runs} runs, {arguments.clock} time; "
          f"load of the machine {load:.1f} before, {os.getloadavg()[0]:.1f} after\n")  # fmt: skip
    print("| file | MiB | resident MiB | prompt, tokens/s | generation, tokens/s | x |\n| --- | --- | --- | --- | --- | --- |")
    for name, path in models.items():
        row = {key: statistics.median(run[key] for run in runs[name]) for key in ("memory", "prompt", "generate")}
        first = first or row
        print(f"| {name} | {path.stat().st_size / 2**20:.0f} | {row['memory']:.0f} | {row['prompt']:.0f} | {row['generate']:.1f} | "
              f"{row['generate'] / first['generate']:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
