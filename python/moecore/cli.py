"""The ``moecore`` command.

Exit status: 0 all well, 1 some targets failed, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moecore._core import __version__
from moecore.errors import MoecoreError, TargetError
from moecore.output import FORMATS, finished_targets, open_sink
from moecore.report import printable

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from moecore.report import ScanReport
    from moecore.scan import Session

KV_DTYPES = (
    "auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments) if arguments.command == "run" else _scan(arguments)
    except MoecoreError as error:
        print(f"moecore: error: {printable(str(error))}", file=sys.stderr)
        _drop_unwritten()
        return 2
    except BrokenPipeError:
        # The reader of our output has had enough (`| head`); nothing may be written at exit either.
        _drop_unwritten()
        sys.stderr.close()
        return 141  # as if by SIGPIPE


def _drop_unwritten() -> None:
    """What standard output does not take must not be tried, and complained of, once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moecore", description="Know, run and operate Mixture-of-Experts models larger than their accelerators."
    )
    parser.add_argument("--version", action="version", version=f"moecore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser(
        "scan",
        help="say exactly what memory models take, from their safetensors headers",
        description="Says what memory models take: base weights, shared and routed experts, KV cache; active against "
        "total parameters. Reads safetensors headers only, by range requests for repos on the hub.",
        epilog="Exit status: 0 all well, 1 some targets failed, 2 bad usage.",
    )
    scan.add_argument("targets", nargs="*", metavar="TARGET", help="org/name[@revision], a folder, or a file")
    scan.add_argument("--from-file", type=Path, metavar="FILE", help="read targets from a file, one a line; - is stdin")
    scan.add_argument("--format", choices=FORMATS, help="table (default), json, jsonl or csv")
    scan.add_argument("--output", "-o", type=Path, metavar="FILE", help="write to a file instead of the terminal")
    scan.add_argument("--resume", action="store_true", help="go on with the JSON lines file of an earlier run")
    scan.add_argument("--fail-fast", action="store_true", help="stop at the first target that fails")
    scan.add_argument("--jobs", "-j", type=int, default=16, metavar="N", help="targets at a time (default: 16)")
    scan.add_argument("--no-cache", action="store_true", help="neither use nor store headers of former scans")
    scan.add_argument("--quiet", "-q", action="store_true", help="no progress line")
    kv = scan.add_argument_group("KV cache")
    kv.add_argument("--max-model-len", type=int, metavar="T", help="tokens a sequence (default: the model's longest)")
    kv.add_argument("--batch-size", type=int, default=1, metavar="B", help="sequences (default: 1)")
    kv.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto", help="number format (default: auto)")
    hub = scan.add_argument_group("hub")
    hub.add_argument("--revision", help="branch, tag or commit for all targets without @revision")
    hub.add_argument("--token", "--hf-token", metavar="TOKEN", help="hub token (default: what huggingface_hub knows)")
    alike = scan.add_argument_group("accepted for users of hf-mem")
    alike.add_argument("--model-id", action="append", default=[], metavar="ID", help="the same as TARGET")
    alike.add_argument("--json-output", action="store_true", help="the same as --format json")
    alike.add_argument("--experimental", action="store_true", help="no effect: KV cache and experts are always shown")
    alike.add_argument("--details", action="store_true", help="no effect: details are always in the JSON")
    alike.add_argument("--ignore-table-width", action="store_true", help=argparse.SUPPRESS)
    _add_run(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="generate text with a part of the experts on the device",
        description="Runs a transformers MoE model with a part of its experts on the device, streams the text, and "
        "ends with what the experts have cost. Greedy. Needs torch and transformers.",
    )
    run.add_argument("model", metavar="MODEL", help="org/name or a folder")
    run.add_argument("--prompt", "-p", required=True, help="text to go on from")
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    run.add_argument(
        "--expert-memory", default="auto", metavar="BUDGET", help="'25%%', '12GiB', bytes or auto (default)"
    )
    run.add_argument("--host-memory", default="auto", metavar="BUDGET", help="pinned host memory for experts, on a GPU")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    run.add_argument("--dtype", help="float32, bfloat16, ... (default: as stored)")
    run.add_argument("--policy", default="cyclic", help="which expert gives way (default: cyclic)")
    run.add_argument("--max-model-len", type=int, metavar="T", help="tokens to keep KV cache room for, with auto")
    run.add_argument("--revision", help="branch, tag or commit")
    run.add_argument("--raw", action="store_true", help="do not use the tokenizer's chat template")
    run.add_argument("--show-prompt", action="store_true", help="print the prompt before the text")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise TargetError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}")
    try:
        from moecore.runtime.run import run
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MoecoreError(f'moecore run needs {error.name}; run: pip install "moecore[torch]"') from error
    if arguments.expert_memory.isdigit():
        arguments.expert_memory = int(arguments.expert_memory)
    return run(arguments)


