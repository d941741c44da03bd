"""Kills training runs and compares what they come to with runs that were left alone. See crash_test.sh."""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_cases as cases

# What changes the disk or could leave something there, and what a run says.
CALLS = (
    "openat,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,symlink,symlinkat,write,writev,"
    "pwrite64,fsync,fdatasync,ftruncate,fallocate,fchmod,chmod,flock,copy_file_range,sendfile"
)
LIMIT = 300
ASIDE = "setting the old run aside, removing it"
# Figures of time and memory and the names of runs, which differ between any two.
VARYING = {
    "metrics.jsonl": {"tokens_per_second", "memory_bytes", "seconds"},
    "summary.json": {"tokens_per_second", "peak_memory", "seconds"},
    "state.json": {"peak_memory", "seconds", "sha256", "run"},
}
VARYING_LINES = ("time", "tokens a second", "peak memory")
# A run that takes the place of another says so in its settings till it is resumed.
OVERWRITE = re.compile(r"^overwrite = (true|false)$", re.MULTILINE)
# Holds an id of its own for every run.
MARKERS = {"run.lock"}


class Wrong(Exception):
    """Something that must not be."""


def listing(top):
    """Every path under `top`, folders with a slash behind."""
    found = {}
    for folder, folders, files in os.walk(top):
        for name in folders:
            path = Path(folder, name)
            found[f"{path.relative_to(top)}/"] = path
        for name in files:
            path = Path(folder, name)
            found[str(path.relative_to(top))] = path
    return found


def content(path, top):
    """A file as two runs can be compared by it."""
    if path.is_dir() or path.name in MARKERS:
        return ""
    data = path.read_bytes()
    varying = VARYING.get(path.name)
    if varying is None and path.suffix not in {".html", ".md", ".toml", ".json"}:
        return hashlib.sha256(data).hexdigest()
    text = data.decode(errors="backslashreplace").replace(str(top), "HERE")
    if path.suffix in {".html", ".toml"}:
        text = OVERWRITE.sub("overwrite = …", text)
    if varying is not None:
        values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return json.dumps(without(values, varying), indent=1)
    if path.suffix == ".html":
        return "\n".join(line for line in text.splitlines() if not any(word in line for word in VARYING_LINES))
    return text


def without(value, names):
    if isinstance(value, list):
        return [without(item, names) for item in value]
    if isinstance(value, dict):
        # Hashes of a checkpoint's files stay: they are under `files`.
        return {k: v if k == "files" else without(v, names) for k, v in value.items() if k not in names}
    return value


def snapshot(top):
    return {name: content(path, top) for name, path in listing(top).items()}


def differences(expected, found):
    """What differs, as (kind, text)."""
    for name in sorted(found.keys() - expected.keys()):
        yield "debris", name
    for name in sorted(expected.keys() - found.keys()):
        yield "missing", name
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            yield "different", f"{name}: {first_difference(expected[name], found[name])}"


def first_difference(a, b):
    lines = zip(a.splitlines(), b.splitlines(), strict=False)
    pair = next(((x.strip(), y.strip()) for x, y in lines if x != y), ("", "another length"))
    return f"{pair[0][:120]!r} became {pair[1][:120]!r}"


def entered(log, top):
    """System calls of a trace: thread, name, arguments with whole paths."""
    for line in log.read_text(errors="replace").splitlines():
        if entry := re.match(r"^(\d+) +(\w+)\((.*)$", line):
            thread, call, arguments = entry.groups()
            arguments = re.sub(r"AT_FDCWD<[^>]*>(, )?", "", arguments)
            yield thread, call, re.sub(r'"run(?=[/"])', f'"{top}/run', arguments)


def events(log, top):
    """System calls that concern `top`, by their place: name, how many of that name the thread had made by then."""
    counts, found = Counter(), defaultdict(list)
    for thread, call, arguments in entered(log, top):
        counts[thread, call] += 1
        if str(top) in arguments or ("write" in call and re.match(r"[12]<", arguments)):
            found[place(call, arguments, top)].append((call, counts[thread, call]))
    return found


