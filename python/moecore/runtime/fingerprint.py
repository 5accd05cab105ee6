"""What a module's forward does, as a short text that changes whenever its code does.

Code of other people is replaced only where it is known word for word. Words are those of the syntax tree: comments,
type hints, docstrings and layout do not count, nor do names of classes, so that a copy of a known forward is known too.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FunctionType

    from torch import nn

#: Fields of syntax nodes that say nothing of what is computed.
SILENT = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}


def fingerprint(module: nn.Module) -> str | None:
    """Digest of a module's forward and of all that it calls on itself; None where the source cannot be read.

    Methods count with their source, modules of torch with their name, other modules with their own forward's source.
    """
    try:
        words = _words(module)
    except (AttributeError, OSError, SyntaxError, TypeError, ValueError):
        return None
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _words(module: nn.Module) -> list[str]:
    """The forward's tree, then what it calls, in the order of names."""
    cls, words = type(module), []
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop(0)
        child: Any = module._modules.get(name)
        if child is None:
            tree, called = _tree(_function(inspect.getattr_static(cls, name)))
            words.append(tree)
            waiting += sorted(called - seen)
            seen |= called
        elif type(child).__module__.startswith("torch."):
            words.append(f"{name}: {type(child).__name__}")
        else:
            words += [f"{name}:", *_words(child)]
    return words


def _function(value: Any) -> FunctionType:
    """The function that holds the code. Wrappers of torch (`no_grad`) are looked through; others are new code."""
    if isinstance(value, staticmethod):
        value = value.__func__
    if not inspect.isfunction(value):
        raise TypeError(f"{value!r} is no function")
    inner = getattr(value, "__wrapped__", None)
    from_torch = value.__globals__.get("__name__", "").startswith("torch.")
    return _function(inner) if inner is not None and from_torch else value


@functools.cache
def _tree(function: FunctionType) -> tuple[str, frozenset[str]]:
    """A function's tree as text, and the names that it calls on `self`."""
    # By the code object: `inspect.getsource` of a function looks through every wrapper.
    source = textwrap.dedent(inspect.getsource(function.__code__))
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(f"{function!r} is not written as a function")
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }
    return _text(tree), frozenset(called)


def _text(node: Any) -> str:
    """A tree as text, alike for all versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(_text(part) for part in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in SILENT}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(_text(value) for value in fields.values())})"
