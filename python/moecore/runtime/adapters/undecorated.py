"""Families whose experts transformers' interface does not reach: their forward is exchanged module by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Param, Run, Taken, direct_params, replace_forward, zero_out_of_range


class Undecorated:
    """An experts module with the interface's call and weights, but without its decorator (step3p5, step3p7)."""

    served_by_interface = False
    rounds_weights = False
    class_name = "Step3p7Experts"

    def owns(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.class_name

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def params(self, module: Any) -> tuple[Param, ...]:
        return direct_params(module, self.num_experts(module))

    def can_group(self, module: Any) -> bool:
        return True

    def gate(self, module: Any, gate_up: Tensor) -> Tensor:
        """Activation of the two halves; here the module's own, which clamps by layer."""
        gated: Tensor = module._apply_gate(gate_up)
        return gated

    def expert(self, module: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional.linear(self.gate(module, functional.linear(x, weights["gate_up_proj"])), weights["down_proj"])

    def without_weights(self, module: Any, hidden: Tensor, index: Tensor, out: Tensor) -> None:
        zero_out_of_range(self.num_experts(module), index, out)

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        module = taken.module
        replace_forward(module, lambda hidden, index, weights: run(module, hidden, index, weights), taken)


class Longcat(Undecorated):
    """longcat_flash: numbers from `num_routed_experts` on are identity experts, which have no weights to move."""

    class_name = "LongcatFlashExperts"

    def num_experts(self, module: Any) -> int:
        return int(module.num_routed_experts)

    def params(self, module: Any) -> tuple[Param, ...]:
        # gate_up_proj has rows for the identity experts too; nobody reads them, and checkpoints lack them.
        return tuple(
            Param(name, tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in module.named_parameters(recurse=False)
        )

    def can_group(self, module: Any) -> bool:
        return False

    def gate(self, module: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = module.act_fn(gate) * up
        return gated

    def without_weights(self, module: Any, hidden: Tensor, index: Tensor, out: Tensor) -> None:
        own = hidden.repeat_interleave(index.shape[-1], dim=0).to(out.dtype)
        out.copy_(torch.where((index.reshape(-1, 1) >= self.num_experts(module)), own, out))


class Dbrx(Undecorated):
    """dbrx: three matrices with the experts one below the other."""

    class_name = "DbrxExperts"

    def params(self, module: Any) -> tuple[Param, ...]:
        shape = (module.ffn_hidden_size, module.hidden_size)
        return tuple(Param(f"mlp.{name}", shape, getattr(module.mlp, name).dtype) for name in ("w1", "v1", "w2"))

    def can_group(self, module: Any) -> bool:
        return False

    def expert(self, module: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        rows: Tensor = module.mlp(x, weights["mlp.w1"], weights["mlp.v1"], weights["mlp.w2"])
        return rows

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        module: Any = taken.module

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            flat = hidden.reshape(-1, module.hidden_size)
            return run(module, flat, index, weights).view(hidden.shape[0], -1, module.hidden_size)

        replace_forward(module, forward, taken)


class JetMoe(Undecorated):
    """jetmoe: the block routes, sorts and adds a bias. Its attention experts stay resident: they are small."""

    class_name = "JetMoeMoE"

    def num_experts(self, module: Any) -> int:
        return int(module.input_linear.num_experts)

    def params(self, module: Any) -> tuple[Param, ...]:
        experts = self.num_experts(module)
        names = ("input_linear", "output_linear")
        return tuple(param for name in names for param in direct_params(getattr(module, name), experts, f"{name}."))

    def can_group(self, module: Any) -> bool:
        return False

    def expert(self, module: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        gate, up = functional.linear(x, weights["input_linear.weight"]).chunk(2, dim=-1)
        return functional.linear(module.activation(gate) * up, weights["output_linear.weight"])

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        module: Any = taken.module

        def forward(layer_input: Tensor) -> Tensor:
            flat = layer_input.reshape(-1, layer_input.shape[-1])
            logits = module.router(flat)[-1]
            values, index = logits.topk(module.router.top_k, dim=1)
            gates = torch.softmax(values, dim=1).type_as(flat)
            total: Tensor = run(module, flat, index, gates).view(layer_input.shape) + module.bias
            return total

        replace_forward(module, forward, taken)


class Llama4(Undecorated):
    """llama4: transformers runs every expert on every token; the score scales an expert's input, not its output."""

    class_name = "Llama4TextExperts"

    def can_group(self, module: Any) -> bool:
        return False

    def expert(self, module: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        gate, up = torch.matmul(x, weights["gate_up_proj"]).chunk(2, dim=-1)
        return torch.matmul(up * module.act_fn(gate), weights["down_proj"])

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        block: Any = model.get_submodule(taken.name.rpartition(".")[0])
        experts = taken.module

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states.reshape(-1, block.hidden_dim)
            scores, logits = block.router(hidden)
            index = torch.topk(logits, block.top_k, dim=1).indices
            # Each (token, expert) pair is a token of its own, with the score in it and a weight of one.
            scaled = hidden.repeat_interleave(block.top_k, dim=0) * scores.gather(1, index).reshape(-1, 1)
            ones = torch.ones(scaled.shape[0], 1, dtype=scaled.dtype, device=scaled.device)
            routed = run(experts, scaled, index.reshape(-1, 1), ones)
            out: Tensor = block.shared_expert(hidden)
            out.add_(routed.view(hidden.shape[0], block.top_k, -1).sum(dim=1))
            return out, logits

        replace_forward(block, forward, taken)