def place(call, arguments, top):
    """Where in a run a system call is, in words."""
    if re.match(r"[12]<", arguments):
        return "saying something"
    paths = re.findall(re.escape(str(top)) + r"/([^\">, ]*)", arguments)
    path = paths[-1] if paths else ""
    if path.startswith("tmp"):
        return "temporary files"
    parts = path.removeprefix("run").strip("/").split("/")
    inside = "/".join(parts)
    moved = call.startswith("rename")
    removed = call.startswith(("unlink", "rmdir"))
    if not path.startswith("run") or path.startswith("run."):
        return "beside the run"
    if any(word in inside for word in (".replacing", ".replaced", ".removing")):
        return ASIDE
    if parts[0] == "checkpoints":
        if moved:
            return "a checkpoint into place"
        if removed:
            return "pruning checkpoints"
        return "writing a checkpoint"
    if parts[0] in {"adapter", "model"}:
        return "the result into place" if moved else "removing a result" if removed else "writing the result"
    names = {
        "metrics.jsonl": "metrics.jsonl",
        "recipe.lock.toml": "recipe.lock.toml",
        "run.lock": "lock and marker",
        "samples.json": "samples, summary, report",
        "summary.json": "samples, summary, report",
        "report.html": "samples, summary, report",
    }
    for name, words in names.items():
        if inside.endswith(name):
            return words
    if parts[0].startswith("."):
        return "a file under its unfinished name"
    return "the run's folder"


