"""Shapes that no demo model has, on this machine's CPU: one block of LLaMA-2-70B and of Falcon-180B, and a checkpoint larger than memory.

The blocks have random bf16 weights and are trained for one step on two samples of 32 tokens, W3 in groups of 128. The large checkpoint is a file of
holes with blocks of LLaMA-2-70B: reading it moves zeros through the whole program, rounded to nearest. A run that `omniquant plan` says does not
fit into what memory is free is not started; its row has the plan alone.
"""

import json
import os
import shutil
import struct
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
    "peak_mib": "the largest resident set that any rank had",
    "planned_mib": "what `omniquant plan` says of rank 0",
    "free_mib": "memory that was free before",
}
LIMIT = "memory: a block's weights in fp32 twice, the gradient of its largest layer, and the block as it is read, in every rank (`planned_mib` has more)"

VOCABULARY = 49152  # of the tokens at hand
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


def measure(bench, what, model, blocks, ranks, random, flags):
    folder, store = bench.folder / "model", bench.folder / "out"
    size = write_checkpoint(folder, model, blocks, random)
    flags = ["--wbits", 3, "--group-size", 128, "--samples", 2, "--batch", 2, "--seqlen", 32, "--sampling", "sequential", "--threads", 1, *flags]
    plan = json.loads(bench.run([bench.omniquant, "plan", "--json", "--model", folder, "--ranks", ranks, "--ranks-a-node", ranks, *flags])[0])
    host, output = plan["memory_bytes"]["host"], plan["memory_bytes"]["output"]
    row = {"what": what, "ranks": ranks, "blocks": blocks, "checkpoint_gb": size / 1e9, "block_seconds": None, "run_seconds": None, "peak_mib": None,
           "planned_mib": host / 2**20, "free_mib": free_mib()}  # fmt: skip
    if (ranks * (host - output) + output) / 2**20 < row["free_mib"]:
        bench.model = folder
        run = bench.calibrate(ranks, flags, output=store)
        shutil.rmtree(store)
        row |= {"block_seconds": run.blocks_seconds / blocks, "run_seconds": run.run_seconds, "peak_mib": run.peak_mib}
    shutil.rmtree(folder)
    return row


def rows(bench, arguments):
    block_gb = sum(bytes_of(shape) for shape in llama_block({"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}).values()) / 1e9
    for what, model in (("70b", "llama-2-70b"), ("180b", "falcon-180b")):
        for ranks in (1, 2):
            if what in arguments.what:
                yield measure(bench, f"{what} block", model, 1, ranks, True, ["--epochs", 1])
    many = round(arguments.gigabytes / block_gb)
    for blocks in (max(2, many // 8), many):
        if "holes" in arguments.what:
            yield measure(bench, "holes", "llama-2-70b", blocks, 1, False, ["--epochs", 0])
