#!/usr/bin/env python3
"""Turns text into a token file: HDF5 with one dataset `tokens` (uint32) whose attributes name its origin.

All texts are joined as `cat` would, line ends become plain newlines, and the whole is tokenized as one string, without special tokens.
The work is done in overlapping pieces, so that time and memory stay in proportion to the text; pieces are stitched where both sides agree,
and the result is that of one string.
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import hashlib
import os
import secrets
from fractions import Fraction
from pathlib import Path

try:
    import h5py
    import numpy as np
    from tokenizers import Tokenizer
except ImportError as error:
    print(f"tokenize.py: {error}; install what tools/requirements.txt lists: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

VERSION = "0.1.0"
PIECE = 1 << 17  # characters from one piece's start to the next's
OVERLAP = 1 << 14  # characters that neighbouring pieces share
AGREEMENT = 64  # tokens before and after a seam that have to be the same in both pieces
BATCH = 8  # pieces tokenized in parallel
CHUNK = 1 << 16  # tokens a chunk of the dataset


class Failure(Exception):
    """What went wrong, in one line with its mend."""


def read_texts(paths):
    """The texts joined, and the SHA-256 of each."""
    texts, digests = [], []
    for path in paths:
        data = path.read_bytes()
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Failure(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv -t UTF-8") from None
        digests.append(hashlib.sha256(data).hexdigest())
    return "".join(texts).replace("\r\n", "\n").replace("\r", "\n"), digests


def read_tokenizer(folder):
    """The tokenizer of a model folder, and the SHA-256 of its file."""
    path = folder / "tokenizer.json"
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise Failure(f"{path}: not a tokenizer ({' '.join(str(error).split())}); copy it again from the model") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.sha256(data).hexdigest()


def token_table(encoding, start):
    """An encoding as rows of (id, first character, end character), characters counted in the whole text."""
    table = np.empty((len(encoding.ids), 3), dtype=np.int64)
    table[:, 0] = encoding.ids
    table[:, 1:] = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
    return table


def find_seam(left, right):
    """Where two overlapping pieces are in step: (tokens to keep of left, tokens to skip of right), or None."""
    for position in np.unique(right[: len(left), 1]):
        i, j = np.searchsorted(left[:, 1], position), np.searchsorted(right[:, 1], position)
        if i + AGREEMENT > len(left):
            break
        if min(i, j) >= AGREEMENT and np.array_equal(left[i - AGREEMENT : i + AGREEMENT], right[j - AGREEMENT : j + AGREEMENT]):
            return i, j
    return None


def tokenize(tokenizer, text):
    """Ids of the text, as if it were tokenized in one go."""
    starts = range(0, max(len(text) - OVERLAP, 1), PIECE)
    ids, held = [], None
    for first in range(0, len(starts), BATCH):
        group = starts[first : first + BATCH]
        encodings = tokenizer.encode_batch([text[s : s + PIECE + OVERLAP] for s in group], add_special_tokens=False)
        for start, encoding in zip(group, encodings):
            piece = token_table(encoding, start)
            if held is not None:
                seam = find_seam(held, piece)
                if seam is None:  # a text without structure, such as one endless word: no way but the long one
                    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
                ids.append(held[: seam[0], 0].astype(np.uint32))
                piece = piece[seam[1] :]
            held = piece
    ids.append(held[:, 0].astype(np.uint32))
    return np.concatenate(ids)


def position(text):
    """A place in the token stream as typed: tokens, or a share of all tokens such as 60%. Checked against the length later."""
    try:
        return (Fraction(text[:-1]) / 100, True) if text.endswith("%") else (int(text), False)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of tokens nor a share such as 60%") from None


def resolve(place, total):
    """A place in a stream of that many tokens, as a number of tokens."""
    value, share = place
    return int(value * total) if share else value


def fixed(value):
    """An attribute's value, texts as UTF-8 of fixed length: HDF5 keeps others in a heap without checksums."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        return value
    array = np.array([text.encode() for text in texts])
    array = array.astype(h5py.string_dtype("utf-8", array.dtype.itemsize))
    return array[0] if isinstance(value, str) else array


def write(path, ids, attributes):
    """Writes the token file, in the layout of HDF5 1.10 with checksums, which is all that omniquant reads; it appears under its name only
    when it is whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        temporary.touch(exist_ok=False)  # its message is plainer than HDF5's
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            tokens = file.create_dataset("tokens", data=ids, dtype="<u4", chunks=(min(CHUNK, len(ids)),), fletcher32=True)
            for name, value in attributes.items():
                tokens.attrs[name] = fixed(value)
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror or error}); choose another --output or make room") from None
    finally:
        temporary.unlink(missing_ok=True)


def run(arguments):
    tokenizer, tokenizer_sha256 = read_tokenizer(arguments.model)
    text, texts_sha256 = read_texts(arguments.text)
    ids = tokenize(tokenizer, text)
    begin, end = resolve(arguments.begin, len(ids)), resolve(arguments.end, len(ids))
    if not 0 <= begin < end <= len(ids):
        names = ", ".join(map(str, arguments.text))
        raise Failure(f"{names}: no tokens from {begin} to {end} among {len(ids)}; change --begin or --end, or give more text")
    write(arguments.output, ids[begin:end], {
        "texts": [path.name for path in arguments.text],
        "texts_sha256": texts_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "tokens": end - begin,
        "begin": begin,
        "total_tokens": len(ids),
        "tool": f"omniquant tokenize.py {VERSION}",
    })
    part = f", tokens {begin} to {end} of {len(ids)}" if end - begin < len(ids) else ""
    print(f"{arguments.output}: {end - begin} tokens{part}")


def main():
    parser = argparse.ArgumentParser(description="Turn text into a token file for omniquant.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder with tokenizer.json")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="token file to write (HDF5)")
    parser.add_argument("--begin", type=position, default=(0, False), metavar="N|P%",
                        help="first token kept, counted or as a share (default 0)")
    parser.add_argument("--end", type=position, default=(Fraction(1), True), metavar="N|P%",
                        help="end of the tokens kept (default 100%%)")
    parser.add_argument("text", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text; several are joined")
    arguments = parser.parse_args()
    try:
        run(arguments)
        return 0
    except Failure as failure:
        print(f"tokenize.py: {failure}", file=sys.stderr)
    except OSError as error:
        print(f"tokenize.py: {error.filename}: {error.strerror}; check the path and its permissions", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
