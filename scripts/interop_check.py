"""Adapters and merged models across Enamel, PEFT and transformers, on a real model.

    python scripts/interop_check.py --enamel target/release/enamel > docs/measurements/interop.md

Needs torch, transformers, peft and gguf, and the model in Enamel's cache (`enamel pull`). Installs and
downloads nothing. Prints a report in Markdown and exits 1 where a bound is not kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed  # noqa: E402

BOUND = 1e-4
ROWS, STEPS, BATCH, RATE = 8, 5, 2, 2e-4

failures = []
lines = []


def note(what, shown):
    lines.append(f"| {what} | {shown} |")
    print(lines[-1], file=sys.stderr, flush=True)


def check(what, value, bound=None):
    """One line of the report. A number is held against its bound, anything else must be true."""
    ok = value <= bound if bound is not None else bool(value)
    shown = f"{value:.2e} (bound {bound:.0e})" if bound is not None else ("yes" if ok else "NO")
    note(what, shown)
    if not ok:
        failures.append(what)


def enamel(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"enamel {' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def load(path, dtype=torch.float32):
    more = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    where = path.parent if more else path
    return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="eager", **more).eval()


def score(name, *arguments):
    """Our logits, one tensor a row, and our token ids."""
    enamel("score", *arguments, "--input", WORK / "rows.jsonl", "--output", WORK / f"{name}.jsonl",
           "--logits", WORK / f"{name}.safetensors", "--batch-size", 4)  # fmt: skip
    rows = [json.loads(line)["input_ids"] for line in (WORK / f"{name}.jsonl").read_text().splitlines()]
    logits = load_file(WORK / f"{name}.safetensors")
    return rows, [logits[f"logits.{i}"] for i in range(len(rows))]


@torch.no_grad()
def worst(model, rows, ours):
    return max((model(torch.tensor([row])).logits[0].double() - o.double()).abs().max().item() for row, o in zip(rows, ours))


def compare(what, model, rows, ours):
    check(f"{what}: largest difference of a logit, f32", worst(model, rows, ours), BOUND)
    check(f"{what}: the same against their f64", worst(model.double(), rows, ours), BOUND)
    model.float()


def our_adapter(base_path, recipe):
    """An adapter trained here, read by PEFT."""
    run = WORK / "run"
    enamel("train", recipe, "--no-tui", "--output", run, "--set", "train.max_steps=10", "--set", "train.samples=0",
           "--set", "train.logging_steps=1", "--set", f"data.train={str(WORK / 'rows.jsonl')!r}")  # fmt: skip
    adapter = run / "adapter"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(base_path), adapter).eval()
    said = [str(w.message) for w in said if "key" in str(w.message).lower()]
    check("PEFT says nothing of missing or unexpected keys", not said)
    file, state = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    check("the file's keys are exactly the model's adapter parameters", set(file) == set(state))
    check("every value arrived", all(torch.equal(file[k], state[k]) for k in file))
    rows, ours = score("adapted", "--model", args.model, "--adapter", adapter)
    plain = load(base_path)
    check("the adapter changes the logits", worst(plain, rows, ours) > 100 * BOUND)
    compare("PEFT with our adapter", model, rows, ours)
    return adapter, rows


def our_merged_model(adapter, rows):
    """A model merged here, read by transformers."""
    merged = WORK / "merged"
    said = enamel("merge", "--model", args.model, "--adapter", adapter, "--output", merged)
    note("`enamel merge` says", "; ".join(l.strip() for l in said.splitlines() if "difference" in l))
    model, info = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    lists = [list(info.get(k) or []) for k in ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]]
    check("transformers finds no missing, unexpected or mismatched key", not any(lists))
    ids, ours = score("merged", "--model", merged)
    check("the merged directory's tokenizer gives us the same tokens", ids == rows)
    compare("transformers with our merged model", model.eval(), ids, ours)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chats = [json.loads(line)["messages"] for line in (WORK / "rows.jsonl").read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    # A closing line break after the last turn belongs to no turn and may be left off.
    theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    same = all(t[: len(i)] == i and len(t) - len(i) <= 1 for t, i in zip(theirs, ids))
    check("transformers' template and tokenizer give the same tokens", same)


def pefts_adapter(base_path, recipe, rows):
    """An adapter made and trained by PEFT: read, continued and used for generation here."""
    set_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True)
    model = get_peft_model(load(base_path), config)
    torch_train(model, rows, 3, 1e-3)
    adapter = WORK / "peft"
    model.save_pretrained(adapter)
    ids, ours = score("peft", "--model", args.model, "--adapter", adapter)
    compare("a PEFT adapter here", model.eval(), ids, ours)

    tokenizer = AutoTokenizer.from_pretrained(WORK / "merged")
    question = "What is the capital of France?"
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    prompt = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=end, pad_token_id=end)
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    theirs = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    said = enamel("generate", "--model", args.model, "--adapter", adapter, "--prompt", question, "--max-new-tokens", 32).strip()
    note(f"its greedy answer to “{question}”", said)
    check("the same words as PEFT's generate", said == theirs)

    tokens = WORK / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"input_ids": r, "labels": r}) + "\n" for r in rows))
    run = WORK / "continued"
    settings = {
        "adapter.init_from": f"{str(adapter)!r}", "data.train": f"{str(tokens)!r}", "data.valid": f"{str(tokens)!r}", "data.format": "'tokens'", "data.shuffle": "false",
        "train.max_steps": STEPS, "train.batch_size": BATCH, "train.gradient_accumulation_steps": 1, "train.learning_rate": RATE,
        "train.lr_scheduler_type": "'constant'", "train.warmup_ratio": 0.0, "train.weight_decay": 0.01, "train.max_grad_norm": 0.0,
        "train.logging_steps": 1, "train.samples": 0, "train.eval_strategy": "'no'", "train.load_best_model_at_end": "false",
    }  # fmt: skip
    enamel("train", recipe, "--no-tui", "--output", run, *(a for k, v in settings.items() for a in ("--set", f"{k}={v}")))
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [entry["loss"] for entry in ours if entry["kind"] == "train"]
    theirs = torch_train(model, rows, STEPS, RATE)
    note("losses here", " ".join(f"{v:.6f}" for v in ours))
    note("losses of PEFT and torch's AdamW", " ".join(f"{v:.6f}" for v in theirs))
    check("a PEFT adapter trained on here: largest difference of a loss", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), BOUND)


def torch_train(model, rows, steps, rate):
    """AdamW with torch's defaults on rows in order; the mean loss over a batch's tokens."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.01)
    losses = []
    for step in range(steps):
        # Rows come round again: an epoch here is an epoch of the recipe.
        picked = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
        width = max(map(len, picked))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in picked])
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in picked])
        mask = (labels >= 0).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    if not args.recipe.is_file():
        sys.exit(f"{args.recipe}: no such recipe; run this from the repository's root")
    valid = args.recipe.parent / "valid.jsonl"
    (WORK / "rows.jsonl").write_text("".join(valid.read_text().splitlines(keepends=True)[:ROWS]))
    base_path = Path(enamel("pull", args.model).strip().splitlines()[-1])
    adapter, rows = our_adapter(base_path, args.recipe)
    our_merged_model(adapter, rows)
    pefts_adapter(base_path, args.recipe, rows)

    print("# Interoperability, measured\n")
    packages = ", ".join(f"{p} {version(p).split('+')[0]}" for p in ["torch", "transformers", "peft"])
    print(f"`scripts/interop_check.sh` with {enamel('--version').strip()}, {packages}, on {platform.machine()}, "
          f"{os.cpu_count()} CPUs.")  # fmt: skip
    print(f"Base: {args.model} ({base_path.name}). {ROWS} rows of `{valid}`, {sum(map(len, rows))} tokens.\n")
    print("| check | result |\n|---|---|")
    print("\n".join(lines))
    print(f"\n{len(failures)} of the checks failed: {'; '.join(failures)}." if failures else "\nAll checks hold.")
    sys.exit(1 if failures else 0)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--enamel", default="enamel", help="the binary")
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--recipe", type=Path, default=Path("datasets/handbook/lora.toml"))
args = parser.parse_args()
BINARY = args.enamel
with tempfile.TemporaryDirectory() as folder:
    WORK = Path(folder)
    main()
