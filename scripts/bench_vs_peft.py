#!/usr/bin/env python3
"""Speed and memory of Enamel and of PEFT + PyTorch on the same machine, in one run; Markdown on stdout.

    python scripts/bench_vs_peft.py [--enamel PATH] [--shapes 1x128,1x512,4x256] [--dtypes f32,bf16,nf4]
                                    [--rounds 2] [--steps 5] [--only train,decode,first]

Needs a Python environment with torch, transformers, peft and gguf (it installs nothing) and a built `enamel`
with smollm2-135m-instruct in its cache. Both sides train LoRA, r = 16 on all seven projections, with AdamW and
without dropout, on random tokens that all count in the loss. The sides take turns, a process a measurement, and
the median round counts. nf4 is QLoRA: NF4 with double quantisation, f32 compute (bitsandbytes on the other side). In bf16 PEFT is tried with an f32 and with a bf16 adapter, and the faster one counts.

PEFT reads the model from safetensors files that are written first: reading GGUF in Python takes far longer than
either side's whole start. Peak memory is the kernel's mark of the resident set from the end of loading on.
A measurement that fails is n/a, with the reason under the table.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

DTYPES = ("f32", "bf16", "nf4")
PARTS = ("train", "decode", "first")
# What PEFT is tried with for each of our dtypes: the base's dtype and the adapter's.
PEFT_VARIANTS = {"f32": [("f32", "f32")], "bf16": [("bf16", "f32"), ("bf16", "bf16")],
                 "nf4": [("nf4", "f32")]}
# How we hold the base.
ENAMEL_FLAGS = {"f32": ["--dequantize"], "bf16": ["--dequantize", "--compute-dtype", "bf16"],
                "nf4": ["--load-in-4bit", "--bnb-4bit-use-double-quant"]}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
NEW_TOKENS = 64
PROMPT = 128

# ---------------------------------------------------------------------------------------------- the PEFT side

PEFT_SIDE = r"""
import json, os, statistics, sys, time
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
import torch
from transformers import AutoModelForCausalLM
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}

def load(path, name):
    folder, file = path.rsplit("/", 1)
    gguf = {"gguf_file": file} if file.endswith(".gguf") else {}
    if name == "nf4":
        from transformers import BitsAndBytesConfig
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=quantization)
    return AutoModelForCausalLM.from_pretrained(folder if gguf else path, dtype=dtype[name], **gguf)

def adapted(model):
    from peft import LoraConfig, get_peft_model
    if job["base"] == "nf4":
        from peft import prepare_model_for_kbit_training
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=job["adapter"] == "f32")

def reset_peak():
    try:
        open("/proc/self/clear_refs", "w").write("5")
    except OSError:
        pass

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024

def convert():
    import gguf, peft, platform, transformers
    for name in dtype:
        model = load(job["path"], name)
        # The weights were dequantised; what is left of the quantiser only keeps them from being written.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(os.path.join(job["into"], name))
    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
            "python": platform.python_version(), "capability": torch.backends.cpu.get_cpu_capability()}

def train(rows, tokens, steps):
    model = adapted(load(job["path"], job["base"]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    reset_peak()
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"finished": time.time(), "seconds": statistics.median(seconds[1:] or seconds), "peak_memory": peak()}

def decode(prompt, tokens):
    from transformers import StoppingCriteria, StoppingCriteriaList
    model = load(job["path"], job["base"])
    if job["adapter"]:
        model = adapted(model)
    model.eval()
    reset_peak()
    times = []
    class Clock(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)
    model.generation_config.eos_token_id = None
    ids = torch.randint(0, model.config.vocab_size, (1, prompt))
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                       pad_token_id=0, stopping_criteria=StoppingCriteriaList([Clock()]))
    return {"tokens_per_second": (len(times) - 1) / (times[-1] - times[0]), "peak_memory": peak()}

if job["do"] == "convert":
    answer = convert()
