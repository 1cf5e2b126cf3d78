"""Entry point: an answer to a question about an image.

`torchrun --nproc-per-node N -m megatron_nvlm.generate --run-dir DIR --image FILE --question TEXT [section.key=value ...]`
"""

import argparse
import sys
from pathlib import Path

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.data.shards import RawSample
from megatron_nvlm.entry import say, user_errors_end_the_process
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.trained_run import open_trained_run
from megatron_nvlm.parallel.groups import stop_groups
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER


def question_sample(question: str, image: Path | None) -> RawSample:
    """A question as a stored sample; the image goes in front unless the question says where."""
    if image is None:
        return RawSample("question", {"conversation": [{"from": "human", "value": question}]}, {})
    if not image.is_file():
        raise UserError(f"there is no image {image}")
    text = question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n{question}"
    record = {"conversation": [{"from": "human", "value": text}], "images": [{}]}
    return RawSample("question", record, {"0.image": image.read_bytes()})


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line; prints the answer."""
    parser = argparse.ArgumentParser(prog="megatron_nvlm.generate", description="Ask a trained run about an image.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the training")
    parser.add_argument("--checkpoint", type=Path, help="a folder below checkpoints/; the newest if not given")
    parser.add_argument("--image", type=Path, help="a picture file; none for a question of text alone")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    raw = question_sample(options.question, options.image)
    trained = open_trained_run(options.run_dir, options.checkpoint, options.overrides)
    sample = trained.pipeline.prepare(raw, open_answer=True)
    say(trained.answer([sample], options.max_new_tokens)[0])
    stop_groups()


if __name__ == "__main__":
    sys.exit(main())
