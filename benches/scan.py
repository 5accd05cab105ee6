"""moecore and hf-mem side by side on the same fake hub: CPU, wall time, requests, bytes, memory.

    python benches/scan.py                 # everything; about half an hour
    python benches/scan.py --quick         # fewer repeats, no list of 1,000

Both tools run as whole processes, in turns, against one server process (`tests/fakehub`) whose own CPU is not
counted. hf-mem is installed from its package into an environment of its own. It has its base URL written into its
sources, so the bench takes a copy of the installed package and puts the fake hub's URL in place of it: nothing else
in the copy differs. The repositories are rebuilt from real metadata (`tests/realrepo.py`), their data sparse.

This process stays small on purpose: Linux counts the parent's size into the peak memory of a child.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fakehub import FakeHub  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HF_MEM = "hf-mem==0.5.6"
BASE_URL = "https://huggingface.co"
LATENCIES = (0, 40)
MOECORE, REPEAT, SEQUENTIAL, EIGHT = "moecore", "moecore, repeat", "hf-mem, one by one", "hf-mem, 8 at a time"

SINGLE = [
    "deepseek-ai/DeepSeek-V3",
    "moonshotai/Kimi-K2-Instruct",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
]
# Repositories that both tools can read, with how often each is in the list of 50 (under names of their own).
FIFTY = {
    "deepseek-ai/DeepSeek-V3": 2, "deepseek-ai/DeepSeek-V3.2": 2, "moonshotai/Kimi-K2-Instruct": 2,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 3, "Qwen/Qwen3-30B-A3B": 6, "Qwen/Qwen3-30B-A3B-FP8": 3,
    "MiniMaxAI/MiniMax-M2.5": 2, "XiaomiMiMo/MiMo-V2-Flash": 2, "moonshotai/Kimi-Linear-48B-A3B-Instruct": 2,
    "mistralai/Mixtral-8x7B-v0.1": 4, "allenai/OLMoE-1B-7B-0924": 3, "deepseek-ai/DeepSeek-V2-Lite": 3,
    "deepseek-ai/deepseek-moe-16b-base": 3, "inclusionAI/Ling-lite-base": 2, "microsoft/Phi-3.5-MoE-instruct": 2,
    "tencent/Hunyuan-A13B-Instruct": 2, "ai21labs/AI21-Jamba-Mini-1.6": 2, "openai/gpt-oss-20b": 0,
    "ibm-granite/granite-3.1-1b-a400m-base": 1, "Qwen/Qwen3-8B": 2, "meta-llama/Llama-3.1-8B": 2,
}  # fmt: skip
# The list of 1,000 is the list of 50 and these: most repositories on a hub are small.
SMALL = {
    "Qwen/Qwen3-8B": 250, "meta-llama/Llama-3.1-8B": 250, "microsoft/phi-3-mini-4k-instruct": 150,
    "mistralai/Mistral-7B-v0.1": 150, "ibm-granite/granite-3.1-1b-a400m-base": 100, "allenai/OLMoE-1B-7B-0924": 50,
}  # fmt: skip
TINY = "ibm-granite/granite-3.1-1b-a400m-base"

NOTES = """\
Medians; both tools in turns against the same server process, each with its own defaults (hf-mem: 6 connections for
each repository on 2 cores; moecore: 16 repositories at a time). "CPU s" is the whole process with interpreter and
imports; "the call alone" is one scan in a process that has imported everything, at 0 ms. Wall is the whole process.
"Requests" leaves redirects out. MB counts all bodies. How it is done: [benches/README.md](../README.md).
"""

# What runs in the client processes. The figures of one call leave imports and the first call out, for both.
HF_CLI = "from hf_mem.cli import main; main()"
HF_CALL = """
import asyncio, json, sys, time, warnings
warnings.simplefilter("ignore")
from hf_mem.run import arun
def call(name):
    return asyncio.run(arun(name, experimental=True)).to_json()
