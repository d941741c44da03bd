#!/usr/bin/env python3
"""Training speed and memory of Enamel and of PEFT + PyTorch on the same machine, in one run.

    python scripts/bench_vs_peft.py [--enamel PATH] [--shapes 1x128,1x512,4x256] [--steps 5]

Needs a Python environment with torch, transformers, peft and gguf (it installs nothing) and a built
`enamel` with smollm2-135m-instruct in its cache. Both train LoRA, r = 16 on all seven projections, with
AdamW in f32 and without dropout, on random tokens that all count in the loss; the median step counts.
Peak memory is the largest resident set of a process that does nothing else.
"""
import argparse
import json
import os
import platform
import subprocess
import sys

PEFT_SIDE = r"""
import json, resource, statistics, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

path, rows, tokens, steps, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
torch.manual_seed(0)
folder, file = path.rsplit("/", 1)
kw = {"gguf_file": file} if file.endswith(".gguf") else {}
model = AutoModelForCausalLM.from_pretrained(folder if kw else path, dtype=torch.float32, **kw)
# Loading dequantises a GGUF file; the peak that counts is training's.
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
seconds = []
for _ in range(steps + 1):
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
median = statistics.median(seconds[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": median, "tokens_per_second": rows * tokens / median, "peak_memory": peak}))
"""


def run(command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} … failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--enamel", default=os.path.join(os.environ.get("CARGO_TARGET_DIR", "target"), "release/enamel"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shapes", default="1x128,1x512,4x256")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    located = run([args.enamel, "pull", args.model]).strip().splitlines()[-1]
    env = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads; {args.model}; median of {args.steps} steps\n")
    print("| shape | Enamel, tokens/s | PEFT, tokens/s | ratio | Enamel, peak GB | PEFT, peak GB |")
    print("|---|---|---|---|---|---|", flush=True)
    for shape in args.shapes.split(","):
        rows, tokens = shape.split("x")
        out = run([args.enamel, "bench", "--model", args.model, "--shapes", shape, "--steps", str(args.steps),
                   "--decode", "0", "--device", "flex", "--json"], env=env)
        ours = json.loads(out.strip().splitlines()[-1])
        theirs = json.loads(run([sys.executable, "-c", PEFT_SIDE, located, rows, tokens, str(args.steps),
                                 str(args.threads)]).strip().splitlines()[-1])
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        print(f"| {rows} × {tokens} | {ours['tokens_per_second']:.0f} | {theirs['tokens_per_second']:.0f} | {ratio:.2f} "
              f"| {ours['peak_memory'] / 1e9:.2f} | {theirs['peak_memory'] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
