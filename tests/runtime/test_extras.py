"""Packages of the extras, on demand."""

import os
import sys
import types

import pytest

from seprune.runtime.extras import require


@pytest.mark.parametrize(("chosen", "then"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_keeps_no_record_of_its_use_unless_the_user_wants_it(
    monkeypatch, chosen, then
):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen or "")
    if chosen is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    require("onnxruntime", extra="onnx", what="it is not installed")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == then
