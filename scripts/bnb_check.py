"""What `enamel quantize` writes beside what bitsandbytes itself makes of the same model, on a real one.

    python scripts/bnb_check.py --enamel target/release/enamel > docs/measurements/quantised.md

Needs torch, transformers, bitsandbytes and gguf, and the model in Enamel's cache (`enamel pull`). Installs and
downloads nothing. Prints a report in Markdown and exits 1 where a bound is not kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

SKIP = ["down_proj", "model.layers.1"]
FOUR = ["nf4", "fp4"]
# 4-bit weights are read alike and summed in another order, over 30 layers; logits range over some 40, so that this is one
# part in 80,000. bitsandbytes' int8 on a CPU rounds each row of inputs, so there only the weights are compared.
BOUND = 5e-4
failures = []


def rows(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def must(what, holds):
    if not holds:
        failures.append(what)
    return "yes" if holds else "**no**"


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def quantised_by_bitsandbytes(dense, folder, settings, dtype):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype, device_map="cpu")
    model.save_pretrained(folder)


def ours(enamel, folder, work):
    """Our logits, and the rows of token ids that they are for."""
    subprocess.run([enamel, "score", "--model", folder, "--input", work / "rows.jsonl", "--output", work / "s.jsonl",
                    "--logits", work / "l.safetensors", "--device", "flex"], check=True, capture_output=True)  # fmt: skip
    ids = [json.loads(line)["input_ids"] for line in (work / "s.jsonl").read_text().splitlines()]
    logits = load_file(work / "l.safetensors")
    return [(row, logits[f"logits.{i}"]) for i, row in enumerate(ids)]


@torch.no_grad()
def worst(model, pairs):
    # In training mode: in evaluation a CPU packs the weights anew, for kernels of its own.
    model.train()
    return max((model(torch.tensor([row])).logits[0].double() - mine.double()).abs().max().item() for row, mine in pairs)


def case(args, work, dense, name, flags, settings, dtype):
    theirs, mine = work / "theirs", work / "mine"
    quantised_by_bitsandbytes(dense, theirs, settings, dtype)
    said = subprocess.run([args.enamel, "quantize", dense, "--output", mine, "--overwrite", *flags], capture_output=True, text=True)
    if said.returncode:
        sys.exit(said.stderr)
    a, b = tensors(theirs), tensors(mine)
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (theirs, mine)]
    # transformers writes a list that it was given; the head has to be in it.
    names = must(f"{name}: names", sorted(a) == sorted(b))
    other = [k for k in a if k in b and not same(a[k], b[k])]
    equal = must(f"{name}: bytes", not other)
    config = must(f"{name}: config", configs[0] == configs[1])
    model = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32, device_map="cpu")
    # transformers leaves what is not quantised in the file's type, and activations then take it: in bf16 they would differ by
    # about 2 from ours, which are f32.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    if "load_in_8bit" in settings:
        gap = "not compared"
    else:
        gap = worst(model, ours(args.enamel, mine, work))
        must(f"{name}: logits", gap <= BOUND)
        gap = f"{gap:.1e}"
    rows(name, f"{len(a)}", names, f"{equal}" if not other else f"{equal}, {len(other)} differ", config, gap)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--enamel", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a directory with dense weights; else smollm2-135m-instruct from Enamel's cache")
    args = parser.parse_args()
    args.enamel = args.enamel.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.model is None:
            pulled = subprocess.run([args.enamel, "pull", "smollm2-135m-instruct"], capture_output=True, text=True, check=True)
            gguf = Path(pulled.stdout.strip().splitlines()[-1])
            more = {"gguf_file": gguf.name}
            source = gguf.parent
        else:
            gguf, more, source = args.model, {}, args.model
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more)
        if more:
            # transformers will not save what it has read from a GGUF file.
            read, config = model, model.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            del read
        tokenizer = AutoTokenizer.from_pretrained(source, **more)
        text = Path(__file__).resolve().parent.parent / "datasets/handbook/valid.jsonl"
        (work / "rows.jsonl").write_text("\n".join(text.read_text().splitlines()[:4]) + "\n")
        for kind in (torch.float32, torch.bfloat16):
            model.to(kind).save_pretrained(work / str(kind))
            tokenizer.save_pretrained(work / str(kind))
        print("# Quantised bases, measured\n\n## What `enamel quantize` writes\n")
        print(f"`scripts/bnb_check.py` with torch {version('torch')}, transformers {version('transformers')}, bitsandbytes "
              f"{version('bitsandbytes')}, on {platform.machine()}, {os.cpu_count()} CPUs. Base: {gguf.name}, made dense. bitsandbytes\n"
              "quantises it through transformers and `enamel quantize` without; both directories are compared tensor by\n"
              "tensor, bit by bit. Then transformers loads ours, and its logits on four rows of the handbook are compared\n"
              f"with those of `enamel score` on the same directory (bound {BOUND:.0e}).\n")  # fmt: skip
        rows("format, base", "tensors", "same names", "same bits, types and shapes", "same `quantization_config`", "largest difference of a logit")
        rows(*["---"] * 6)
        four, double = {"load_in_4bit": True}, {"bnb_4bit_use_double_quant": True}
        f32, bf16 = torch.float32, torch.bfloat16
        for name, flags, settings, dtype in [
            ("nf4, f32", [], four | {"bnb_4bit_quant_type": "nf4"}, f32),
            ("nf4 doubly, f32", ["--bnb-4bit-use-double-quant"], four | double | {"bnb_4bit_quant_type": "nf4"}, f32),
            ("nf4 doubly, bf16", ["--load-in-4bit", "--bnb-4bit-use-double-quant"], four | double | {"bnb_4bit_quant_type": "nf4"}, bf16),
            ("fp4, f32", ["--bnb-4bit-quant-type", "fp4"], four | {"bnb_4bit_quant_type": "fp4"}, f32),
            ("nf4, f32, layers skipped", ["--skip-modules", *SKIP],
             four | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": [*SKIP, "lm_head"]}, f32),
            ("int8, f32", ["--load-in-8bit"], {"load_in_8bit": True}, f32),
            ("int8, bf16", ["--load-in-8bit"], {"load_in_8bit": True}, bf16),
        ]:  # fmt: skip
            case(args, work, work / str(dtype), name, flags, settings, dtype)
    print("\nint8: bitsandbytes rounds inputs to 8 bits too, so its logits are not those of the weights alone.\n")
    print("All checks hold." if not failures else "**Not kept:** " + "; ".join(failures))
    sys.exit(bool(failures))


main()