elif job["do"] == "train":
    answer = train(job["rows"], job["tokens"], job["steps"] + 1)
    answer["tokens_per_second"] = job["rows"] * job["tokens"] / answer["seconds"]
elif job["do"] == "first":
    answer = train(job["rows"], job["tokens"], 1)
else:
    answer = decode(job["prompt"], job["tokens"])
print(json.dumps(answer))
"""


class Failed(Exception):
    """A measurement that came to nothing; the message says why."""


def lines_of(command, env, timeout):
    """The lines of JSON that a command prints, and when it was started."""
    started = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"not finished after {timeout} s") from None
    if done.returncode < 0:
        raise Failed(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        wrong = [line for line in said if line.startswith("error")] or said[-1:] or ["no word of why"]
        raise Failed(wrong[0].strip())
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise Failed("it printed nothing")
    return [json.loads(line) for line in lines if line.startswith("{")], started


class Peft:
    name = "PEFT"

    def __init__(self, args, located):
        self.args, self.located, self.files = args, located, None
        self.env = dict(os.environ)

    def job(self, **job):
        command = [sys.executable, "-c", PEFT_SIDE, json.dumps({"threads": self.args.threads, **job})]
        try:
            figures, started = lines_of(command, self.env, self.args.timeout)
        except Failed as failed:
            if "SIGILL" not in str(failed) or "ONEDNN_MAX_CPU_ISA" in self.env:
                raise
            # Where a virtual machine hides the AMX palettes, oneDNN dies of an empty tile configuration.
            self.env["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
            note("PyTorch dies of SIGILL here as it comes (oneDNN's AMX code on a machine that hides its tile "
                 "palettes), so oneDNN was held to AVX-512 from then on (ONEDNN_MAX_CPU_ISA)")
            figures, started = lines_of(command, self.env, self.args.timeout)
        return {**figures[-1], "started": started}

    def convert(self, into):
        self.files = into
        return self.job(do="convert", path=self.located, into=into)

    def path(self, base):
        return os.path.join(self.files, "f32" if base == "nf4" else base)

    def train(self, variant, rows, tokens):
        base, adapter = variant
        return self.job(do="train", path=self.path(base), base=base, adapter=adapter, rows=rows, tokens=tokens,
                        steps=self.args.steps)

    def decode(self, base, adapter):
        return self.job(do="decode", path=self.path(base), base=base, adapter=adapter, prompt=PROMPT,
                        tokens=NEW_TOKENS)

    def first(self):
        done = self.job(do="first", path=self.path("f32"), base="f32", adapter="f32", rows=1, tokens=128)
        return {"seconds": done["finished"] - done["started"]}


class Enamel:
    name = "Enamel"

    def __init__(self, args):
        self.args = args
        self.env = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}

    def bench(self, kind, dtype, *more):
        command = [self.args.enamel, "bench", "--model", self.args.model, "--device", "flex", "--json", *more]
        command += ENAMEL_FLAGS[dtype]
        figures, _ = lines_of(command, self.env, self.args.timeout)
        return [figure for figure in figures if figure["kind"] == kind]

    def train(self, dtype, rows, tokens):
        shape = f"{rows}x{tokens}"
        return self.bench("step", dtype, "--shapes", shape, "--steps", str(self.args.steps), "--decode", "0")[-1]

    def decode(self, dtype):
        """Figures of the base and of the unmerged adapter."""
        found = self.bench("decode", dtype, "--shapes", "1x2", "--steps", "1", "--decode", str(NEW_TOKENS))
        return {("base" if figure["variant"] == "base" else "adapter"): figure for figure in found}

    def first(self):
        return self.bench("first_step", "f32", "--first-step")[-1]


# ---------------------------------------------------------------------------------------------------- rounds

notes = []


def note(text):
    if text not in notes:
        notes.append(text)


def progress(text):
    print(text, file=sys.stderr, flush=True)


class Cell:
    """One measurement of one side over the rounds; what failed once is not tried again."""

    def __init__(self, what, measure):
        self.what, self.measure, self.rounds, self.failed = what, measure, [], None

    def run(self):
        if self.failed:
            return
        try:
            self.rounds.append(self.measure())
            progress(f"{self.what}: {json.dumps(self.rounds[-1])}")
        except Failed as failed:
            self.failed = str(failed)
            note(f"{self.what}: n/a, {failed}")
            progress(notes[-1])

    def median(self, key):
        """Over the rounds; none where there is no figure."""
        values = [figures[key] for figures in self.rounds if figures.get(key) is not None]
        return statistics.median(values) if values and not self.failed else None


def rounds(cells, count):
    for _ in range(count):
        for cell in cells:
            cell.run()


def show(value, digits=0):
    return "n/a" if value is None else f"{value:.{digits}f}"


def over(ours, theirs):
    return None if ours is None or not theirs else ours / theirs


def gigabytes(cell):
    peak = cell.median("peak_memory")
    return None if peak is None else peak / 1e9


def best(cells, key):
    """The cell with the largest figure; the first one if none has any."""
    return max(cells, key=lambda cell: cell.median(key) or 0.0)


def table(head):
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------- tables

def label(variant):
    base, adapter = variant
    return base if base == adapter == "f32" else f"{base}, {adapter} adapter"


def training(args, enamel, peft):
    print(f"\n## Training steps\n\nMedian of {args.steps} steps after one that is not counted; "
          f"median of {args.rounds} rounds.")
    table(["rows × tokens", "compute", "Enamel, tokens/s", "PEFT, tokens/s", "ratio", "over PEFT's best",
           "PEFT's best", "Enamel, peak GB", "PEFT, peak GB"])
    for shape in args.shapes:
        rows, tokens = shape
        name = f"{rows} × {tokens}"
        ours = {d: Cell(f"Enamel {name} {d}", lambda d=d: enamel.train(d, rows, tokens)) for d in args.dtypes}
        theirs = {d: [(v, Cell(f"PEFT {name} {label(v)}", lambda v=v: peft.train(v, rows, tokens)))
                      for v in PEFT_VARIANTS[d]] for d in args.dtypes}
        rounds([cell for d in args.dtypes for cell in [ours[d], *(c for _, c in theirs[d])]], args.rounds)
        key = "tokens_per_second"
        labels = {id(cell): label(v) for found in theirs.values() for v, cell in found}
        top = best([cell for found in theirs.values() for _, cell in found], key)
        for d in args.dtypes:
            mine, peer = ours[d], best([cell for _, cell in theirs[d]], key)
            top_label = "n/a" if top.median(key) is None else f"{show(top.median(key))} ({labels[id(top)]})"
            row(name, d, show(mine.median(key)), f"{show(peer.median(key))} ({labels[id(peer)]})",
                show(over(mine.median(key), peer.median(key)), 2), show(over(mine.median(key), top.median(key)), 2),
                top_label, show(gigabytes(mine), 2), show(gigabytes(peer), 2))


def decoding(args, enamel, peft):
    print(f"\n## Greedy decoding\n\nBatch 1, {NEW_TOKENS} tokens after a prompt of {PROMPT}, KV cache; the limit is "
          f"reading the weights once a token at the bandwidth measured in the same run.")
    table(["variant", "Enamel, tokens/s", "PEFT, tokens/s", "ratio", "Enamel, share of the limit"])
    # One run of ours gives both the base and the adapter.
    ours = {d: Cell(f"Enamel decoding {d}", lambda d=d: enamel.decode(d)) for d in args.dtypes}
    cells, lines = [], []
    for d in args.dtypes:
        cells.append(ours[d])
        for kind, adapter in [("base", None), ("adapter", "f32")]:
            peer = Cell(f"PEFT decoding {d} {kind}", lambda d=d, a=adapter: peft.decode(d, a))
            cells.append(peer)
            lines.append((d, kind, peer))
    rounds(cells, args.rounds)
    for d, kind, peer in lines:
        mine = Cell("", None)
        mine.failed = ours[d].failed
        mine.rounds = [figures[kind] for figures in ours[d].rounds if kind in figures]
        speed, other = mine.median("tokens_per_second"), peer.median("tokens_per_second")
        share = mine.median("share_of_bandwidth")
        name = d if kind == "base" else f"{d}, unmerged adapter"
        row(name, show(speed, 1), show(other, 1), show(over(speed, other), 2),
            "n/a" if share is None else f"{100 * share:.0f}%")


def first_steps(args, enamel, peft):
    print("\n## From the start of the process to the end of the first step\n\n1 × 128, f32, page cache warm.")
    table(["Enamel, s", "PEFT, s", "ratio"])
    cells = [Cell("Enamel first step", enamel.first), Cell("PEFT first step", peft.first)]
    for cell in cells:  # warms the page cache
        cell.run()
        cell.rounds.clear()
    rounds(cells, args.rounds)
    ours, theirs = (cell.median("seconds") for cell in cells)
    row(show(ours, 2), show(theirs, 2), show(over(theirs, ours), 1))


# ------------------------------------------------------------------------------------------------ the machine

def machine(threads):
    try:
        info = open("/proc/cpuinfo").read()
        memory = int(open("/proc/meminfo").readline().split()[1]) / 1e6
    except OSError:
        return f"{threads} threads"
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    has = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in FLAGS)
    return f"{fields.get('model name', 'unknown processor')}, {threads} threads, {memory:.0f} GB; {has}"


def choices(text, known):
    found = text.split(",")
    if wrong := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
    return found


def shapes(text):
    wrong = argparse.ArgumentTypeError("write rows and tokens as in 1x128,4x256")
    try:
        pairs = [(int(rows), int(tokens)) for rows, tokens in (shape.split("x") for shape in text.split(","))]
    except ValueError:
        raise wrong from None
    if any(rows < 1 or tokens < 2 for rows, tokens in pairs):
        raise wrong
    return pairs


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    built = os.path.join(os.environ.get("CARGO_TARGET_DIR", "target"), "release/enamel")
    parser.add_argument("--enamel", default=built)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shapes", type=shapes, default="1x128,1x512,4x256")
    parser.add_argument("--dtypes", type=lambda text: choices(text, DTYPES), default="f32,bf16,nf4")
    parser.add_argument("--only", type=lambda text: choices(text, PARTS), default="train,decode,first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=int, default=900, help="seconds a measurement may take")
    return parser.parse_args(given)


def say(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main():
    args = arguments()
    located = say([args.enamel, "pull", args.model]).strip().splitlines()[-1]
    version = say([args.enamel, "--version"]).strip()
    path = [line for line in say([args.enamel, "devices"]).splitlines() if line.startswith("CPU path")]
    enamel, peft = Enamel(args), Peft(args, located)
    with tempfile.TemporaryDirectory() as files:
        progress("writing the model for PEFT")
        try:
            found = peft.convert(files)
        except Failed as failed:
            sys.exit(f"the Python side does not work: {failed}")
        print(f"# Enamel and PEFT on one machine\n\n{machine(args.threads)}. {args.model}; LoRA, r = 16 on all seven "
              f"projections, AdamW, no dropout.\n\n{version}, {' '.join(path).replace('CPU path', '').strip()}; "
              f"PEFT {found['peft']}, transformers {found['transformers']}, torch {found['torch']} "
              f"({found['capability']}), Python {found['python']}.", flush=True)
        parts = {"train": training, "decode": decoding, "first": first_steps}
        for part in PARTS:
            if part in args.only:
                parts[part](args, enamel, peft)
    if notes:
        print("\n" + "\n".join(f"- {text}" for text in notes))


if __name__ == "__main__":
    main()