def _scan(arguments: argparse.Namespace) -> int:
    kind = arguments.format or ("json" if arguments.json_output else None)
    if kind is None:
        kind = "jsonl" if arguments.output and arguments.output.suffix in (".jsonl", ".ndjson") else "table"
    if arguments.resume and (arguments.output is None or kind != "jsonl"):
        raise TargetError("--resume goes on with a file: give it as --output FILE with --format jsonl")
    if arguments.jobs < 1:
        raise TargetError(f"--jobs must be at least 1, not {arguments.jobs}")
    for name in ("max_model_len", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 2**40:
            raise TargetError(f"--{name.replace('_', '-')} must be between 1 and 2^40, not {value}")
    targets = _targets(arguments)
    done = finished_targets(arguments.output) if arguments.resume else set()
    left = [target for target in targets if target not in done]

    # Imported late: usage errors and --help must not wait for them.
    from moecore.scan import Options, Session

    session = Session(
        Options(
            revision=arguments.revision,
            max_model_len=arguments.max_model_len,
            batch_size=arguments.batch_size,
            kv_cache_dtype=arguments.kv_cache_dtype,
            token=arguments.token,
            cache=not arguments.no_cache,
        )
    )
    failed = count = 0
    with contextlib.ExitStack() as stack:
        sink = open_sink(kind, arguments.output, targets, stack, append=arguments.resume)
        reports = stack.enter_context(contextlib.closing(_reports(session, left, arguments, skipped=len(done))))
        try:
            for report in reports:
                sink.write(report)
                count += 1
                if report.error is not None:
                    failed += 1
                    if report.status == "error" or len(left) > 1:
                        print(f"moecore: {report.status}: {_line(report)}", file=sys.stderr)
                    if arguments.fail_fast:
                        break
        except KeyboardInterrupt:
            session.cancel()
            hint = "; --resume goes on from here" if kind == "jsonl" and arguments.output else ""
            print(f"moecore: interrupted after {count} of {len(left)} targets{hint}", file=sys.stderr)
            # With nothing to say, a file of an earlier run is better left as it is.
            if count:
                sink.close()
            return 130
        sink.close()
    return 1 if failed else 0


def _line(report: ScanReport) -> str:
    """The error of a report on one line, naming its target once."""
    text = " ".join((report.error or "").split())
    return printable(text if text.startswith(report.requested) else f"{report.requested}: {text}")


def _targets(arguments: argparse.Namespace) -> list[str]:
    targets: list[str] = [*arguments.targets, *arguments.model_id]
    if arguments.from_file is not None:
        try:
            text = sys.stdin.read() if str(arguments.from_file) == "-" else arguments.from_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(f"{arguments.from_file}: cannot be read: {error}") from error
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        targets += [line for line in lines if line]
    if not targets:
        raise TargetError("no targets; give repo ids, folders or files, or --from-file")
    return list(dict.fromkeys(targets))


def _reports(
    session: Session, targets: list[str], arguments: argparse.Namespace, *, skipped: int
) -> Generator[ScanReport, None, None]:
    """Reports as they come, under a progress line where a person watches a longer run."""
    reports = session.scan_many(targets, jobs=min(arguments.jobs, max(len(targets), 1)))
    with contextlib.closing(reports):
        if len(targets) < 2 or arguments.quiet or not sys.stderr.isatty():
            yield from reports
        else:
            from moecore.progress import watched

            yield from watched(session, reports, total=len(targets) + skipped, done=skipped)
