"""A local web page to talk with a trained run: `python -m tools.chat_page --run-dir DIR`, then open the address it prints.

Drop an image, see the tiles and tags that the model gets, ask, in several turns; choose among the run's checkpoints.
One process holds the whole model (large models: `megatron_nvlm.generate --chat` under torchrun). The page keeps the
conversation and sends all of it with each question, so the server has no state but the model. It listens on this machine
alone unless --host says otherwise; there is no password. Programs ask at /v1/chat/completions, in OpenAI's form.
"""

import argparse
import base64
import binascii
import io
import secrets
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.option_types import network_port

from flask import Flask, Response, jsonify, request  # isort: skip
from PIL import Image
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import WSGIRequestHandler, make_server

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image
from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import choose_grid, cut_tiles
from megatron_nvlm.inference.answers import answer, generate_answers
from megatron_nvlm.inference.openai_chat import completion, read_completion_request
from megatron_nvlm.inference.questions import make_sample
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.runs.restore import open_trained_run
from megatron_nvlm.runs.run_dir import RunDir

PAGE = Path(__file__).with_suffix(".html")
MOST_MEGABYTES = 32
"""Of one picture; a conversation may send four times as much."""
MOST_NEW_TOKENS = 4096
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)
ONE_PROCESS = (
    "parallelism.tensor_model_parallel_size=1",
    "parallelism.sequence_parallel=false",
    "parallelism.vision_placement=first_stage",
)
Result = TypeVar("Result")


