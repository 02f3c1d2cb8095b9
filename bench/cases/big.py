"""Shapes that no demo model has, on this machine's CPU: one block of LLaMA-2-70B and of Falcon-180B, and a checkpoint larger than memory.

The blocks have random bf16 weights and are trained for one step on two samples, W3: of 70B in groups of 128 with 32 tokens, of 180B in groups of 512
with 64. The large checkpoint is a file of holes with blocks of LLaMA-2-70B: reading it moves zeros through the whole program, rounded to nearest. A
run that `omniquant plan` says does not fit into what memory is free is not started; its row has the plan alone.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path

from harness import ROOT

SEPARATE = True
COLUMNS = {
    "what": "`70b block`, `180b block`: one random block, one step of training; `holes`: blocks that are zero, rounded to nearest",
    "ranks": "processes of one thread each, on this machine",
    "blocks": "of the checkpoint",
    "checkpoint_gb": "bytes that are read of it, 10^9",
    "block_seconds": "mean of the blocks, as the store tells them",
    "run_seconds": "the whole run",
    "peak_mib": "the largest resident set that any rank had; what ranks have in common counts in each",
    "planned_mib": "what `omniquant plan` says of rank 0",
    "node_mib": "the most that all ranks had together at a time, what they have in common counted once: the sum of their proportional set sizes "
                "(`/proc/PID/smaps_rollup`), looked at every second",
    "node_planned_mib": "what `omniquant plan` says of the node",
    "loss_end": "of the block, as it is stored: mean squared error of its outputs",
    "same": "on more ranks: whether codes, scales and zero points are those of one rank",
    "free_mib": "memory that was free before",
}
LIMIT = "memory: a block's weights in fp32 twice a node, and the block as it is read in every rank, though not at once where no other follows"

VOCABULARY = 49152  # of the tokens at hand
LOOK_SECONDS = 1
ONE = struct.pack("<H", 0x3F80)  # in bf16
PATTERN = (1 << 24) - 2  # bytes of random numbers that are repeated: no multiple of any row


def options(parser):
    parser.add_argument("--gigabytes", type=float, default=40, help="of the checkpoint of holes (40)")
    parser.add_argument("--what", nargs="+", choices=["70b", "180b", "holes"], default=["70b", "180b", "holes"], help="default: all")


# ---- checkpoints ----


def llama_block(config):
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,),
              "post_attention_layernorm": (hidden,)}  # fmt: skip
    return {f"model.layers.{{}}.{name}.weight": shape for name, shape in shapes.items()}


def falcon_block(config):
    hidden = config["hidden_size"]
    rows = hidden + 2 * config["num_kv_heads"] * (hidden // config["num_attention_heads"])
    shapes = {"self_attention.query_key_value.weight": (rows, hidden), "self_attention.dense.weight": (hidden, hidden),
              "mlp.dense_h_to_4h.weight": (4 * hidden, hidden), "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden), "ln_attn.weight": (hidden,),
              "ln_attn.bias": (hidden,), "ln_mlp.weight": (hidden,), "ln_mlp.bias": (hidden,)}  # fmt: skip
    return {f"transformer.h.{{}}.{name}": shape for name, shape in shapes.items()}


def tensors(config, blocks):
    """Names and shapes, in the file's order; the embedding first."""
    hidden = config["hidden_size"]
    falcon = config["model_type"] == "falcon"
    yield ("transformer.word_embeddings.weight" if falcon else "model.embed_tokens.weight"), (VOCABULARY, hidden)
    for block in range(blocks):
        for name, shape in (falcon_block if falcon else llama_block)(config).items():
            yield name.format(block), shape
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias") if falcon else ("model.norm.weight",):
        yield name, (hidden,)


def bytes_of(shape):
    count = 2
    for size in shape:
        count *= size
    return count


