"""The paper's own numbers (NVLM 1.0, arXiv 2409.11402), by the names of our tasks."""

SOURCE = "NVLM 1.0 (arXiv 2409.11402), Tables 7 and 12 (vision-language), 8 and 13 (text)"
PAPER_TASKS = (
    "mmmu",
    "mathvista",
    "vqav2",
    "ai2d",
    "textvqa",
    "chartqa",
    "docvqa",
    "realworldqa",
    "ocrbench",
    "mmlu",
    "gsm8k",
    "math",
    "humaneval",
)
_ROWS: dict[str, tuple[float, ...]] = {
    "NVLM-D 72B": (59.7, 65.2, 85.4, 85.2, 82.1, 86.0, 92.6, 69.7, 853, 82.0, 92.9, 73.1, 88.4),
    "NVLM-X 72B": (57.4, 64.6, 85.2, 84.2, 80.2, 82.9, 82.9, 66.1, 828, 81.4, 91.8, 70.6, 85.2),
    "NVLM-H 72B": (60.2, 66.6, 85.2, 83.8, 80.3, 83.3, 83.1, 66.0, 831, 80.4, 91.5, 71.4, 86.6),
    "NVLM-D 34B": (52.1, 59.9, 84.3, 82.6, 80.0, 84.0, 89.1, 67.3, 819, 73.4, 82.3, 47.8, 62.8),
    "NVLM-X 34B": (54.0, 59.2, 84.5, 79.6, 78.2, 79.4, 79.2, 64.8, 802, 73.2, 82.2, 46.4, 62.2),
    "NVLM-H 34B": (53.0, 59.4, 84.8, 81.5, 79.0, 82.0, 80.5, 66.3, 821, 73.4, 82.7, 46.3, 63.4),
}
PAPER: dict[str, dict[str, float]] = {
    model: dict(zip(PAPER_TASKS, values, strict=True)) for model, values in _ROWS.items()
}
"""Model -> task -> what the paper tells: MMMU of validation, AI2D of test with labels hidden."""
OTHER_SPLITS = {
    "mmmu test": (54.6, 53.6, 53.0, 48.7, 47.2, 46.3),
    "ai2d no_mask": (94.2, 93.6, 93.3, 93.0, 91.2, 93.0),
}
"""Further numbers of the paper, in the order of its models here."""
