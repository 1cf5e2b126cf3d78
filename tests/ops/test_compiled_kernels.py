"""Kernels compiled for GPUs that are not there: nothing spills, shared memory suffices, tensor cores are used."""

import pytest

from megatron_nvlm.gpu_check.kernels import HEAD_SIZES, compile_all

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(("capability", "unit"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")])
def test_kernels_fit(capability: int, unit: str) -> None:
    kernels = compile_all(capability)
    assert len(kernels) == 4 * len(HEAD_SIZES) + 4
    assert [kernel for kernel in kernels if not kernel["fits"]] == []
    assert {kernel["tensor_cores"] for kernel in kernels if kernel["multiplies"]} == {unit}