class Test:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.enamel = str(Path(options.enamel).resolve())
        self.lock = threading.Lock()
        self.references, self.making = {}, defaultdict(threading.Lock)
        self.kills, self.trials, self.wrong = [], 0, []
        self.numbers = 0
        self.aside = []
        # Without kills at system calls, no run is traced.
        self.traced = ("trace",) if options.calls else None

    # ---------------------------------------------------------------- running

    def command(self, top, arguments, strace=()):
        """A process of enamel that works in `top` and puts nothing elsewhere."""
        for name in ("tmp", "home"):
            (top / name).mkdir(exist_ok=True, parents=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "ENAMEL_"))}
        environment |= {"TMPDIR": str(top / "tmp"), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
        if not self.options.model:
            environment["ENAMEL_HOME"] = str(top / "home")
        said = open(top.with_suffix(".said"), "ab")
        with said:
            return subprocess.Popen(
                [*strace, self.enamel, *arguments],
                cwd=top,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def run(self, top, arguments, kill=None):
        """Runs to the end, or till `kill` comes. Exit code, and what was said."""
        said = top.with_suffix(".said")
        before = said.stat().st_size if said.exists() else 0
        strace = ()
        if kill and kill[0] == "call":
            # Not with --seccomp-bpf: strace 6.1 then sends no signal.
            strace = self.strace(top, "-e", f"inject={kill[1]}:signal=SIGKILL:when={kill[2]}")
        elif kill and kill[0] == "trace":
            strace = self.strace(top, "--seccomp-bpf")
        process = self.command(top, arguments, strace)
        try:
            process.wait(kill[1] if kill and kill[0] == "time" else LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if not kill or kill[0] != "time":
                raise Wrong(f"it did not end in {LIMIT} s") from None
        with open(said, "rb") as file:
            file.seek(before)
            return process.returncode, file.read().decode(errors="replace")

    def strace(self, top, *more):
        log = top.with_suffix(".trace")
        log.unlink(missing_ok=True)
        return ["strace", "-f", "-qq", "-y", "-s", "256", "-o", str(log), "-e", f"trace={CALLS}", *more]

    # ---------------------------------------------------------------- references

    def recipe(self, combination):
        path = self.work / f"recipes/{'_'.join(combination)}.toml"
        text = cases.recipe(self.work, combination, self.options.model)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    def train(self, combination):
        return ["train", self.recipe(combination), "--no-tui", "--output", "run"]

    def reference(self, combination):
        """What an uninterrupted run of a combination comes to: its files, its system calls, its seconds."""
        with self.lock:
            mine = self.making[combination]
        with mine:
            if combination not in self.references:
                top = self.work / f"references/{'_'.join(combination)}"
                top.mkdir(parents=True)
                started = time.monotonic()
                code, said = self.run(top, self.train(combination), self.traced)
                seconds = time.monotonic() - started
                if code:
                    raise Wrong(f"the uninterrupted run failed:\n{said}")
                calls = events(top.with_suffix(".trace"), top) if self.traced else {}
                if self.traced and not calls:
                    raise Wrong("strace saw no system call in the run directory")
                self.references[combination] = snapshot(top), calls, seconds
                shutil.rmtree(top)
            return self.references[combination]

    def prepare(self):
        """Makes a finished run that others take the place of."""
        if not self.options.overwrite:
            return
        combination = (*cases.OLD[:2], "given" if self.options.model else cases.OLD[2])
        code, said = self.run(self.work / "old", [*self.train(combination), "--set", "seed=4"])
        if not code:
            # What a run does to another in its way, once, for its system calls.
            top = self.work / "over"
            shutil.copytree(self.work / "old/run", top / "run")
            code, said = self.run(top, [*self.train(combination), "--overwrite"], self.traced)
            self.aside = events(top.with_suffix(".trace"), top).get(ASIDE, []) if self.traced else []
        if code:
            raise SystemExit(f"the run to replace failed:\n{said}")

    # ---------------------------------------------------------------- a trial

    def trial(self, combination, number):
        """Kills a run up to three times, lets it finish, and compares."""
        rng = random.Random(f"{self.options.seed} {number}")
        top = self.work / f"trials/{number}"
        (top / "run").parent.mkdir(parents=True)
        over = rng.random() < self.options.overwrite
        try:
            expected, calls, seconds = self.reference(combination)
        except Wrong as wrong:
            return self.record(combination, [], [("failed", str(wrong))])
        first = self.train(combination)
        if over:
            shutil.copytree(self.work / "old/run", top / "run")
            old = self.weigh(top / "run")
            first.append("--overwrite")
        wanted, kills, found = rng.choice((1, 1, 2, 3)), [], []
        arguments, tries = first, 0
        try:
            while True:
                tries += 1
                if tries > 12:
                    raise Wrong("twelve runs, and none of them came to an end")
                kill = None
                if len(kills) < wanted:
                    if rng.random() < self.options.calls:
                        # Every place of a run as often: most calls by far write tensors.
                        among = calls[rng.choice(sorted(calls))]
                        if over and "--overwrite" in arguments and rng.random() < 0.5:
                            among = self.aside or among
                        kill = ("call", *rng.choice(among))
                    else:
                        kill = ("time", rng.uniform(0.0, seconds))
                code, said = self.run(top, arguments, kill)
                resuming = "--resume" in arguments
                if kills and kills[-1]["then"] is None and code != -9:
                    kills[-1]["then"] = answer(said, resuming, code, over)
                if code == -9:
                    if kills and kills[-1]["then"] is None:
                        kills[-1]["then"] = "killed again"
                    kills.append(self.describe(top, kill, over))
                    if over:
                        self.check_old(top, old)
                    arguments = [*self.train(combination), "--resume"]
                elif code == 0:
                    break
                elif resuming and code == 1 and "panicked" not in said:
                    # There is no run yet, or the old one is back.
                    arguments = first
                else:
                    raise Wrong(f"exit code {code} of {' '.join(arguments)}:\n{said}")
            found = list(differences(expected, snapshot(top)))
        except Wrong as wrong:
            found = [("failed", str(wrong))]
        if kills:
            for kill in kills:
                kill["then"] = kill["then"] or "failed"
        if found:
            self.say_wrong(number, combination, kills, found)
        else:
            shutil.rmtree(top)
            for suffix in (".said", ".trace"):
                top.with_suffix(suffix).unlink(missing_ok=True)
        self.record(combination, kills, found)

    def describe(self, top, kill, over):
        """Where a kill came."""
        where = after(top / "run")
        if kill[0] == "call":
            last = [entry for entry in entered(top.with_suffix(".trace"), top) if entry[1] == kill[1]][-1:]
            where = place(kill[1], last[0][2], top) if last else "unknown"
        return {"how": kill[0], "what": kill[1:], "where": where, "over": over, "then": None}

    def weigh(self, run):
        """Name and hash of what an old run cannot be without."""
        files = listing(run)
        names = [n for n in files if n.startswith(("adapter/", "checkpoints/")) and not n.endswith("/")]
        return {n: hashlib.sha256(files[n].read_bytes()).hexdigest() for n in [*names, "summary.json", "metrics.jsonl"]}

    def check_old(self, top, old):
        """Until the new run has a checkpoint, the old one is somewhere, whole."""
        checkpoints = list((top / "run/checkpoints").glob("step-*/state.json"))
        is_new = [path for path in checkpoints if '"seed": 4,' not in path.read_text()]
        if is_new:
            return
        held = defaultdict(set)
        for name, path in listing(top).items():
            if not name.endswith("/"):
                held[hashlib.sha256(path.read_bytes()).hexdigest()].add(name)
        lost = [name for name, hash_ in old.items() if not any(n.endswith(name) for n in held[hash_])]
        if lost:
            raise Wrong(f"the old run is lost before the new one has a checkpoint: {', '.join(lost[:4])} …")

    # ---------------------------------------------------------------- counting

    def record(self, combination, kills, found):
        with self.lock:
            self.trials += 1
            self.kills += [kill | {"of": combination, "wrong": {kind for kind, _ in found}} for kill in kills]
            if found:
                self.wrong.append((combination, kills, found))
            if self.trials % 25 == 0 or found:
                print(f"{self.trials} runs, {len(self.kills)} kills, {len(self.wrong)} wrong", file=sys.stderr, flush=True)

    def say_wrong(self, number, combination, kills, found):
        with self.lock:
            print(f"\nrun {number}, {' '.join(combination)}:", file=sys.stderr)
            for kill in kills:
                print(f"  killed by {kill['how']} {kill['what']}: {kill['where']}; then {kill['then']}", file=sys.stderr)
            for kind, text in found[:8]:
                print(f"  {kind}: {text}", file=sys.stderr)

    def next(self, order):
        """The next combination, till there are kills enough."""
        with self.lock:
            if len(self.kills) >= self.options.kills or self.numbers >= 20 * self.options.kills + 20:
                return None
            self.numbers += 1
            return order[self.numbers % len(order)], self.numbers


def after(run):
    """How far a run had come, by what lies there."""
    if (run / "report.html").exists():
        return "at the very end"
    steps = [int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/state.json")]
    if not steps:
        return "before the first checkpoint"
    return "after the last step" if max(steps) >= cases.STEPS else "between checkpoints"


def answer(said, resuming, code, over):
    """What the run after a kill did."""
    if code and over:
        return "refused: the old run was back; --overwrite again"
    if code:
        return f"refused: {said.strip()[:60]}".splitlines()[0]
    if match := re.search(r"resuming after step (\d+)", said):
        return "went on from a checkpoint" if int(match[1]) < cases.STEPS else "handed over the result"
    if resuming and "finished" in said and "step 1" not in said:
        return "was finished already"
    return "started anew"


def order(options):
    """Combinations in turns: every method, each time with another optimizer and format."""
    rng = random.Random(options.seed)
    by_method = defaultdict(list)
    for combination in cases.combinations(options):
        by_method[combination[0]].append(combination)
    if not by_method:
        raise SystemExit("no combination is left")
    for rest in by_method.values():
        rng.shuffle(rest)
    rounds = max(map(len, by_method.values()))
    return [rest[i % len(rest)] for i in range(rounds) for rest in by_method.values()]


def report(test, options, seconds):
    """The tables."""
    kills = test.kills
    print("# Kills\n")
    print(f"`scripts/crash_test.sh {' '.join(options.said)}`", end="")
    print(f" on {time.strftime('%Y-%m-%d', time.gmtime())}, commit {options.commit or 'unknown'},", end=" ")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.0f} minutes;", end=" ")
    print(f"{cases.STEPS} steps a run, a checkpoint after each{f'; base {options.model}' if options.model else ''}.\n")
    wrong = Counter(kind for kill in kills for kind in kill["wrong"])
    overs = sum(kill["over"] for kill in kills)
    print(f"{len(kills)} kills in {test.trials} runs of {len({k['of'] for k in kills})} combinations; {overs} of the kills")
    print("where the run took the place of an old one (`--overwrite`). Kills in runs that ended with other bits or figures")
    print(f"than an uninterrupted one: {wrong['different'] + wrong['missing']}; that left debris: {wrong['debris']};", end=" ")
    print(f"that failed: {wrong['failed']}.\n")
    for title, key in (("killed", "where"), ("what the run after it did", "then")):
        print(f"| {title} | kills | equal | no debris |\n|---|---|---|---|")
        for name in sorted({k[key] for k in kills}):
            print(row(name, [k for k in kills if k[key] == name]))
        print()
    by = {how: [k for k in kills if k["how"] == how] for how in ("time", "call")}
    print("| killed | kills | equal | no debris |\n|---|---|---|---|")
    print(row("at a random moment", by["time"]))
    calls = Counter(k["what"][0] for k in by["call"])
    print(row(f"on entering a system call ({', '.join(f'{n} {c}' for c, n in calls.most_common())})", by["call"]))
    print("\nKills by method, optimizer and format of the base; `–` where the program refuses the combination, empty where none")
    print("was drawn, with `!` where a run differed.\n")
    forms = [f for f in cases.GIVEN | cases.FORMATS if any(k["of"][2] == f for k in kills)]
    print(f"| method | optimizer | {' | '.join(forms)} | all |\n|---|---|{'---|' * (len(forms) + 1)}")
    for method in cases.METHODS:
        for optimizer in cases.OPTIMIZERS:
            mine = [k for k in kills if k["of"][:2] == (method, optimizer)]
            if mine:
                cells = [cell([k for k in mine if k["of"][2] == f], cases.refused(method, f)) for f in forms]
                print(f"| {method} | {optimizer} | {' | '.join(cells)} | {len(mine)} |")
    for combination, _, found in test.wrong:
        print(f"\n{' '.join(combination)}:")
        for kind, text in found[:8]:
            print(f"- {kind}: {text}")


def row(name, kills):
    equal = sum(not kill["wrong"] & {"different", "missing", "failed"} for kill in kills)
    clean = sum("debris" not in kill["wrong"] for kill in kills)
    return f"| {name} | {len(kills)} | {equal} | {clean} |"


def cell(kills, why_not):
    if why_not:
        return "–"
    return f"{len(kills) or ''}{'!' if any(kill['wrong'] for kill in kills) else ''}"


def main():
    parser = argparse.ArgumentParser(prog="crash_test.sh", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--seed", type=int, default=1, help="which (1)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--model", help="a real base instead of the tiny ones: a folder, a GGUF file, or a name")
    parser.add_argument("--methods", help="only these, parted by commas")
    parser.add_argument("--optimizers", help="only these")
    parser.add_argument("--formats", help="only these")
    parser.add_argument("--overwrite", type=float, default=0.2, help="share of runs that replace an old one (0.2)")
    parser.add_argument("--calls", type=float, default=0.6, help="share of kills at system calls (0.6)")
    parser.add_argument("--work", help="where to work; kept (a temporary folder, removed unless something is wrong)")
    parser.add_argument("--enamel", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--commit", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help="of a run (8)")
    options = parser.parse_args()
    ours = {"--enamel", options.enamel, "--commit", options.commit, "--work", options.work}
    options.said = [word for word in sys.argv[1:] if word not in ours]
    cases.STEPS = options.steps
    work = Path(options.work or tempfile.mkdtemp(prefix="crash-test-")).resolve()
    (work / "trials").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    all_of_them = order(options)
    cases.prepare(options.enamel, work, options, {method for method, _, _ in all_of_them})
    test = Test(options, work)
    test.prepare()
    print(f"{len(set(all_of_them))} combinations", file=sys.stderr)

    def work_on():
        while (chosen := test.next(all_of_them)) is not None:
            test.trial(*chosen)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(work_on) for _ in range(options.jobs)]:
            done.result()
    report(test, options, time.monotonic() - started)
    if test.wrong:
        print(f"what is left of the runs that differ: {work}/trials", file=sys.stderr)
    elif not options.work:
        shutil.rmtree(work)
    if len(test.kills) < options.kills:
        sys.exit(f"only {len(test.kills)} kills: most runs ended before they were killed")
    sys.exit(1 if test.wrong else 0)


if __name__ == "__main__":
    main()
