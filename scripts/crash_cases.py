"""What crash_test.py trains: tiny models in every format that a base comes in, and a recipe for every method and optimizer.

Needs no package: the weights are drawn and written here, the tokenizer is that of tests/fixtures, and enamel itself
makes the GGUF files and the bitsandbytes directories.
"""

import array
import json
import random
import struct
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TOKENIZER = HERE / "tests/fixtures/llama/untied"

# A head of 1600 x 64 has 102400 elements: enough for the optimizers to page it, and to hold it in 8 bits.
VOCABULARY, WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 1600, 64, 128, 4, 2, 2

# Every init that is not a method of its own in adapter_config.json too. Dropout is on wherever there is one: its masks have
# to be those of the step, not of the process.
ALL = 'target_modules = "all-linear"'
LORA = f"r = 4\nlora_dropout = 0.1\n{ALL}"
METHODS = {
    "lora": (LORA, ""),
    "lora+": (f"r = 4\n{ALL}", "loraplus_lr_ratio = 8"),
    "rslora": (f"{LORA}\nuse_rslora = true", ""),
    "dora": (f'method = "dora"\n{LORA}', ""),
    "gaussian": (f'{LORA}\ninit_lora_weights = "gaussian"', ""),
    "orthogonal": (f'{LORA}\ninit_lora_weights = "orthogonal"', ""),
    "pissa": (f'{LORA}\ninit_lora_weights = "pissa"', ""),
    "pissa_niter_4": (f'{LORA}\ninit_lora_weights = "pissa_niter_4"', ""),
    "olora": (f'{LORA}\ninit_lora_weights = "olora"', ""),
    "eva": (f'{LORA}\ninit_lora_weights = "eva"', ""),
    "loftq": (f'{LORA}\ninit_lora_weights = "loftq"', ""),
    "lora-bias": (f'{LORA}\nlora_bias = true\nlora_alpha = 16', ""),
    "lora-tokens": ('r = 4\nbias = "all"\ntrainable_token_indices = [3, 5]', ""),
    "lora-embed": ('r = 4\nlora_dropout = 0.1\ntarget_modules = ["embed_tokens", "lm_head", "q_proj"]', ""),
    "init_from": ('init_from = "EXPERTS/one/adapter"', ""),
    "loha": (f'method = "loha"\nr = 4\nrank_dropout = 0.1\nmodule_dropout = 0.2\n{ALL}', ""),
    "lokr": (f'method = "lokr"\nr = 2\ndecompose_both = true\nrank_dropout = 0.1\nmodule_dropout = 0.2\n{ALL}', ""),
    "adalora": (f'method = "adalora"\ninit_r = 6\ntarget_r = 3\ntinit = 1\ntfinal = 2\nlora_dropout = 0.1\n{ALL}', ""),
    "vera": (f'method = "vera"\nr = 8\nvera_dropout = 0.1\n{ALL}', ""),
    "ia3": ('method = "ia3"', ""),
    "miss": (f'method = "miss"\nr = 8\nmiss_dropout = 0.1\n{ALL}', ""),
    "miss-bat": (f'method = "miss"\nr = 4\ninit_weights = "bat"\n{ALL}', ""),
    "xlora": (
        'method = "xlora"\nadapters = { one = "EXPERTS/one/adapter", two = "EXPERTS/two/adapter" }\n'
        "xlora_depth = 2\nxlora_size = 16\nlayerwise_scalings = true",
        "",
    ),
    "head": ('method = "head"', ""),
    "full": ('method = "full"', ""),
}
# Those that take no modules_to_save: the head is theirs anyway, or they have none.
NO_HEAD = {"full", "xlora", "lora-embed", "init_from"}
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
# The base's file, and what [model] and [model.quantization] say of it.
FORMATS = {
    "f32": ("f32", "", ""),
    "shards": ("shards", "", ""),
    "bf16": ("bf16", "", ""),
    "f16": ("f16", "", ""),
    "as-bf16": ("f32", 'compute_dtype = "bf16"', ""),
    "nf4": ("f32", "", "load_in_4bit = true\nbnb_4bit_use_double_quant = true"),
    "fp4": ("bf16", "", 'load_in_4bit = true\nbnb_4bit_quant_type = "fp4"'),
    "int8": ("f32", "", "load_in_8bit = true"),
    "bnb-nf4": ("bnb-nf4", "", ""),
    "bnb-int8": ("bnb-int8", "", ""),
    "gguf-f16": ("f16.gguf", "", ""),
    "gguf-q8_0": ("q8_0.gguf", "", ""),
    "gguf-q4_0": ("q4_0.gguf", "", ""),
    "gguf-dense": ("q4_0.gguf", "", "dequantize = true"),
}
# The one that --model names.
GIVEN = {"given": ("", "", "")}
# Formats whose linear layers are packed, by how.
ON_LOADING = {"nf4", "fp4", "int8"}
PACKED = ON_LOADING | {"bnb-nf4", "bnb-int8", "gguf-q8_0", "gguf-q4_0"}


# A run that experts and old runs are made by.
OLD = ("lora", "adamw_torch", "f32")


def refused(method, form):
    """Why the program trains no such combination; none if it does."""
    if method in {"full", "pissa", "pissa_niter_4", "olora"} and form in PACKED:
        return "packed weights cannot be changed"
    if method == "loftq" and form not in ON_LOADING:
        return "LoftQ starts from what quantising on loading loses"
    return None


