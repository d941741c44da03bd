"""A sequence classifier trained here and by transformers with PEFT, from the same adapter on the same rows.

    python scripts/interop_classifier.py ENAMEL FILE.gguf [--steps 20]

Needs torch, transformers, peft, gguf. Prints the table of docs/measurements/interop.md.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

LABELS = ["bad", "good"]
THINGS = ["film", "meal", "phone", "song", "room", "book", "coat", "train", "game", "talk"]
WORDS = {
    "good": ["I loved this {}.", "What a wonderful {}!", "The {} was better than I had hoped.", "A {} worth every penny."],
    "bad": ["I want my money back for this {}.", "The {} was dull and far too long.", "What a waste, this {}.", "Never again such a {}!"],
}
BATCH, RATE = 8, 2e-4


def rows():
    pairs = [(text.format(thing), label) for label, texts in WORDS.items() for text, thing in itertools.product(texts, THINGS)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"text": pairs[i][0], "label": pairs[i][1]} for i in order]


class Theirs:
    def __init__(self, gguf):
        self.where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
        self.tokenizer = AutoTokenizer.from_pretrained(**self.where)

    def base(self):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(**self.where, num_labels=len(LABELS), dtype=torch.float32)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def batch(self, rows):
        ids = [self.tokenizer(row["text"])["input_ids"] for row in rows]
        width = max(map(len, ids))
        pad = lambda row, fill: row + [fill] * (width - len(row))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(row, self.tokenizer.pad_token_id) for row in ids]),
            "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
            "labels": torch.tensor([LABELS.index(row["label"]) for row in rows]),
        }

    def train(self, start, rows, steps):
        model = PeftModel.from_pretrained(self.base(), start, is_trainable=True).train()
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, 0, steps)
        losses = []
        for step in range(steps):
            mine = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
            optimizer.zero_grad()
            loss = model(**self.batch(mine)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    def probabilities(self, model, rows):
        model.eval()
        with torch.no_grad():
            return [torch.softmax(model(**self.batch([row])).logits, -1)[0] for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("enamel", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    data = rows()
    train, valid = data[: BATCH * (len(data) // BATCH - 2)], data[-2 * BATCH :]
    for name, part in [("train", train), ("valid", valid)]:
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    theirs = Theirs(args.gguf)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    get_peft_model(theirs.base(), config).save_pretrained(work / "start")

    (work / "recipe.toml").write_text(f"""task = "seq_cls"
[model]
base = {json.dumps(str(args.gguf))}
[adapter]
init_from = "start"
[data]
train = "train.jsonl"
valid = "valid.jsonl"
labels = {json.dumps(LABELS)}
shuffle = false
[train]
max_steps = {args.steps}
batch_size = {BATCH}
learning_rate = {RATE}
samples = 0
[output]
dir = {json.dumps(str(work / "run"))}
""")
    enamel = lambda *a: subprocess.run([args.enamel, *a], cwd=work, check=True, capture_output=True, text=True).stdout  # noqa: E731
    enamel("train", "recipe.toml", "--no-tui")
    entries = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    ours = [entry["loss"] for entry in entries if entry["kind"] == "train"]
    losses = theirs.train(work / "start", train, args.steps)
    loss = max(abs(a - b) for a, b in zip(ours, losses, strict=True))

    place = ("--model", str(args.gguf), "--adapter", str(work / "run/adapter"))
    told = [json.loads(line) for line in enamel("predict", "valid.jsonl", *place).splitlines()]
    told = [torch.tensor([row["scores"][label] for label in LABELS]) for row in told]
    adapted = theirs.probabilities(PeftModel.from_pretrained(theirs.base(), work / "run/adapter"), valid)
    enamel("merge", *place, "--output", "merged")
    whole = AutoModelForSequenceClassification.from_pretrained(work / "merged", dtype=torch.float32)
    merged = theirs.probabilities(whole, valid)
    apart = lambda a, b: max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))  # noqa: E731

    print("| check | result |\n|---|---|")
    print(f"| losses here | {' '.join(f'{x:.6f}' for x in ours[:5])} … |")
    print(f"| losses of PEFT and torch's AdamW | {' '.join(f'{x:.6f}' for x in losses[:5])} … |")
    print(f"| largest difference of a loss in {args.steps} steps | {loss:.2e} (bound 1e-04) |")
    print(f"| PEFT with our adapter: largest difference of a class's probability | {apart(told, adapted):.2e} (bound 1e-04) |")
    print(f"| transformers with our merged model: the same | {apart(told, merged):.2e} (bound 1e-04) |")
    print(f"| its classes | {', '.join(whole.config.id2label[i] for i in range(len(LABELS)))} |")
    holds = max(loss, apart(told, adapted), apart(told, merged)) < 1e-4
    print(f"\n{'All checks hold.' if holds else 'A check does not hold.'}")
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
