"""The expert index: what it refuses, what it joins, and that its cost does not grow with every tensor's name."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from moecore.errors import ConfigError, FileError, HeaderError
from moecore.runtime import conversion, families
from moecore.runtime.header import header
from moecore.runtime.index import ExpertIndex
from safetensors.torch import load_file, save_file

LAYER = "model.layers.1.mlp.experts"


def empty(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"), tiny.quiet():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def index(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertIndex:
    return ExpertIndex(sorted(folder.glob("*.safetensors")), empty(folder, dtype))


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.checkpoint("olmoe", checkpoints), tmp_path / "copy"))


def edit(folder: Path, change: Any) -> Path:
    """Applies `change(tensors)` to the shard that has expert 3 of layer 1."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if f"{LAYER}.3.up_proj.weight" in tensors:
            change(tensors)
            save_file(tensors, file)
            return file
    raise AssertionError("no shard has that expert")


def test_neighbours_in_file_and_row_are_one_range(folder: Path) -> None:
    whole: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        whole |= load_file(file)
        file.unlink()
    save_file(whole, folder / "model.safetensors")  # sorted by name: down, gate, up
    layer = index(folder).layers[1]
    assert layer.ranges is not None
    first, second = layer.ranges[3]
    gate_up, down = layer.parts
    assert (first.bytes, first.at) == (gate_up.bytes, gate_up.offset)
    assert (second.bytes, second.at) == (down.bytes, down.offset)


def test_missing_expert(folder: Path) -> None:
    file = edit(folder, lambda tensors: tensors.pop(f"{LAYER}.3.up_proj.weight"))
    with pytest.raises(
        ConfigError, match=r"there are 15 tensors .*configuration says 16; .* missing is expert 3"
    ) as error:
        index(folder)
    assert error.value.tensor == f"{LAYER}.0.up_proj.weight"
    assert error.value.file is not None
    assert file.exists()


def test_a_gap_in_the_numbers(folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.16.up_proj.weight"] = tensors.pop(f"{LAYER}.3.up_proj.weight")

    edit(folder, rename)
    with pytest.raises(ConfigError, match="missing is expert 3"):
        index(folder)


def test_no_tensor_at_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}, file)
    with pytest.raises(ConfigError, match=f"no file has a tensor for {LAYER}.gate_up_proj"):
        index(folder)


def test_wrong_shape_of_one_expert(folder: Path) -> None:
    key = f"{LAYER}.3.up_proj.weight"
    file = edit(folder, lambda tensors: tensors.update({key: tensors[key][:-1].contiguous()}))
    with pytest.raises(ConfigError, match=r"up_proj.weight is F32 \[95, 64\]") as error:
        index(folder)
    assert (error.value.file, error.value.tensor) == (str(file), key)


def test_wrong_shape_of_all(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 88}))
    with pytest.raises(ConfigError, match=r"does not fit model.layers.0.mlp.experts.gate_up_proj"):
        index(folder)


def test_another_count_in_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 12}))
    with pytest.raises(ConfigError, match=r"there are 16 tensors .*configuration says 12"):
        index(folder)


def test_another_count_in_one_tensor(checkpoints: Path) -> None:
    folder = tiny.checkpoint("granitemoe", checkpoints)
    model = empty(folder)
    for taken in families.find(model):
        taken.module.num_experts = 12
        for name, tensor in taken.module.named_parameters(recurse=False):
            setattr(taken.module, name, torch.nn.Parameter(tensor[:12]))
    with pytest.raises(ConfigError, match="holds 16 experts, and the configuration says 12"):
        ExpertIndex(sorted(folder.glob("*.safetensors")), model)


def test_another_dtype_of_one_expert(folder: Path) -> None:
    key = f"{LAYER}.3.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({key: tensors[key].half()}))
    with pytest.raises(ConfigError, match=r"3.up_proj.weight is F16 .* is F32") as error:
        index(folder)
    assert error.value.tensor == key


def test_packed_without_a_quantisation(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match=r"F8_E4M3 .* names no quantisation"):
        index(folder)


def test_duplicate_keys(folder: Path) -> None:
    file = edit(folder, lambda _: None)
    shutil.copy(file, folder / "model-copy.safetensors")
    with pytest.raises(ConfigError, match=r"is in .* too"):
        index(folder)


def test_a_cast_is_materialised_as_the_loader_casts(folder: Path) -> None:
    made = index(folder, torch.bfloat16)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for at, (layer, taken) in enumerate(zip(made.layers, families.find(whole), strict=True)):
        assert layer.ranges is None
        for name, tensor in made.materialise(at, 5).items():
            assert torch.equal(tensor, taken.resident(5)[name])


def test_names_of_the_model_itself(folder: Path) -> None:
    """A checkpoint that another tool wrote with the model's own, merged names."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    made = index(folder)
    for at, taken in enumerate(families.find(whole)):
        assert made.layers[at].ranges is not None
        for name, tensor in tiny.rows(made, at, 7).items():
            assert torch.equal(tensor, taken.resident(7)[name])


def test_a_base_model_checkpoint(folder: Path) -> None:
    """Names without the `model.` that the class with a head puts in front."""
    for file in folder.glob("*.safetensors"):
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert all(layer.ranges is not None for layer in index(folder).layers)


def test_broken_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileError, match=r"model.safetensors: No such file"):
        header(file, 0)
    cases = {
        b"\x10": "longer than the file",
        struct.pack("<Q", 1 << 40) + b"{}": "longer than the file",
        packed_header("{"): "is not JSON",
        packed_header('{"a": {"dtype": "F32"}}'): "broken header entry",
        packed_header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'): "lies outside of the file",
        packed_header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + bytes(8): "bytes of its shape",
    }
    for data, message in cases.items():
        file.write_bytes(data)
        with pytest.raises(HeaderError, match=message) as error:
            header(file, 0)
        assert error.value.file == str(file)


def packed_header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_a_file_cut_after_indexing(folder: Path) -> None:
    made = index(folder, torch.bfloat16)
    file = made.files[0]
    with file.open("r+b") as opened:
        opened.truncate(64)
    first = next(key for key in made.expert_keys if made.stored[key].file == 0)
    layer = next(at for at, entry in enumerate(made.layers) if first.startswith(entry.name))
    expert = int(first.removeprefix(made.layers[layer].name).split(".")[1])
    with pytest.raises(FileError, match="ends early"):
        made.materialise(layer, expert)


def test_thousands_of_experts_cost_few_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of one layer and projection differ in the expert's number only: two of them are enough."""
    layers, experts = 12, 256
    config = transformers.DeepseekV3Config(
        num_hidden_layers=layers, first_k_dense_replace=0, n_routed_experts=experts, hidden_size=32,
        moe_intermediate_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    entries, end = {}, 0
    for layer in range(layers):
        for expert in range(experts):
            for name, shape in (("gate_proj", [16, 32]), ("up_proj", [16, 32]), ("down_proj", [32, 16])):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 1024]}
                end += 1024
    file = tmp_path / "model.safetensors"
    file.write_bytes(packed_header(json.dumps(entries)) + bytes(end))
    calls = 0
    real = conversion.rename_source_key

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(conversion, "rename_source_key", counted)
    made = ExpertIndex([file], model)
    assert made.expert_bytes == end
    assert len(made.layers) == layers
    assert calls < len(entries) / 50
    for layer in made.layers:
        assert layer.ranges is not None
        starts = [row[0].offset for row in layer.ranges]
        assert starts == sorted(starts)
        assert {len(row) for row in layer.ranges} == {1}  # gate, up and down lie in the file as in the row
