"""Rebuilds real checkpoints from their metadata: true names, dtypes and shapes, true header bytes, no data.

The files are sparse: the header of each ``*.safetensors`` file is written, the data section is a hole made by
``ftruncate``. A repository of 688 GB costs a few megabytes of disk, and a scanner cannot tell the difference.

Where ``data/models`` holds the real index, names and shards come from it, and every tensor's shape is checked
against the family's rules. Elsewhere the names come from the family's published checkpoint layout;
``RepoSpec.assumed`` says what was not seen in a real index.

    python tests/realrepo.py deepseek-ai/DeepSeek-V3 /tmp/v3     # write one
    python tests/realrepo.py --list                              # names, tensors, shards, bytes, what is assumed
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.catalogue import CATALOGUE, NAMES, STORED, stored_index
from checkpoints.collect import Collector
from checkpoints.quantised import Fp8Blocks, Gptq, Nvfp4
from checkpoints.shards import by_index, cut
from checkpoints.stored import DATA, MODELS, config_variants, folder_of, load_config
from checkpoints.tensors import DTYPE_BITS, Json, RepoSpec, Tensor
from checkpoints.writer import header_bytes, index_bytes, write_repo, write_safetensors, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "DATA",
    "DTYPE_BITS",
    "MODELS",
    "NAMES",
    "STORED",
    "Collector",
    "Fp8Blocks",
    "Gptq",
    "Json",
    "Nvfp4",
    "RepoSpec",
    "Tensor",
    "build",
    "config_variants",
    "header_bytes",
    "headers",
    "main",
    "patterns",
    "spec",
    "stored_index",
    "write_repo",
    "write_safetensors",
    "write_sparse",
]


@lru_cache(maxsize=8)
def spec(name: str, config: str = "config.json") -> RepoSpec:
    """The repository's tensors, shards and small files; nothing is written. Kept for the last few calls."""
    entry = CATALOGUE[name]
    cfg = entry.config() if entry.config else load_config(name, config)
    tensors = entry.build(cfg if entry.config or config == "config.json" else load_config(name))
    index = stored_index(name)
    shards = by_index(name, tensors, index) if index else cut(tensors, entry)
    small = {"config.json": json.dumps(cfg, indent=2).encode()}
    if entry.config is None:
        small["config.json"] = (folder_of(name) / config).read_bytes()
    if (quant := folder_of(name) / "hf_quant_config.json").exists():
        small["hf_quant_config.json"] = quant.read_bytes()
    if index or len(shards) > 1:
        small["model.safetensors.index.json"] = index or index_bytes(shards)
    return RepoSpec(name, cfg, shards, small, index is not None, entry.library_writer, entry.assumed)


def headers(name: str) -> Iterator[tuple[str, bytes, int]]:
    """File name, first ``8 + n`` bytes and whole length of each safetensors file, for a server that makes up data."""
    repo = spec(name)
    for shard, tensors in repo.shards.items():
        head, length = header_bytes(tensors, align=repo.library_writer, order=repo.library_writer)
        yield shard, head, length


def build(name: str, folder: str | Path, *, config: str = "config.json", index: bool = True) -> RepoSpec:
    """Writes the repository into ``folder`` (made if missing): small files and sparse safetensors files.

    ``config`` picks another stored copy of the config; it is written as ``config.json``.
    """
    repo = spec(name, config)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for file, data in repo.small_files.items():
        if index or not file.endswith(".index.json"):
            (root / file).write_bytes(data)
    for shard, tensors in repo.shards.items():
        write_safetensors(root / shard, tensors, align=repo.library_writer, order=repo.library_writer)
    return repo


def patterns(name: str) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Names with the numbers taken out: how many, dtype and shape of the first. For reading, not for tests."""
    found: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    for tensor in spec(name).tensors:
        key = re.sub(r"\d+", "N", tensor.name)
        count = found[key][0] if key in found else 0
        found[key] = (count + 1, tensor.dtype, tensor.shape)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild a real repository from its metadata, data sparse.")
    parser.add_argument("name", nargs="?", help="org/name")
    parser.add_argument("folder", nargs="?", help="where to write; without it the names are printed")
    parser.add_argument("--list", action="store_true", help="what can be rebuilt")
    args = parser.parse_args(argv)
    if args.list:
        for name in NAMES:
            repo = spec(name)
            source = "real index" if repo.real_index else repo.assumed
            sizes = f"{len(repo.tensors):7} tensors {len(repo.shards):4} files {repo.total_bytes:16,} B"
            print(f"{name:45} {sizes}  {source}")
        return 0
    if args.name not in CATALOGUE:
        parser.error("give a name that --list shows")
    if args.folder is None:
        for pattern, (count, dtype, shape) in patterns(args.name).items():
            print(f"{count:7} {dtype:8} {shape!s:24} {pattern}")
        return 0
    repo = build(args.name, args.folder)
    print(f"{len(repo.tensors)} tensors in {len(repo.shards)} files, {repo.total_bytes:,} B of tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
