#!/usr/bin/env python3
"""Runs benchmarks: each a file in bench/cases/ that says what its columns mean and what bounds its figures (bench/README.md).

A case prints its table, and with --json DIR leaves DIR/DATE-CASE.json and .txt. What stands behind -- goes to the case (-- --help).
"""

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from harness import ROOT, Bench, Failure

CASES = Path(__file__).resolve().parent / "cases"


def load_case(name):
    """The module: its documentation, COLUMNS, LIMIT, optionally SEPARATE and options(parser), and rows(bench, arguments)."""
    path = CASES / f"{name}.py"
    if not path.is_file():
        raise Failure(f"there is no such case; there are {' '.join(case_names())}")
    spec = importlib.util.spec_from_file_location(f"case_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case_names():
    return sorted(path.stem for path in CASES.glob("*.py"))


def is_separate(name):
    return getattr(load_case(name), "SEPARATE", False)


# ---- the machine ----


def first_match(path, pattern):
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found else None


def output_of(*command):
    """The first line that a command prints; None without the command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def machine():
    memory = first_match("/proc/meminfo", r"^MemTotal: *(\d+) kB")
    return {"cpu": first_match("/proc/cpuinfo", r"^model name\s*: (.*)$") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(int(memory) / 2**20, 1) if memory else None,
            "kernel": platform.release(),
            "gpu": output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")}


def loaded_library(program, name):
    """The shared library of that name that the program uses."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    found = re.search(rf"lib{name}\S* => (\S+)", done.stdout)
    return ctypes.CDLL(found.group(1)) if found else None


def onednn_version(program):
    library = loaded_library(program, "dnnl")
    if not library:
        return None
    library.dnnl_version.restype = ctypes.POINTER(ctypes.c_int * 3)
    return ".".join(map(str, library.dnnl_version().contents))


def hdf5_version(program):
    library, parts = loaded_library(program, "hdf5"), [ctypes.c_uint() for _ in range(3)]
    if not library:
        return None
    library.H5get_libversion(*map(ctypes.byref, parts))
    return ".".join(str(part.value) for part in parts)


def versions(bench):
    commit, changed = output_of("git", "rev-parse", "--short", "HEAD"), output_of("git", "status", "--porcelain", "-uno")
    compilers = list(bench.build.glob("CMakeFiles/*/CMakeCCompiler.cmake"))
    compiler = [first_match(compilers[0], rf'^set\(CMAKE_C_COMPILER_{key} "(.*)"\)') or "" for key in ("ID", "VERSION")] if compilers else []
    return {"omniquant": f"{commit}{' and changes' if changed else ''}" if commit else None,
            "build": first_match(bench.build / "CMakeCache.txt", r"^CMAKE_BUILD_TYPE:\w+=(.*)$"),
            "compiler": " ".join(compiler) or None,
            "openmpi": (output_of("mpirun", "--version") or "").rpartition(" ")[2] or None,
            "onednn": onednn_version(bench.omniquant),
            "hdf5": hdf5_version(bench.omniquant),
            "python": platform.python_version()}


# ---- tables ----


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(rows):
    """Rows one below the other; those with other columns than the row before begin a table of their own."""
    lines, begin = [], 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end].keys() == rows[begin].keys():
            continue
        part = [list(rows[begin])] + [[cell(value) for value in row.values()] for row in rows[begin:end]]
        text = [any(isinstance(row[column], str) for row in rows[begin:end]) for column in rows[begin]]
        widths = [max(map(len, column)) for column in zip(*part)]
        lines += [""] if begin else []
        lines += ["  ".join(word.ljust(width) if left else word.rjust(width) for word, width, left in zip(line, widths, text)).rstrip()
                  for line in part]
        begin = end
    return "\n".join(lines)


def definitions(names):
    """What bench/README.md says of each case."""
    parts = []
    for name in names:
        case = load_case(name)
        lines = [f"### {name}", "", case.__doc__.strip(), "", "| column | |", "| --- | --- |"]
        lines += [f"| `{column}` | {definition} |" for column, definition in case.COLUMNS.items()]
        parts.append("\n".join([*lines, "", f"Limit: {case.LIMIT}."]))
    return "\n\n".join(parts)


