#!/usr/bin/env python3
"""AutoRound on a whole model with the samples and as many steps as `omniquant calibrate` is given: what it is compared with.

Everything else is AutoRound's own default. Writes the model with its quantized weights in place, as a folder that any program reads, and prints one
JSON object. Needs auto-round, transformers and h5py.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for option in ("model", "tokens", "output"):
    parser.add_argument("--" + option, type=Path, required=True)
for option, value in dict(bits=3, group=64, samples=16, seqlen=512, epochs=5, threads=1).items():
    parser.add_argument("--" + option, type=int, default=value, help=f"default {value}")
args = parser.parse_args()
os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")  # before torch is loaded

import h5py  # noqa: E402
import torch  # noqa: E402
from auto_round import AutoRound, __version__  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(args.threads)
with h5py.File(args.tokens) as file:
    ids = torch.from_numpy(file["tokens"][: args.samples * args.seqlen].astype("int64")).reshape(args.samples, 1, args.seqlen)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
rounding = AutoRound(model, tokenizer, bits=args.bits, group_size=args.group, sym=False, iters=args.epochs * args.samples, nsamples=args.samples,
                     seqlen=args.seqlen, batch_size=1, dataset=list(ids), device_map="cpu", enable_torch_compile=False)  # fmt: skip
begin = time.perf_counter()
quantized, _ = rounding.quantize()
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
quantized.float().save_pretrained(args.output)
print(json.dumps({"seconds": seconds, "blocks": model.config.num_hidden_layers, "peak_mib": peak, "auto_round": __version__, "torch": torch.__version__}))
