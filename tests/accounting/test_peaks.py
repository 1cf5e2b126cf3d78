"""The table of GPU peaks: names as CUDA gives them, and no peak for anything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.accounting.peaks import H100_SXM, PEAKS, peak_tflops_of
from megatron_nvlm.estimate.step_time import Hardware

KNOWN = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121,
}
UNKNOWN = [
    "",
    "cpu",
    "NVIDIA",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100",  # of which kind?
    "NVIDIA A100X",
    "NVIDIA A1000",
    "NVIDIA RTX A4000",
    "Tesla V100-SXM2-16GB",
    "AMD Instinct MI300X",
    "NVIDIA L400",
    "NVIDIA B2000",
]


@pytest.mark.parametrize("name", KNOWN)
def test_peaks_of_gpus(name: str) -> None:
    assert peak_tflops_of(name) == KNOWN[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_peak_of_what_is_not_in_the_table(name: str) -> None:
    assert peak_tflops_of(name) is None


def test_the_dry_run_reckons_with_the_same_peak() -> None:
    assert Hardware().peak_tflops == peak_tflops_of(H100_SXM)


@given(st.text(max_size=30))
def test_any_name_has_one_peak_or_none(name: str) -> None:
    assert peak_tflops_of(name) in {None, *(peak for _, peak in PEAKS)}


@given(st.sampled_from(sorted(KNOWN)), st.text("abcXYZ0189 -", min_size=1, max_size=4).filter(str.strip))
def test_a_name_with_more_behind_it_is_another_device(name: str, more: str) -> None:
    assert peak_tflops_of(f"{name}{more}") is None or f"{name}{more}".strip() in KNOWN or more.strip() in ("GB", "S")
