import base64
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from memvir.reporting import aggregation, page
from memvir.reporting.aggregation import Experiment
from memvir.reporting.page import Picture, Section
from memvir.reporting.results import Line

LINES = [
    Line("plain", "Norm-SoftMax", "Norm-SoftMax", None),
    Line("memvir", "MemVir + Norm-SoftMax", "MemVir + Norm-SoftMax", "plain"),
]
VOID = {"meta", "link", "img", "br", "hr", "input"}


def experiment(scale: float = 23.0, shift: float = 0.0, missing: bool = False) -> Experiment:
    rows = [
        (protocol, metric, variant, seed, value + seed + shift)
        for protocol in ("last", "best")
        for metric in ("recall_at_1", "recall_at_2", "rp", "map")
        for variant, value in (("plain", 80.0), ("memvir", 81.0))
        for seed in (1, 2)
    ]
    values = pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"])
    if missing:
        values.loc[0, "value"] = math.nan
    settings = {"loss": {"scale": scale, "name": "<b>&"}, "model": {"widths": [1, 2]}, "data": None}
    results = {
        (line.variant, seed): {
            "settings": {**settings, "memvir": {"num_steps": 5} if line.baseline else None, "seed": seed},
            "made_by": {"training": {"environment": {"torch": "2.14.1"}}},
        }
        for line in LINES
        for seed in (1, 2)
    }
    return Experiment(LINES, results, aggregation.summarise(values, LINES), [])


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


@pytest.fixture
def sections(tmp_path):
    (tmp_path / "curve.svg").write_text("<svg/>")
    (tmp_path / "tsne.png").write_bytes(b"\x89PNG")
    return [
        Section("curves", "Curves", [Picture(tmp_path / "curve.svg", "a", "what it <shows>")]),
        Section("tsne", "t-SNE", [Picture(tmp_path / "tsne.png", "b", "points", "a caption", wide=True)]),
        Section("absent", "Absent", [Picture(tmp_path / "none.png", "c", "nothing")]),
    ]


def parse(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def test_the_page_needs_no_network_and_no_scripts(sections):
    html = page.render_page("glyphs", experiment(), sections, None)
    outline = parse(html)
    assert not outline.all("script") and not outline.all("link") and not outline.all("iframe")
    addresses = re.findall(r"(?:src|href)=\"(.*?)\"", html)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in html and "@import" not in html


def test_pictures_are_inside_of_the_page_with_a_text_for_those_who_cannot_see_them(sections):
    images = parse(page.render_page("glyphs", experiment(), sections, None)).all("img")
    assert [image["alt"] for image in images] == ["what it <shows>", "points"]
    assert base64.b64decode(images[0]["src"].removeprefix("data:image/svg+xml;base64,")) == b"<svg/>"
    assert images[1]["src"].startswith("data:image/png;base64,")


def test_a_picture_that_was_not_made_is_left_out_with_its_section(sections):
    html = page.render_page("glyphs", experiment(), sections, None)
    assert "Absent" not in html and 'id="tsne"' in html


def test_every_table_has_a_caption_and_headers_with_a_scope(sections):
    html = page.render_page("cars196", experiment(), sections, None)
    outline = parse(html)
    assert len(outline.all("caption")) == len(outline.all("table")) >= 10
    assert all(header.get("scope") in ("col", "row") for header in outline.all("th"))
    assert "83.22 ± 0.12" in html  # the published values


def test_links_lead_to_sections_that_are_there(sections):
    outline = parse(page.render_page("glyphs", experiment(), sections, None))
    anchors = {attributes["id"] for _, attributes in outline.seen if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in outline.all("a")} <= anchors
    assert outline.all("html") == [{"lang": "en"}]


def test_text_from_outside_is_escaped(sections):
    html = page.render_page("<i>x", experiment(), sections, None)
    assert "<i>x" not in html and "&lt;i&gt;x" in html
    assert "<b>&" not in html and "&lt;b&gt;&amp;" in html


def test_the_same_inputs_give_the_same_page(sections):
    assert page.render_page("glyphs", experiment(), sections, None) == page.render_page(
        "glyphs", experiment(), sections, None
    )


def test_a_missing_run_shows_on_the_page(sections):
    html = page.render_page("glyphs", experiment(missing=True), sections, None)
    assert ">missing</td>" in html and "1 of 2 runs, without seed 1" in html


def test_settings_are_split_into_those_that_differ_and_those_in_common():
    differing, common = page.settings_tables(experiment().content["settings"], LINES)
    assert differing.columns == ["Setting", "Norm-SoftMax", "MemVir + Norm-SoftMax"]
    assert ["memvir.num_steps", "–", "5"] in differing.rows
    assert ["loss.scale", "23.0"] in common.rows and ["model.widths", "[1, 2]"] in common.rows


def test_what_changed_names_means_settings_and_versions():
    current, previous = experiment(scale=30.0, shift=0.5).content, experiment().content
    current["environment"] = {"torch": "2.15.0"}
    changes = page.describe_changes(current, previous, LINES)
    means, settings, versions = changes.tables
    assert means.rows[0] == ["Norm-SoftMax", "Recall@1", "81.50", "82.00", "+0.50"]
    assert settings.rows[0] == ["loss.scale", "Norm-SoftMax", "23.0", "30.0"]
    assert versions.rows == [["torch", "2.14.1", "2.15.0"]]


def test_what_changed_says_when_nothing_did_and_when_nothing_is_known():
    content = experiment().content
    assert page.describe_changes(content, content, LINES).tables == []
    assert "no earlier report" in page.describe_changes(content, None, LINES).text


def test_a_variant_that_is_new_or_gone_has_no_change_but_is_named():
    current, previous = experiment().content, experiment().content
    del previous["metrics"]["memvir"]
    rows = page.describe_changes(current, previous, LINES).tables[0].rows
    assert rows[0] == ["MemVir + Norm-SoftMax", "Recall@1", "–", "82.50", "–"]
