"""Stands where exported folders have a copy of models/families/rope_scaling.py."""

from megatron_nvlm.models.families.rope_scaling import RopeScaling

__all__ = ["RopeScaling"]
