"""The main jobs on real input, without a network: `make demo`.

Rebuilds checkpoints from their real names, shapes and configs (header bytes, no weights) and scans them. Then runs the
small trained model of the tests with a quarter of its experts in memory, and compares its text with that of the whole
model. With `--picture FILE.svg` it draws what the terminal shows of the scans, for the README.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from typing import TYPE_CHECKING

import realrepo

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Trained, 6 layers of 16 experts: tests/data/tiny-moe/README.md.
TINY = Path(__file__).parent / "data/tiny-moe"

PROMPT = "The old man walked down to the"

#: One page for the first, one line for each of the others.
MODELS = [
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V3",
    "moonshotai/Kimi-K2-Instruct",
    "openai/gpt-oss-120b",
    "mistralai/Mixtral-8x7B-v0.1",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "Qwen/Qwen3.5-35B-A3B",
    "meta-llama/Llama-3.1-8B",
]


@contextlib.contextmanager
def repos() -> Iterator[None]:
    """The models in a temporary folder, which is the working folder meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="moecore-demo-") as folder:
        for name in MODELS:
            realrepo.build(name, Path(folder) / name)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def show(*arguments: str) -> None:
    """Runs the command as a user would, and shows it."""
    print(f"\n$ moecore {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "moecore", *arguments], check=True)


def compare() -> None:
    """The same prompt by moecore in a quarter of the memory and by transformers with everything resident."""
    import moecore
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    resident = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    whole = resident.generate(**inputs, max_new_tokens=40, do_sample=False)
    model = moecore.load(TINY, expert_memory="25%", device="cpu", dtype="float32")
    with model.moecore as handle:
        part = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        stats = handle.stats()
    if part.tolist() != whole.tolist():
        raise SystemExit("the tokens differ from those of the resident model")
    print(
        f"\nThe same {part.shape[1] - inputs.input_ids.shape[1]} tokens as the resident model, with {stats.slots} of "
        f"{stats.experts} experts in memory."
    )


def draw(path: Path) -> None:
    """Writes the page of the first model and the table of all as SVG."""
    import moecore
    from moecore import render
    from rich.console import Console

    console = Console(record=True, width=128, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold]$ moecore scan {MODELS[0]}[/]")
    console.print(render.page(moecore.scan(MODELS[0])))
    console.print(f"\n[bold]$ moecore scan {MODELS[1]} {MODELS[2]} …[/]")
    console.print(render.overview([moecore.scan(name) for name in MODELS[1:]]))
    picture = console.export_svg(title="moecore scan")
    # The fonts of the reader's machine do; a picture fetches nothing.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Shows the two commands, or draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw instead of show")
    picture = parser.parse_args().picture
    target = picture.resolve() if picture else None
    with repos():
        if target:
            draw(target)
        else:
            show("scan", MODELS[0])
            show("scan", *MODELS[1:])
    if not target:
        os.chdir(TINY.parent)
        show("run", TINY.name, "--prompt", PROMPT, "--expert-memory", "25%", "--max-new-tokens", "40", "--show-prompt")
        compare()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
