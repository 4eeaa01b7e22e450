"""How the native taps learn which outputs nobody else holds: whatever is going on when the first capture is entered."""

import subprocess
import sys

import pytest
from backends import usable

PROGRAM = """
import torch, tlfast
from torch import nn

class Doubled(nn.Module):
    def forward(self, x):
        return x * 2

def rows(model, x, kept):
    with tlfast.capture(model, "0", rows=2, backend="native") as cap:
        out = model(x)
        (out.sum() + sum(k.square().sum() for k in kept)).backward()
    return cap["0"], out.grad_fn.next_functions[0][0].name()

x, model = torch.ones(2, 3, 4, requires_grad=True), nn.Sequential(Doubled(), nn.Softplus())
kept = []
FIRST
print(*rows(model, x, kept))
"""
KEEPING = """
handle = nn.modules.module.register_module_forward_hook(
    lambda module, args, out: kept.append(out) if type(module) is Doubled else None)
"""
NO_GRAD = """
with torch.no_grad(), tlfast.capture(model, "0", rows=2, backend="native", missing="nan"):
    model(x)
"""
LATER = (
    KEEPING
    + """
rows(model, x, kept)
handle.remove()
kept.clear()
"""
)


def run(first):
    usable("native")
    program = "import warnings; warnings.simplefilter('ignore')\n" + PROGRAM.replace("FIRST", first)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_a_global_hook_that_keeps_outputs_is_somebody():
    """The penalty on what it kept did not pass through the module: softplus'(2) is all that did."""
    out = run(KEEPING)
    assert "0.8808" in out
    assert "TlfastIdentity" in out


@pytest.mark.parametrize("first", ["", NO_GRAD, LATER])
def test_an_output_that_nobody_holds_is_hooked_itself(first):
    out = run(first)
    assert "0.8808" in out
    assert "MulBackward" in out
