#!/usr/bin/env python3
"""Sets `enamel bench`'s estimates of peak memory against the peaks it measures, a process a row.

    python3 scripts/plan_memory.py [--enamel target/release/enamel] [--out docs/measurements/memory.md]

Fails when a row is further off than the share that `enamel plan` promises. Memory does not depend on speed, so a busy machine does not matter.
"""

import argparse
import json
import os
import platform
import subprocess
import sys

PROMISED = 0.10
SHAPES = ["1x128", "1x512", "4x256"]
DENSE = ["--dequantize"]
NF4 = ["--load-in-4bit", "--bnb-4bit-use-double-quant"]
CHECKPOINTED = ["--gradient-checkpointing"]


def rows():
    """(benchmark's own?, what, shape, arguments)"""
    for dtype in ["f32", "bf16"]:
        for kept, more in [("", []), (", checkpointed", CHECKPOINTED)]:
            for shape in SHAPES:
                yield True, f"LoRA r = 16, {dtype}{kept}", shape, ["--compute-dtype", dtype, *DENSE, *more]
    for shape in SHAPES:
        yield True, "LoRA r = 16, NF4 with double quantisation", shape, NF4
    yield True, "LoRA r = 16, NF4 with double quantisation, checkpointed", "4x256", NF4 + CHECKPOINTED
    yield True, "LoRA r = 16, the file's Q4_1 blocks", "4x256", []
    yield True, "LoRA r = 16, int8", "4x256", ["--load-in-8bit"]
    yield False, "LoRA r = 64, f32", "4x256", [*DENSE, "--r", "64"]
    yield False, "LoRA r = 16, f32, every 5 blocks", "4x256", [*DENSE, "--gradient-checkpointing=every:5"]
    yield False, "LoRA r = 16, f32", "2x1024", DENSE
    yield False, "LoRA r = 16, f32", "8x128", DENSE
    for method in ["dora", "lokr", "loha", "adalora", "vera", "ia3", "miss"]:
        yield False, f"{method}, f32", "4x256", [*DENSE, "--methods", method]
    for optim in ["adamw_torch", "adamw_8bit"]:
        for kept, more in [("", []), (", checkpointed", CHECKPOINTED)]:
            for shape in SHAPES:
                yield False, f"full, f32, {optim}{kept}", shape, [*DENSE, "--methods", "full", "--optim", optim, *more]


def measure(enamel, shape, arguments):
    command = [enamel, "bench", "--steps", "2", "--decode", "0", "--json", "--shapes", shape, *arguments]
    if "--r" not in arguments:
        command += ["--r", "16"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    step = next(line for line in map(json.loads, said.splitlines()) if line["kind"] == "step")
    return step["estimated_memory"], step["peak_memory"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--enamel", default="target/release/enamel")
    parser.add_argument("--out")
    arguments = parser.parse_args()

    lines, wrong = [], []
    for own, what, shape, options in rows():
        estimated, measured = measure(arguments.enamel, shape, options)
        off = estimated / measured - 1
        mib = lambda n: f"{n / 2**20:.0f}"
        row = f"| {what} | {shape.replace('x', ' × ')} | {mib(estimated)} | {mib(measured)} | {100 * off:+.1f} % |"
        print(row, flush=True)
        lines.append((own, row))
        if abs(off) > PROMISED:
            wrong.append(row)
    if arguments.out:
        head = "| what | rows × tokens | estimated, MiB | measured, MiB | off by |\n|---|---|---|---|---|\n"
        table = lambda own: head + "\n".join(row for o, row in lines if o == own) + "\n"
        threads = os.environ.get("RAYON_NUM_THREADS", os.cpu_count())
        with open(arguments.out, encoding="utf-8") as file:
            text = file.read()
        for name, own in [("benchmark", True), ("others", False)]:
            begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            before, rest = text.split(begin)
            text = before + begin + f"{platform.system()}, {threads} threads:\n\n" + table(own) + end + rest.split(end)[1]
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write(text)
    if wrong:
        sys.exit("more than 10 % off:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
