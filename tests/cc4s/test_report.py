"""Report: pictures by their numbers, pages by parsing them, tables by their text."""

from __future__ import annotations

import base64
import io
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cc4s import report
from cc4s.engine.metrics import SegmentationMetrics
from cc4s.report import ReportImage, overlays

PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[1:5] = [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0]]
CLASSES = ["_background_", "<script>alert(1)</script>", 'a "b" & c|d', "$x^{", "心"]
STAGES = ["ur", "<b>ss</b>", "_ur2"]
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def fake_metrics(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    metrics = SegmentationMetrics(CLASSES, exclude=[0], volume_pattern="(v.)")
    for name in ("v1_a", "v1_b", "v2_a"):
        label = rng.integers(0, 4, (9, 11))
        metrics.update(name, np.where(rng.random((9, 11)) < 0.7, label, 0), label)
    return metrics.compute()


def fake_log(steps: int = 40) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for stage in STAGES:
        for step in range(10, 10 * steps + 1, 10):
            entry = {"event": "step", "stage": stage, "step": step, "lr": 1e-3, "loss": 2.0 / step}
            entry["cross_entropy"] = float("nan") if step == 20 else 1.0 / step
            if stage != "ur":
                entry["consistency_kl"] = 0.1
            log.append(entry)
        log.append({"event": "evaluate", "stage": stage, "miou": 0.5})
    return log


def fake_images() -> list[ReportImage]:
    rng = np.random.default_rng(0)
    images = []
    for name, (h, w) in {"plain": (30, 40), "<img src=x onerror=alert(1)>": (25, 20)}.items():
        label = rng.integers(0, 4, (h, w)).astype(np.uint8)
        scribble = np.full((h, w), 255, np.uint8)
        scribble[5, 3:15] = 2
        image = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        vectors, values = rng.standard_normal((2, 4, 5)), np.array([1.0, 0.5 - 0.25j])
        images.append(ReportImage(name, image, scribble, label, label, label, vectors, values))
    images.append(ReportImage("bare", images[0].image))
    return images


def write(path: Path, **changes: Any) -> str:
    stages = {stage: fake_metrics(i) for i, stage in enumerate(STAGES)}
    arguments: dict[str, Any] = {
        "title": "CC4S <script>alert(2)</script>",
        "config": {"data": {"root": "</pre><script>", "mean": [0.5]}, "stages": [{"name": "ur", "lr": 0.1}]},
        "metrics": {
            "dataset": "<i>set",
            "method": "cc4s",
            "seed": 3,
            "stages": stages,
            "final": stages["_ur2"],
            "pseudo_labels": {"coverage": 0.8125},
            "seconds": {"ur": 61.0, "_ur2": 3600.0},
        },
        "log": fake_log(),
        "images": fake_images(),
        "classes": CLASSES,
        "palette": PALETTE,
        "table": {"partial CE <alone>": fake_metrics(7)},
    }
    report.write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "report.html")


def test_page_is_well_formed_and_names_everything(page: str) -> None:
    text = Page(page).text
    for name in [*CLASSES, *STAGES, "partial CE <alone>", "<img src=x onerror=alert(1)>", "bare"]:
        assert name in text
    assert "81.2" in text  # coverage
    assert "λ = 0.500 − 0.250i" in text
    assert "data.root=</pre><script>" in text
    assert "stages[0].lr=0.1" in text
    assert "1 min 01 s" in text
    assert "1 h 01 min" in text


