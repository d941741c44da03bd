"""Every adapter method between Enamel and PEFT, both ways, on a tiny model with random weights.

    python scripts/interop_methods.py --enamel target/release/enamel > docs/measurements/interop_methods.md

Needs torch, transformers and peft; installs and downloads nothing. For each method: Enamel trains an adapter
and PEFT loads it (no key missing or left over, every value as stored, the same logits); Enamel merges it and
transformers loads the model (the same logits); PEFT makes an adapter of the same kind and Enamel loads it
(the same logits). Prints a report in Markdown and exits 1 where something does not hold.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import peft  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

# Logits of order one, sums over 32 to 64 terms in another order: some units in the last place.
BOUND = 2e-5
# PEFT's own PiSSA adapter holds none of what it took from the base: both sides decompose the weight again, PEFT in
# f32, which leaves 1e-5 of the singular values.
DECOMPOSED = 1e-4
ALL = "adapter.target_modules=all-linear"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name: base, what the recipe sets, PEFT's class and options
METHODS = {
    "LoRA": ("untied", [ALL, "adapter.r=4"], "LoraConfig", dict(r=4, target_modules=SEVEN)),
    "LoRA, rank-stabilised": ("untied", [ALL, "adapter.r=4", "adapter.use_rslora=true"], "LoraConfig", dict(r=4, target_modules=SEVEN, use_rslora=True)),
    "LoRA, ranks and alphas by pattern": ("untied", ["adapter.r=4", "adapter.rank_pattern={ 'layers.1.self_attn.q_proj' = 2, q_proj = 6 }", "adapter.alpha_pattern={ v_proj = 16.0 }"],
        "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 6}, alpha_pattern={"v_proj": 16})),
    "LoRA, a bias behind B": ("bias", ["adapter.r=4", "adapter.lora_bias=true"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "LoRA, all biases": ("bias", ["adapter.r=4", "adapter.bias=all"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], bias="all")),
    "LoRA, biases of targets": ("bias", ["adapter.r=4", "adapter.bias=lora_only"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], bias="lora_only")),
    "LoRA on embedding and head": ("untied", ["adapter.r=4", "adapter.target_modules=['embed_tokens', 'lm_head', 'q_proj']"], "LoraConfig", dict(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "LoRA, single token rows": ("untied", ["adapter.r=4", "adapter.trainable_token_indices=[3, 9, 27]"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=[3, 9, 27])),
    "LoRA, token rows, tied head": ("tied", ["adapter.r=4", "adapter.trainable_token_indices=[3, 9, 27]"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=[3, 9, 27])),
    "LoRA and whole modules": ("untied", ["adapter.r=4", "adapter.modules_to_save=['lm_head', 'embed_tokens']"], "LoraConfig", dict(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "LoRA+": ("untied", [ALL, "adapter.r=4", "train.loraplus_lr_ratio=8"], "LoraConfig", dict(r=4, target_modules=SEVEN)),
    "LoRA, gaussian": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=gaussian"], "LoraConfig", dict(r=4, target_modules=SEVEN, init_lora_weights="gaussian")),
    "LoRA, orthogonal": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=orthogonal"], "LoraConfig", dict(r=4, target_modules=SEVEN, init_lora_weights="orthogonal")),
    "PiSSA": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=pissa"], "LoraConfig", dict(r=4, target_modules=SEVEN, init_lora_weights="pissa")),
    "PiSSA, fast": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=pissa_niter_4"], None, None),
    "OLoRA": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=olora"], "LoraConfig", dict(r=4, target_modules=SEVEN, init_lora_weights="olora")),
    "EVA": ("untied", [ALL, "adapter.r=4", "adapter.init_lora_weights=eva"], None, None),
    "DoRA": ("bias", ["adapter.method=dora", ALL, "adapter.r=4"], "LoraConfig", dict(r=4, target_modules=SEVEN, use_dora=True)),
    "DoRA on the embedding": ("untied", ["adapter.method=dora", "adapter.r=4", "adapter.target_modules=['embed_tokens', 'q_proj']"], "LoraConfig", dict(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "LoHa": ("untied", ["adapter.method=loha", ALL, "adapter.r=4"], "LoHaConfig", dict(r=4, target_modules=SEVEN)),
    "LoHa, r = 2": ("untied", ["adapter.method=loha", ALL, "adapter.r=2"], "LoHaConfig", dict(r=2, target_modules=SEVEN)),
    "LoKr": ("untied", ["adapter.method=lokr", ALL, "adapter.r=4"], "LoKrConfig", dict(r=4, target_modules=SEVEN)),
    "LoKr, both factors decomposed": ("untied", ["adapter.method=lokr", ALL, "adapter.r=2", "adapter.decompose_both=true"], "LoKrConfig", dict(r=2, target_modules=SEVEN, decompose_both=True)),
    "LoKr, LyCORIS start, factor 4": ("untied", ["adapter.method=lokr", ALL, "adapter.r=2", "adapter.decompose_factor=4", "adapter.init_weights=lycoris"], "LoKrConfig", dict(r=2, target_modules=SEVEN, decompose_factor=4, init_weights="lycoris")),
    "AdaLoRA": ("untied", ["adapter.method=adalora", ALL, "adapter.init_r=6", "adapter.target_r=3", "adapter.tinit=1", "adapter.tfinal=2"], "AdaLoraConfig", dict(init_r=6, target_r=3, total_step=10, target_modules=SEVEN)),
    "VeRA": ("untied", ["adapter.method=vera", ALL, "adapter.r=8"], "VeraConfig", dict(r=8, target_modules=SEVEN)),
    "VeRA without its projections": ("untied", ["adapter.method=vera", ALL, "adapter.r=8", "adapter.save_projection=false", "adapter.projection_prng_key=7"], "VeraConfig", dict(r=8, target_modules=SEVEN, save_projection=False, projection_prng_key=7)),
    "(IA)³": ("bias", ["adapter.method=ia3"], "IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "MiSS": ("bias", ["adapter.method=miss", ALL, "adapter.r=5"], "MissConfig", dict(r=5, target_modules=SEVEN)),
    "MiSS, mini": ("untied", ["adapter.method=miss", ALL, "adapter.r=5", "adapter.init_weights=mini", "adapter.mini_r=4"], "MissConfig", dict(r=5, target_modules=SEVEN, init_weights="mini", mini_r=4)),
    "MiSS, bat": ("bias", ["adapter.method=miss", ALL, "adapter.r=4", "adapter.init_weights=bat"], "MissConfig", dict(r=4, target_modules=SEVEN, init_weights="bat")),
    "head alone": ("untied", ["adapter.method=head", "adapter.modules_to_save=['lm_head']"], None, None),
}  # fmt: skip

failures, lines = [], []


def enamel(*arguments):
    done = subprocess.run([args.enamel, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"enamel {' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}")


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def logits(*arguments):
    enamel("score", *arguments, "--input", ROWS, "--overwrite", "--output", WORK / "scores.jsonl", "--logits", WORK / "scores.safetensors")
    stored = load_file(WORK / "scores.safetensors")
    return [stored[f"logits.{i}"] for i in range(len(TOKENS))]


@torch.no_grad()
def worst(model, ours):
    return max((model(torch.tensor([row])).logits[0] - o).abs().max().item() for row, o in zip(TOKENS, ours, strict=True))


def ours_in_peft(name, base, settings):
    run = WORK / "run"
    sets = [f"model.base={str(base)!r}", "train.max_steps=8", "train.learning_rate=2e-2", "train.samples=0", "train.eval_strategy='no'", "data.shuffle=false", *settings]
    recipe = WORK / "recipe.toml"
    recipe.write_text(f"[data]\ntrain = {str(ROWS)!r}\nformat = 'tokens'\n")
    enamel("train", recipe, "--no-tui", "--overwrite", "--output", run, *(a for s in sets for a in ("--set", s)))
    adapter = run / "adapter"
    ours = logits("--model", base, "--adapter", adapter)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(base), adapter).eval()
    complaints = [str(w.message) for w in said if re.search("(missing|unexpected).*key|key.*(missing|unexpected)", str(w.message), re.I)]
    file, state = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model, save_embedding_layers=False)
    keys = set(file) == set(state) and all(torch.equal(file[k], state[k]) for k in file)
    changed = worst(load(base), ours)
    merged = WORK / "merged"
    subprocess.run(["rm", "-rf", merged], check=True)
    enamel("merge", "--model", base, "--adapter", adapter, "--output", merged, "--dtype", "f32")
    return {
        "keys": keys and not complaints,
        "changed": changed > 100 * BOUND,
        "adapter": worst(model, ours),
        "merged": worst(load(merged), ours),
    }


def pefts_here(base, kind, options):
    torch.manual_seed(1)
    model = get_peft_model(load(base), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    # Every trained parameter away from where it started, so that nothing is zero by accident.
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    adapter = WORK / "theirs"
    subprocess.run(["rm", "-rf", adapter], check=True)
    model.save_pretrained(adapter)
    return worst(model.eval(), logits("--model", base, "--adapter", adapter))


def row(name, base, settings, kind, options):
    shown = lambda value: f"{value:.1e}"  # noqa: E731
    try:
        found = ours_in_peft(name, base, settings)
        back = pefts_here(base, kind, options) if kind else None
    except Exception as error:  # noqa: BLE001 - one method that fails must not hide the others
        failures.append(name)
        print(f"{name}: {error}", file=sys.stderr)
        lines.append(f"| {name} | FAILED | | | |")
        return
    close = max(found["adapter"], found["merged"]) <= BOUND and (not kind or back <= (DECOMPOSED if name == "PiSSA" else BOUND))
    if not (found["keys"] and found["changed"] and close):
        failures.append(name)
    keys = "yes" if found["keys"] else "NO"
    lines.append(f"| {name} | {keys} | {shown(found['adapter'])} | {shown(found['merged'])} | {shown(back) if kind else '–'} |")
    print(lines[-1], file=sys.stderr, flush=True)


def main():
    for name, (base, settings, kind, options) in METHODS.items():
        if not args.only or name in args.only:
            row(name, FIXTURES / base, settings, kind, options)
    print("# Every method between Enamel and PEFT\n")
    packages = ", ".join(f"{p} {version(p).split('+')[0]}" for p in ["torch", "transformers", "peft"])
    print(f"`scripts/interop_methods.py`, {packages}, on {platform.machine()}. Tiny Llamas of `tests/fixtures/llama`; eight optimizer steps.")
    print(f"Figures are the largest difference of a logit over {sum(map(len, TOKENS))} tokens; the bound is {BOUND:.0e}, {DECOMPOSED:.0e} for PEFT's PiSSA here.\n")
    print("| method | PEFT finds each key, no other, every value | PEFT with our adapter | transformers with our merged model | PEFT's adapter here |\n|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"\nNot as it should be: {'; '.join(failures)}." if failures else "\nAll of it holds.")
    sys.exit(1 if failures else 0)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--enamel", default="enamel", help="the binary")
parser.add_argument("--only", action="append", help="only the method of this name (repeatable)")
args = parser.parse_args()
FIXTURES = Path(__file__).resolve().parent.parent / "tests/fixtures/llama"
generator = torch.Generator().manual_seed(3)
TOKENS = [torch.randint(3, 120, (n,), generator=generator).tolist() for n in (12, 9, 14, 7)]
with tempfile.TemporaryDirectory() as folder:
    WORK = Path(folder)
    ROWS = WORK / "rows.jsonl"
    ROWS.write_text("".join(json.dumps({"input_ids": t, "labels": t}) + "\n" for t in TOKENS))
    main()
