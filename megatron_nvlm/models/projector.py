"""The projector: pixel-shuffled patch features to the width of the language model (paper, section 4.5)."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

LAYER_NORM_EPSILON = 1e-5
"""As in the public NVLM-D release; its training scripts have 1e-6 (the two differ by rounding only)."""


class MLPProjector(MegatronModule):
    """LayerNorm, linear, exact GELU, linear, without biases: NVLM-D and NVLM-H (one module for all of H's tiles)."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, norm: Any, input_size: int) -> None:
        super().__init__(config=config)
        self.layernorm = build_module(norm, config=config, hidden_size=input_size, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(
            config,
            submodules,
            input_size=input_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[vision tokens, input size] -> [vision tokens, h], whole on every tensor-parallel rank."""
        output: Tensor = self.mlp(self.layernorm(features[:, None]))[0]  # [vision tokens, 1, h]
        return output[:, 0]  # [vision tokens, h]


class LinearProjector(MegatronModule):
    """One linear layer without bias or norm: NVLM-X (the paper says one layer; the rest is our choice)."""

    def __init__(self, config: TransformerConfig, input_size: int) -> None:
        super().__init__(config=config)
        self.linear = ColumnParallelLinear(
            input_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[vision tokens, input size] -> [vision tokens, h], whole on every tensor-parallel rank."""
        output: Tensor = self.linear(features[:, None])[0]  # [vision tokens, 1, h]
        return output[:, 0]  # [vision tokens, h]
