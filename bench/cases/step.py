"""A training step of one block: as a whole, its matrix products by themselves, and each operation beside what the machine allows.

`bench/step.c`, a block with random weights of SmolLM2's shape (hidden 576, 9 heads, 3 kv heads, MLP 1536), T = 512, W3 in groups of 64:
quantize, forward, loss, backward, the factors' gradients, AdamW. Beside it the same step written plainly in PyTorch
(`bench/torch_step.py`), where `--python` has torch.
"""

COLUMNS = {
    "variant": "`fp32`; `bf16` (`bf16_products: true`); `let a4` (LWC, LET and 4-bit activations, W4 per channel); `pytorch`: eager, fp32",
    "step_ms": "the median step, in turn with its products, so that a noisy machine slows both",
    "products_ms": "exactly the matrix products of a step done again by themselves: same shapes, same memory, same order; the median. PyTorch: "
                   "their flops at the speed of one of its products of T x hidden x MLP",
    "ratio": "`step_ms` over `products_ms`: 1 would mean that everything else is free",
    "step_gflop": "floating-point operations of these products",
    "products_gflops": "their speed, `step_gflop` over `products_ms`",
    "limit_gflops": "the best speed of one product of 1536 x 1536 x 1536 in the same library and in the type of the linear layers' products",
    "limit_copy_gb_s": "bytes a second of a copy of 128 MiB, each counted read and written; the best",
    "limit_step_ms": "the sum of `limit_ms` over the operations",
    "step_of_limit": "`limit_step_ms` over `step_ms`",
    "against_pytorch": "`step_ms` over PyTorch's",
    "part": "what of a step the operation belongs to (`kernels/trace.h`)",
    "operation": "as `kernels/kernels.h` names it; `_bf16`: with its operands rounded; `rest`: what lies between them",
    "calls": "in a step",
    "ms": "in a step, the median of as many further steps, in which each operation is timed by itself",
    "share": "`ms` over the sum of all",
    "mbyte": "of its larger operands, each read or written once",
    "gflop": "of its matrix products, as the mathematics asks for them: of attention those of the pairs that see each other",
    "limit_ms": "the longer of its bytes at the copy's speed and its flops at the large product's, of attention always in fp32",
    "of_limit": "`limit_ms` over `ms`: 1 is as fast as the machine allows; above it where operands stay in a cache",
}
LIMIT = ("of products the speed of one large product (`limit_gflops`), of the rest memory's (`limit_copy_gb_s`), both measured in the same minute "
         "on as many threads; exponentials and divisions are not counted")

VARIANTS = {"fp32": [], "bf16": ["--bf16"], "let a4": ["--let", "--bits", 4, "--group", 0, "--abits", 4]}


def options(parser):
    parser.add_argument("--steps", type=int, default=30, help="timed steps (30), and as many in which operations are timed")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--variants", nargs="*", choices=[*VARIANTS, "pytorch"], default=[*VARIANTS, "pytorch"], help="default: all")
    parser.add_argument("--sizes", default="", help="further options of build/bench/step in one word: '--hidden 64 --heads 4'")


def pytorch_step(bench, arguments):
    """None where it is not asked for or --python has no torch."""
    if "pytorch" not in arguments.variants or not bench.has_module("torch"):
        return None
    return bench.run_json([bench.python, bench.source("torch_step.py"), "--threads", arguments.threads, "--steps", arguments.steps,
                           *arguments.sizes.split()])  # fmt: skip


def rows(bench, arguments):
    reference = pytorch_step(bench, arguments)
    results = {}
    for variant, flags in VARIANTS.items():
        if variant in arguments.variants:
            results[variant] = bench.run_json([bench.program("bench/step"), "--steps", arguments.steps, "--threads", arguments.threads, *flags,
                                               *arguments.sizes.split()])  # fmt: skip
    for variant, step in results.items():
        yield {"variant": variant, "step_ms": step["step_ms"], "products_ms": step["products_ms"], "ratio": step["ratio"],
               "step_gflop": step["gflop"], "products_gflops": step["products_gflops"], "limit_gflops": step["sgemm_gflops"],
               "limit_copy_gb_s": step["copy_gb_s"], "limit_step_ms": step["limit_ms"], "step_of_limit": step["limit_ms"] / step["step_ms"],
               "against_pytorch": step["step_ms"] / reference["step_ms"] if reference and variant == "fp32" else None}  # fmt: skip
    if reference:
        yield {"variant": "pytorch", "step_ms": reference["step_ms"], "products_ms": reference["products_ms"],
               "ratio": reference["step_ms"] / reference["products_ms"], "step_gflop": reference["products_ms"] * reference["gemm_gflops"] / 1e3,
               "products_gflops": reference["gemm_gflops"], "limit_gflops": None, "limit_copy_gb_s": None, "limit_step_ms": None,
               "step_of_limit": None, "against_pytorch": 1.0}  # fmt: skip
    for variant, step in results.items():
        total = sum(operation["ms"] for operation in step["operations"])
        for operation in sorted(step["operations"], key=lambda operation: -operation["ms"]):
            yield {"variant": variant, "part": operation["part"], "operation": operation["operation"], "calls": operation["calls"],
                   "ms": operation["ms"], "share": operation["ms"] / total, "mbyte": operation["mbyte"], "gflop": operation["gflop"],
                   "limit_ms": operation["limit_ms"], "of_limit": operation["limit_ms"] / operation["ms"] if operation["limit_ms"] and operation["ms"] else None}  # fmt: skip
