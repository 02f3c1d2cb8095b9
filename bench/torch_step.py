#!/usr/bin/env python3
"""One training step of learnable weight clipping on one LLaMA block, written plainly in PyTorch: what `bench/step` is compared with.

A step: fake-quantize the seven linears (weights frozen; gamma and beta learned), block forward, mean square error against the full-precision
block, backward, AdamW. fp32, one sample of T tokens. Prints one JSON object; `step_ms` is the median over the steps, `gemm_gflops` the speed of one
[T, hidden] x [hidden, ffn] product (rows 512, columns 1536, depth 576 by default), `products_ms` the step's own products at that speed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def fake_quantize(w: Tensor, gamma: Tensor, beta: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric quantize-dequantize of w [out, in] with clipping factors per group of columns; straight-through rounding."""
    def round_through(value: Tensor) -> Tensor:
        return (value.round() - value).detach() + value

    levels = 2**bits - 1
    x = w.reshape(-1, group)
    hi = torch.sigmoid(gamma) * x.amax(1, keepdim=True)
    lo = torch.sigmoid(beta) * x.amin(1, keepdim=True)
    scale = ((hi - lo) / levels).clamp(1e-5, 1e4)
    zero = (-lo / scale).clamp(-1e4, 1e4).round().detach()
    codes = (round_through(x / scale) + zero).clamp(0, levels)
    return ((codes - zero) * scale).reshape(w.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope on x [heads, T, head_dim]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def block_forward(x: Tensor, w: Weights, norms: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor], mask: Tensor, heads: int, eps: float,
                  sdpa: bool) -> Tensor:
    """One LLaMA block on x [T, hidden]."""
    tokens, head_dim = len(x), w["q"].shape[0] // heads
    h = rms_norm(x, norms[0], eps)
    q, k, v = (F.linear(h, w[name]).view(tokens, -1, head_dim).transpose(0, 1) for name in "qkv")
    q, k = rotate(q, *rope), rotate(k, *rope)
    if sdpa:
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    else:
        repeats = heads // len(k)
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        attended = torch.softmax(q @ k.transpose(1, 2) * head_dim**-0.5 + mask, -1) @ v
    x = x + F.linear(attended.transpose(0, 1).reshape(tokens, -1), w["o"])
    h = rms_norm(x, norms[1], eps)
    return x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])


def rope_tables(tokens: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def product_flops(args: argparse.Namespace) -> float:
    """Flops of a step's matrix products: forward, gradients of the seven weights, and of the inputs of all but q, k, v (theirs is frozen)."""
    head_dim = args.hidden // args.heads
    qkv = args.hidden * head_dim * (args.heads + 2 * args.kv_heads)
    rest = args.hidden * args.hidden + 3 * args.hidden * args.ffn
    attention = 2 * args.heads * args.tokens * head_dim  # both products, a token; the causal half is computed too
    return 2 * args.tokens * (2 * qkv + 3 * rest + 3 * attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(hidden=576, heads=9, kv_heads=3, ffn=1536, tokens=512, bits=3, group=64, threads=1, steps=10, warmup=3).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, help=f"default {value}")
    parser.add_argument("--sdpa", action="store_true", help="F.scaled_dot_product_attention in place of matmul and softmax")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    head_dim = args.hidden // args.heads
    shapes = {"q": (args.hidden, args.hidden), "k": (args.kv_heads * head_dim, args.hidden), "v": (args.kv_heads * head_dim, args.hidden),
              "o": (args.hidden, args.hidden), "gate": (args.ffn, args.hidden), "up": (args.ffn, args.hidden), "down": (args.hidden, args.ffn)}
    if any(columns % (args.group or columns) for _, columns in shapes.values()):
        parser.error("--group must divide hidden and ffn (0: the whole row)")
    weights = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    groups = {name: args.group or shape[1] for name, shape in shapes.items()}
    factors = {name: [torch.full((w.numel() // groups[name], 1), 4.0, requires_grad=True) for _ in range(2)] for name, w in weights.items()}
    norms = (1 + 0.2 * torch.randn(args.hidden), 1 + 0.2 * torch.randn(args.hidden))
    rope = rope_tables(args.tokens, head_dim, 10000.0)
    mask = torch.full((args.tokens, args.tokens), float("-inf")).triu(1)
    x = torch.randn(args.tokens, args.hidden)
    fixed = (norms, rope, mask, args.heads, 1e-5, args.sdpa)
    target = block_forward(x, weights, *fixed)
    optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=1e-2, weight_decay=0.0)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        quantized = {name: fake_quantize(w, *factors[name], args.bits, groups[name]) for name, w in weights.items()}
        loss = F.mse_loss(block_forward(x, quantized, *fixed), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    left, right = torch.randn(args.tokens, args.hidden), torch.randn(args.ffn, args.hidden)
    steps, products = [], []
    for i in range(args.warmup + args.steps):  # products are timed between the steps: a machine that others use slows both
        spent = seconds_of(step)
        spent_on_products = [seconds_of(lambda: F.linear(left, right)) for _ in range(4)][1:]
        if i >= args.warmup:
            steps.append(spent)
            products += spent_on_products
    seconds = statistics.median(steps)
    gemm = 2 * args.tokens * args.hidden * args.ffn / statistics.median(products)
    print(json.dumps({
        "step_ms": round(seconds * 1e3, 2), "products_ms": round(product_flops(args) / gemm * 1e3, 2), "gemm_gflops": round(gemm / 1e9, 1),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "attention": "sdpa" if args.sdpa else "eager",
        "shape": {name: getattr(args, name) for name in ("hidden", "heads", "kv_heads", "ffn", "tokens")},
        "bits": args.bits, "group": args.group, "steps": args.steps, "first_loss": losses[0], "last_loss": losses[-1]}))


if __name__ == "__main__":
    main()
