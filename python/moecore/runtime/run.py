"""``moecore run``: text from a prompt, and what its experts have cost."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from moecore.errors import MoecoreError, TargetError

from . import load
from .budget import size

if TYPE_CHECKING:
    import argparse

    from .stats import Stats

#: Bytes of the copy that measures a GPU's link: large enough that its start does not count.
LINK_PROBE = 256 << 20


@dataclass
class Timed:
    """Passes tokens on to a streamer and notes when they come."""

    inner: Any
    started: float
    times: list[float]

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self.times.append(time.perf_counter())
        self.inner.put(value)

    def end(self) -> None:
        """No more tokens."""
        self.inner.end()


def run(arguments: argparse.Namespace) -> int:
    """Loads the model, streams the text to standard output, and ends with a table on standard error."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, revision=arguments.revision)
    except (OSError, ValueError) as error:
        raise TargetError(f"{arguments.model}: no tokenizer that can be loaded: {error}") from error
    started = time.perf_counter()
    model = load(
        arguments.model,
        expert_memory=arguments.expert_memory,
        host_memory=arguments.host_memory,
        device=arguments.device,
        dtype=arguments.dtype,
        policy=arguments.policy,
        max_model_len=arguments.max_model_len,
        revision=arguments.revision,
    )
    loaded = time.perf_counter() - started
    with model.moecore as handle:
        inputs = encode(tokenizer, arguments.prompt, raw=arguments.raw).to(model.device)
        prompt = int(inputs["input_ids"].shape[1])
        if arguments.show_prompt:
            print(arguments.prompt, end="", flush=True)
        streamer = Timed(transformers.TextStreamer(tokenizer, skip_prompt=True), time.perf_counter(), [])
        model.generate(
            **inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, streamer=streamer,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        stats = handle.stats()
        print(table(stats, handle.report(), streamer, prompt, loaded, model.device), file=sys.stderr)
    return 0


def encode(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    """The prompt as tokens: as a user's message where the tokenizer has a chat template."""
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise TargetError("the prompt has no tokens; give --prompt some text")
    return inputs


def table(stats: Stats, report: str, streamer: Timed, prompt: int, loaded: float, device: torch.device) -> str:
    """What was counted, with times and the floor of the link beside them."""
    first, last = streamer.times[1] if len(streamer.times) > 1 else streamer.started, streamer.times[-1]
    tokens = max(len(streamer.times) - 2, 0)
    lines = ["", report, f"loaded in {loaded:.1f} s, without its experts"]
    lines.append(f"prompt of {prompt} tokens: first token after {(first - streamer.started) * 1e3:.0f} ms")
    if tokens:
        each = (last - first) / tokens
        lines.append(f"then {tokens} tokens at {1 / each:.1f} a second ({each * 1e3:.1f} ms each)")
        moved = stats.decode.demand_bytes / tokens
        lines.append(f"moved for each of them: {size(moved)}{floor(moved, stats, each, device)}")
    return "\n".join(lines)


def floor(moved: float, stats: Stats, each: float, device: torch.device) -> str:
    """The least time that the bytes of one token can take, where the rate below them can be measured."""
    if not moved:
        return ""
    if device.type != "cuda":
        wait = stats.decode.stall_ns / 1e9
        rate = stats.decode.demand_bytes / wait if wait else 0.0
        return f", read at {rate / 1e9:.2f} GB/s while calls waited"
    rate = link_rate(device)
    return f"; at the link's {rate / 1e9:.1f} GB/s no less than {moved / rate * 1e3:.2f} ms of the {each * 1e3:.1f} ms"


def link_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device: the best of five copies."""
    try:
        source = torch.empty(LINK_PROBE, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(LINK_PROBE, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise MoecoreError(f"no memory to measure the link of {device}: {error}") from error
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(LINK_PROBE / min(times))
