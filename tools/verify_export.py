#!/usr/bin/env python3
"""Loads an export with the engine that it is for, on CPU, and compares it with the store it was made from.

Three questions are answered, one JSON object on standard output:
  tensors      the weights that the engine's own library unpacks, against (code - zero_point) * scale of the store
  logits       of the engine, against the checkpoint with the store's weights in fp32 (relative error in the 2-norm; mean KL divergence)
  perplexity   of both

Engines: transformers (with compressed-tensors for its exports), GPTQModel, llama-cpp-python. Only what the export needs has to be installed.
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import json
import logging
import math
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.disable(logging.WARNING)

try:
    import h5py
    import numpy as np
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as error:
    print(f"verify_export.py: {error}; it needs torch, transformers, h5py and safetensors beside the engine itself", file=sys.stderr)
    sys.exit(2)

PREFIXES = {"opt": "model.decoder.layers.%d.", "falcon": "transformer.h.%d."}
TIED = ("opt", "falcon")  # where config.json does not say


class Failure(Exception):
    """What went wrong, in one line with its mend."""


# ---- the store ----


def dequantize(group):
    """A layer's weight in fp32."""
    bits, size, columns = (int(group.attrs[key]) for key in ("bits", "group_size", "in_features"))
    stream = np.unpackbits(group["codes"][:], axis=1, bitorder="little")[:, : columns * bits]
    codes = (stream.reshape(-1, columns, bits).astype(np.int32) << np.arange(bits)).sum(-1)
    which = np.arange(columns) // size
    return (codes - group["zero_point"][:].astype(np.int32)[:, which]) * group["scale"][:].astype(np.float32)[:, which]


def read_store(folder, model_type):
    """The recipe, and under the checkpoint's names the quantized weights and the tensors that were folded."""
    weights, folded, prefix = {}, {}, PREFIXES.get(model_type, "model.layers.%d.")
    with h5py.File(folder / "omniquant.h5") as store:
        recipe = json.loads(store.attrs["recipe"])
        for number, block in store["blocks"].items():

            def take(name, item, at=prefix % int(number)):
                if name == "timing" or name.startswith("calibration"):
                    return
                if isinstance(item, h5py.Group) and "codes" in item:
                    weights[f"{at}{name}.weight"] = torch.from_numpy(dequantize(item))
                elif isinstance(item, h5py.Dataset) and "/" not in name:
                    folded[at + name] = torch.from_numpy(item[:])

            block.visititems(take)
    return recipe, weights, folded


# ---- the reference: the checkpoint with the store's weights ----


def read_checkpoint(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name).float() for name in file.keys()})
    return tensors


def with_full_names(tensors, model_type):
    """Some OPT files lack the beginning of each name."""
    if model_type == "opt" and not any(name.startswith("model.") for name in tensors):
        return {name if name.startswith("lm_head") else f"model.{name}": value for name, value in tensors.items()}
    return tensors


