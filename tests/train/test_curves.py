"""The picture of a run: panels for what was measured, every extreme, labels beside the data."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vllama2_jax.train.curves import draw_curves

DATASETS = ("valley", "llava_image", "a_dataset_with_a_name_of_many_letters", "clevrer", "webvid")


NOT_FINITE = object()  # which a log writes as null


def write_run(folder, num_steps, **more):
    """A run's metrics; `more` maps names to functions of the step (None leaves the name out)."""
    names = {
        "loss": lambda step: 1 + 5 / step,
        "grad_norm": lambda step: 1.0,
        "learning_rate": lambda step: 1e-5,
        "stage": lambda step: "video_sft",
        **more,
    }
    with (folder / "metrics.jsonl").open("w") as lines:
        for step in range(1, num_steps + 1):
            values = {name: value(step) for name, value in names.items()}
            record = {name: value for name, value in values.items() if value is not None}
            line = json.dumps({"step": step, **record}, default=lambda _: None)
            lines.write(f"{line}\n")


EVERYTHING = {
    "validation/loss": lambda step: 1 + 6 / step if step % 3 == 0 else None,
    "grad_norm/connector": lambda step: 10.0 / step,
    "grad_norm/decoder": lambda step: 0.1,
    "tokens_per_second": lambda step: 6e4 + step if step > 1 else None,
    "utilisation": lambda step: 0.4 if step > 1 else None,
    "accuracy/colour": lambda step: 0.5 if step % 3 == 0 else None,
    "accuracy/order": lambda step: 0.49 if step % 3 == 0 else None,
    **{f"loss/{name}": lambda step: 1 + 1 / step for name in DATASETS},
    "validation/loss/valley": lambda step: 2.0 if step % 3 == 0 else None,
}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a run and returns {title of a panel: its axes}."""
    drawn = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def run(num_steps, **more):
        write_run(tmp_path, num_steps, **more)
        draw_curves(tmp_path)
        return {axes.get_title(loc="left"): axes for axes in drawn[-1].axes}

    return run


def test_the_picture_is_a_png_of_1600_by_900_and_the_only_new_file(tmp_path):
    write_run(tmp_path, 50, **EVERYTHING)
    for _ in range(2):
        assert draw_curves(str(tmp_path)) == tmp_path / "curves.png"
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "metrics.jsonl"}
    with Image.open(tmp_path / "curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1600, 900))
        assert len(image.convert("RGB").getcolors(100_000)) > 100


def test_drawing_leaves_pyplot_and_its_global_state_alone(tmp_path):
    write_run(tmp_path, 2)
    code = (
        "import sys; from vllama2_jax.train.curves import draw_curves; "
        f"draw_curves({str(tmp_path)!r}); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_only_what_was_measured_gets_a_panel(draw):
    assert list(draw(20)) == ["loss", "gradient norm", "learning rate"]
    assert list(draw(20, **EVERYTHING)) == [
        "loss",
        "loss per dataset (o validation)",
        "gradient norm",
        "learning rate",
        "tokens per second",
        "model FLOP/s utilisation",
        "accuracy",
    ]


def test_the_only_dataset_is_not_drawn_a_second_time(draw):
    assert "loss per dataset" not in draw(20, **{"loss/valley": lambda step: 1.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_dots_over_whole_numbers(draw, num_steps):
    for axes in draw(num_steps, **EVERYTHING).values():
        assert all(line.get_marker() == "o" for line in axes.lines)
        ticks = [tick for tick in axes.get_xticks() if 1 <= tick <= num_steps]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_of_many_steps_the_line_keeps_its_extremes_and_is_short(draw):
    num_steps = 20_000
    rng = np.random.default_rng(0)
    losses = dict(enumerate(rng.uniform(1, 2, num_steps), start=1)) | {7_777: 9.0, 12_345: 0.1}
    raw, mean = draw(num_steps, loss=losses.get)["loss"].lines
    steps, values = raw.get_data()
    assert len(steps) < 1_500
    assert steps[values.argmax()] == 7_777 and values.max() == 9.0
    assert steps[values.argmin()] == 12_345 and values.min() == 0.1
    assert all(losses[step] == value for step, value in zip(steps, values, strict=True))
    assert np.all(np.diff(steps) > 0)
    assert np.abs(mean.get_ydata() - 1.5).max() < 0.1


def test_the_running_mean_of_a_slope_is_the_slope_and_its_ends_are_not_pulled_to_zero(draw):
    _, mean = draw(1_000, loss=lambda step: 3.0 + step / 1_000)["loss"].lines
    steps, values = mean.get_data()
    error = np.abs(values - (3.0 + steps / 1_000))
    assert error.max() < 0.02
    assert error[50:-50].max() < 1e-9


def test_values_that_were_not_finite_are_left_out_and_their_steps_crossed(draw):
    panels = draw(30, loss=lambda step: NOT_FINITE if step == 30 else 2.0)
    line, crosses = panels["loss (x not finite)"].lines
    assert list(line.get_xdata()) == list(range(1, 30))
    assert crosses.get_marker() == "x"
    assert list(crosses.get_xdata()) == [30]


def test_labels_stand_right_of_the_axes_and_clear_of_each_other(draw):
    panels = draw(60, **EVERYTHING)
    labelled = 0
    for axes in panels.values():
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        labelled += len(boxes)
        for box in boxes:
            assert box.x0 >= axes.get_window_extent().x1
            assert box.x1 <= axes.figure.bbox.width
        for below, above in itertools.pairwise(boxes):
            assert below.y1 <= above.y0
    assert labelled == 2 + len(DATASETS) + 2 + 2


def test_a_run_without_metrics_is_an_error_of_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics to draw; train at least one step"):
        draw_curves(tmp_path)
