"""A model of Llama-3-8B's shape, far larger than memory when dense, loaded as NF4 and trained for a step.

    python scripts/large_model.py --enamel target/release/enamel > docs/measurements/large_model.md

Needs Python with numpy and nothing else. Writes 16 GB of bf16 weights, shard by shard, under --work and removes them.
The weights are random numbers of a trained model's size; they say nothing about the loss.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
LAYERS_A_SHARD = 4


def tensors(config):
    """(name, shape) of every tensor, a list a shard."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
               "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
               "mlp.down_proj": (hidden, inner)}  # fmt: skip
    yield [("model.embed_tokens.weight", (vocab, hidden)), ("model.norm.weight", (hidden,))]
    for first in range(0, config["num_hidden_layers"], LAYERS_A_SHARD):
        shard = []
        for i in range(first, min(first + LAYERS_A_SHARD, config["num_hidden_layers"])):
            shard += [(f"model.layers.{i}.{n}.weight", s) for n, s in linears.items()]
            shard += [(f"model.layers.{i}.{n}.weight", (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")]
        yield shard
    yield [("lm_head.weight", (vocab, hidden))]


def write(path, shard, rng):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shard:
        end = at + 2 * int(np.prod(shape))
        header[name], at = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, shape in shard:
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 24)
                values = np.ones(count, np.float32) if len(shape) == 1 else rng.standard_normal(count, np.float32) * 0.02
                # The upper half of an f32 is a bf16.
                out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count
    return at


def model(folder, layers):
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
              "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    shards, rng, names, total = list(tensors(config)), np.random.default_rng(0), {}, 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        total += write(folder / name, shard, rng)
        names.update({tensor: name for tensor, _ in shard})
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--enamel", default="target/release/enamel")
    parser.add_argument("--work", type=Path, default=None, help="where to write the model")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, to try the script")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        size = model(work / "model", options.layers)
        command = [options.enamel, "bench", "--model", str(work / "model"), "--load-in-4bit", "--r", "16", "--shapes", "1x32",
                   "--steps", "1", "--decode", "0", "--json"]  # fmt: skip
        command += ["--gradient-checkpointing"] * options.gradient_checkpointing
        # GNU time's figure of the most memory resident at once, mapped files included.
        run = subprocess.run(["/usr/bin/time", "-f", "%M %e", *command], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        peak, elapsed = run.stderr.split()[-2:]
        step = next(line for line in map(json.loads, run.stdout.splitlines()) if line["kind"] == "step")
        print("# A model larger than memory\n\nWritten by `scripts/large_model.py`.\n")
        print(f"- {options.layers} layers of Llama-3-8B's shape, random weights, {size / 1e9:.1f} GB in bf16")
        print("- loaded as NF4 in blocks of 64; LoRA r=16 on all seven linear layers; one step of 1×32 and one before it")
        print(f"- most memory resident at once: {int(peak) * 1024 / 1e9:.2f} GB")
        print(f"- a step: {step['seconds']:.1f} s; the whole run with reading and quantising: {float(elapsed):.0f} s")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
