#!/usr/bin/env python3
"""Makes models for the tests of exports: those of tests/fixtures four times as wide, with random weights and tokenizers of the kinds that
their families have, so that groups of 32 columns and blocks of every format fit.

Usage: export_models.py FIXTURES OUTPUT
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FACTOR = 4
SCALED = ("hidden_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "head_dim", "vocab_size", "word_embed_proj_dim", "sliding_window")
KEPT_ROWS = ("embed_positions.weight", "block_sparse_moe.gate.weight")  # positions and experts do not grow
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

# llama.cpp's name of a way to split text, and the way as tokenizer.json has it
SPLITS = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CONTRACTIONS + r"\p{N}{1,3}" + SPACES), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CONTRACTIONS + r"\p{N}" + SPACES), "isolated"), BYTES]),
    "falcon": pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), WORDS, pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]),
}
MODELS = {
    "llama_mha": "smollm", "llama_gqa_tied": "smollm", "llama3_rope": "llama-bpe", "llama_linear_rope": "sentencepiece",
    "mistral": "sentencepiece", "qwen2": "qwen2", "qwen3": "qwen2", "opt": "gpt-2", "opt_post": "gpt-2", "falcon_7b": "falcon",
    "falcon_40b": "falcon", "falcon_11b": "falcon", "mixtral": "sentencepiece",
}


def read_header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def write_weights(path, tensors, dtype):
    """tensors: name -> fp32 array; dtype F32, F16 or BF16."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = value.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def make_weights(source, output, seed):
    random = np.random.default_rng(seed)
    tensors, dtype = {}, None
    for path in sorted(source.glob("model*.safetensors")):
        for name, entry in sorted(read_header(path).items()):
            if name == "__metadata__":
                continue
            rows, dtype = entry["shape"], entry["dtype"]
            shape = [size * FACTOR for size in rows]
            if name.endswith(KEPT_ROWS):
                shape[0] = rows[0]
            value = random.standard_normal(shape)
            if len(shape) == 2:
                value /= np.sqrt(shape[1])
            else:
                value = 0.2 * value + (0 if name.endswith("bias") else 1)
            tensors[name] = value
    write_weights(output / "model.safetensors", tensors, dtype)


def text_of(fixtures):
    return [path.read_text() for path in sorted(fixtures.glob("*.py"))] + [(fixtures / "README.md").read_text()]


def byte_level(texts, split, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def sentencepiece(texts, size):
    """As LLaMA 2 has it: bytes as a last resort, and a merge for every pair of tokens that makes a third."""
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 259, limit_alphabet=60, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    merged = [piece for piece in pieces if len(piece) > 1] + [piece for piece in pieces if len(piece) == 1]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + merged)}
    merges = [(piece[:i], piece[i:]) for piece in merged for i in range(1, len(piece)) if piece[:i] in vocabulary and piece[i:] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return tokenizer


def make_tokenizer(texts, kind, size):
    return sentencepiece(texts, size) if kind == "sentencepiece" else byte_level(texts, kind, size)


def main():
    fixtures, output = Path(sys.argv[1]), Path(sys.argv[2])
    texts = text_of(fixtures)
    for seed, (name, kind) in enumerate(MODELS.items()):
        folder = output / name
        folder.mkdir(parents=True)
        config = json.loads((fixtures / name / "config.json").read_text())
        config.update({key: config[key] * FACTOR for key in SCALED if isinstance(config.get(key), int)})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        make_weights(fixtures / name, folder, seed)
        make_tokenizer(texts, kind, config["vocab_size"] - 3).save(str(folder / "tokenizer.json"))  # some rows have no token
        end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        special = {"bos_token": "<s>", "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ x }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))


if __name__ == "__main__":
    main()
