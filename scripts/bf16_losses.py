#!/usr/bin/env python3
"""Trains a recipe in f32 and in bf16 compute and compares the losses, step by step.

    cargo build --release
    python3 scripts/bf16_losses.py [RECIPE] [STEPS]

Exits with 1 where the mean loss of any ten steps in a row, or the validation loss, differs by 1 % or more.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

WINDOW = 10
LIMIT = 0.01


def losses(recipe, steps, dtype, out):
    """Losses of all steps and the last validation loss of a run in `dtype`."""
    settings = [f"train.max_steps={steps}", "train.logging_steps=1", "train.samples=0",
                f"train.eval_steps={steps}", f"train.save_steps={steps}"]
    command = [os.environ.get("ENAMEL", "target/release/enamel"), "train", recipe, "--output", str(out), "--overwrite",
               "--compute-dtype", dtype]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [e["loss"] for e in entries if e["kind"] == "train"]
    valid = [e["loss"] for e in entries if e["kind"] == "valid"]
    return train, valid[-1]


def main():
    recipe = sys.argv[1] if len(sys.argv) > 1 else "datasets/handbook/lora.toml"
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    with tempfile.TemporaryDirectory() as folder:
        runs = {d: losses(recipe, steps, d, pathlib.Path(folder) / d) for d in ("f32", "bf16")}
    (f32, f32_valid), (bf16, bf16_valid) = runs["f32"], runs["bf16"]
    worst = 0.0
    for start in range(0, steps, WINDOW):
        a, b = (sum(x[start:start + WINDOW]) / len(x[start:start + WINDOW]) for x in (f32, bf16))
        worst = max(worst, abs(b / a - 1))
        print(f"steps {start + 1:3}-{start + len(f32[start:start + WINDOW]):3}  "
              f"f32 {a:.5f}  bf16 {b:.5f}  {100 * (b / a - 1):+.3f} %")
    gap = bf16_valid / f32_valid - 1
    single = max(abs(b / a - 1) for a, b in zip(f32, bf16))
    print(f"validation     f32 {f32_valid:.5f}  bf16 {bf16_valid:.5f}  {100 * gap:+.3f} %")
    print(f"largest difference of a single step {100 * single:.3f} %")
    sys.exit(max(worst, abs(gap)) >= LIMIT)


if __name__ == "__main__":
    main()
