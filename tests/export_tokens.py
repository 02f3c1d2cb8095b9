#!/usr/bin/env python3
"""Whether llama.cpp, with the tokenizer that an export's GGUF holds, splits text as the model's tokenizer.json does.

Usage: export_tokens.py TEXT MODEL EXPORT [MODEL EXPORT ...]
"""

import sys
from pathlib import Path

from llama_cpp import Llama
from tokenizers import Tokenizer

TEXTS = (
    "Hello world, this costs 1234567 dollars!\n\n\tdon't  you see?   x=3.14; def f(a):\n    return a+1",
    "\u00dcn\u00efc\u00f6d\u00e9 \u2014 na\u00efve caf\u00e9 \u6570\u5b57 \uff11\uff12 \U0001f600 end",
    "  leading spaces and   runs\r\nof them",
    "I'LL say: it's 'quoted' (really?) [yes] {no} <s> </s> 100% a_b_c",
    "word " * 20,
)


def main():
    text, folders, failed = Path(sys.argv[1]).read_text(), sys.argv[2:], 0
    for model, export in zip(folders[::2], folders[1::2]):
        engine = Llama(f"{export}/model.gguf", vocab_only=True, verbose=False)
        tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        for sample in (*TEXTS, text):
            found, wanted = engine.tokenize(sample.encode(), add_bos=True, special=True), tokenizer.encode(sample).ids
            if found != wanted:
                first = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
                print(f"{export}: {sample[:40]!r}: token {first}: {found[first:first + 5]}, not {wanted[first:first + 5]}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
