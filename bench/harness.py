"""What the cases share: the programs of the build, MPI on one machine, and one calibration whose figures are read from what it prints and stores."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """What went wrong, in one line with its mend."""


@dataclass
class Calibration:
    """One run of `omniquant calibrate`."""

    run_seconds: float  # the whole run, by its own clock
    blocks_seconds: float  # its blocks together, each from waiting for its weights to being handed to the writer; of the last recipe
    blocks: int
    peak_mib: float  # of the rank that took most
    log: str  # what it said meanwhile


class Bench:
    """Where programs, model and tokens are, and a folder that goes when the case is done."""

    def __init__(self, build, model, tokens, python):
        self.build, self.model, self.tokens, self.python = Path(build), Path(model), Path(tokens), python
        self.omniquant = self.program("omniquant")
        self.folder = Path(tempfile.mkdtemp(prefix="omniquant-bench-"))

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def program(self, name):
        path = self.build / name
        if not path.is_file():
            raise Failure(f"{path}: is not there; build it (cmake -S . -B build && cmake --build build), or give --build")
        return path

    def source(self, name):
        return ROOT / "bench" / name

    def need_model(self):
        if not self.model.is_dir() or not self.tokens.is_file():
            raise Failure(f"{self.model} or {self.tokens}: is not there; run scripts/quickstart.sh, or give --model and --tokens")

    def has_module(self, name):
        """Whether --python has it."""
        return subprocess.run([self.python, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0

    def run(self, command, environment=None):
        """Its standard output and standard error."""
        command = [str(word) for word in command]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                              env={**os.environ, **(environment or {})})
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()
            own = [line for line in lines if line.partition(":")[0] in {Path(word).name for word in command}]  # mpirun has more to say
            said = (own or lines)[-1]
            raise Failure(f"{' '.join(command)}: ended with {done.returncode}: {said}")
        return done.stdout, done.stderr

    def json_lines(self, text):
        """The JSON objects of a text with one a line."""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def run_json(self, command, environment=None):
        """The JSON object that is the last line of its standard output."""
        return self.json_lines(self.run(command, environment)[0])[-1]

    def mpirun(self, ranks, command):
        """The command line of a program on that many ranks of this machine."""
        return ["mpirun", "--bind-to", "none", "--oversubscribe", "-np", ranks, *command]

    def calibrate(self, ranks, flags, output=None, read_seconds=0):
        """One run on the CPU with one thread a rank; without `output` its store is dropped. `read_seconds`: what reading a block takes longer."""
        self.need_model()
        store = output or self.folder / "store"
        command = [self.omniquant, "calibrate", "--model", self.model, "--tokens", self.tokens, "--output", store, "--backend", "cpu", "--threads", 1,
                   *flags]  # fmt: skip
        said, log = self.run(self.mpirun(ranks, command), {"OMNIQUANT_TEST_READ_SECONDS": str(read_seconds)})
        told = re.search(r".*: (\d+) blocks, .* a weight, ([0-9.]+) s, peak memory (\d+) MiB a rank", said)
        if not told:
            raise Failure(f"{self.omniquant}: calibrate's summary is not understood: {said.strip()}")
        blocks, run_seconds, peak = told.groups()
        folder = store if (store / "omniquant.h5").is_file() else next(store.iterdir())
        seconds = json.loads(self.run([self.omniquant, "inspect", "--json", folder])[0])["seconds"]
        if not output:
            shutil.rmtree(store)
        return Calibration(float(run_seconds), seconds, int(blocks), float(peak), log)
