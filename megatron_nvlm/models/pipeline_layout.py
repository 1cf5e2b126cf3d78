"""Which decoder layers stand in which part of the pipeline: even parts, or Megatron-core's layout strings."""

import re
from collections.abc import Sequence

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_nvlm.errors import UserError


def chunk_layers(layout: str | None, stages: int, chunks: int, num_layers: int) -> list[list[int]]:
    """Decoder layers, from 0, of each part of the pipeline, in the order in which a micro-batch passes through them.

    Part `i` belongs to stage `i % stages` and is its chunk `i // stages`.

    Args:
        layout: Megatron-core's string, such as `Et*13|t*16|t*16|t*15L` (E embedding, t decoder layer, L output layer
            and loss, | between parts); None for equal parts.
        chunks: parts of each stage (virtual pipeline stages).

    Raises:
        UserError: the parts do not hold each layer once, or one of them holds none.
    """
    parts = stages * chunks
    if layout is None:
        if num_layers % parts:
            virtual = f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
            raise UserError(
                f"parallelism.pipeline_model_parallel_size is {stages}{virtual}, which does not divide the {num_layers} "
                f"layers of the language model; choose a divisor of {num_layers}, or set parallelism.pipeline_layout"
            )
        each = num_layers // parts
        return [list(range(part * each, (part + 1) * each)) for part in range(parts)]
    return _from_counts(_layer_counts(layout, parts, num_layers))


def _from_counts(counts: Sequence[int]) -> list[list[int]]:
    starts = [sum(counts[:part]) for part in range(len(counts))]
    return [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]


def _layer_counts(layout: str, parts: int, num_layers: int) -> list[int]:
    where = f"parallelism.pipeline_layout {layout!r}"
    if not re.fullmatch(r"[EtL|(),*0-9]+", layout):
        raise UserError(f"{where} may hold E, t, L, | and repeats such as t*8 only; see docs/parallelism.md")
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}); write it like Et*7|t*8|t*8|t*7L") from error
    if len(rows) != parts:
        raise UserError(
            f"{where} has {len(rows)} parts and the pipeline has {parts} (pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size); separate as many by |"
        )
    flat = [kind for row in rows for kind in row]
    embedding, loss = LayerType.embedding, LayerType.loss
    if flat.count(embedding) != 1 or flat[0] != embedding or flat.count(loss) != 1 or flat[-1] != loss:
        raise UserError(f"{where} must begin with E and end with L, each once")
    counts = [row.count(LayerType.decoder) for row in rows]
    if sum(counts) != num_layers:
        raise UserError(f"{where} has {sum(counts)} layers and the language model has {num_layers}; make them equal")
    if 0 in counts:
        raise UserError(f"{where} leaves part {counts.index(0) + 1} without a layer; give each at least one t")
    return counts
