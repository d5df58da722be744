"""The report page: complete in itself, safe with what models wrote, and honest where nothing was trained."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recoup.schemas import Alignment, Estimate, Gate, Report, TrainingReport, Trajectory
from recoup_ml import plots
from recoup_ml.page import VERDICTS, fold, html_page, number, percent, scale, visible

SAMPLES = json.loads((Path(__file__).parent / "sample_report.json").read_text("utf-8"))
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Elements(HTMLParser):
    """Collects elements and text of a page, and complains about tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module", autouse=True)
def _each_chart_drawn_once() -> Iterator[None]:
    """Nearly all of a page's time is drawing, and most of these tests change only its words."""
    drawn: dict[tuple[str, str], str] = {}
    Part = TrainingReport | Trajectory | Alignment

    def once(name: str, draw: Callable[[Part], str]) -> Callable[[Part], str]:
        def chart(part: Part) -> str:
            known = name, part.model_dump_json()
            if known not in drawn:
                drawn[known] = draw(part)
            return drawn[known]

        return chart

    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_curve", "trajectory_curves", "alignment_diagonal", "alignment_heatmap"):
            patch.setattr(plots, name, once(name, getattr(plots, name)))
        yield


@pytest.fixture(scope="module", params=SAMPLES)
def report(request: pytest.FixtureRequest) -> Report:
    return Report.model_validate(SAMPLES[request.param])


@pytest.fixture(scope="module")
def recovered() -> Report:
    return Report.model_validate(SAMPLES["recovered"])


@pytest.fixture(scope="module")
def not_needed() -> Report:
    return Report.model_validate(SAMPLES["not_needed"])


def with_answer(report: Report, answer: str) -> Report:
    sample = report.samples[0].model_copy(update={"before": answer})
    return report.model_copy(update={"samples": [sample]})


def test_the_page_nests_its_elements(report: Report) -> None:
    assert Elements(html_page(report)).open == []


def test_an_answer_that_is_a_script_stays_text(recovered: Report) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    page = html_page(with_answer(recovered, attack))
    assert "<script" not in page and "<img" not in page
    assert attack in Elements(page).text


def test_a_hostile_name_stays_text(recovered: Report) -> None:
    hostile = recovered.model_copy(
        update={"reason": '"><script>alert(1)</script>', "recovery": "</title><script>"}
    )
    assert "<script" not in html_page(hostile)


def test_control_characters_of_an_answer_are_shown_as_pictures(recovered: Report) -> None:
    assert "a␀b␛[31m" in html_page(with_answer(recovered, "a\x00b\x1b[31m"))
    assert visible("one\n\ttwo") == "one\n\ttwo"


def test_the_page_asks_nothing_of_the_network(report: Report) -> None:
    page = html_page(report)
    links = [
        value
        for _, name, value in Elements(page).attributes
        if name in {"src", "href", "xlink:href", "srcset"}
    ]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\((?!#)", page)


def test_every_link_inside_the_page_has_its_target(report: Report) -> None:
    attributes = Elements(html_page(report)).attributes
    ids = {value for _, name, value in attributes if name == "id"}
    assert {value[1:] for tag, name, value in attributes if (tag, name) == ("a", "href")} <= ids


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert html_page(report) == html_page(report)


def test_every_number_of_every_measure_stands_on_the_page(recovered: Report) -> None:
    rows = Elements(html_page(recovered)).text.split("MeasureTeacherBeforeAfterRecovered")[1]
    for measure in recovered.measures:
        row = rows[rows.index(measure.label) :]
        for shown in (measure.teacher, measure.before, measure.after):
            assert number(shown) in row[:300]
        if measure.recovered:
            assert percent(measure.recovered.value) in row[:300]
            assert f"{percent(measure.recovered.low)} to {percent(measure.recovered.high)}" in row[:300]


def test_the_verdict_shows_the_fraction_with_its_interval(recovered: Report) -> None:
    text = Elements(html_page(recovered)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "86 %" in text and "82 % to 89 %" in text and "0.702 → 0.100" in text


def test_the_gate_is_marked_where_the_request_put_it(recovered: Report) -> None:
    strict = recovered.model_copy(update={"gate": Gate(min_recovered=0.7)})
    assert "gate 70\N{NO-BREAK SPACE}%" in html_page(strict)
    assert "gate 50\N{NO-BREAK SPACE}%" in html_page(recovered)


@pytest.mark.parametrize("outcome", VERDICTS)
def test_an_outcome_is_said_in_words_and_in_the_icon_of_its_tone(outcome: str, recovered: Report) -> None:
    page = html_page(recovered.model_copy(update={"outcome": outcome}))
    assert VERDICTS[outcome].word in page
    icons = {
        html_page(recovered.model_copy(update={"outcome": other})).split('class="icon"')[1].split("</svg>")[0]
        for other in {outcome, "recovered"}
    }
    assert len(icons) == (1 if VERDICTS[outcome].tone == "good" else 2)


def test_a_guarded_measure_that_got_worse_is_called_worse(recovered: Report) -> None:
    worse = recovered.measures[4].model_copy(update={"worse": True})
    assert "worse than before" not in Elements(html_page(recovered)).text
    assert "worse than before" in Elements(html_page(recovered.model_copy(update={"measures": [worse]}))).text


def test_a_report_without_training_says_that_nothing_was_trained(not_needed: Report) -> None:
    text = Elements(html_page(not_needed)).text
    assert "There is no recovered fraction, because nothing was trained." in text
    assert "Nothing was trained, so there is no “after”." in text
    assert "optimizer step" not in text


def test_an_undefined_layer_is_called_undefined(not_needed: Report) -> None:
    assert not_needed.alignment.before.diagonal[0] is None
    assert "undefined" in Elements(html_page(not_needed)).text


def test_a_report_with_empty_lists_renders(recovered: Report) -> None:
    nothing = {"remarks": [], "measures": [], "plan": [], "samples": []}
    assert "No samples were taken." in html_page(recovered.model_copy(update=nothing))


def test_an_empty_answer_is_named(recovered: Report) -> None:
    assert "empty answer" in html_page(with_answer(recovered, " \n"))


def test_folding_a_long_text_loses_nothing() -> None:
    words = "word " * 400
    head, rest = fold(words)
    assert head + rest == words and len(head) <= 320
    assert fold("x" * 1000)[0] == "x" * 320


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.70213, "0.702"),
        (0.0006, "0.0006"),
        (-0.25, "−0.250"),
        (18.0, "18.0"),
        (526.3, "526"),
        (134515008, "134,515,008"),
        (0.0, "0"),
        (None, "–"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_are_shown_with_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_a_scale_reaches_from_nothing_to_all_and_further_where_it_must() -> None:
    plain, wide = scale([None]), scale([Estimate(value=0.9, low=-0.5, high=1.5)])
    assert (plain.place(0), plain.place(1)) == (0, 100)
    assert (wide.place(-0.5), wide.place(0.5), wide.place(1.5), wide.place(9)) == (0, 50, 100, 100)
