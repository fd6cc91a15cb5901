from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from megatron_disagmoe.drawing import chart_of, draw, print_chart, write_html
from tests.drawing.timelines import one_layer, wide


class _Page(HTMLParser):
    """Collects the elements, their attributes and the embedded data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def test_png_shows_boxes_where_they_belong(tmp_path: Path) -> None:
    draw(one_layer(), tmp_path / "a.png", bounds={"fill_bound": 16})
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > pixels.shape[0] > 200
    forward, backward = (0.0, 0x72 / 255, 0xB2 / 255), (0xE6 / 255, 0x9F / 255, 0.0)

    def columns(colour: tuple[float, float, float]) -> tuple[int, int]:
        hit = (abs(pixels[..., :3] - colour).max(axis=2) < 0.02)[: int(pixels.shape[0] * 0.8)].any(axis=0).nonzero()[0]
        return int(hit.min()), int(hit.max())

    (first, _), (_, last) = columns(forward), columns(backward)
    per_unit = (last - first) / 17
    # the first backward of full colour is F0's, from 8 to 11; A's darkest forward boxes end at 2, F's at 6
    assert columns(backward)[0] == pytest.approx(first + 8 * per_unit, abs=4)
    assert columns(forward)[1] == pytest.approx(first + 6 * per_unit, abs=4)


def test_svg_holds_its_text_and_is_reproducible(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(one_layer(), tmp_path / name, bounds={"busy_bound": 10})
    texts = [e.text for e in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "makespan 17, busy bound 10 (×1.700)" in texts
    assert {"A0", "F0", "A0 →", "forward", "backward", "dispatch", "combine gradient"} <= set(texts)
    assert texts.count("1") == 10  # micro-batch 1: four boxes of A0, two of F0, four transfers
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_pdf_is_written(tmp_path: Path) -> None:
    draw(one_layer(), tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_wrong_suffix_says_which_are_right(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.gif: its suffix should be one of \.png, \.svg"):
        draw(one_layer(), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_html_is_self_contained_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    charts = [
        chart_of(one_layer(), heading="Measured </script><b>", unit="s"),
        chart_of(one_layer(), heading="Predicted", unit="s"),
    ]
    write_html(charts, path, title="Measured & predicted")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    for tag, attributes in page.elements:
        assert tag != "link"
        assert "src" not in attributes
        assert "href" not in attributes
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|@[A-Z]+@", text)
    assert "<title>Measured &amp; predicted</title>" in text
    data = json.loads(page.data)
    assert [chart["heading"] for chart in data["charts"]] == ["Measured </script><b>", "Predicted"]
    chart = data["charts"][1]
    assert (chart["makespan"], chart["unit"], chart["facts"]) == (17.0, "s", "makespan 17 s")
    row = chart["rows"][0]
    assert (row["label"], row["port"], row["busy"]) == ("A0", False, 10)
    assert row["start"] == [0, 1, 5, 6, 7, 8, 12, 15]
    assert row["end"] == [1, 2, 6, 7, 8, 9, 14, 17]
    assert row["style"] == ["F", "F", "F", "B", "F", "B", "B", "B"]
    assert row["microBatch"] == [0, 1, 0, 0, 1, 1, 0, 1]
    assert [chart["names"][number] for number in row["what"]] == ["A(0)"] * 2 + ["A(1) tail"] * 4 + ["A(0)"] * 2
    assert set(data["styles"]) >= {style for row in chart["rows"] for style in row["style"]}


def test_html_needs_a_chart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one chart"):
        write_html([], tmp_path / "a.html")


def test_tens_of_thousands_of_spans_are_quick_and_small(tmp_path: Path) -> None:
    timeline = wide(8, 32, 512)  # 65,536 spans
    began = time.perf_counter()
    draw(timeline, tmp_path / "a.html")
    assert time.perf_counter() - began < 20
    assert (tmp_path / "a.html").stat().st_size < 4_000_000
    (chart,) = json.loads(_Page((tmp_path / "a.html").read_text(encoding="utf-8")).data)["charts"]
    assert sum(len(row["start"]) for row in chart["rows"]) == 65_536


def test_large_pictures_leave_numbers_out_and_stay_bounded(tmp_path: Path) -> None:
    draw(wide(2, 16, 256), tmp_path / "a.svg")  # 8,192 spans, far too narrow for numbers
    texts = [e.text for e in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert len(texts) < 60
    draw(wide(24, 24, 1), tmp_path / "b.png")
    height, width, _ = imread(tmp_path / "b.png").shape
    assert 1000 < height < 4000
    assert width < 9000


def _printed(width: int, *, ports: bool = True) -> list[str]:
    console = Console(file=StringIO(), width=width, no_color=True, highlight=False)
    print_chart(chart_of(one_layer()), console, ports=ports)
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_terminal_view() -> None:
    lines = _printed(3 + 4 * 17, ports=False)  # four characters a unit of time
    assert lines[:2] == ["by-hand: 1 attention and 1 FFN group, 1 layer, 2 micro-batches", "makespan 17"]
    assert lines[2] == "A0 0>>>1>>>            0>>>0<<<1>>>1<<<            0<<<<<<<    1<<<<<<<"
    assert lines[3] == ""
    assert lines[4] == "F0         0>>>>>>>1>>>>>>>        0<<<<<<<<<<<1<<<<<<<<<<<"
    assert lines[5].split() == [">", "forward", "<", "backward"]


def test_terminal_view_with_ports() -> None:
    lines = _printed(5 + 4 * 17)
    assert lines[4] == "A0 →     0↓↓↓1↓↓↓                0↓↓↓    1↓↓↓"
    assert lines[5] == "F0 →                 0↑↑↑    1↑↑↑                0↑↑↑        1↑↑↑"


def test_terminal_too_narrow() -> None:
    with pytest.raises(ValueError, match="10 columns is too narrow"):
        _printed(10)