call("bench/tiny")
cpu, wall = time.process_time(), time.perf_counter()
call(sys.argv[1])
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""
MOECORE_CALL = """
import json, sys, time
import moecore
def call(name):
    return moecore.scan(name).to_json()
call("bench/tiny")
cpu, wall = time.process_time(), time.perf_counter()
call(sys.argv[1])
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""
HF_BULK = """
import asyncio, json, sys, warnings
warnings.simplefilter("ignore")
from hf_mem.run import arun
names, jobs, out = open(sys.argv[1]).read().split(), int(sys.argv[2]), open(sys.argv[3], "w")
async def main():
    gate = asyncio.Semaphore(jobs)
    async def one(name):
        async with gate:
            try:
                line = (await arun(name, experimental=True)).to_json()
            except Exception as error:
                line = {"model_id": name, "error": repr(error)}
        out.write(json.dumps(line) + "\\n")
    await asyncio.gather(*(one(name) for name in names))
asyncio.run(main())
"""


@dataclass
class Run:
    """One client process."""

    tool: str
    what: str
    latency_ms: int
    cpu: float
    wall: float
    rss_mib: float
    requests: int
    redirects: int
    megabytes: float
    scanned: int
    server_cpu: float


class Bench:
    """The server, the two tools and where they work."""

    def __init__(self, hub: FakeHub, work: Path, python: str) -> None:
        self.hub = hub
        self.work = work
        self.python = python
        self.runs: list[Run] = []
        self.totals: dict[str, dict[str, int]] = {}
        self.hf_python = install_hf_mem(work)
        self.hf_path = patch_hf_mem(self.hf_python, work, hub.url)

    def env(self, tool: str) -> dict[str, str]:
        env = {k: v for k, v in self.hub.env(self.work / "home").items() if k not in ("PYTHONPATH", "MAX_WORKERS")}
        return env | {"PYTHONPATH": str(self.hf_path)} if tool.startswith("hf-mem") else env

    def measure(self, tool: str, what: str, latency: int, command: Sequence[str]) -> tuple[Run, bytes]:
        """One process from start to end; its CPU and peak memory from the kernel, the rest from the server."""
        self.hub.clear()
        before = self.hub.totals()["cpu"]
        out = self.work / "stdout"
        with out.open("wb") as stdout, (self.work / "stderr").open("wb") as stderr:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=self.env(tool), stdout=stdout, stderr=stderr, cwd=self.work)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            tail = (self.work / "stderr").read_text()[-2000:]
            raise SystemExit(f"{tool} on {what} ended with {process.returncode}:\n{tail}")
        sums = self.hub.totals()
        run = Run(
            tool, what, latency, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024,
            int(sums["requests"] - sums["redirects"]), int(sums["redirects"]), sums["bytes"] / 1e6, 1,
            sums["cpu"] - before,
        )  # fmt: skip
        print(f"  {tool:22} {latency:3} ms  cpu {run.cpu:7.2f}  wall {wall:7.2f}  rss {run.rss_mib:6.1f}  "
              f"requests {run.requests} (+{run.redirects})  {run.megabytes:.2f} MB", file=sys.stderr)  # fmt: skip
        self.runs.append(run)
        return run, out.read_bytes()

    def fresh(self) -> None:
        """Nothing cached."""
        shutil.rmtree(self.work / "home", ignore_errors=True)
        (self.work / "home").mkdir()

    # -------------------------------------------------------------------------------------------------- one repository

    def single(self, name: str, latency: int, runs: int) -> None:
        print(f"{name}, {latency} ms", file=sys.stderr)
        self.hub.settings(latency_ms=latency, record=False)
        moecore = [self.python, "-m", "moecore", "scan", name, "--format", "json"]
        hf_mem = [self.hf_python, "-c", HF_CLI, "--model-id", name, "--experimental", "--json-output"]
        for _ in range(runs):
            _, theirs = self.measure("hf-mem", name, latency, hf_mem)
            self.fresh()
            _, ours = self.measure(MOECORE, name, latency, moecore)
            self.measure(REPEAT, name, latency, moecore)
            self.compare(name, json.loads(ours), json.loads(theirs))

    def compare(self, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Both have to have read all of it."""
        if ours["status"] != "ok" or ours["bytes"]["total"] != theirs["memory"]:
            raise SystemExit(f"{name}: {ours['bytes']['total']} and {theirs['memory']} bytes: not the same work")

    def calls(self, name: str, runs: int) -> dict[str, list[list[float]]]:
        """One call within a process that has imported everything and scanned one small repository before."""
        self.hub.settings(record=False)
        found: dict[str, list[list[float]]] = {"hf-mem": [], MOECORE: []}
        for _ in range(runs):
            self.fresh()
            for tool, command in (
                ("hf-mem", [self.hf_python, "-c", HF_CALL, name]),
                (MOECORE, [self.python, "-c", MOECORE_CALL, name]),
            ):
                done = subprocess.run(command, env=self.env(tool), cwd=self.work, capture_output=True, check=True)
                found[tool].append(json.loads(done.stdout))
        return found

    # ----------------------------------------------------------------------------------------------- many repositories

    def bulk(self, what: str, names: Sequence[str], latency: int, tools: Iterable[str]) -> None:
        print(f"{what}, {latency} ms", file=sys.stderr)
        self.hub.settings(latency_ms=latency, record=False)
        listed, out = self.work / "names.txt", self.work / "out.jsonl"
        listed.write_text("\n".join(names) + "\n")
        for tool in tools:
            out.unlink(missing_ok=True)
            if tool == MOECORE:
                self.fresh()
            if tool.startswith("hf-mem"):
                jobs = "8" if tool == EIGHT else "1"
                command = [self.hf_python, "-c", HF_BULK, str(listed), jobs, str(out)]
            else:
                command = [self.python, "-m", "moecore", "scan", "--from-file", str(listed), "--format", "jsonl"]
                command += ["--output", str(out)]
            run, _ = self.measure(tool, what, latency, command)
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            run.scanned = sum(1 for line in lines if not line.get("error"))
            self.keep_totals(tool, lines)

    def keep_totals(self, tool: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Whoever reads a repository reads the same number of bytes of tensors in it."""
        for line in lines:
            if not line.get("error"):
                name = line.get("target") or line["model_id"]
                total = line["bytes"]["total"] if "bytes" in line else line["memory"]
                seen = self.totals.setdefault(name, {})
                seen[tool.split(",")[0]] = total
                if len(set(seen.values())) > 1:
                    raise SystemExit(f"{name}: {seen}: not the same work")


# ------------------------------------------------------------------------------------------------ what has to be there


def install_hf_mem(work: Path) -> str:
    """hf-mem from its package, in an environment of its own; gives its Python."""
    home = work / "hf-mem"
    python = home / "bin" / "python"
    if not (home / "done").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", HF_MEM], check=True)
        (home / "done").touch()
    return str(python)


def patch_hf_mem(python: str, work: Path, url: str) -> Path:
    """A copy of the installed package with the hub's URL replaced; gives the folder to put on the path."""
    code = "import hf_mem, os; print(os.path.dirname(hf_mem.__file__))"
    installed = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    target = work / "hf-mem-patched"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(installed, target / "hf_mem", ignore=shutil.ignore_patterns("__pycache__"))
    for path in target.rglob("*.py"):
        path.write_text(path.read_text().replace(BASE_URL, url))
    subprocess.run([python, "-m", "compileall", "-q", str(target)], check=True)
    return target


def build_repos(work: Path, names: Iterable[str]) -> dict[str, Path]:
    """The repositories as folders of sparse files, each made once, by a process of its own."""
    found = {}
    for name in sorted(set(names)):
        folder = work / "repos" / name.replace("/", "--")
        if not (folder / "config.json").exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            tool = [sys.executable, str(ROOT / "tests" / "realrepo.py"), name, str(part)]
            subprocess.run(tool, check=True, stdout=sys.stderr)
            part.rename(folder)
        found[name] = folder
    return found


def listed(counts: Mapping[str, int], prefix: str) -> dict[str, str]:
    """Names of the list to the repositories behind them."""
    return {
        f"{prefix}/{name.split('/')[1]}-{number:03d}": name
        for name, count in counts.items()
        for number in range(count)
    }  # fmt: skip


def facts(folder: Path) -> tuple[int, int, int]:
    """Header bytes, shards and tensors of a repository: what has to be read at least."""
    size = shards = tensors = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size, shards = size + 8 + length, shards + 1
            tensors += file.read(length).count(b'"data_offsets"')
    return size, shards, tensors


# ---------------------------------------------------------------------------------------------------------- the report


def median(runs: Iterable[Run], field: str) -> float:
    return float(statistics.median(getattr(run, field) for run in runs))


def times(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f}x" if ours else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def single_report(bench: Bench, name: str, folder: Path, calls: Mapping[str, list[list[float]]]) -> str:
    size, shards, tensors = facts(folder)
    rows: list[list[str]] = []
    by_tool: dict[str, dict[int, list[Run]]] = {}
    for run in bench.runs:
        if run.what == name:
            by_tool.setdefault(run.tool, {}).setdefault(run.latency_ms, []).append(run)

    def figures(tool: str) -> list[float]:
        runs = by_tool[tool]
        call = statistics.median(cpu for cpu, _ in calls[tool]) if tool in calls else float("nan")
        walls = [median(runs[latency], "wall") for latency in LATENCIES]
        now = runs[0]
        rest = [median(now, field) for field in ("requests", "redirects", "megabytes", "rss_mib")]
        return [median(now, "cpu"), call, *walls, *rest]

    for tool in by_tool:
        cpu, call, wall, wall_far, requests, redirects, megabytes, rss = figures(tool)
        rows.append([
            tool, f"{cpu:.3f}", f"{call:.3f}" if call == call else "", f"{wall:.2f}", f"{wall_far:.2f}",
            f"{requests:.0f}", f"{requests + redirects:.0f}", f"{megabytes:.2f}", f"{rss:.0f}",
        ])  # fmt: skip
    floor = 5 * LATENCIES[1] / 1000
    rows.append(["floor", "", "", "", f"{floor:.2f}", f"{shards + 2}", f"{2 * shards + 2}", f"{size / 1e6:.2f}", ""])
    ratios = [a / b for a, b in zip(figures("hf-mem"), figures(MOECORE), strict=True)]
    rows.append(
        ["**hf-mem / moecore**", *(f"**{one:.1f}x**" for one in (*ratios[:5], sum_ratio(by_tool), *ratios[6:]))]
    )
    head = ["", "CPU s", "CPU s, the call alone", "wall s, 0 ms", "wall s, 40 ms", "requests", "with redirects", "MB"]
    return f"### {name}: {tensors:,} tensors in {shards} files\n\n" + table([*head, "peak RSS MiB"], rows)


def sum_ratio(by_tool: Mapping[str, Mapping[int, list[Run]]]) -> float:
    theirs, ours = (
        median(by_tool[tool][0], "requests") + median(by_tool[tool][0], "redirects") for tool in ("hf-mem", MOECORE)
    )
    return theirs / ours


def bulk_report(bench: Bench, what: str, repos: Sequence[Path]) -> str:
    sums = [sum(column) for column in zip(*map(facts, repos), strict=True)]
    rows = []
    for latency in LATENCIES:
        runs = [run for run in bench.runs if run.what == what and run.latency_ms == latency]
        tools = list(dict.fromkeys(run.tool for run in runs))
        ours = [run for run in runs if run.tool == MOECORE]
        for tool in tools:
            own = [run for run in runs if run.tool == tool]
            rows.append([
                f"{latency} ms", tool, f"{median(own, 'scanned'):.0f}", f"{median(own, 'cpu'):.2f}",
                f"{median(own, 'wall'):.2f}", f"{median(own, 'requests'):.0f}",
                f"{median(own, 'requests') + median(own, 'redirects'):.0f}", f"{median(own, 'megabytes'):.1f}",
                f"{median(own, 'rss_mib'):.0f}", times(median(own, "cpu"), median(ours, "cpu")),
                times(median(own, "wall"), median(ours, "wall")), len(own),
            ])  # fmt: skip
    rows.append(["", "floor", len(repos), "", "", sums[1] + 2 * len(repos), 2 * (sums[1] + len(repos)),
                 f"{sums[0] / 1e6:.1f}", "", "", "", ""])  # fmt: skip
    head = ["round trip", "", "read", "CPU s", "wall s", "requests", "with redirects", "MB", "peak RSS MiB"]
    title = f"### {what}: {sums[2]:,} tensors in {sums[1]:,} files\n\n"
    return title + table([*head, "CPU / moecore", "wall / moecore", "runs"], rows)


def header_report(output: str) -> str:
    """The median rates of `cargo bench -p moecore --bench header`."""
    found = re.findall(r"^(header/\S+)\s+time:[^\n]*\n\s+thrpt:\s+\[\S+ \S+ (\S+) (\S+)", output, re.MULTILINE)
    rates: dict[str, dict[str, str]] = {}
    for name, rate, unit in found:
        _, parser, size = name.split("/")
        factor = 2**20 / 1e6 if unit == "MiB/s" else 2**30 / 1e6
        rates.setdefault(size.replace("_", " "), {})[parser] = f"{float(rate) * factor:.0f}"
    parsers = list(next(iter(rates.values())))
    rows = [[size, *(own.get(parser, "") for parser in parsers)] for size, own in rates.items()]
    return "### Header parser, MB/s on one core\n\n" + table(["one header of", *parsers], rows)


def command(args: Sequence[str]) -> str:
    """How this was run, without the folders of this machine."""
    pairs = zip(args, ["", *args], strict=False)
    kept = [
        one for one, before in pairs if not any(flag in one + before for flag in ("--python", "--work", "--header"))
    ]
    return " ".join(["python", "benches/scan.py", *kept])


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "no commit"


def versions(bench: Bench) -> str:
    code = (
        "import moecore, sys, huggingface_hub as h; print(moecore.__version__, sys.version.split()[0], h.__version__)"
    )
    ours = subprocess.run([bench.python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    code = (
        "import sys, importlib.metadata as m; print(sys.version.split()[0], m.version('hf-mem'), m.version('httpx2'))"
    )
    theirs = subprocess.run([bench.hf_python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return (
        f"moecore {ours[0]}, {commit()} (Python {ours[1]}, huggingface_hub {ours[2]}); "
        f"hf-mem {theirs[1]} (Python {theirs[0]}, httpx2 {theirs[2]})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 runs of each repository, 1 of the 50, none of 1,000")
    parser.add_argument("--runs", type=int, default=5, help="of each single repository")
    parser.add_argument("--bulk-runs", type=int, default=3, help="of the list of 50")
    parser.add_argument("--thousand-runs", type=int, default=1, help="of the list of 1,000")
    parser.add_argument("--python", default=str(ROOT / ".venv" / "bin" / "python"), help="one that has moecore")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "bench-scan", help="folder for what is made")
    parser.add_argument("--output", type=Path, help="Markdown file; the raw figures go beside it as .json")
    parser.add_argument("--header", type=Path, help="saved output of `cargo bench -p moecore --bench header`, to add")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.bulk_runs, args.thousand_runs = 3, 1, 0
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%d")
    folders = build_repos(args.work, [*SINGLE, *FIFTY, *SMALL])
    fifty = listed(FIFTY, "fifty")
    thousand = {**listed(FIFTY, "thousand"), **listed(SMALL, "many")}
    assert (len(fifty), len(thousand)) == (50, 1000), (len(fifty), len(thousand))
    with FakeHub(record=False) as hub:
        bench = Bench(hub, args.work, args.python)
        used = versions(bench)
        hub.add_folder("bench/tiny", folders[TINY])
        for name in SINGLE:
            hub.add_folder(name, folders[name])
        for alias, name in {**fifty, **(thousand if args.thousand_runs else {})}.items():
            hub.add_folder(alias, folders[name], salt=alias)  # files of its own: nothing is shared by accident
        busy = os.getloadavg()[0]
        calls = {}
        for name in SINGLE:
            for latency in LATENCIES:
                bench.single(name, latency, args.runs)
            calls[name] = bench.calls(name, args.runs)
        parts = [single_report(bench, name, folders[name], calls[name]) for name in SINGLE]
        for _ in range(args.bulk_runs):
            for latency in LATENCIES:
                bench.bulk("50 repositories", list(fifty), latency, [SEQUENTIAL, EIGHT, MOECORE, REPEAT])
        if args.bulk_runs:
            parts.append(bulk_report(bench, "50 repositories", [folders[one] for one in fifty.values()]))
        for _ in range(args.thousand_runs):
            bench.bulk("1,000 repositories", list(thousand), 0, [EIGHT, MOECORE, REPEAT])
            bench.bulk("1,000 repositories", list(thousand), 40, [EIGHT, MOECORE, REPEAT])
        if args.thousand_runs:
            parts.append(bulk_report(bench, "1,000 repositories", [folders[one] for one in thousand.values()]))
    if args.header:
        parts.append(header_report(args.header.read_text()))
    head = (
        f"# Scanning: moecore beside hf-mem\n\n{started}. {machine()}.  \n{used}.  \n"
        f"Load average {busy:.1f} before and {os.getloadavg()[0]:.1f} after: other work on the machine is in the wall "
        f"times.  \nCommand: `{command(sys.argv[1:])}`\n\n{NOTES}"
    )
    text = "\n".join([head, *parts])
    print(text)
    if args.output:
        args.output.write_text(text)
        raw = {"runs": [asdict(run) for run in bench.runs], "calls": calls}
        args.output.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
