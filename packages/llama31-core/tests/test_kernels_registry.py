"""Which kernels a model gets: by device, or by name."""

from __future__ import annotations

import mindspore as ms
import pytest

from llama31_core import kernels
from llama31_core.errors import ConfigError
from llama31_core.kernels import ascend, portable
from llama31_core.model.norm import RMSNorm


@pytest.mark.parametrize(("device", "expected"), [("CPU", portable), ("GPU", portable), ("Ascend", ascend)])
def test_the_device_decides(device: str, expected: kernels.KernelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms, "get_context", {"device_target": device}.__getitem__)
    assert kernels.active() is expected


def test_a_name_decides_within_its_block_and_a_built_cell_keeps_its_kernels() -> None:
    with kernels.use("ascend") as chosen:
        assert chosen is ascend
        norm = RMSNorm(8, 1e-5)
    assert kernels.active() is portable
    assert norm._normalise is ascend.rms_norm
    assert RMSNorm(8, 1e-5)._normalise is portable.rms_norm


def test_a_name_that_no_set_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cuda', allowed are 'portable', 'products', 'ascend'"), kernels.use("cuda"):
        pass