def test_page_runs_no_script_and_loads_nothing(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "image"}
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "srcset", "poster", "background"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:image/", "#")) or value == ""
    # Namespaces are names, not addresses; nothing else looks like one.
    addresses = set(re.findall(r"https?://[^\"' )<]*", page))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_page_ids_are_unique_and_referenced_ones_exist(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|xlink:href="#([^"]*)"', page)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_page_pictures_decode(page: str) -> None:
    images = [a for tag, a in Page(page).tags if tag == "img"]
    # Five pictures and two eigenvectors for two images, one picture for the bare one.
    assert len(images) == 2 * 7 + 1
    for attributes in images:
        data = base64.b64decode((attributes["src"] or "").split(",", 1)[1], validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.size == (int(attributes["width"] or 0), int(attributes["height"] or 0))
        assert attributes["alt"]


def test_page_numbers_are_those_of_the_metrics(page: str) -> None:
    values = fake_metrics(2)
    final = Page(re.search(r'<section class="cards">.*?</section>', page, re.DOTALL)[0]).text  # type: ignore[index]
    assert f"mIoU{100 * values['miou']:.1f} %" in final
    assert f"Dice per volume{100 * values['volume_dice']:.1f} %" in final
    row = re.search(r'<tr><th scope="row">_ur2</th>(.*?)</tr>', page)
    assert row is not None
    cells = re.findall(r">([^<]+)</td>", row[1])
    keys = ("miou", "dice", "volume_iou", "volume_dice", "pixel_accuracy", "mean_accuracy")
    assert cells[:6] == [f"{100 * values[key]:.1f}" for key in keys]


def test_page_has_a_curve_per_quantity_with_all_stages(page: str) -> None:
    curves = [a["aria-label"] or "" for tag, a in Page(page).tags if a.get("class") == "curve"]
    assert [c.split(" by step")[0] for c in curves] == [
        "loss, weighted sum",
        "cross-entropy",
        "consistency: KL",
        "learning rate",
    ]
    assert all(stage in label for label in curves for stage in STAGES)


def test_page_is_repeatable_and_replaced_whole(tmp_path: Path, page: str) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(path) == page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    # A report that cannot be made leaves the old one.
    bad = ReportImage("bad", np.zeros((4, 4), np.uint8), prediction=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="image"):
        write(path, images=[bad])
    assert path.read_text(encoding="utf-8") == page


def test_stage_times_come_from_the_log_across_resumes(tmp_path: Path) -> None:
    clock = [5.0, 30.0, 4.0, 45.0]  # started anew after 30 s
    log = [
        {"event": "step", "stage": "ur", "step": step, "seconds": seconds}
        for step, seconds in zip((10, 20, 11, 20), clock, strict=True)
    ]
    metrics = {"stages": {"ur": fake_metrics(0)}, "final": fake_metrics(0)}
    # `seconds` of a row is the time of its evaluation, not of its training.
    other = {"other": fake_metrics(1) | {"seconds": 777.0}}
    text = write(tmp_path / "r.html", metrics=metrics, log=log, images=[], table=other)
    assert "<td>1 min 15 s</td>" in text
    assert "12 min 57 s" not in text


def test_page_of_an_empty_run(tmp_path: Path) -> None:
    text = write(tmp_path / "r.html", metrics={}, log=[], images=[], classes=[], config={}, table=None, title="nothing")
    assert "nothing" in Page(text).text


def test_overlay_numbers() -> None:
    image = np.full((3, 5, 3), 100, np.uint8)
    mask = np.array([[1, 1, 1, 255, 255]] * 3, np.uint8)
    got = report.overlay(image, mask, PALETTE, alpha=0.25)
    # 0.75 * 100 + 0.25 * (200, 0, 0); column 2 is a border in the full colour; 255 shows the image.
    assert got[:, :2].reshape(-1, 3).tolist() == [[125, 75, 75]] * 6
    assert got[:, 2].tolist() == [[200, 0, 0]] * 3
    assert (got[:, 3:] == 100).all()
    assert got.dtype == np.uint8
    both = report.overlay(image[:1, :2], np.array([[1, 2]]), PALETTE)
    assert both.tolist() == [[[200, 0, 0], [0, 200, 0]]]
    assert (report.overlay(image, np.full((3, 5), 255), PALETTE) == image).all()
    with pytest.raises(ValueError, match="alpha"):
        report.overlay(image, mask, PALETTE, alpha=1.5)
    with pytest.raises(ValueError, match="uint8"):
        report.overlay(image.astype(np.float32), mask, PALETTE)


def test_scribble_strokes_grow_by_the_radius() -> None:
    image = np.full((9, 9, 3), 7, np.uint8)
    scribble = np.full((9, 9), 255, np.uint8)
    scribble[4, 4] = 3
    got = report.draw_scribble(image, scribble, PALETTE, radius=1)
    for y, x in np.ndindex(9, 9):
        distance = np.hypot(y - 4, x - 4)
        expected = [0, 0, 200] if distance <= 1 else [255] * 3 if distance <= 2 else [7] * 3
        assert got[y, x].tolist() == expected
    assert (report.draw_scribble(image, np.full((9, 9), 255), PALETTE) == 7).all()


def test_masks_and_scribbles_resize() -> None:
    mask = np.array([[1, 2], [3, 4]])
    assert overlays.resize_mask(mask, (4, 4)).tolist() == np.kron(mask, np.ones((2, 2), int)).tolist()
    # Nearest centre: (i + 0.5) * 4 / 3 of 4 pixels.
    assert overlays.resize_mask(np.arange(4)[None], (1, 3)).tolist() == [[0, 2, 3]]
    scribble = np.full((100, 60), 255)
    scribble[37, 11] = 1
    small = overlays.resize_scribble(scribble, (10, 6))
    assert small[3, 1] == 1
    assert (small != 255).sum() == 1
    assert overlays.fit_size(96, 50) == (288, 150)
    assert overlays.fit_size(1120, 560) == (560, 280)
    assert overlays.fit_size(300, 400) == (300, 400)


def test_eigenvectors_are_centred_at_zero() -> None:
    middle = (np.array(matplotlib.colormaps["RdBu_r"](0.5)[:3]) * 255).round()
    top = (np.array(matplotlib.colormaps["RdBu_r"](1.0)[:3]) * 255).round()
    picture = overlays.eigenvector_picture(np.array([[0.0, 2.0]]), (3, 5))
    # One step of rounding in matplotlib's own tables.
    assert np.abs(picture[:, 0] - middle).max() <= 1
    assert np.abs(picture[:, -1] - top).max() <= 1
    # The sign is free: the same picture either way.
    vector = np.random.default_rng(0).standard_normal((4, 6))
    assert (overlays.eigenvector_picture(vector, (8, 9)) == overlays.eigenvector_picture(-vector, (8, 9))).all()
    flat = overlays.eigenvector_picture(np.full((2, 2), np.nan), (4, 4))
    assert np.abs(flat - middle).max() <= 1


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (1.0, "λ = 1.000"),
        (0.5 + 0.25j, "λ = 0.500 + 0.250i"),
        (-0.5 - 1e-5j, "λ = -0.500"),
        (np.nan, "λ = ?"),
    ],
)
def test_eigenvalue_captions(value: complex, caption: str) -> None:
    assert report.eigenvalue_caption(value) == caption


