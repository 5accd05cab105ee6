"""How each kind of experts module is found, run and switched over to moecore."""

from __future__ import annotations

from .base import Adapter, Param, Run, Taken
from .interface import FP8, Interface
from .undecorated import Dbrx, JetMoe, Llama4, Longcat, Undecorated

ADAPTERS: tuple[Adapter, ...] = (FP8(), Interface(), Undecorated(), Longcat(), Dbrx(), JetMoe(), Llama4())
"""The first one that owns a module runs it."""

__all__ = ["ADAPTERS", "Adapter", "Param", "Run", "Taken"]