def combinations(options):
    """Every method with every optimizer on every format that it is possible on, of those that were asked for."""

    def chosen(names, asked, what):
        wanted = asked.split(",") if asked else list(names)
        if unknown := set(wanted) - set(names):
            raise SystemExit(f"no such {what}: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        return wanted

    formats = chosen(GIVEN if options.model else FORMATS, options.formats, "format")
    for method in chosen(METHODS, options.methods, "method"):
        for optimizer in chosen(OPTIMIZERS, options.optimizers, "optimizer"):
            for form in formats:
                if refused(method, form) is None:
                    yield method, optimizer, form


def recipe(work, combination, given):
    """The recipe of a combination; `work` holds the models, the rows and the experts, `given` is a real base."""
    method, optimizer, form = combination
    base, model, quantization = (GIVEN | FORMATS)[form]
    base = given if given else f"{work}/models/{base}"
    adapter, train = METHODS[method]
    # Without it nothing would be large enough for 8 bits or for pages.
    saved = method == "head" or (method not in NO_HEAD and optimizer != "adamw_torch" and not given)
    lines = [
        "seed = 3",
        'device = "flex"',
        "[model]",
        f'base = "{base}"',
        model,
        "[model.quantization]" if quantization else "",
        quantization,
        "[adapter]",
        adapter.replace("EXPERTS", f"{work}/experts"),
        'modules_to_save = ["lm_head"]' if saved else "",
        "[data]",
        f'train = "{work}/train.jsonl"',
        f'valid = "{work}/valid.jsonl"',
        "max_length = 64",
        "[train]",
        f"max_steps = {STEPS}",
        "batch_size = 2",
        "gradient_accumulation_steps = 2",
        "learning_rate = 5e-2",
        'lr_scheduler_type = "cosine"',
        "warmup_steps = 2",
        f'optim = "{optimizer}"',
        "logging_steps = 3",
        'eval_strategy = "steps"',
        "eval_steps = 1",
        "save_steps = 1",
        "save_total_limit = 2",
        "load_best_model_at_end = true",
        "samples = 1",
        "max_new_tokens = 3",
        train,
    ]
    return "\n".join(line for line in lines if line) + "\n"


STEPS = 8


def config(dtype):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }


def weights(seed):
    """Name, shape and values of every tensor."""
    random_ = random.Random(seed)
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj": (rows, WIDTH) for n, rows in (("q", WIDTH), ("k", kv), ("v", kv), ("o", WIDTH))}
        shapes |= {f"{at}.mlp.{n}_proj": (INNER, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (WIDTH, INNER)}
        shapes |= {f"{at}.{n}_layernorm": (WIDTH,) for n in ("input", "post_attention")}
    for name, shape in shapes.items():
        norm = len(shape) == 1
        count = shape[0] * (1 if norm else shape[1])
        yield f"{name}.weight", shape, [1.0] * count if norm else [random_.gauss(0.0, 0.08) for _ in range(count)]


def packed(values, dtype):
    floats = array.array("f", values)
    if dtype == "F32":
        return floats.tobytes()
    if dtype == "F16":
        return struct.pack(f"<{len(floats)}e", *floats)
    # bf16 is the upper half of an f32.
    return array.array("H", array.array("H", floats.tobytes())[1::2]).tobytes()


def write_safetensors(path, tensors, dtype):
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape, values in tensors:
        data = packed(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def write_tokenizer(folder):
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for i in range(len(vocabulary), VOCABULARY):
        vocabulary[f"word{i}"] = i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_bytes((TOKENIZER / "tokenizer_config.json").read_bytes())


def run(enamel, folder, *arguments):
    done = subprocess.run([enamel, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"enamel {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


def write_models(enamel, folder):
    """Every base that FORMATS names."""
    tensors = list(weights(7))
    names = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "shards": ("F32", "float32")}
    for name, (dtype, called) in names.items():
        to = folder / name
        to.mkdir(parents=True)
        (to / "config.json").write_text(json.dumps(config(called)))
        write_tokenizer(to)
        if name != "shards":
            write_safetensors(to / "model.safetensors", tensors, dtype)
            continue
        middle, index = len(tensors) // 2, {}
        for file, part in (("model-00001-of-00002", tensors[:middle]), ("model-00002-of-00002", tensors[middle:])):
            write_safetensors(to / f"{file}.safetensors", part, dtype)
            index |= {tensor: f"{file}.safetensors" for tensor, _, _ in part}
        (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    for outtype in ("f16", "q8_0", "q4_0"):
        run(enamel, folder, "export", "./f32", "--outtype", outtype, "--output", f"{outtype}.gguf")
    run(enamel, folder, "quantize", "./f32", "--output", "bnb-nf4", "--load-in-4bit")
    run(enamel, folder, "quantize", "./f32", "--output", "bnb-int8", "--load-in-8bit")


def write_rows(work):
    def row(i):
        a, b = i % 7, i // 7
        answer = f"{a + b}." + " is the answer" * (i % 3)
        return json.dumps({"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": answer}]})

    (work / "train.jsonl").write_text("".join(f"{row(i)}\n" for i in range(32)))
    (work / "valid.jsonl").write_text("".join(f"{row(i)}\n" for i in range(32, 36)))


def prepare(enamel, work, options, methods):
    """Bases, rows, and the adapters that some methods start from."""
    write_rows(work)
    given = options.model
    if given is None:
        write_models(enamel, work / "models")
    if not methods & {"xlora", "init_from"}:
        return
    combination = (*OLD[:2], "given" if given else OLD[2])
    (work / "expert.toml").write_text(recipe(work, combination, given))
    for name, seed in (("one", 1), ("two", 2)):
        run(enamel, work, "train", "expert.toml", "--no-tui", "--output", f"experts/{name}", "--set", f"seed={seed}")
