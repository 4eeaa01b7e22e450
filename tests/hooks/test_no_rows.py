"""Why there are no rows: a point that was never called, an output that is unused, and a forgotten backward."""

import pytest
import torch
from models import WIDTH, Experts, inputs, uneven
from torch import nn

import tlfast

NO_ROWS = "capture: no backward reached the points, so there are no rows. "


class Sides(nn.Module):
    """Calls `main` and `side`; `idle` is never called, and nothing is made of what `side` puts out."""

    def __init__(self):
        super().__init__()
        self.main, self.side, self.idle = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        self.side(x)
        return self.main(x)


def nothing(model, x):
    pass


def forward(model, x):
    model(x)


def step(model, x):
    uneven(model(x)).backward()


NOT_CALLED = "No point was called: call the model inside the with. What its forward doesn't call can't be captured."
NO_BACKWARD = "The points were called and no backward ran: call backward() inside the with."
UNUSED = "a backward ran, but its loss isn't made of their outputs: choose points that it uses."


@pytest.mark.parametrize(
    "points, do, text",
    [
        ("main", nothing, NOT_CALLED),
        ("idle", step, NOT_CALLED),
        ("main", forward, NO_BACKWARD),
        (["side", "idle"], forward, NO_BACKWARD.replace("called", "called (not idle)")),
        ("side", step, f"The points were called and {UNUSED}"),
        (["side", "idle"], step, f"The points were called (not idle) and {UNUSED}"),
    ],
)
@pytest.mark.parametrize("missing", ["raise", "nan"])
def test_the_warning_at_the_end_says_which(backend, attach, points, do, text, missing):
    model, x = Sides(), inputs()
    uneven(model(x)).backward()  # before the capture: it doesn't count
    with (
        pytest.warns(UserWarning, match="capture") as warned,
        tlfast.capture(model, points, rows=4, attach=attach, backend=backend, missing=missing),
    ):
        do(model, x)
    assert [str(warning.message) for warning in warned] == [NO_ROWS + text]


@pytest.mark.parametrize(
    "points, do, text",
    [("idle", step, NOT_CALLED), ("main", nothing, NOT_CALLED), ("main", forward, NO_BACKWARD),
     ("side", step, f"The points were called and {UNUSED}")],
)  # fmt: skip
def test_so_does_the_error_of_a_batch(backend, attach, points, do, text):
    model, x = Sides(), inputs()
    with (
        pytest.warns(UserWarning, match=NO_ROWS),
        tlfast.capture(model, points, rows=4, attach=attach, backend=backend) as cap,
        pytest.raises(RuntimeError) as error,
        cap.batch(),
    ):
        do(model, x)
    assert str(error.value) == f"batch: the block must hold a forward and a backward, got no committed row. {text}"


def test_a_later_batch_does_not_blame_what_was_called_before(backend, attach):
    model, x = Sides(), inputs()
    with tlfast.capture(model, "main", rows=4, attach=attach, backend=backend) as cap:
        with cap.batch():
            step(model, x)
        with (
            pytest.raises(RuntimeError, match=r"got no committed row\. No point was called: call the model"),
            cap.batch(),
        ):
            pass
        text = r"got no committed row\. The points were called: call backward\(\) on a loss that is made of their out"
        with pytest.raises(RuntimeError, match=text), cap.batch():
            model(x)
    assert cap.rows == 3


EVERY = "capture: every point must fire in a backward, got "
LEAVE = 'Leave these points out, or pass missing="nan" for NaN rows.'
IDLE = "no call of idle since the last step (none is seen in compiled code)"
CALLED = "(called, but the backward does not go through the output)"


@pytest.mark.parametrize(
    "points, text",
    [
        (["main", "idle"], f"{EVERY}{IDLE}. {LEAVE}"),
        (["main", "side"], f"{EVERY}no gradient at side {CALLED}. {LEAVE}"),
        ("*", f"{EVERY}{IDLE}; no gradient at side {CALLED}. {LEAVE}"),
    ],
)
@pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
def test_beside_points_that_fire_they_are_told_apart(backend, attach, points, text):
    model, x = Sides(), inputs()
    with tlfast.capture(model, points, rows=4, attach=attach, backend=backend) as cap:
        for _ in range(2):  # the second step counts its own calls
            with pytest.raises(RuntimeError) as error:
                step(model, x)
            assert str(error.value) == text
            assert cap.rows == 0


def test_calls_are_those_since_the_last_step(backend, attach):
    model, x = Experts(), inputs()
    everyone, nobody = torch.arange(12).reshape(3, 4) % 3, torch.zeros(3, 4, dtype=torch.long)
    with tlfast.capture(model, "experts.*", rows=12, attach=attach, backend=backend, calls="last") as cap:
        uneven(model(x, everyone)).backward()
        with pytest.raises(RuntimeError, match=r"no call of experts\.1, experts\.2 since the last step"):
            uneven(model(x, nobody)).backward()
        # Two forwards before two backwards: the calls of the second were before the first step, and prove nothing.
        first, second = uneven(model(x, everyone)), uneven(model(x, nobody))
        first.backward()
        with pytest.raises(RuntimeError, match=f"got no gradient at experts.1, experts.2. {LEAVE[:10]}"):
            second.backward()
    assert cap.rows == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_counts_no_calls(backend):
    model, x = Sides(), inputs()
    torch._dynamo.reset()
    try:
        with (
            pytest.warns(UserWarning, match=NO_ROWS),
            tlfast.capture(model, ["main", "side"], rows=4, backend=backend),
            pytest.raises(RuntimeError) as error,
        ):
            step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
        assert str(error.value) == f"{EVERY}no gradient at side. {LEAVE}"
    finally:
        torch._dynamo.reset()
