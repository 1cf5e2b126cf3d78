"""What GPUs compute at most: dense bf16, in TFLOP/s, by the name that CUDA gives a device.

A name that is not in the table has no peak here, and nothing is put in its place: `logging.peak_tflops` gives it by hand.
Figures are those of NVIDIA's data sheets. Sheets since the A100 print tensor-core rates with 2:4 sparsity, which training
does not use; the dense rate is half of that.
"""

import re

PEAKS: tuple[tuple[str, float], ...] = (
    # A100 data sheet (40 GB and 80 GB, SXM and PCIe alike): BFLOAT16 312. A800: the same chip with slower NVLink.
    (r"A100-(SXM4|SXM|PCIE|PG\w+)-\d+GB", 312.0),
    (r"A100 80GB PCIe", 312.0),
    (r"A800-SXM4-\d+GB", 312.0),
    (r"A800 80GB PCIe", 312.0),
    # A30, A40 and A10 data sheets: BFLOAT16 165, 149.7, 125.
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    # H100 data sheet: SXM 1979 sparse (the architecture paper says 989.4 dense), PCIe 1513, NVL 1671. The first sheets of
    # the NVL gave the sum of a pair of cards.
    (r"H100 (80GB|64GB|96GB) HBM[23]e?", 989.0),
    (r"H100 PCIe", 756.5),
    (r"H100 NVL", 835.5),
    (r"H800", 989.0),
    # GH200 data sheet: 1979 sparse.
    (r"GH200 (96GB|120GB|144G|144GB|480GB)( HBM3e?)?", 989.0),
    # H200 data sheet: SXM 1979 sparse, NVL 1671 sparse.
    (r"H200", 989.0),
    (r"H200 NVL", 835.5),
    # H20 data sheet: 148.
    (r"H20", 148.0),
    # HGX B200 and HGX B300 data sheets, eight GPUs: 36 PFLOP/s sparse.
    (r"B200", 2250.0),
    (r"B300( SXM6 AC)?", 2250.0),
    # GB200 and GB300 NVL72 data sheets, 72 GPUs: 360 PFLOP/s sparse.
    (r"GB200", 2500.0),
    (r"GB300", 2500.0),
    # L40S, L40 and L4 data sheets: 362.05, 181.05, 121 (242 sparse).
    (r"L40S", 362.05),
    (r"L40", 181.05),
    (r"L4", 121.0),
)
"""Patterns that the whole name must match, without its maker: a part of a GPU ("... MIG 3g.40gb") is not the GPU."""

H100_SXM = "NVIDIA H100 80GB HBM3"
"""The name of the paper's GPUs."""


def peak_tflops_of(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name; None if the table does not know it."""
    bare = re.sub(r"^(NVIDIA|Tesla)\s+", "", name.strip())
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, bare)), None)
