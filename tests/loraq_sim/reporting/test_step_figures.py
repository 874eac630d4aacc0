import pytest

from loraq_sim.errors import InputError
from loraq_sim.reporting.figures import save_figure
from loraq_sim.reporting.layer_figures import step_heat_map, step_title

pytestmark = pytest.mark.pictures

CASE = {
    **{"split": "W4A4", "accelerator": "aie2", "method": "rtn", "calibration": "all"},
    **{"output_error": 0.0123, "tokens": 1234, "n_layers": 2, "n_steps": 3},
    **{"half_layers": 1, "half_steps": 2},
}


def cells(names=("a.$x$", "b"), shares=(0.1, 0.2, 0.0, None, 0.3, 0.4)):
    places = [(name, step) for name in names for step in (1000, 499.5, 0)]
    return [
        {"layer": name, "step": step, "run_share": share}
        for (name, step), share in zip(places, shares, strict=True)
    ]


def test_the_picture_shows_every_cell_and_its_sums():
    figure = step_heat_map(CASE, cells(), provenance={"dump": "x.pt"})
    axes, above, beside, scale = figure.axes
    (image,) = axes.images
    drawn = image.get_array()
    assert drawn.shape == (2, 3)
    assert drawn.mask.tolist() == [[False, False, False], [True, False, False]]
    assert drawn[0].tolist() == pytest.approx([10.0, 20.0, 0.0])
    assert [bar.get_height() for bar in above.patches] == pytest.approx([10.0, 50.0, 40.0])
    assert [bar.get_width() for bar in beside.patches] == pytest.approx([30.0, 70.0])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1000", "499.5", "0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a.$x$", "b"]
    assert scale.get_ylim() == pytest.approx((0.0, 40.0))
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == step_title(CASE)
    assert "output error 1.23 %" in texts[1]


def test_the_title_is_the_finding():
    assert step_title(CASE).endswith("1 of 2 layers, or from 2 of 3 time steps")
    assert step_title(CASE | {"half_layers": 0}) == "No error at any time step"


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_figure(step_heat_map(CASE, cells()), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_hundreds_of_layers_fit_a_picture_and_names_do_not_overlap():
    names = [f"transformer_blocks.{i}.a_rather_long_module_name.attn.to_q" for i in range(300)]
    figure = step_heat_map(CASE, cells(names, [1 / 900] * 900))
    assert figure.get_size_inches()[1] < 20
    assert len(figure.axes[0].get_yticks()) <= 60


def test_zero_error_is_drawn_and_no_cells_are_refused():
    assert step_heat_map(CASE, cells(shares=[0.0] * 6)).axes
    with pytest.raises(InputError, match="no cells"):
        step_heat_map(CASE, [])
