"""Peak memory of `enamel merge` on a model of about a gigabyte, written for the purpose.

    python scripts/merge_memory.py --enamel target/release/enamel > docs/measurements/merge.md

Needs Python with numpy and nothing else; writes about 3 GB under --work and removes them.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, LAYERS, KV, VOCAB, SHARDS = 2048, 5632, 8, 512, 32000, 4
SEVEN = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
         "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
         "mlp.down_proj": (HIDDEN, INNER)}  # fmt: skip


def write(path, tensors, dtype):
    """A safetensors file from (name, shape) pairs: small random numbers, made tensor by tensor."""
    size = {"BF16": 2, "F32": 4}[dtype]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        end = at + int(np.prod(shape)) * size
        header[name], at = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, shape in tensors:
            values = (rng.standard_normal(int(np.prod(shape)), dtype=np.float32) * 0.02).view(np.uint32)
            # The upper half of an f32 is a bf16.
            out.write((values >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else values.tobytes())
    return at


def base(folder):
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
              "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": KV // 64, "vocab_size": VOCAB,
              "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [("model.embed_tokens.weight", (VOCAB, HIDDEN))]
    for i in range(LAYERS):
        tensors += [(f"model.layers.{i}.{n}.weight", s) for n, s in SEVEN.items()]
        tensors += [(f"model.layers.{i}.{n}.weight", (HIDDEN,)) for n in ("input_layernorm", "post_attention_layernorm")]
    tensors += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCAB, HIDDEN))]
    each = -(-len(tensors) // SHARDS)
    weight_map, total = {}, 0
    for s in range(SHARDS):
        name = f"model-{s + 1:05}-of-{SHARDS:05}.safetensors"
        part = tensors[s * each : (s + 1) * each]
        total += write(folder / name, part, "BF16")
        weight_map |= {n: name for n, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def adapter(folder, r):
    folder.mkdir()
    key = lambda i, n, side: f"base_model.model.model.layers.{i}.{n}.lora_{side}.weight"  # noqa: E731
    tensors = [t for i in range(LAYERS) for n, (out, width) in SEVEN.items()
               for t in ((key(i, n, "A"), (r, width)), (key(i, n, "B"), (out, r)))]  # fmt: skip
    write(folder / "adapter_model.safetensors", tensors, "F32")
    names = [n.split(".")[1] for n in SEVEN]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": names}))


def run(label, *arguments):
    start = time.perf_counter()
    child = subprocess.Popen([args.enamel, "merge", "--model", WORK / "base", *arguments, "--output", WORK / "out"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"enamel merge failed ({label})")
    shutil.rmtree(WORK / "out")
    print(f"| {label} | {usage.ru_maxrss * 1024 / 1e6:.0f} MB | {time.perf_counter() - start:.1f} s |", flush=True)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--enamel", default="enamel", help="the binary")
parser.add_argument("--work", default=None, help="where to put the files")
args = parser.parse_args()
args.enamel = os.path.abspath(args.enamel) if os.sep in args.enamel else args.enamel
with tempfile.TemporaryDirectory(dir=args.work) as folder:
    WORK = Path(folder)
    total = base(WORK / "base")
    adapter(WORK / "a", 16)
    adapter(WORK / "b", 8)
    print("# Memory of a merge, measured\n")
    print(f"`scripts/merge_memory.py`: a Llama of {LAYERS} layers of width {HIDDEN}, {total / 1e9:.2f} GB of bf16 in {SHARDS} shards; its largest")
    print(f"tensor is {VOCAB * HIDDEN * 4 / 1e6:.0f} MB in f32. The most resident memory of the whole process.\n")
    print("| merge | peak | time |\n|---|---|---|")
    run("one LoRA, `--no-check`", "--adapter", WORK / "a", "--no-check")
    run("two LoRAs, weights 0.7 and 0.3, `--no-check`", "--adapter", WORK / "a", "--adapter", WORK / "b", "--weights", "0.7,0.3", "--no-check")
    run("one LoRA, logits compared (whole models are loaded)", "--adapter", WORK / "a")
