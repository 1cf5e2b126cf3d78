"""The chat page in a real headless browser, over a checkpoint that the demo's own command trained for a few steps."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.launch import environment
from tests.support.trained import train_demo

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, in which the page could be opened")
DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
}"""


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page over a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("chat_page")
    run_dir = train_demo(folder, steps=3, save_every=2)
    command = [sys.executable, "-m", "megatron_nvlm.commands.chat_page", "--run-dir", str(run_dir), "--port", "0"]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        try:
            assert said[0] == f"NVLM-H of {run_dir} at step 3\n", (folder / "errors").read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+/", said[1])
            assert found
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)
    assert "Traceback" not in (folder / "errors").read_text()


@pytest.fixture
def page(server: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server)
        page.get_by_role("heading", name="NVLM-H").wait_for()
        yield page
        browser.close()
    assert not faults
    assert all(url.startswith((server, "data:", "blob:")) for url in asked), "the page is to be self-contained"


def ask(page: Any, question: str) -> str:
    before = page.locator(".answer.done").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".answer.done").nth(before).wait_for()
    return str(page.locator(".answer.done").last.inner_text())


def test_an_image_is_dropped_its_tiles_shown_and_questions_answered(page: Any) -> None:
    page.evaluate(DROP, ["two_to_three.png", list(picture(224, 336))])
    page.wait_for_selector("#pending .image")
    tags = page.locator("#pending figcaption").all_inner_texts()
    assert tags == [*(f"<tile_{number}>" for number in range(1, 7)), "<tile_global_thumbnail>"]
    assert page.evaluate("[...document.querySelectorAll('#pending img')].every(one => one.naturalWidth === 56)")
    assert "7 tiles" in ask(page, "Read red.")
    assert page.locator("#turns .question .tiles").count() == 1 and not page.locator("#pending .image").count()
    with page.expect_request("**/ask") as sent:
        ask(page, "And blue?")
    fields = json.loads(sent.value.post_data)
    assert [turn["from"] for turn in fields["turns"]] == ["human", "gpt", "human"] and len(fields["images"]) == 1
    page.click("#new")
    with page.expect_request("**/ask") as sent:
        assert "0 tiles" in ask(page, "What is 3?")
    assert len(json.loads(sent.value.post_data)["turns"]) == 1


def test_what_is_wrong_is_said(page: Any) -> None:
    page.set_input_files("#file", {"name": "half.png", "mimeType": "image/png", "buffer": picture(300, 200)[:400]})
    page.get_by_text("half.png: the image cannot be decoded").wait_for()
    assert not page.locator("#pending .image").count()
    page.evaluate("const file = new File([new Uint8Array(33 * 2 ** 20)], 'large.png'); addFiles([file]).then(() => {})")
    page.get_by_text("large.png: it has over 32 MB").wait_for()
    page.fill("#temperature", "-1")
    page.fill("#question", "What is 3?")
    page.evaluate("ask()")
    page.wait_for_selector(".turn.error")
    assert "temperature is -1" in page.locator(".turn.error").inner_text()
    assert page.input_value("#question") == "What is 3?"  # to be asked again


def test_another_checkpoint_is_loaded(page: Any) -> None:
    names = page.locator("#checkpoint option").all_inner_texts()
    assert names == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        page.select_option("#checkpoint", f"step_0000000{step}")
        page.locator("#run", has_text=f"step {step}").wait_for()
    ask(page, "What is 3?")


def test_a_port_that_is_taken(server: str, tmp_path: Path) -> None:
    port = server.rsplit(":", 1)[1].strip("/")
    command = [sys.executable, "-m", "megatron_nvlm.commands.chat_page", "--run-dir", str(tmp_path), "--port", port]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "choose another --port" in done.stderr and done.stderr.count("\n") == 1
