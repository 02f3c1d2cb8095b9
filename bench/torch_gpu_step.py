#!/usr/bin/env python3
"""The training step of bench/torch_step.py on a GPU: what `bench/gpu_step` is compared with.

bf16 weights and activations, fp32 factors, F.scaled_dot_product_attention; AdamW (fused). Prints one JSON object a line: eager, then torch.compile.
`step_ms` is the median over the steps, each timed by device events; the losses of all steps are read once, after the last.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch_step import block_forward, fake_quantize, rope_tables


def step_milliseconds(step: Callable[[], None], warmup: int, steps: int) -> float:
    times = []
    for i in range(warmup + steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        if i >= warmup:
            times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(hidden=4096, heads=32, kv_heads=32, ffn=11008, tokens=2048, bits=3, group=128, batch=1, steps=20, warmup=5).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cuda", help="default cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(args.device)

    head_dim = args.hidden // args.heads
    shapes = {"q": (args.hidden, args.hidden), "k": (args.kv_heads * head_dim, args.hidden), "v": (args.kv_heads * head_dim, args.hidden),
              "o": (args.hidden, args.hidden), "gate": (args.ffn, args.hidden), "up": (args.ffn, args.hidden), "down": (args.hidden, args.ffn)}
    half = torch.bfloat16
    weights = {name: (torch.randn(shape) / shape[1] ** 0.5).to(half) for name, shape in shapes.items()}
    groups = {name: args.group or shape[1] for name, shape in shapes.items()}
    factors = {name: [torch.full((w.numel() // groups[name], 1), 4.0, requires_grad=True) for _ in range(2)] for name, w in weights.items()}
    norms = ((1 + 0.2 * torch.randn(args.hidden)).to(half), (1 + 0.2 * torch.randn(args.hidden)).to(half))
    rope = tuple(table.to(half) for table in rope_tables(args.tokens, head_dim, 10000.0))
    mask = torch.zeros(0)  # attention is causal by itself
    samples = [torch.randn(args.tokens, args.hidden).to(half) for _ in range(args.batch)]
    fixed = (norms, rope, mask, args.heads, 1e-5, True)

    def loss_of(sample: torch.Tensor, target: torch.Tensor, quantized: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(block_forward(sample, quantized, *fixed).float(), target.float())

    def quantize() -> dict[str, torch.Tensor]:
        return {name: fake_quantize(w, *factors[name], args.bits, groups[name]).to(half) for name, w in weights.items()}

    with torch.no_grad():
        targets = [block_forward(sample, weights, *fixed) for sample in samples]
    for mode in ("eager", "compile"):
        optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=1e-2, weight_decay=0.0, fused=args.device == "cuda")
        compiled = mode == "compile"
        run_loss, run_quantize = (torch.compile(loss_of), torch.compile(quantize)) if compiled else (loss_of, quantize)
        losses = []

        def step() -> None:
            optimizer.zero_grad()
            quantized = run_quantize()
            leaves = {name: w.detach().requires_grad_() for name, w in quantized.items()}  # the weights' graph is walked once a step
            for sample, target in zip(samples, targets):
                loss = run_loss(sample, target, leaves) / args.batch
                loss.backward()
                losses.append(loss.detach())
            torch.autograd.backward(list(quantized.values()), [leaves[name].grad for name in quantized])
            optimizer.step()

        try:
            milliseconds = step_milliseconds(step, args.warmup, args.steps)
        except Exception as failure:  # one mode that fails leaves the other's figure
            print(json.dumps({"mode": mode, "failed": str(failure)[:300]}), flush=True)
            continue
        print(json.dumps({
            "mode": mode, "step_ms": round(milliseconds, 3), "sample_ms": round(milliseconds / args.batch, 3), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device, "python": sys.version.split()[0],
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if args.device == "cuda" else None,
            "shape": {name: getattr(args, name) for name in ("hidden", "heads", "kv_heads", "ffn", "tokens", "batch")},
            "bits": args.bits, "group": args.group, "first_loss": losses[0].item(), "last_loss": losses[-1].item()}), flush=True)


if __name__ == "__main__":
    main()
