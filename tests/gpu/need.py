"""Imported first by every module of this folder: skips it where there is no GPU to test on."""

import pytest
from moecore import _core

pytest.importorskip("torch", reason="the CUDA kernels are tested through torch")

import torch

_reason = _core.cuda_available()
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("this torch is built without CUDA", allow_module_level=True)