def load_plain(config, tensors):
    """transformers' model of these tensors, in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        tied = config.get("tie_word_embeddings", config["model_type"] in TIED)
        tensors = {name: value.contiguous() for name, value in tensors.items() if not (tied and name == "lm_head.weight")}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    if lost:
        raise Failure(f"transformers did not find {sorted(lost)[0]}, or knows no such tensor: the model is of another kind")
    return model.eval()


def quantize_inputs(model, bits):
    """Lets the layers of blocks read dynamically quantized activations, as eval does: asymmetric, a scale a token. Codes are signed and rounded after
    the zero point is added, as the engine does: a last bit that rounds otherwise grows, over the blocks, to percents of the logits."""
    least, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def hook(_, inputs):
        x = inputs[0]
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        zero = (least - low / scale).clamp(least, top).round()
        return ((x / scale + zero).round().clamp(least, top) - zero) * scale

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split(".")):
            module.register_forward_pre_hook(hook)


# ---- engines: each gives the name, a function from token ids to logits, and the weights that its library unpacks ----


def open_transformers(export, config, **more):
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, attn_implementation="eager", **more).eval()
    return lambda ids: model(input_ids=ids).logits[0]


def open_hf(export, config, scheme):
    return f"transformers {version('transformers')}", open_transformers(export, config), read_checkpoint(export)


def unpacked_tensors(export, config):
    """What compressed-tensors' own functions make of the packed tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scheme = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    bits, tensors, weights = scheme["num_bits"], {}, {}
    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    for name, scale in tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        base = name.removesuffix("_scale")
        if base in tensors:  # int-quantized
            weights[base] = tensors[base].float() * scale.float()
            continue
        shape = torch.Size(tensors[base + "_shape"].tolist())
        codes = unpack_from_int32(tensors[base + "_packed"], bits, shape)
        zero = 0
        if not scheme["symmetric"]:
            zero = unpack_from_int32(tensors[base + "_zero_point"], bits, scale.shape, packed_dim=0)
            zero = zero.repeat_interleave(shape[1] // scale.shape[1], 1).float()
        weights[base] = (codes.float() - zero) * scale.float().repeat_interleave(shape[1] // scale.shape[1], 1)
    return weights


def open_compressed_tensors(export, config, scheme):
    name = f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"
    packed = config["quantization_config"]["format"] == "pack-quantized"
    more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed else {}
    return name, open_transformers(export, config, **more), unpacked_tensors(export, config)


def open_gptq(export, config, scheme):
    """GPTQModel loads nothing in fp32, but computes in it once its scales are; what is not quantized is taken as it was exported."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(export), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.float().eval()
    exported, weights = read_checkpoint(export), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in exported and tensor.is_floating_point():
            tensor.data.copy_(exported[name])
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            weights[name + ".weight"] = module.dequantize_weight().T.contiguous()
    return f"GPTQModel {version('gptqmodel')}, fp32", lambda ids: model(input_ids=ids).logits[0], weights


def products(llama, model, length):
    """llama.cpp built with a BLAS gives it matrices of 32 rows or more, but for experts, dequantized to fp32; else it rounds activations to 8 bits."""
    blas = any((Path(llama.__path__[0]) / "lib").glob("libggml-blas*"))
    experts = any(key.endswith(".expert_count") for key in model.metadata)
    return "products in fp32 (BLAS)" if blas and length >= 32 and not experts else "products in 8 bits"


def open_gguf(export, config, scheme):
    """Weights under llama.cpp's names are compared by tests/export_reads.py, which knows its order of rows. They stay as the file has them (repacked
    ones a BLAS does not get), and the cache is fp32: what is left of rounding is the products'."""
    import llama_cpp

    def parameters(defaults=llama_cpp.llama_cpp.llama_model_default_params):
        values = defaults()
        values.use_extra_bufts = False
        return values

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    length = scheme["seqlen"]
    model = llama_cpp.Llama(str(export / "model.gguf"), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False,
                            n_threads=torch.get_num_threads(), type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # fmt: skip

    def logits(ids):
        model.reset()
        model.eval(ids[0].tolist())
        return torch.from_numpy(np.array(model.scores[: ids.shape[1]]))

    return f"llama-cpp-python {version('llama-cpp-python')}, {products(llama_cpp, model, length)}", logits, {}


def open_engine(export, seqlen):
    if (export / "model.gguf").is_file():
        return open_gguf(export, None, {"seqlen": seqlen})
    config = json.loads((export / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    openers = {None: open_hf, "gptq": open_gptq, "compressed-tensors": open_compressed_tensors}
    if method not in openers:
        raise Failure(f"{export}/config.json: quant_method: '{method}' is none of omniquant's exports")
    return openers[method](export, config, None)


# ---- comparing ----


def compare_tensors(found, wanted):
    """exact: equal; rounded: equal to the weight in fp16, which is what some engines compute with."""
    largest, exact, rounded, count = 0.0, 0, 0, 0
    for name, weight in wanted.items():
        if name in found:
            difference = (found[name] - weight).norm() / weight.norm().clamp(min=1e-30)
            largest, count = max(largest, difference.item()), count + 1
            exact, rounded = exact + torch.equal(found[name], weight), rounded + torch.equal(found[name], weight.half().float())
    return {"compared": count, "of": len(wanted), "exact": exact, "rounded": rounded, "largest_relative_error": largest}


def entropy(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:]).item()


def compare_logits(engine, reference, windows):
    worst, divergence, loss, loss_reference = 0.0, 0.0, 0.0, 0.0
    for ids in windows:
        ours, theirs = reference(ids), engine(ids).float()
        worst = max(worst, ((theirs - ours).norm() / ours.norm()).item())
        p, q = torch.log_softmax(ours.double(), -1), torch.log_softmax(theirs.double(), -1)
        divergence += (p.exp() * (p - q)).sum(-1).mean().item() / len(windows)
        loss += entropy(theirs, ids) / len(windows)
        loss_reference += entropy(ours, ids) / len(windows)
    return {"relative_error": worst, "kl": divergence}, {"engine": math.exp(loss), "reference": math.exp(loss_reference)}


def read_windows(arguments):
    with h5py.File(arguments.tokens) as file:
        first, end = arguments.offset, arguments.offset + arguments.windows * arguments.seqlen
        if file["tokens"].shape[0] < end:
            raise Failure(f"{arguments.tokens}: {file['tokens'].shape[0]} tokens are there, {end} are asked for; lower --windows")
        ids = torch.from_numpy(file["tokens"][first:end].astype(np.int64))
    return [window[None] for window in ids.split(arguments.seqlen)]


def verify(arguments):
    config = json.loads((arguments.model / "config.json").read_text())
    recipe, weights, folded = read_store(arguments.quantized, config["model_type"])
    checkpoint = with_full_names(read_checkpoint(arguments.model), config["model_type"])
    name, engine, found = open_engine(arguments.export, arguments.seqlen)
    model = load_plain(config, {**checkpoint, **weights, **folded})
    integer = recipe.get("abits", 16) < 16 and "compressed" in name  # the others do not quantize activations
    if integer:
        quantize_inputs(model, recipe["abits"])
    with torch.no_grad():
        logits, perplexity = compare_logits(engine, lambda ids: model(input_ids=ids).logits[0], read_windows(arguments))
    return {"export": str(arguments.export), "engine": name, "tensors": compare_tensors(found, weights), "logits": logits,
            "perplexity": perplexity, "abits": recipe["abits"] if integer else 16, "windows": arguments.windows,
            "seqlen": arguments.seqlen, "offset": arguments.offset}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Compare an export, as its engine loads it, with the store it was made from.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--quantized", required=True, type=Path, metavar="OUT", help="store that calibrate made")
    parser.add_argument("--tokens", required=True, type=Path, metavar="FILE", help="text, as made by tools/tokenize.py")
    parser.add_argument("--seqlen", type=int, default=128, metavar="N", help="tokens a window (default 128)")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="windows (default 4)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="first token (default 0)")
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder that export made")
    try:
        arguments, out = parser.parse_args(), os.dup(1)
        os.dup2(2, 1)  # what engines print goes where messages go
        result = verify(arguments)
        os.write(out, (json.dumps(result, indent=2) + "\n").encode())
        return 0
    except Failure as failure:
        print(f"verify_export.py: {failure}", file=sys.stderr)
    except (OSError, ImportError) as error:
        print(f"verify_export.py: {error}; check the path, or install the engine", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