def random_pattern():
    """bf16 of 0.008 to 0.03, of either sign: exponent and sign in the high byte, the rest in the low one."""
    pattern = bytearray(PATTERN)
    pattern[0::2] = os.urandom(PATTERN // 2)
    pattern[1::2] = os.urandom(PATTERN // 2).translate(bytes(0x3C if byte < 128 else 0xBC for byte in range(256)))
    return bytes(pattern)


def write_checkpoint(folder, model, blocks, random):
    """A model folder; without `random` all but its header is a hole. Returns the bytes of its tensors."""
    config = json.loads((ROOT / "tests/plans" / model / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": blocks, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, end = {}, 0
    for name, shape in tensors(config, blocks):
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + bytes_of(shape)]}
        end += bytes_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        pattern = random_pattern() if random else b""
        for name, shape in tensors(config, blocks) if random else ():
            left = bytes_of(shape)
            if len(shape) == 1:
                file.write((b"\0\0" if name.endswith("bias") else ONE) * shape[0])
                continue
            while left > 0:
                left -= file.write(pattern[:left])
        file.truncate(8 + len(text) + end)
    return end


# ---- runs ----


def free_mib():
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


class NodeMemory(threading.Thread):
    """The most that a program's processes on this machine have together, while it runs."""

    def __init__(self, program):
        super().__init__(daemon=True)
        self.program, self.peak_mib, self.done = program.resolve(), 0, threading.Event()

    def processes(self):
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "exe").resolve() == self.program:
                    yield entry
            except OSError:
                pass  # it has ended, or is another's

    def look(self):
        total = 0
        for process in self.processes():
            try:
                lines = (process / "smaps_rollup").read_text(encoding="utf-8").splitlines()
            except OSError:
                continue
            total += next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0)
        self.peak_mib = max(self.peak_mib, total)

    def run(self):
        while not self.done.wait(LOOK_SECONDS):
            self.look()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def planned(bench, folder, ranks, flags):
    command = [bench.omniquant, "plan", "--json", "--model", folder, "--ranks", ranks, "--ranks-a-node", ranks, *flags]
    return {name: size / 2**20 for name, size in json.loads(bench.run(command)[0])["memory_bytes"].items()}


def measure(bench, what, folder, size, ranks, flags, store):
    """A row; the run's blocks are in `store`, if it is started."""
    blocks = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    flags = ["--wbits", 3, "--samples", 2, "--batch", 2, "--sampling", "sequential", "--threads", 1, *flags]
    plan = planned(bench, folder, ranks, flags)
    row = {"what": what, "ranks": ranks, "blocks": blocks, "checkpoint_gb": size / 1e9, "block_seconds": None, "run_seconds": None, "peak_mib": None,
           "planned_mib": plan["host"], "node_mib": None, "node_planned_mib": plan["node"], "free_mib": free_mib(), "loss_end": None, "same": None}  # fmt: skip
    if plan["node"] > row["free_mib"]:
        return row
    bench.model = folder
    with NodeMemory(bench.omniquant) as memory:
        run = bench.calibrate(ranks, flags, output=store)
    losses = re.findall(r" end (\S+) ", run.log)
    row |= {"block_seconds": run.blocks_seconds / blocks, "run_seconds": run.run_seconds, "peak_mib": run.peak_mib, "node_mib": memory.peak_mib,
            "loss_end": float(losses[-1]) if losses else None}  # fmt: skip
    return row


def random_block(bench, what, model, flags):
    """One block on one rank and on two, whose stores are compared."""
    folder, one = bench.folder / "model", bench.folder / "out 1"
    size = write_checkpoint(folder, model, 1, True)
    for ranks in (1, 2):
        store = bench.folder / f"out {ranks}"
        row = measure(bench, what, folder, size, ranks, ["--epochs", 1, *flags], store)
        if ranks > 1 and store.is_dir() and one.is_dir():
            row["same"] = "yes" if subprocess.run([bench.program("tests/test_helper"), "compare", one, store], check=False).returncode == 0 else "no"
        yield row
    for path in (folder, one, bench.folder / "out 2"):
        shutil.rmtree(path, ignore_errors=True)


def holes(bench, blocks):
    folder, store = bench.folder / "model", bench.folder / "out"
    size = write_checkpoint(folder, "llama-2-70b", blocks, False)
    yield measure(bench, "holes", folder, size, 1, ["--group-size", 128, "--seqlen", 32, "--epochs", 0], store)
    for path in (folder, store):
        shutil.rmtree(path, ignore_errors=True)


def rows(bench, arguments):
    block_gb = sum(bytes_of(shape) for shape in llama_block({"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}).values()) / 1e9
    if "70b" in arguments.what:
        yield from random_block(bench, "70b block", "llama-2-70b", ["--group-size", 128, "--seqlen", 32])
    if "180b" in arguments.what:
        yield from random_block(bench, "180b block", "falcon-180b", ["--group-size", 512, "--seqlen", 64])
    many = round(arguments.gigabytes / block_gb)
    for blocks in (max(2, many // 8), many):
        if "holes" in arguments.what:
            yield from holes(bench, blocks)
