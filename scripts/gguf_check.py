"""What llama.cpp makes of exported files: every type of a merged model, and base + GGUF LoRA, against the f32 file.

    python scripts/gguf_check.py --enamel target/release/enamel --adapter runs/handbook-lora/adapter > docs/measurements/gguf.md

Needs llama-cpp-python and numpy. Writes about a gigabyte under --work and removes it.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

PROMPT = "How do I train an adapter?"
TOKENS = 24


def model(path, lora=None):
    return llama_cpp.Llama(model_path=str(path), lora_path=lora and str(lora), n_ctx=512, logits_all=True, verbose=False, seed=0)


def logits(llama, tokens):
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)], dtype=np.float64)


def row(what, size, ours, reference):
    gap = np.abs(ours - reference)
    same = (ours.argmax(1) == reference.argmax(1)).mean()
    return f"| {what} | {size / 1e6:.1f} | {gap.max():.3f} | {gap.mean():.4f} | {100 * same:.0f} % |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--enamel", default="target/release/enamel")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--work", default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work))

    def export(name, *arguments):
        path = work / f"{name}.gguf"
        subprocess.run([options.enamel, "export", *arguments, "--output", str(path)], check=True, capture_output=True)
        return path

    try:
        files = {kind: export(kind, options.adapter, "--outtype", kind) for kind in ["f32", "f16", "bf16", "q8_0", "q4_0"]}
        lora = export("lora", options.adapter, "--adapter-only")
        base = export("base", options.base, "--outtype", "f32")
        exact = model(files["f32"])
        chat = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        tokens = exact.tokenize(chat.encode(), add_bos=False, special=True)
        reference = logits(exact, tokens)
        print("# Exported GGUF files in llama.cpp\n")
        print(f"Written by `scripts/gguf_check.py` with llama-cpp-python {llama_cpp.__version__}: {options.base} with an adapter of")
        print(f"all seven projections; logits of {len(tokens)} tokens against those of the f32 file, which range over {np.ptp(reference):.0f}.\n")
        print("| file | MB | largest gap | mean gap | same first choice |\n|---|---|---|---|---|")
        for kind in ["f16", "bf16", "q8_0", "q4_0"]:
            print(row(f"merged, {kind}", files[kind].stat().st_size, logits(model(files[kind]), tokens), reference))
        both = logits(model(base, lora), tokens)
        print(row("base f32 + GGUF LoRA f32", lora.stat().st_size, both, reference))
        print(row("base f32 alone", base.stat().st_size, logits(model(base), tokens), reference))
        asked = [{"role": "user", "content": PROMPT}]
        theirs = exact.create_chat_completion(asked, max_tokens=TOKENS, temperature=0.0)["choices"][0]["message"]["content"]
        command = [options.enamel, "generate", "--model", str(files["f32"]), "--prompt", PROMPT, "--max-new-tokens", str(TOKENS)]
        ours = subprocess.run([*command, "--temperature", "0"], check=True, capture_output=True, text=True).stdout
        print(f"\nGreedy answer of {TOKENS} tokens to \"{PROMPT}\", through the file's chat template:\n")
        print(f"- llama.cpp: {theirs.strip()}\n- Enamel: {ours.strip()}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
