"""The same calibration by other code, one thread each: the paper's method in PyTorch, and AutoRound.

`bench/torch_model.py` and `bench/autoround_model.py`. Setting: W3 in groups of 64, 16 sequential samples of 512 tokens, 5 epochs of one sample
a step: 80 steps a block for everybody, on the same tokens. The peers write their quantized weights into a model folder, and one program evaluates
all (`omniquant eval`). What `--python` lacks is left out, and said on standard error.
"""

import json
import sys

SEPARATE = True
COLUMNS = {
    "what": "`full precision`; `rtn`: rounded to nearest; `paper` and `fast`: `omniquant calibrate` with the paper's training and with "
            "`configs/fast-w3a16g64.yaml`'s; `pytorch`: the paper's training in PyTorch; `autoround`: AutoRound, in all else as it comes",
    "version": "of what was compared with",
    "steps_a_block": "optimizer steps a block, each with one sample",
    "seconds_a_block": "all of a block over the blocks: targets, training, the quantized stream; AutoRound: of its `quantize`, which also runs "
                       "the model for inputs",
    "limit_seconds_a_block": "the matrix products of these steps at the speed of one large product in fp32 (`limit_gflops` of the case step)",
    "peak_mib": "the process's largest resident set, libraries included (`ru_maxrss`)",
    "perplexity": "of `omniquant eval` on the evaluation tokens",
}
LIMIT = ("`limit_seconds_a_block`: a step's own products in fp32 at the machine's best speed; AutoRound may compute in bf16, and learns a value "
         "for each weight, the others two for each group")

PEERS = {"pytorch": ("torch_model.py", ("torch", "safetensors", "h5py")),
         "autoround": ("autoround_model.py", ("auto_round", "transformers", "h5py"))}  # fmt: skip
SAMPLES, SEQLEN = 16, 512


def options(parser):
    parser.add_argument("--blocks", type=int, default=0, help="only the first, as a model whose perplexity says nothing (all)")
    parser.add_argument("--epochs", type=int, default=5, help="default 5")
    parser.add_argument("--evaluation", help="tokens to predict (evaluation.h5 beside --tokens)")
    parser.add_argument("--offset", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens (40)")
    every = ["rtn", "paper", "fast", *PEERS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, help="default: all")


def model_of(bench, blocks):
    """The model, or one of its first blocks that shares its files."""
    bench.need_model()
    if not blocks:
        return bench.model.resolve()
    folder = bench.folder / "model"
    folder.mkdir()
    for file in bench.model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((bench.model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}), encoding="utf-8")
    return folder


def product_limit(bench, config):
    """Seconds that the products of one step take at least."""
    step = bench.run_json([bench.program("bench/step"), "--steps", 3, "--hidden", config["hidden_size"], "--heads", config["num_attention_heads"],
                           "--kv-heads", config["num_key_value_heads"], "--ffn", config["intermediate_size"], "--tokens", SEQLEN])  # fmt: skip
    return step["gflop"] / step["sgemm_gflops"]


def rows(bench, arguments):
    bench.model = model_of(bench, arguments.blocks)
    config = json.loads((bench.model / "config.json").read_text(encoding="utf-8"))
    steps, limit = arguments.epochs * SAMPLES, product_limit(bench, config)
    evaluation = arguments.evaluation or bench.tokens.with_name("evaluation.h5")

    def perplexity(*of):
        return json.loads(bench.run([bench.omniquant, "eval", "--backend", "cpu", "--tokens", evaluation, "--seqlen", SEQLEN, "--windows", arguments.windows, "--offset",
                                     arguments.offset, "--json", *of])[0])["perplexity"]  # fmt: skip

    def row(what, version=None, steps=None, seconds=None, peak=None, of=()):
        return {"what": what, "version": version, "steps_a_block": steps, "seconds_a_block": seconds,
                "limit_seconds_a_block": steps * limit if steps else None, "peak_mib": peak, "perplexity": perplexity(*of)}  # fmt: skip

    yield row("full precision", of=("--model", bench.model))
    same = ["--wbits", 3, "--group-size", 64, "--batch", 1, "--samples", SAMPLES, "--seqlen", SEQLEN, "--sampling", "sequential"]
    trained = ["--epochs", arguments.epochs]
    ours = {"rtn": ["--epochs", 0], "paper": trained, "fast": [*trained, "--lwc-init", "search", "--optimizer", "sign"]}
    for what, flags in ours.items():
        if what in arguments.only:
            store = bench.folder / what
            run = bench.calibrate(1, [*same, *flags], store)
            yield row(what, "omniquant", steps if what != "rtn" else None, run.blocks_seconds / run.blocks, run.peak_mib,
                      ("--model", bench.model, "--quantized", store))  # fmt: skip
    for what, (script, modules) in PEERS.items():
        missing = [module for module in modules if what in arguments.only and not bench.has_module(module)]
        if missing:
            print(f"peers: {what} is left out: {bench.python} has no {' '.join(missing)}", file=sys.stderr)
        elif what in arguments.only:
            folder = bench.folder / what
            run = bench.run_json([bench.python, bench.source(script), "--model", bench.model, "--tokens", bench.tokens.resolve(), "--output", folder,
                                  "--bits", 3, "--group", 64, "--samples", SAMPLES, "--seqlen", SEQLEN, "--epochs", arguments.epochs,
                                  "--threads", 1])  # fmt: skip
            version = f"auto-round {run['auto_round']}" if what == "autoround" else f"torch {run['torch']}"
            yield row(what, version, steps, run["seconds"] / run["blocks"], run["peak_mib"], ("--model", folder))
