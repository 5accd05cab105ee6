"""The tool that rebuilds real repositories, held against real indexes and published figures.

Nothing here uses moecore: if these tests fail, the figures of the other tests mean nothing.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import time
from typing import TYPE_CHECKING

import pytest
import realrepo

if TYPE_CHECKING:
    from pathlib import Path

# Real indexes: folder in data/models, repository that is rebuilt from it.
INDEXED = {
    "Qwen__Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "allenai__OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924",
    "microsoft__phi-3-mini-4k-instruct": "microsoft/phi-3-mini-4k-instruct",
    "mistralai__Mixtral-8x7B-v0.1--yangulei": "mistralai/Mixtral-8x7B-v0.1",
    "openai__gpt-oss-20b": "openai/gpt-oss-20b",
}

# Tensors and files as the hub has them (reference table of measured repositories; issue).
COUNTS = {
    "deepseek-ai/DeepSeek-V3": (91_991, 163),
    "moonshotai/Kimi-K2-Instruct": (139_583, 61),
    "Qwen/Qwen3-30B-A3B": (18_867, 16),
    "mistralai/Mixtral-8x7B-v0.1": (995, 19),
    "openai/gpt-oss-20b": (459, 3),
    "openai/gpt-oss-120b": (687, 15),
    "microsoft/phi-3-mini-4k-instruct": (195, 2),
    "allenai/OLMoE-1B-7B-0924": (3_219, 3),
    # A public description of the checkpoint: 14 shards, 1,811 tensors.
    "Qwen/Qwen3.5-35B-A3B": (1_811, 14),
}

# Bytes of all tensors, as published. The first five are in the head of the reference.
TENSOR_BYTES = {
    "Qwen/Qwen3-30B-A3B": 61_064_245_248,
    "mistralai/Mixtral-8x7B-v0.1": 93_405_585_408,
    "deepseek-ai/DeepSeek-V2-Lite": 31_412_968_448,
    "openai/gpt-oss-20b": 13_761_264_768,
    "openai/gpt-oss-120b": 65_248_815_744,
    "microsoft/phi-3-mini-4k-instruct": 7_642_159_104,
    "allenai/OLMoE-1B-7B-0924": 13_838_323_712,
}


def parse_file(path: Path) -> tuple[dict[str, object], int]:
    """Header and file length, read and checked by the letter of the format."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size)
    header = json.loads(raw)
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for entry in header.values():
        begin, stop = entry["data_offsets"]
        assert begin == end, "no hole, no overlap, in offset order"
        assert stop - begin == math.prod(entry["shape"]) * realrepo.DTYPE_BITS[entry["dtype"]] // 8
        end = stop
    assert path.stat().st_size == 8 + size + end
    return header, 8 + size


@pytest.mark.parametrize("folder", INDEXED)
def test_names_shards_and_total_size_equal_the_real_index(folder: str) -> None:
    path = realrepo.MODELS / folder / "model.safetensors.index.json.gz"
    index = json.loads(gzip.decompress(path.read_bytes()))
    repo = realrepo.spec(INDEXED[folder])
    assert repo.real_index
    assert {tensor.name: shard for shard, held in repo.shards.items() for tensor in held} == index["weight_map"]
    assert repo.total_bytes == index["metadata"]["total_size"]


def test_every_stored_index_is_used() -> None:
    stored = {path.parent.name for path in realrepo.MODELS.glob("*/*.index.json.gz")}
    assert stored == set(INDEXED)


def test_every_stored_config_can_be_rebuilt() -> None:
    stored = {path.parent.name for path in realrepo.MODELS.glob("*/config.json")}
    assert stored == {name.replace("/", "__") for name in realrepo.STORED}


@pytest.mark.parametrize("name", COUNTS)
def test_tensor_and_file_counts(name: str) -> None:
    repo = realrepo.spec(name)
    assert (len(repo.tensors), len(repo.shards)) == COUNTS[name]


def test_qwen3_next_has_the_published_main_tensors() -> None:
    # 74,391 in the reference, which leaves the MTP layer out.
    names = [tensor.name for tensor in realrepo.spec("Qwen/Qwen3-Next-80B-A3B-Instruct").tensors]
    assert sum(not name.startswith("mtp.") for name in names) == 74_391


@pytest.mark.parametrize("name", TENSOR_BYTES)
def test_tensor_bytes_equal_the_published_total(name: str) -> None:
    assert realrepo.spec(name).total_bytes == TENSOR_BYTES[name]


def test_mixtral_files_equal_the_published_file_bytes() -> None:
    # 93,405,713,504 B of files for 93,405,585,408 B of tensors: the headers are right to the byte, padding included.
    assert sum(length for _, _, length in realrepo.headers("mistralai/Mixtral-8x7B-v0.1")) == 93_405_713_504


def test_kimi_k2_files_are_those_of_a_public_listing() -> None:
    # File sizes in a public issue thread: the dense layer with the embedding, a MoE layer, one with a longer number.
    # The same 192 bytes are missing in each, whatever its tensors: header metadata that nobody published.
    listed = {
        "model-1-of-61.safetensors": 2_846_451_040,
        "model-10-of-61.safetensors": 17_066_593_104,
        "model-11-of-61.safetensors": 17_066_595_432,
    }
    lengths = {name: whole for name, _, whole in realrepo.headers("moonshotai/Kimi-K2-Instruct")}
    assert {name: length - lengths[name] for name, length in listed.items()} == dict.fromkeys(listed, 192)


