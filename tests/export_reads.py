#!/usr/bin/env python3
"""Reads exports back with numpy, without this program and without the engines, and compares everything with the store and the checkpoint:
codes, scales and zero points of each layer, all other tensors, their set, the files around them.

Usage: export_reads.py MODEL STORE EXPORT [MODEL STORE EXPORT ...]   one line each; status 1 if anything differs
"""

import json
import re
import sys
from pathlib import Path

import gguf
import h5py
import numpy as np

BLOCKS = {"opt": "model.decoder.layers.%d.", "falcon": "transformer.h.%d."}
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<u4", "I64": "<i8", "I8": "i1"}


class Different(Exception):
    pass


def same(what, a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise Different(f"{what}: shapes {a.shape} and {b.shape}")
    if not np.array_equal(a, b):
        raise Different(f"{what}: {np.count_nonzero(a != b)} of {a.size} differ")


def expect(what, condition):
    if not condition:
        raise Different(what)


# ---- what there was ----


def read_safetensors(path):
    """name -> array in the file's own numbers (BF16 as its bits), and the types."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays, types, covered = {}, {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        expect(f"{path.name}: {name}: a gap before it", first == covered)
        expect(f"{path.name}: {name}: not aligned", (8 + length + first) % np.dtype(TYPES[entry["dtype"]]).itemsize == 0)
        covered = end
        arrays[name] = np.frombuffer(raw[8 + length + first : 8 + length + end], TYPES[entry["dtype"]]).reshape(entry["shape"])
        types[name] = entry["dtype"]
    expect(f"{path.name}: {len(raw) - 8 - length - covered} bytes too many", len(raw) == 8 + length + covered)
    return arrays, types


def read_folder(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    arrays, types, where = {}, {}, json.loads(index.read_text())
    for shard in sorted(set(where["weight_map"].values())):
        more, more_types = read_safetensors(folder / shard)
        for name in more:
            expect(f"{name}: the index has it in {where['weight_map'].get(name)}, it is in {shard}", where["weight_map"].get(name) == shard)
        arrays.update(more)
        types.update(more_types)
    expect("the index names other tensors than there are", set(arrays) == set(where["weight_map"]))
    expect("the index's total_size", where["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values()))
    return arrays, types


def to_float(array, kind):
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array.astype(np.float32)


class Layer:
    """A quantized layer of the store."""

    def __init__(self, group):
        n, size, columns = (int(group.attrs[key]) for key in ("bits", "group_size", "in_features"))
        bits = np.unpackbits(group["codes"][:], axis=1, bitorder="little")[:, : columns * n]
        self.bits, self.group_size, self.symmetric = n, size, bool(group.attrs["symmetric"])
        self.codes = (bits.reshape(-1, columns, n).astype(np.int32) << np.arange(n)).sum(-1)
        self.scale, self.zero = group["scale"][:], group["zero_point"][:].astype(np.int32)
        self.group = np.arange(columns) // size

    def steps(self):
        return self.codes - self.zero[:, self.group]

    def weight(self):
        return self.steps() * self.scale.astype(np.float32)[:, self.group]


class Source:
    """The checkpoint with what the store puts in its place."""

    def __init__(self, model, store):
        self.folder, self.config = model, json.loads((model / "config.json").read_text())
        self.prefix = BLOCKS.get(self.config["model_type"], "model.layers.%d.")
        arrays, self.types = read_folder(model)
        bare = self.config["model_type"] == "opt" and not any(name.startswith("model.") for name in arrays)
        arrays = {("model." if bare and not name.startswith("lm_head") else "") + name: array for name, array in arrays.items()}
        self.types = {("model." if bare and not name.startswith("lm_head") else "") + name: kind for name, kind in self.types.items()}
        tied = self.config.get("tie_word_embeddings", self.config["model_type"] in ("opt", "falcon"))
        self.plain = {name: array for name, array in arrays.items() if not (tied and name == "lm_head.weight")}
        self.layers, self.folded = {}, {}
        with h5py.File(store / "omniquant.h5") as file:
            self.recipe = json.loads(file.attrs["recipe"])
            for number, block in file["blocks"].items():
                block.visititems(lambda name, item, prefix=self.prefix % int(number): self.take(prefix, name, item))
        for name in self.layers:
            del self.plain[name + ".weight"]

    def take(self, prefix, name, item):
        if name == "timing" or name.startswith("calibration"):
            return
        if isinstance(item, h5py.Group):
            if "codes" in item:
                self.layers[prefix + name] = Layer(item)
        elif "/" not in name:
            self.folded[prefix + name] = item[:]

    def value(self, name):
        return self.folded[name] if name in self.folded else to_float(self.plain[name], self.types[name])


# ---- bit streams ----


def unpack(words, bits, count):
    """count codes along axis 0 of little-endian words."""
    stream = ((words.astype(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1).reshape(words.shape[0] * 32, -1)
    return (stream[: count * bits].reshape(count, bits, -1).astype(np.int32) << np.arange(bits)[None, :, None]).sum(1)


# ---- formats: each takes what it knows out of `arrays` ----


def check_gptq(source, arrays, config):
    expect("quant_method", config["quant_method"] == "gptq")
    for name, layer in source.layers.items():
        out, columns = layer.codes.shape
        packed, zeros, scales, index = (arrays.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
        expect(f"{name}: settings", (config["bits"], config["sym"]) == (layer.bits, layer.symmetric))
        expect(f"{name}: group_size", config["group_size"] == (-1 if layer.scale.shape[1] == 1 and source.recipe["group_size"] == 0 else layer.group_size))
        same(f"{name}: codes", unpack(packed, layer.bits, columns).T, layer.codes)
        added = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        same(f"{name}: zero points", (unpack(zeros.T, layer.bits, out) + added) % (1 << layer.bits), layer.zero)
        same(f"{name}: scales", scales.T, layer.scale)
        same(f"{name}: g_idx", index, layer.group)


def check_pack_quantized(source, arrays, config):
    scheme = config["config_groups"]["group_0"]["weights"]
    for name, layer in source.layers.items():
        out, columns = layer.codes.shape
        expect(f"{name}: settings", (scheme["num_bits"], scheme["symmetric"]) == (layer.bits, layer.symmetric))
        expect(f"{name}: strategy", scheme["strategy"] == ("group" if source.recipe["group_size"] else "channel"))
        expect(f"{name}: group_size", scheme.get("group_size", columns) == layer.group_size)
        same(f"{name}: shape", arrays.pop(name + ".weight_shape"), [out, columns])
        same(f"{name}: codes", unpack(arrays.pop(name + ".weight_packed").T, layer.bits, columns).T, layer.codes)
        same(f"{name}: scales", arrays.pop(name + ".weight_scale"), layer.scale.astype(np.float32))
        if layer.symmetric:
            expect(f"{name}: zero points", np.all(layer.zero == 1 << (layer.bits - 1)))
        else:
            same(f"{name}: zero points", unpack(arrays.pop(name + ".weight_zero_point"), layer.bits, out), layer.zero)


def check_int_quantized(source, arrays, config):
    group = config["config_groups"]["group_0"]
    expect("activations", group["input_activations"]["num_bits"] == source.recipe["abits"] and group["input_activations"]["dynamic"])
    for name, layer in source.layers.items():
        expect(f"{name}: bits", group["weights"]["num_bits"] == layer.bits and group["weights"]["symmetric"])
        same(f"{name}: codes", arrays.pop(name + ".weight"), layer.steps())
        same(f"{name}: scales", arrays.pop(name + ".weight_scale"), layer.scale.astype(np.float32))


def bf16_bits(value):
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def check_hf(source, arrays, types):
    for name, layer in source.layers.items():
        found, kind = arrays.pop(name + ".weight"), types[name + ".weight"]
        wanted = layer.weight()
        same(f"{name}: weights", found, {"F32": wanted, "F16": wanted.astype(np.float16), "BF16": bf16_bits(wanted)}[kind])
        scale = layer.scale.astype(np.float32)[:, layer.group]
        same(f"{name}: codes found again", np.rint(to_float(found, kind) / scale) + layer.zero[:, layer.group], layer.codes)


def check_folder(source, folder):
    arrays, types = read_folder(folder)
    arrays = dict(arrays)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    if quantization is None:
        check_hf(source, arrays, types)
        config.pop("torch_dtype", None), config.pop("dtype", None)
        expect("config.json", config == {k: v for k, v in source.config.items() if k not in ("torch_dtype", "dtype")})
    else:
        checks = {"gptq": check_gptq, "pack-quantized": check_pack_quantized, "int-quantized": check_int_quantized}
        checks[quantization.get("format", quantization["quant_method"])](source, arrays, quantization)
        expect("config.json", config == source.config)
        if quantization["quant_method"] == "gptq":
            expect("quantize_config.json", json.loads((folder / "quantize_config.json").read_text()) == quantization)
    expect(f"other tensors: {sorted(set(arrays) ^ set(source.plain))[:4]}", set(arrays) == set(source.plain))
    for name, array in arrays.items():
        if types[name] == "F32":
            same(name, array, source.value(name))
        else:
            expect(f"{name}: its type", types[name] == source.types[name] and name not in source.folded)
            same(name, array, source.plain[name])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        expect(f"{name}: not copied as it is", (folder / name).read_bytes() == (source.folder / name).read_bytes())


# ---- GGUF ----

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down", "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm", "block_sparse_moe.gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight", "transformer.word_embeddings.weight": "token_embd.weight",
    "lm_head.weight": "output.weight", "model.norm.weight": "output_norm.weight", "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}  # fmt: skip


def gguf_name(source, name):
    """GGUF's name, and the expert that the tensor is a slice for, or None."""
    if name in OUTSIDE:
        return OUTSIDE[name], None
    pattern = re.escape(source.prefix).replace("%d", r"(\d+)") + r"(?:block_sparse_moe\.experts\.(\d+)\.)?(.*)\.(weight|bias)"
    block, expert, part, kind = re.fullmatch(pattern, name).groups()
    return f"blk.{block}.{GGUF_NAMES[part]}.{kind}", None if expert is None else int(expert)


def reorder(source, name, rows):
    """Rows as llama.cpp has them, from rows as the checkpoint has them."""
    config = source.config
    heads = config["num_attention_heads"]
    if "query_key_value" in name:
        kv = config.get("num_kv_heads", heads) if config.get("new_decoder_architecture") else 1
        size, share = config["hidden_size"] // heads, heads // kv
        grouped = rows.reshape(kv, share + 2, size, *rows.shape[1:])
        return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in (grouped[:, :share], grouped[:, share], grouped[:, share + 1])])
    if config["model_type"] not in ("llama", "mistral", "mixtral") or not re.search(r"\.[qk]_proj\.", name):
        return rows
    heads = heads if ".q_proj." in name else config["num_key_value_heads"]
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def decode_blocks(raw, kind, columns):
    """Numbers, d and m of a quantized tensor, by the layout of the blocks."""
    block = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}[kind]
    raw = raw.reshape(-1, columns // 32, block)
    d = raw[..., :2].copy().view("<f2")[..., 0]
    rest, m = raw[..., 2:], None
    if kind.endswith("_1"):
        m, rest = rest[..., :2].copy().view("<f2")[..., 0], rest[..., 2:]
    if kind == "Q8_0":
        return rest.copy().view(np.int8).astype(np.int32).reshape(-1, columns), d, m
    high = 0
    if kind.startswith("Q5"):
        word, rest = rest[..., :4].copy().view("<u4"), rest[..., 4:]
        high = (word >> np.arange(32, dtype=np.uint32) & 1).astype(np.int32) << 4
    numbers = np.concatenate([rest & 15, rest >> 4], axis=-1).astype(np.int32) + high
    return numbers.reshape(-1, columns), d, m


def check_quantized(source, name, layer, tensor, data):
    kind, columns = tensor.tensor_type.name, layer.codes.shape[1]
    numbers, d, m = decode_blocks(data, kind, columns)
    blocks = layer.group[::32]
    scale, zero = reorder(source, name, layer.scale)[:, blocks], reorder(source, name, layer.zero)[:, blocks]
    same(f"{name}: scales", d, scale)
    if m is None:
        same(f"{name}: codes", numbers - {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind], reorder(source, name, layer.steps()))
        same(f"{name}: gguf's weights", gguf.quants.dequantize(data, tensor.tensor_type), reorder(source, name, layer.weight()))
    else:
        same(f"{name}: codes", numbers, reorder(source, name, layer.codes))
        same(f"{name}: minima", m, (-scale.astype(np.float32) * zero).astype(np.float16))
        same(f"{name}: zero points", np.rint(-m.astype(np.float32) / d.astype(np.float32)), zero)
        found, wanted = gguf.quants.dequantize(data, tensor.tensor_type), reorder(source, name, layer.weight())
        most = np.repeat(scale.astype(np.float32) * np.maximum(zero, 1), 32, axis=1) * 2.0**-11
        expect(f"{name}: gguf's weights", bool(np.all(np.abs(found - wanted) <= most)))


def check_gguf_keys(source, fields):
    config, name = source.config, fields["general.architecture"]
    heads = config["num_attention_heads"]
    keys = {
        "vocab_size": config["vocab_size"], "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "attention.head_count": heads, "expert_count": config.get("num_local_experts"), "expert_used_count": config.get("num_experts_per_tok"),
        "feed_forward_length": config.get("intermediate_size") or config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "context_length": min(config["max_position_embeddings"], (config.get("sliding_window") if name == "llama" else None) or 1 << 30),
        "rope.dimension_count": config.get("head_dim") or config["hidden_size"] // heads,
    }  # fmt: skip
    for key, value in keys.items():
        expect(f"{name}.{key}: {fields.get(f'{name}.{key}')}, not {value}", fields.get(f"{name}.{key}") == value)
    rope = config.get("rope_parameters") or {}
    expect("rope.freq_base", fields[f"{name}.rope.freq_base"] == np.float32(config.get("rope_theta") or rope.get("rope_theta") or 10000.0))
    expect("rope.scaling", (fields.get(f"{name}.rope.scaling.type") == "linear") == (rope.get("rope_type") == "linear"))
    expect("rope factor", fields.get(f"{name}.rope.scaling.factor") == (rope["factor"] if rope.get("rope_type") == "linear" else None))


def check_gguf_tokenizer(source, fields):
    tokenizer = json.loads((source.folder / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    expect("as many tokens as rows", len(tokens) == len(types) == source.config["vocab_size"])
    expect("tokens", all(tokens[i] == token for token, i in vocabulary.items()))
    expect("unused tokens", all(types[i] == 5 for i in range(len(tokens)) if i not in vocabulary.values()))
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    expect("control tokens", all((types[i] in (2, 3)) == (i in special) for i in vocabulary.values()))
    expect("bos and eos", tokens[fields["tokenizer.ggml.bos_token_id"]] == "<s>" and tokens[fields["tokenizer.ggml.eos_token_id"]] == "</s>")
    expect("add_bos_token", fields["tokenizer.ggml.add_bos_token"] == (tokenizer["post_processor"] is not None))
    expect("chat_template", fields["tokenizer.chat_template"] == "{{ x }}")
    if fields["tokenizer.ggml.model"] == "gpt2":
        expect("merges", fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tokenizer["model"]["merges"]])
    else:
        scores = fields["tokenizer.ggml.scores"]
        ranked = [vocabulary["".join(merge)] for merge in tokenizer["model"]["merges"]]
        expect("scores fall with the merges", all(scores[a] >= scores[b] for a, b in zip(ranked, ranked[1:])))
        expect("bytes", all((types[i] == 6) == bool(re.fullmatch("<0x[0-9A-F]{2}>", token)) for token, i in vocabulary.items()))


def check_gguf(source, folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    left, rounded = set(tensors), []
    check_gguf_keys(source, fields)
    check_gguf_tokenizer(source, fields)
    for name in [*(layer + ".weight" for layer in source.layers), *source.plain]:
        target, expert = gguf_name(source, name)
        tensor = tensors[target]
        left.discard(target)
        data = tensor.data if expert is None else tensor.data[expert]
        layer = source.layers.get(name.removesuffix(".weight"))
        if layer is not None and tensor.tensor_type.name != "F16":
            check_quantized(source, name, layer, tensor, data)
            continue
        wanted = reorder(source, name, layer.weight() if layer is not None else source.value(name))
        if target in ("token_embd.weight", "output.weight") and tensor.tensor_type.name == "Q8_0":  # --embedding q8_0
            same(name, data, gguf.quants.quantize(wanted.astype(np.float32), tensor.tensor_type))
            rounded.append(target)
            continue
        expect(f"{name}: its type", tensor.tensor_type.name == ("F32" if wanted.ndim == 1 or "block_sparse_moe.gate." in name else "F16"))
        same(name, data, wanted.astype(data.dtype))
    if "rope_freqs.weight" in left:
        left.discard("rope_freqs.weight")
        check_rope_factors(source, tensors["rope_freqs.weight"].data)
    expect(f"tensors that the model has not: {sorted(left)[:4]}", not left)
    if folder.name in ("exact4", "exact5"):  # --exact
        kinds = {tensor.tensor_type.name for tensor in reader.tensors} - {"F16", "F32"}
        expect(f"types that round nothing: {kinds}", kinds == {"exact4": {"Q5_0"}, "exact5": {"Q8_0"}}[folder.name])
    expect("the embedding is rounded where it was asked for", bool(rounded) == (folder.name == "rounded"))


def check_rope_factors(source, found):
    scaling = source.config["rope_scaling"]
    size = source.config["hidden_size"] // source.config["num_attention_heads"]
    frequency = source.config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    expect(f"rope_freqs: {found} is not {wanted}", np.allclose(found, wanted, rtol=1e-5))


# ---- all ----


def check_card(source, folder):
    card = (folder / "README.md").read_text()
    expect("README.md: no front matter", card.startswith("---\nbase_model: ") and card.index("\n---\n") > 0)
    expect("README.md: the recipe", f"| wbits | {source.recipe['wbits']} |" in card)


def main():
    arguments, failed = [Path(argument) for argument in sys.argv[1:]], False
    for i in range(0, len(arguments), 3):
        model, store, folder = arguments[i : i + 3]
        try:
            source = Source(model, store)
            expect("the store has no layers", len(source.layers) > 0)
            (check_gguf if (folder / "model.gguf").exists() else check_folder)(source, folder)
            check_card(source, folder)
            print(f"ok {folder.name}: {len(source.layers)} layers, {len(source.plain)} other tensors, {len(source.folded)} of them folded")
        except (Different, KeyError) as error:
            print(f"not ok {folder.name}: {type(error).__name__}: {error}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
