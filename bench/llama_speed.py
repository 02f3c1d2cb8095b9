#!/usr/bin/env python3
"""One run of a GGUF file in llama.cpp: llama_speed.py FILE THREADS PROMPT GENERATE wall|cpu. Prints a JSON object: tokens a second of the prompt and of
generation, and MiB resident. Needs llama-cpp-python.
"""

import json
import resource
import sys
import time

from llama_cpp import Llama


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


path, threads, prompt_tokens, generate_tokens = sys.argv[1], *map(int, sys.argv[2:5])
clock = time.process_time if sys.argv[5] == "cpu" else time.perf_counter
before = resident()
model = Llama(path, n_ctx=prompt_tokens + generate_tokens, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
prompt = [5 + 7 * i % 1000 for i in range(prompt_tokens)]
model.eval(prompt[:8])  # pages come in
model.reset()
begin = clock()
model.eval(prompt)
read = clock()
for i in range(generate_tokens):
    model.eval([5 + 11 * i % 1000])
end = clock()
print(json.dumps({"prompt": prompt_tokens / (read - begin), "generate": generate_tokens / (end - read), "memory": resident() - before}))