class ModelThread:
    """The model, and the one thread in which all its work is done: requests come in several and wait for their turn."""

    def __init__(self, run_dir: Path, checkpoint: Path | None, overrides: list[str]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.run_dir = run_dir
        self.path = save_load.find_checkpoint(checkpoint or run_dir)
        self.trained = self._do(open_trained_run, run_dir, self.path, [*ONE_PROCESS, *overrides])
        self.step = self.trained.progress.step

    def _do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return self._thread.submit(work, *arguments).result()

    def checkpoints(self) -> list[str]:
        """Names of the run's complete checkpoints, and of the one that is loaded."""
        found = RunDir(self.run_dir).checkpoints.glob(f"*/{IDENTITY_FILE}")
        return sorted({*(file.parent.name for file in found), self.path.name})

    def load(self, name: str) -> None:
        """Go on with another checkpoint of the run."""
        if name not in self.checkpoints():
            raise UserError(f"there is no checkpoint {name!r} in {self.run_dir}; reload the page to see those that are")
        path = self.path if name == self.path.name else RunDir(self.run_dir).checkpoints / name
        self.step = self._do(save_load.load_model, path, self.trained.model).step
        self.path = path

    def answer(self, raw: RawSample, sampling: Sampling) -> dict[str, Any]:
        """The answer, and what it took."""

        def work() -> dict[str, Any]:
            began = time.monotonic()
            sample = self.trained.pipeline.prepare(raw, open_answer=True)
            text = answer(self.trained, [sample], sampling)[0]
            seconds = round(time.monotonic() - began, 2)
            return {"answer": text, "tiles": sample.sequence.num_tiles, "seconds": seconds}

        return self._do(work)

    def complete(self, raw: RawSample, sampling: Sampling) -> dict[str, Any]:
        """The answer as a chat completion in OpenAI's form."""

        def work() -> dict[str, Any]:
            sample = self.trained.pipeline.prepare(raw, open_answer=True)
            found = generate_answers(self.trained, [sample], sampling)[0]
            names = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
            tokenizer, with_logprobs = self.trained.pipeline.tokenizer, sampling.logprobs is not None
            return completion(found, len(sample.sequence.tokens), tokenizer, with_logprobs, names)

        return self._do(work)

    @property
    def name(self) -> str:
        """What programs call the model: its run and checkpoint."""
        return f"{self.run_dir.resolve().name}/{self.path.name}"

    def show_tiles(self, data: bytes) -> dict[str, Any]:
        """Tiles of an image as they lie, with their tags, the thumbnail last; as PNG in data addresses."""
        tiling = self.trained.run.tiling
        image = decode_image(data, tiling.background)
        grid = choose_grid(*image.size, tiling.max_tiles, tiling.tile_size)
        tiles = [_data_address(tile) for tile in cut_tiles(image, grid, tiling.tile_size)]
        tags = tile_tags(grid, tiling.tag_format, tiling.thumbnail_tag)
        return {"cols": grid.cols, "rows": grid.rows, "tags": tags, "tiles": tiles, "size": list(image.size)}


def _data_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_app(model: ModelThread) -> Flask:
    """The page and what it asks for. Errors come as {"error": sentence}."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 4 * MOST_MEGABYTES * 2**20

    @app.get("/")
    def page() -> Response:
        return Response(PAGE.read_text(), mimetype="text/html", headers={"Content-Security-Policy": POLICY})

    @app.get("/state")
    def state() -> Response:
        run = model.trained.run
        return jsonify(
            run=str(model.run_dir),
            variant=run.model.variant.upper(),
            step=model.step,
            checkpoint=model.path.name,
            checkpoints=model.checkpoints(),
        )

    @app.post("/checkpoint")
    def load() -> Response:
        model.load(str(_fields().get("name")))
        return state()

    @app.post("/tiles")
    def tiles() -> Response:
        data = request.get_data()
        if len(data) > MOST_MEGABYTES * 2**20:
            raise UserError(f"the picture has over {MOST_MEGABYTES} MB; scale it down")
        return jsonify(model.show_tiles(data))

    @app.post("/ask")
    def ask() -> Response:
        fields = _fields()
        try:
            images = [base64.b64decode(image, validate=True) for image in fields["images"]]
            raw = make_sample("page", fields["turns"], images)
            sampling = Sampling(
                temperature=float(fields["temperature"]),
                top_p=float(fields["top_p"]),
                top_k=int(fields["top_k"]),
                repetition_penalty=float(fields["repetition_penalty"]),
                max_new_tokens=int(fields["max_new_tokens"]),
                seed=secrets.randbits(32),
            )
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise UserError(f"the page sent something else than a question ({error}); reload it") from error
        _check_length(sampling)
        return jsonify(model.answer(raw, sampling))

    _add_openai_routes(app, model)
    _answer_errors(app)
    return app


def _add_openai_routes(app: Flask, model: ModelThread) -> None:
    @app.get("/v1/models")
    def models() -> Response:
        only = {"id": model.name, "object": "model", "created": 0, "owned_by": "megatron_nvlm"}
        return jsonify(object="list", data=[only])

    @app.post("/v1/chat/completions")
    def complete() -> Response:
        body = request.get_json(silent=True)
        if not isinstance(body, dict):
            raise UserError("the request is no JSON object (application/json)")
        raw, sampling = read_completion_request(body, secrets.randbits(32))
        _check_length(sampling)
        return jsonify(model.complete(raw, sampling))


def _check_length(sampling: Sampling) -> None:
    if sampling.max_new_tokens > MOST_NEW_TOKENS:
        raise UserError(f"max_new_tokens is {sampling.max_new_tokens}; choose 1 to {MOST_NEW_TOKENS}")


def _answer_errors(app: Flask) -> None:
    @app.errorhandler(UserError)
    def mistake(error: UserError) -> tuple[Response, int]:
        return _told(str(error), "invalid_request_error"), 400

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: HTTPException) -> tuple[Response, int]:
        sentence = f"that is more than the {4 * MOST_MEGABYTES} MB that a conversation may send"
        return _told(sentence, "invalid_request_error"), 413

    @app.errorhandler(Exception)
    def fault(error: Exception) -> tuple[Response, int] | HTTPException:
        if isinstance(error, HTTPException):
            return error
        app.logger.error("a request failed", exc_info=error)
        return _told(
            f"the server failed ({type(error).__name__}: {error}); its terminal tells more", "server_error"
        ), 500


def _told(sentence: str, kind: str) -> Response:
    """An error as the page reads it, or as OpenAI's clients do."""
    is_openai = request.path.startswith("/v1/")
    return jsonify(error={"message": sentence, "type": kind} if is_openai else sentence)


def _fields() -> dict[str, Any]:
    # application/json alone, which no page of another origin may send
    fields = request.get_json(silent=True)
    if not isinstance(fields, dict):
        raise UserError("the page sent no JSON object; reload it")
    return fields


class _SilentHandler(WSGIRequestHandler):
    def log_request(self, *args: Any) -> None:
        """Say nothing of requests that went well or met a user's mistake."""


def main(arguments: list[str] | None = None) -> None:
    """Command line; serves until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.chat_page", description="Talk with a trained run in a browser."
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the training")
    parser.add_argument("--checkpoint", type=Path, help="a folder below checkpoints/; the newest if not given")
    parser.add_argument("--port", type=network_port, default=7860, help="default 7860; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    try:
        try:
            listener = socket.create_server((options.host, options.port))
        except OSError as error:
            raise UserError(
                f"{options.host}:{options.port} cannot be listened on ({error.strerror or error}); choose another --port"
            ) from error
        model = ModelThread(options.run_dir, options.checkpoint, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    host, port = listener.getsockname()[:2]
    server = make_server(
        host, port, make_app(model), threaded=True, request_handler=_SilentHandler, fd=listener.fileno()
    )
    print(f"NVLM-{model.trained.run.model.variant.upper()} of {model.run_dir} at step {model.step}", flush=True)
    print(f"open http://{host}:{port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