def test_deepseek_v3_files_are_within_shard_borders_of_the_published_bytes() -> None:
    # 688,586,727,753 B are published. The odd sum shows headers without padding. Which tensor lies in which shard is
    # not published; it changes the digits of offsets by some bytes in a shard, not more.
    files = sum(length for _, _, length in realrepo.headers("deepseek-ai/DeepSeek-V3"))
    assert abs(files - 688_586_727_753) < 163 * 16


def test_deepseek_v3_has_the_elements_of_a_public_listing() -> None:
    # A public listing of the (identical) R1 checkpoint: 684,531,386,000 elements, scales counted.
    assert sum(tensor.elements for tensor in realrepo.spec("deepseek-ai/DeepSeek-V3").tensors) == 684_531_386_000


def test_sizes_stated_in_published_facts() -> None:
    with (realrepo.DATA / "published_facts.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    checked = 0
    for model, row in rows.items():
        found = re.fullmatch(r"(\S+?)(?:--\w+)? \[(index total_size|weight file) bytes\]", model)
        if not found or found[1] not in realrepo.NAMES:
            continue
        repo = realrepo.spec(found[1])
        if found[2] == "index total_size":
            assert repo.total_bytes == int(row["total_params"]), model
            if count := re.fullmatch(r"(\d+) tensors", row["active_params"]):
                assert len(repo.tensors) == int(count[1]), model
            if count := re.fullmatch(r"(\d+) params", row["active_params"]):
                assert sum(tensor.elements for tensor in repo.tensors) == int(count[1]), model
        elif payload := re.fullmatch(r"payload (\d+)", row["active_params"]):
            assert repo.total_bytes == int(payload[1]), model
        checked += 1
    assert checked == 8


@pytest.mark.parametrize("name", realrepo.NAMES)
def test_names_are_unique_and_shards_hold_something(name: str) -> None:
    repo = realrepo.spec(name)
    assert len(repo.by_name) == len(repo.tensors)
    assert all(repo.shards.values())
    assert repo.real_index or repo.assumed, "what is not from an index is said"


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V2-Lite", "google/gemma-4-26B-A4B"])
def test_written_files_follow_the_format(name: str, tmp_path: Path) -> None:
    repo = realrepo.build(name, tmp_path)
    found: dict[str, object] = {}
    for shard in repo.shards:
        header, start = parse_file(tmp_path / shard)
        assert start % 8 == 0
        found |= header
    assert found.keys() == repo.by_name.keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(found)
    assert json.loads((tmp_path / "config.json").read_bytes()) == repo.config


def test_files_are_sparse_and_quick(tmp_path: Path) -> None:
    realrepo.spec.cache_clear()
    start = time.process_time()
    repo = realrepo.build("deepseek-ai/DeepSeek-V3", tmp_path)
    assert time.process_time() - start < 4, "about half a second on an idle machine"
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    apparent = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert apparent > repo.total_bytes > 688 * 10**9
    assert on_disk < 40_000_000, "headers and index only"


def test_headers_equal_what_build_writes(tmp_path: Path) -> None:
    name = "allenai/OLMoE-1B-7B-0924"
    realrepo.build(name, tmp_path)
    for shard, head, length in realrepo.headers(name):
        with (tmp_path / shard).open("rb") as file:
            assert file.read(len(head)) == head
        assert (tmp_path / shard).stat().st_size == length


def test_tensors_are_ordered_as_the_library_writes_them() -> None:
    # Widest dtype first, then by name; metadata in front; padded with spaces to 8 bytes.
    tensors = [
        realrepo.Tensor("b.weight", "F8_E4M3", (2, 3)),
        realrepo.Tensor("b.scale", "F32", (1, 1)),
        realrepo.Tensor("a.weight", "BF16", (4,)),
        realrepo.Tensor("a.scalar", "F32", ()),
    ]
    head, length = realrepo.header_bytes(tensors)
    text = head[8:].decode()
    assert text.startswith('{"__metadata__":{"format":"pt"},"a.scalar":{"dtype":"F32","shape":[],"data_offsets":[0,4]}')
    assert re.findall(r'"(\w\.\w+)"', text) == ["a.scalar", "b.scale", "a.weight", "b.weight"]
    assert len(head) % 8 == 0
    assert length == len(head) + 4 + 4 + 8 + 6


def test_sub_byte_tensors_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="whole bytes"):
        realrepo.header_bytes([realrepo.Tensor("x", "F4", (3,))])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert realrepo.main(["ibm-granite/granite-3.1-1b-a400m-base", str(tmp_path)]) == 0
    assert "218 tensors in 1 files" in capsys.readouterr().out
    header, _ = parse_file(tmp_path / "model.safetensors")
    assert len(header) == 218
    with pytest.raises(SystemExit):
        realrepo.main(["no/such"])