# ---- running ----


def parse_options(name, case, words):
    parser = argparse.ArgumentParser(prog=f"bench/run.py {name} --", description=case.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if hasattr(case, "options"):
        case.options(parser)
    return parser.parse_args(words)


def run_case(name, arguments):
    """Runs, prints and keeps one case."""
    case = load_case(name)
    options = parse_options(name, case, arguments.options)
    bench = Bench(arguments.build, arguments.model, arguments.tokens, arguments.python)
    try:
        load = [os.getloadavg()[0]]
        rows = []
        for row in case.rows(bench, options):
            unknown = row.keys() - case.COLUMNS.keys()
            if unknown:
                raise Failure(f"{name}: columns that are not defined: {' '.join(sorted(unknown))}")
            rows.append(row)
            print(f"{name}: {' '.join(f'{key}={cell(value)}' for key, value in row.items())}", file=sys.stderr)
        load.append(os.getloadavg()[0])
        command = ["bench/run.py", name, *(["--", *arguments.options] if arguments.options else [])]
        result = {"case": name, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "machine": machine(),
                  "versions": versions(bench), "command": shlex.join(command),
                  "load": [round(value, 2) for value in load], "rows": rows, "limit": case.LIMIT,
                  "columns": {column: text for column, text in case.COLUMNS.items() if any(column in row for row in rows)}}
    finally:
        bench.close()
    text = f"{report(result)}\n"
    print(text)
    if arguments.json:
        arguments.json.mkdir(parents=True, exist_ok=True)
        base = arguments.json / f"{result['date'][:10]}-{name}"
        base.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        base.with_suffix(".txt").write_text(text, encoding="utf-8")


def report(result):
    there = result["machine"]
    kept = ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value)
    return "\n".join([f"{result['case']}: {result['command']}, {result['date']}",
                      f"{there['cpu']}, {there['cores']} cores, {there['memory_gib']} GiB, Linux {there['kernel']}, GPU: {there['gpu'] or 'none'}",
                      f"{kept}; load {result['load'][0]} before, {result['load'][1]} after", "",
                      table(result["rows"]), "", f"limit: {result['limit']}"])


def main():
    words, behind, options = sys.argv[1:], [], False
    if "--" in words:
        at = words.index("--")
        words, behind, options = words[:at], words[at + 1:], True
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--all", action="store_true", help="every case but those that want arguments or much time of their own")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--definitions", action="store_true", help="what every column means, as in bench/README.md")
    parser.add_argument("--json", type=Path, metavar="DIR", help="keep each case's result there")
    parser.add_argument("--build", type=Path, default=ROOT / "build", metavar="DIR", help="where the programs are built (build)")
    parser.add_argument("--model", type=Path, default=ROOT / "work/smollm2", metavar="DIR", help="checkpoint (work/smollm2)")
    parser.add_argument("--tokens", type=Path, default=ROOT / "work/calibration.h5", metavar="FILE", help="calibration tokens (work/calibration.h5)")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="a Python with torch and the like, for what is compared (this one)")
    arguments = parser.parse_args(words)
    arguments.options = behind
    names = case_names()
    if arguments.list:
        for name in names:
            print(f"{name:10} {load_case(name).__doc__.splitlines()[0]}{' (not part of --all)' if is_separate(name) else ''}")
        return 0
    if arguments.definitions:
        print(definitions(names))
        return 0
    chosen = [name for name in names if not is_separate(name)] if arguments.all else arguments.cases
    if not chosen or (options and len(chosen) > 1):
        parser.error("options behind -- are those of one case" if chosen else "no case is named; --list names them")
    os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMNIQUANT_PROGRESS="lines")
    failed = 0
    for name in chosen:
        try:
            run_case(name, arguments)
        except Failure as failure:
            print(f"run.py: {name}: {failure}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
