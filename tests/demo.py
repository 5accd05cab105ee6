"""The main job on real metadata, without a network: `make demo`.

Rebuilds checkpoints from their real names, shapes and configs (header bytes, no weights) and scans them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import realrepo

#: One page for the first, one line for each.
MODELS = [
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V3",
    "openai/gpt-oss-120b",
    "mistralai/Mixtral-8x7B-v0.1",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "Qwen/Qwen3.5-35B-A3B",
    "moonshotai/Kimi-K2-Instruct",
    "meta-llama/Llama-3.1-8B",
]


def show(*arguments: str) -> None:
    """Runs the command as a user would, and shows it."""
    print(f"\n$ moecore {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "moecore", *arguments], check=True)


def main() -> None:
    """Builds the repos in a temporary folder and scans them."""
    with tempfile.TemporaryDirectory(prefix="moecore-demo-") as folder:
        for name in MODELS:
            realrepo.build(name, Path(folder) / name)
        before = Path.cwd()
        os.chdir(folder)
        try:
            show("scan", MODELS[0])
            show("scan", *MODELS[1:])
        finally:
            os.chdir(before)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