def test_curves_take_the_last_entry_of_a_step_and_all_stages() -> None:
    log = [
        {"event": "step", "stage": "ur", "step": 1, "loss": 9.0},
        {"event": "step", "stage": "ur", "step": 2, "loss": 8.0},
        {"event": "step", "stage": "ur", "step": 2, "loss": 5.0},
        {"event": "step", "stage": "ur", "step": 3, "loss": float("inf")},
        {"event": "evaluate", "stage": "ur", "miou": 0.1},
        {"event": "step", "stage": "ss", "step": 2, "loss": 4.0},
        {"event": "step", "stage": "ss", "step": 1, "loss": 4.5},
    ]
    figure = report.curves(log)
    lines = figure.axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 9], [2, 5]], [[4, 4.5], [5, 4]]]
    assert lines[0].get_color() != lines[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ur", "ss"]


def test_long_curves_are_averaged() -> None:
    log = [{"event": "step", "stage": "s", "step": i, "loss": float(i)} for i in range(1, 1001)]
    axes = report.curve_figures(log)["loss"].axes[0]
    x, y = axes.lines[0].get_data()
    assert len(x) <= 160
    # Blocks of ceil(1000 / 160) = 7 steps; the mean of the first is 4.
    assert (x[0], y[0]) == (4.0, 4.0)
    assert x == pytest.approx(y)


def png_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


def test_figures_render_without_warnings_and_leave_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    images = fake_images()
    sheet = report.contact_sheet(images, CLASSES, PALETTE, eigenvectors=1)
    # Two full rows of six and one of one; the legend has the four classes that occur, by name.
    assert len(sheet.axes) == 13
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == CLASSES[:4]
    assert min(png_size(report.figure_png(sheet, dpi=50))) > 100
    panel, again = (report.eigenvector_panel(images[0].eigenvectors, images[0].eigenvalues, (30, 40)) for _ in range(2))
    assert [axes.get_title() for axes in panel.axes] == ["λ = 1.000", "λ = 0.500 − 0.250i"]
    svg = report.figure_svg(panel, "panel")
    assert svg == report.figure_svg(again, "panel")
    ElementTree.fromstring(svg)
    handles = report.legend(CLASSES, PALETTE, [2])
    assert handles[0].get_facecolor()[:3] == pytest.approx((0, 200 / 255, 0))
    report.figure_png(report.contact_sheet([], CLASSES, PALETTE), dpi=30)
    report.figure_png(report.curves([]), dpi=30)
    assert dict(matplotlib.rcParams) == before


def test_numbers_as_text() -> None:
    assert report.format_percent(0.7134) == "71.3"
    assert report.format_percent(None) == report.format_percent(float("nan")) == "–"
    assert report.format_percent(-0.0001) == "0.0"
    assert report.format_percent(0.02, sign=True) == "+2.0"
    assert report.format_percent(-0.02, sign=True) == "-2.0"
    assert report.format_spread(*report.mean_and_std([0.5, 0.52, 0.54])) == "52.0 ± 2.0"
    assert report.format_spread(*report.mean_and_std([0.5])) == "50.0"
    assert report.format_spread(*report.mean_and_std([])) == "–"
    seconds = [0.04, 9.96, 59.6, 3599.7, 7380.0, None]
    assert [report.format_seconds(s) for s in seconds] == [
        "0.0 s", "10 s", "1 min 00 s", "1 h 00 min", "2 h 03 min", "–",
    ]  # fmt: skip


def test_tables() -> None:
    rows = [["a|b", 1], ["心", None]]
    assert report.markdown_table(rows, ["x", "y"]) == "| x | y |\n| :-- | --: |\n| a\\|b | 1 |\n| 心 | – |\n"
    assert report.text_table(rows, ["x", "why"]) == "x    why\n───  ───\na|b    1\n心     –\n"
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        report.markdown_table([["a"]], ["x", "y"])


def ladder() -> dict[str, Any]:
    scores = {
        "released": [0.6],
        "full": [0.8, 0.9],
        "cc4s": [0.8, 0.7],
        "pce": [0.5, 0.6],
        "rw": [0.6, 0.62],
        "own": [0.1],
    }
    runs = [
        {"rung": rung, "seed": seed, "dice": value, "per_class": {"lv": value, "rv": None}, "seconds": 60.0}
        for rung, values in scores.items()
        for seed, value in enumerate(values)
    ]
    first = {"rung": "pce", "seed": 0, "dice": 0.01}
    protocol = {"iterations": 800, "seeds": [0, 1]}
    return {"dataset": "acdc", "metric": "dice", "protocol": protocol, "runs": [first, *runs]}


def test_ladder_numbers() -> None:
    rungs = {rung.name: rung for rung in report.summarize_ladder(ladder())}
    assert list(rungs) == ["pce", "rw", "cc4s", "full", "released", "own"]
    # The later run of seed 0 replaces the earlier one.
    assert rungs["pce"].scores == {0: 0.5, 1: 0.6}
    assert rungs["pce"].mean == pytest.approx(0.55)
    assert rungs["pce"].std == pytest.approx(statistics.stdev([0.5, 0.6]))
    assert rungs["rw"].gain == pytest.approx(0.06)
    assert rungs["rw"].gain_std == pytest.approx(statistics.stdev([0.1, 0.02]))
    # The rung below cc4s has no runs.
    assert rungs["cc4s"].gain is None
    assert rungs["full"].gain == pytest.approx(0.1)
    assert rungs["cc4s"].share_of_full == pytest.approx(0.75 / 0.85)
    assert rungs["cc4s"].gap_closed == pytest.approx(0.2 / 0.3)
    assert rungs["released"].std is None
    assert rungs["released"].per_class == {"lv": 0.6}


def test_ladder_pages() -> None:
    text = report.ladder_markdown(ladder())
    assert text.startswith("# Ablation ladder: acdc\n")
    assert "| + random walk | 2 | 61.0 ± 1.4 | +6.0 ± 5.7 | 0.718 | 20 % | 1 min 00 s |\n" in text
    assert "| iterations | 800 |\n" in text
    assert "| lv | 55.0 | 61.0 | 75.0 | 85.0 | 60.0 | 10.0 |\n" in text
    figure = report.ladder_figure(ladder())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        "partial cross-entropy",
        "+ random walk",
    ]
    assert [bar.get_width() for bar in figure.axes[0].patches[:2]] == pytest.approx([55.0, 61.0])
    assert min(png_size(report.figure_png(figure, dpi=50))) > 100
    empty = {"dataset": "x", "metric": "miou", "runs": []}
    assert "# Ablation ladder: x" in report.ladder_markdown(empty)
    report.figure_png(report.ladder_figure(empty), dpi=30)
