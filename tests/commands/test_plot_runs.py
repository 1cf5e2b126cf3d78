"""Runs compared: what is drawn, over which axis, and that page and picture show every run by themselves."""

import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_nvlm.commands.plot_runs import main
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.watching.charts import Chart, Line, tick_label, ticks, to_picture, to_svg
from megatron_nvlm.watching.comparison import make_charts, open_runs, places_of, smoothed
from megatron_nvlm.watching.history import History
from tests.commands.test_watch import write_steps
from tests.support.trained import train_demo

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of other lengths, batches and metrics; the second one has a NaN and a validation."""
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (one, other):
        folder.mkdir(parents=True)
    write_steps(one, *({"loss": 4.0 / step, "consumed_samples": 8 * step} for step in range(1, 31)))
    measured = {"validation": {"pages/images": {"loss": 2.5, "token_accuracy": 0.25}}}
    gates = [{"loss": math.nan}, {"gates": {"layer_1": 0.5}}, measured, {"sources": {"scans": {"loss": 1.0}}}]
    write_steps(other, *({"loss": 3.0, "consumed_samples": 16 * step, **gates[step % 4]} for step in range(1, 11)))
    (one / "config.yaml").write_text("optimizer: {max_lr: 0.001}\ntraining: {train_steps: 30}\nmodel: {variant: h}\n")
    (other / "config.yaml").write_text(
        "optimizer: {max_lr: 0.002}\ntraining: {train_steps: 30}\nmodel: {variant: <x>}\n"
    )
    return [one, other]


def test_page_and_picture_show_both_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "compared")]) == 0
    assert f"wrote {tmp_path}/compared.html and {tmp_path}/compared.png" in capsys.readouterr().out
    page = (tmp_path / "compared.html").read_text()
    assert "a/run" in page and "b/run" in page, "the shortest names that differ"
    titles = re.findall(r'role="img"><title>(.*?)</title>', page)
    assert titles == [
        "training loss (nats a target token)",
        "gradient norm",
        "learning rate",
        "samples a second",
        "tokens a second",
        "tiles a second",
        "tanh(gate) of the cross-attention layers",
        "training loss: scans",
        "validation loss: pages/images",
        "validation, share of tokens right: pages/images",
    ]
    assert "<td>optimizer.max_lr</td><td>0.001</td><td>0.002</td>" in page and "&lt;x&gt;" in page
    assert "training.train_steps" not in page, "it is the same"
    assert not re.search(r"(src|href|url)\s*[=(]|@import|<script", page), "the page is to be self-contained"
    assert "nan" not in page
    with Image.open(tmp_path / "compared.png") as picture:
        assert picture.width == 2 * 2 * 640
        found = {colour for _, colour in picture.convert("RGB").getcolors(10**7)}
    assert {(0x1F, 0x6F, 0xB2), (0xD1, 0x49, 0x5B)} <= found, "both runs are drawn"


@pytest.mark.slow
def test_a_really_trained_run_is_drawn(tmp_path: Path) -> None:
    run_dir = train_demo(tmp_path, steps=4, save_every=4)
    charts = make_charts(open_runs([RunDir(run_dir)]), "step", smooth_steps=1)
    by_title = {chart.title: chart for chart in charts}
    gates = by_title["tanh(gate) of the cross-attention layers"]
    assert [line.name.split(", ")[1] for line in gates.lines] == ["layer 1", "layer 3"]
    assert len({line.dash for line in gates.lines}) == 2
    loss = by_title["training loss (nats a target token)"].lines[0]
    assert list(loss.xs) == [1, 2, 3, 4] and loss.ys[3] < loss.ys[0]


def test_axes(runs: list[Path]) -> None:
    history = History(RunDir(runs[0]))
    history.refresh()
    assert list(places_of(history, "step"))[:3] == [1, 2, 3]
    assert list(places_of(history, "samples"))[:3] == [8, 16, 24]
    assert places_of(history, "tokens")[:3] == [640, 1280, 1920]
    assert places_of(history, "hours")[29] == pytest.approx(30 * 2 / 3600)
    assert smoothed([1.0, 3.0, math.nan, 5.0], 2)[:2] == [1.0, 2.0]
    assert math.isnan(smoothed([1.0, math.nan], 2)[1])


@pytest.mark.parametrize("axis", ["step", "samples", "tokens", "hours"])
def test_every_axis_gives_a_page(axis: str, runs: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "c.html"), "--over", axis, "--smooth", "3"]) == 0
    assert (tmp_path / "c.html").exists() and (tmp_path / "c.png").exists()


def test_what_cannot_be_drawn_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no run directory")
    (tmp_path / "config.yaml").touch()
    assert main([str(tmp_path)]) == 2
    assert "let a run make some first" in capsys.readouterr().err


@given(st.lists(st.floats(), max_size=30), st.integers(1, 4000))
def test_any_values_can_be_drawn(values: list[float], repeats: int) -> None:
    ys = values * (repeats if len(values) < 3 else 1)
    chart = Chart("t", "step", (Line("a", range(len(ys)), ys, "#000000", (3, 2)),), with_names=True)
    assert not re.search("nan|inf", to_svg(chart))


def test_a_long_line_keeps_its_peaks() -> None:
    ys = [0.0] * 50_000
    ys[12_345] = 9.0
    drawn = to_svg(Chart("t", "step", (Line("a", range(50_000), ys, "#000000"),)))
    assert len(drawn) < 60_000 and ">8<" in drawn


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 260, 6) == [50, 100, 150, 200, 250]
    assert [tick_label(value) for value in (0.25, 1500, 2e-6, 3.5e6, 2e12)] == ["0.25", "1500", "2e-06", "3.5M", "2T"]


def test_the_picture_has_dashes() -> None:
    def black(dash: tuple[int, ...]) -> int:
        line = Line("a", [0, 1], [0.0, 1.0], "#000000", dash)
        picture = to_picture([Chart("", "", (line,))], [])
        return sum(count for count, colour in picture.getcolors(10**7) if sum(colour) < 100)

    assert 0.2 * black(()) < black((5, 5)) < 0.8 * black(())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, in which the page could be opened")
def test_the_page_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert main([*map(str, runs), "--out", str(tmp_path / "compared")]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "compared.html").as_uri())
        boxes = [svg.bounding_box() for svg in page.locator("svg").all()]
        lines = page.locator("polyline[stroke='#d1495b']").count()
        browser.close()
    assert len(boxes) == 10 and all(box["width"] > 300 and box["height"] > 100 for box in boxes)
    assert lines > 5 and not faults and len(asked) == 1
