"""Charts: well-formed, repeatable, honest about what is undefined, and without traces in pyplot."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib._pylab_helpers import Gcf

from recoup.schemas import Alignment, Report
from recoup_ml import plots

SAMPLES = json.loads((Path(__file__).parent / "sample_report.json").read_text("utf-8"))
ALIGNMENT_CHARTS = [plots.alignment_diagonal, plots.alignment_heatmap, plots.alignment_svg]


@pytest.fixture(scope="module", params=SAMPLES)
def report(request: pytest.FixtureRequest) -> Report:
    return Report.model_validate(SAMPLES[request.param])


@pytest.fixture(scope="module")
def recovered() -> Report:
    return Report.model_validate(SAMPLES["recovered"])


def undefined_everywhere(alignment: Alignment) -> Alignment:
    layers = len(alignment.student_layers)
    state = {
        "matrix": [[None] * layers] * layers,
        "diagonal": [None] * layers,
        "with_outliers": [None] * layers,
        "distances": [],
    }
    nothing = {"before": state, "ceiling": [None] * layers, "floor": [None] * layers}
    return Alignment.model_validate({**alignment.model_dump(), **nothing})


@pytest.mark.parametrize("chart", ALIGNMENT_CHARTS)
def test_the_same_alignment_gives_the_same_svg_and_it_parses(
    chart: Callable[[Alignment], str], report: Report
) -> None:
    svg = chart(report.alignment)
    assert svg == chart(report.alignment)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("chart", ALIGNMENT_CHARTS)
def test_an_alignment_that_is_undefined_everywhere_is_drawn(
    chart: Callable[[Alignment], str], recovered: Report
) -> None:
    ElementTree.fromstring(chart(undefined_everywhere(recovered.alignment)))


def test_the_same_alignment_gives_the_same_png(recovered: Report) -> None:
    png = plots.alignment_png(recovered.alignment)
    assert png.startswith(b"\x89PNG\r\n")
    assert png == plots.alignment_png(recovered.alignment)


def test_the_loss_curve_names_the_chosen_checkpoint(recovered: Report) -> None:
    svg = plots.loss_curve(recovered.training)
    assert "chosen: step 12, KL 0.104" in "".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), 250.0])
def test_a_loss_that_left_all_bounds_is_drawn(loss: float, recovered: Report) -> None:
    last = recovered.training.curve[-1].model_copy(update={"loss": loss})
    diverged = recovered.training.model_copy(update={"curve": [*recovered.training.curve[:-1], last]})
    ElementTree.fromstring(plots.loss_curve(diverged))


def test_training_without_a_finite_number_is_drawn(recovered: Report) -> None:
    ElementTree.fromstring(
        plots.loss_curve(recovered.training.model_copy(update={"curve": [], "checkpoints": []}))
    )


def test_the_heat_map_states_where_its_colours_start(recovered: Report) -> None:
    assert "colours start at 0.2" in plots.alignment_heatmap(recovered.alignment)


def test_the_heat_map_says_what_hatching_means_only_where_there_is_some() -> None:
    hatched, full = (Report.model_validate(SAMPLES[name]).alignment for name in ("not_needed", "recovered"))
    assert "hatched: undefined" in plots.alignment_heatmap(hatched)
    assert "hatched" not in plots.alignment_heatmap(full)


def test_charts_of_one_page_share_no_id(recovered: Report) -> None:
    charts = [
        plots.loss_curve(recovered.training),
        plots.alignment_diagonal(recovered.alignment),
        plots.alignment_heatmap(recovered.alignment),
    ]
    ids = [
        node.get("id") for chart in charts for node in ElementTree.fromstring(chart).iter() if node.get("id")
    ]
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_chart_has_its_target(recovered: Report) -> None:
    nodes = list(ElementTree.fromstring(plots.alignment_diagonal(recovered.alignment)).iter())
    ids = {node.get("id") for node in nodes}
    references = [node.get("{http://www.w3.org/1999/xlink}href") for node in nodes]
    clips = [node.get("clip-path") for node in nodes]
    assert {link[1:] for link in references if link} | {clip[5:-1] for clip in clips if clip} <= ids


def test_drawing_leaves_no_figure_open(recovered: Report) -> None:
    plots.alignment_png(recovered.alignment)
    plots.loss_curve(recovered.training)
    assert Gcf.get_all_fig_managers() == []
