"""The model card of an exported folder: README.md with the metadata that Hugging Face's hub reads.

It tells what the run directory knows: variant, data and their weights, steps, validation losses, and scores of a benchmark
report. Paths of this machine are left out. A licence is not: it depends on data and weights, and its owner adds it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_nvlm
from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.metrics_lines import LineFollower, is_step
from megatron_nvlm.regular_files import read_whole
from megatron_nvlm.runs.run_dir import RunDir

CARD_FILE = "README.md"
Scored = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Tasks of a report, each with the result of this checkpoint."""


def read_scores(report: Path, checkpoint: Path, step: int) -> Scored:
    """What a report.json of run_benchmarks says of the checkpoint's run at this step.

    Raises:
        UserError: it is none, or has no scores of this run at this step.
    """
    try:
        content = json.loads(read_whole(report, f"the report {report}"))
        models = {str(model["name"]): model for model in content["models"]}
        run_dir = checkpoint.resolve().parents[1]
        own = [name for name, one in models.items() if one["path"] == str(run_dir) and one["step"] == step]
        scored = [
            (task, task["results"][name])
            for name in own
            for task in content["tasks"]
            if "scores" in task["results"].get(name, {})
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{report} is no report.json of run_benchmarks ({error}); correct --report") from error
    if not scored:
        there = ", ".join(f"{one['path']} at step {one['step']}" for one in models.values()) or "nothing"
        raise UserError(f"{report} has no scores of {run_dir} at step {step}, but of {there}; run its benchmarks first")
    return scored


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint; 0 for weights that were imported."""
    progress = json.loads((checkpoint / IDENTITY_FILE).read_text()).get("progress") or {}
    return int(progress.get("step", 0))


def write_card(run: RunConfig, checkpoint: Path, scored: Scored) -> str:
    """The text of the card."""
    name = f"NVLM-{run.model.variant.upper()}"
    step = step_of(checkpoint)
    parts = [
        "---",
        *_metadata(run, name, scored),
        "---",
        "",
        f"# {name}",
        "",
        f"{_variant(run)} Trained with megatron_nvlm {megatron_nvlm.__version__}, in the architecture of NVLM 1.0 "
        "(arXiv 2409.11402).",
        "",
        *_training(run, step),
        *_validation(checkpoint, step),
        *_benchmarks(scored),
        *_use(),
    ]
    return "\n".join(parts) + "\n"


def _variant(run: RunConfig) -> str:
    seen = {
        "d": "The decoder reads tokens of the image among those of the text.",
        "x": "Gated cross-attention reads the image's tokens.",
        "h": "The decoder reads the thumbnail's tokens, and gated cross-attention those of the tiles.",
    }
    tiles = f"up to {run.tiling.max_tiles} tiles of {run.tiling.tile_size} pixels, tags {run.tiling.tag_format}"
    return f"{seen[run.model.variant]} Images are cut into {tiles}."


def _metadata(run: RunConfig, name: str, scored: Scored) -> Iterator[str]:
    """YAML that the hub reads. JSON's strings are YAML's."""
    yield "library_name: transformers"
    yield "pipeline_tag: image-text-to-text"
    yield f"tags: [nvlm, nvlm-{run.model.variant}, custom_code]"
    if not scored:
        return
    yield "model-index:"
    yield f"- name: {json.dumps(name)}"
    yield "  results:"
    for task, result in scored:
        kind = "image-text-to-text" if task["kind"] == "vision-language" else "text-generation"
        yield f"  - task: {{type: {kind}}}"
        yield f"    dataset: {{name: {json.dumps(task['name'])}, type: {json.dumps(task['name'])}}}"
        yield "    metrics:"
        for scorer, score in result["scores"].items():
            if "score" in score:
                yield f"    - {{type: {json.dumps(scorer)}, value: {round(score['score'], 2)}}}"


def _training(run: RunConfig, step: int) -> Iterator[str]:
    yield "## Training"
    yield ""
    if step == 0:
        yield from ("The weights were imported and not trained here.", "")
        return
    trained = ", ".join(run.trainable_components())
    yield (
        f"{step} steps of {run.training.global_batch_size} samples, recipe {run.recipe.name} (training {trained}), up to "
        f"{run.data.sequence_length} tokens, precision {run.training.precision}, template {run.data.template}."
    )
    total = sum(source.weight for source in run.data.train)
    yield from ("", "| data | weight | share |", "|---|---:|---:|")
    for source in run.data.train:
        yield f"| {_cell(source.label)} | {source.weight:g} | {source.weight / total:.1%} |"
    yield ""


def _validation(checkpoint: Path, step: int) -> Iterator[str]:
    """The last validation up to the checkpoint's step."""
    records = LineFollower(RunDir(checkpoint.parents[1]).metrics).read().records
    measured = [one for one in records if is_step(one) and one["step"] <= step and one.get("validation")]
    if not measured:
        return
    yield from ("## Validation", "", f"After step {measured[-1]['step']}:", "")
    yield from ("| set | loss | tokens right | samples |", "|---|---:|---:|---:|")
    for name, row in measured[-1]["validation"].items():
        numbers = (f"{row['loss']:.4f}", f"{row['token_accuracy']:.1%}") if row.get("loss") is not None else ("", "")
        yield f"| {_cell(name)} | {numbers[0]} | {numbers[1]} | {row.get('samples', '')} |"
    yield ""


def _benchmarks(scored: Scored) -> Iterator[str]:
    if not scored:
        return
    yield from (
        "## Benchmarks",
        "",
        "Mean and standard error over samples, greedy answers (docs/benchmarks.md of megatron_nvlm).",
    )
    yield from ("", "| task | scorer | score | samples | examples | prompt |", "|---|---|---:|---:|---:|---|")
    for task, result in scored:
        for scorer, score in result["scores"].items():
            told = f"{score['score']:.1f} ± {score['error']:.1f}" if "score" in score else "not scored"
            cells = (task["name"], scorer, told, str(result["samples"]), str(task["few_shot"]), _cell(task["prompt"]))
            yield f"| {' | '.join(cells)} |"
    versions = ", ".join(sorted({result["version"] for _, result in scored}))
    unanswered = sum(result["unanswered"] for _, result in scored)
    wrong = f" {unanswered} questions had no answer and count as wrong." if unanswered else ""
    yield from ("", f"Scored by megatron_nvlm {versions}.{wrong}", "")


def _use() -> Iterator[str]:
    yield from (
        "## Use",
        "",
        "    from transformers import AutoModelForCausalLM, AutoProcessor",
        "    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).eval()",
        "    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)",
        '    inputs = processor(text="<image>\\nWhat is this?", images=[picture])',
        "    print(processor.decode_answers(inputs, model.generate(**inputs, max_new_tokens=64)))",
    )


def _cell(text: str) -> str:
    """Text within a row of a table."""
    return text.replace("|", "\\|").replace("\n", "<br>").replace("<image>", "&lt;image&gt;")
