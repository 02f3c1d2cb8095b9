"""Exports in llama.cpp on CPU: size, memory, tokens a second reading a prompt and generating.

Every file is loaded in a process of its own and the files take turns, so that a change of the machine's load meets all of them. On a machine that
others use, `--threads 1 --clock cpu` counts the seconds that the process had instead of those that passed. Needs llama-cpp-python in `--python`.
"""

import os
import statistics
from pathlib import Path

from harness import Failure

SEPARATE = True
COLUMNS = {
    "file": "the name it was given",
    "mib": "of the file",
    "resident_mib": "the largest resident set of the process less what it had before it loaded the model; the median run",
    "prompt_tokens_s": "tokens a second reading the prompt; the median run",
    "generate_tokens_s": "tokens a second generating one by one; the median run",
    "x": "`generate_tokens_s` over the first file's",
    "limit_generate_tokens_s": "what memory would allow: a copy's speed on as many threads, `limit_copy_gb_s` of the case step, over the bytes of "
                               "the file",
}
LIMIT = "`limit_generate_tokens_s`: each token reads every weight once; files that a cache holds may go faster"


def options(parser):
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (256)")
    parser.add_argument("--generate", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds that passed, or that the process had")
    parser.add_argument("files", nargs="+", metavar="NAME=PATH", help="a GGUF file or a folder with model.gguf; the others are compared with the first")


def rows(bench, arguments):
    if not bench.has_module("llama_cpp"):
        raise Failure(f"{bench.python} has no llama_cpp; give --python FILE of one with llama-cpp-python")
    files = {}
    for given in arguments.files:
        name, _, path = given.partition("=")
        files[name] = Path(path) / "model.gguf" if Path(path).is_dir() else Path(path)
        if not files[name].is_file():
            raise Failure(f"{given}: is no NAME=FILE.gguf")
    words = [arguments.threads, arguments.prompt, arguments.generate, arguments.clock]
    runs = {name: [] for name in files}
    for _ in range(arguments.repeats):
        for name, path in files.items():
            runs[name].append(bench.run_json([bench.python, bench.source("llama_speed.py"), path, *words]))
    speed = bench.run_json([bench.program("bench/step"), "--steps", 1, "--threads", arguments.threads])["copy_gb_s"]
    first = None
    for name, path in files.items():
        memory, prompt, generate = (statistics.median(run[key] for run in runs[name]) for key in ("memory", "prompt", "generate"))
        first = first or generate
        yield {"file": name, "mib": path.stat().st_size / 2**20, "resident_mib": memory, "prompt_tokens_s": prompt, "generate_tokens_s": generate,
               "x": generate / first, "limit_generate_tokens_s": speed * 1e9 / path.stat().st_size}  # fmt: skip
