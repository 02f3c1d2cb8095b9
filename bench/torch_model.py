#!/usr/bin/env python3
"""The paper's learnable weight clipping on a whole LLaMA model, block by block, written plainly in PyTorch: what `omniquant calibrate` is compared with.

fp32, one sample a step, the same samples, losses and learning rate as `calibrate` with its defaults. Writes the model with its quantized weights in
place, as a folder that any program reads, and prints one JSON object. Needs torch, safetensors and h5py.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import h5py
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch_step import block_forward, fake_quantize, rope_tables

LINEARS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
           "down": "mlp.down_proj"}  # fmt: skip
LEARNING_RATE = 1e-2


def read_samples(path, samples, tokens):
    with h5py.File(path) as file:
        return torch.from_numpy(file["tokens"][: samples * tokens].astype("int64")).reshape(samples, tokens)


def learn(weights, x_q, targets, fixed, args):
    """The block's quantized weights after training."""
    groups = {name: args.group or w.shape[1] for name, w in weights.items()}
    factors = {name: [torch.full((w.numel() // groups[name], 1), 4.0, requires_grad=True) for _ in range(2)] for name, w in weights.items()}
    optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=LEARNING_RATE, weight_decay=0.0)

    def quantize():
        return {name: fake_quantize(w, *factors[name], args.bits, groups[name]) for name, w in weights.items()}

    for _ in range(args.epochs):
        for x, target in zip(x_q, targets):
            optimizer.zero_grad()
            F.mse_loss(block_forward(x, quantize(), *fixed), target).backward()
            optimizer.step()
    with torch.no_grad():
        return quantize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "output"):
        parser.add_argument("--" + name, type=Path, required=True)
    for name, value in dict(bits=3, group=64, samples=16, seqlen=512, epochs=5, threads=1).items():
        parser.add_argument("--" + name, type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(args.model / "model.safetensors")
    heads, head_dim = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    rope = rope_tables(args.seqlen, head_dim, config["rope_theta"])
    mask = torch.full((args.seqlen, args.seqlen), float("-inf")).triu(1)
    ids = read_samples(args.tokens, args.samples, args.seqlen)
    x_fp = list(F.embedding(ids, tensors["model.embed_tokens.weight"].float()))
    x_q, seconds = list(x_fp), 0.0
    for block in range(config["num_hidden_layers"]):
        begin = time.perf_counter()
        prefix = f"model.layers.{block}."
        weights = {name: tensors[f"{prefix}{layer}.weight"].float() for name, layer in LINEARS.items()}
        norms = tuple(tensors[f"{prefix}{name}.weight"].float() for name in ("input_layernorm", "post_attention_layernorm"))
        fixed = (norms, rope, mask, heads, config["rms_norm_eps"], False)
        with torch.no_grad():
            x_fp = [block_forward(x, weights, *fixed) for x in x_fp]
        quantized = learn(weights, x_q, x_fp, fixed, args)
        with torch.no_grad():
            x_q = [block_forward(x, quantized, *fixed) for x in x_q]
            loss = sum(F.mse_loss(x, target).item() for x, target in zip(x_q, x_fp)) / args.samples
        for name, layer in LINEARS.items():
            tensors[f"{prefix}{layer}.weight"] = quantized[name].contiguous()
        seconds += time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    args.output.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (args.model / name).is_file():
            shutil.copy(args.model / name, args.output)
    save_file(tensors, args.output / "model.safetensors")
    print(json.dumps({"seconds": seconds, "blocks": config["num_hidden_layers"], "peak_mib": peak, "last_loss": loss, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
