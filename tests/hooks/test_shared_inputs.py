"""Modules that read one tensor share the product that projects it: rows are those of each module captured alone."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlfast
from tlfast import Projection, Spec

B, P, D, DIM = 3, 5, 24, 4
NAMES = ("q", "k", "v", "o")


class Reading(nn.Module):
    """Three layers that read one tensor, and one that reads another; ``between`` happens before the second reads."""

    def __init__(self, between=lambda h: h, times=1):
        super().__init__()
        self.start = nn.Linear(D, D)
        self.q, self.k, self.v, self.o = (
            nn.Linear(D, D),
            nn.Linear(D, 10),
            nn.Linear(D, 10, bias=False),
            nn.Linear(D, 7),
        )
        self.between, self.times = between, times

    def read(self, x):
        h = self.start(x) * 1.5
        q = self.q(h)
        h = self.between(h)
        k, v = self.k(h), self.v(h)
        return (self.o(q) + k.sum(-1, keepdim=True) * v.cos().sum(-1, keepdim=True)).square()

    def forward(self, x):
        return sum(self.read(x + time) for time in range(self.times))


def built(**settings):
    torch.manual_seed(3)
    return Reading(**settings).eval()


def drawn(n):
    return torch.randn(n, P, D, generator=torch.Generator().manual_seed(n))


def run(model, specs, step, backend, n_steps=3, **options):
    """The rows of each column after some steps, and of each step the memory of what was kept, by point."""
    seen = [{} for _ in range(n_steps)]

    def see(name, grad, act, kept):
        seen[number].setdefault(name, kept[0])  # held, so that no other one comes to lie there

    options = {"rows": 2 * B * n_steps, "backend": backend, **options}
    with tlfast.freeze(model, embedding="start"), tlfast.capture(model, specs, **options).watched(see) as cap:
        for number in range(n_steps):
            step(model, cap, number)
    memory = [{name: kept.untyped_storage().data_ptr() for name, kept in held.items()} for held in seen]
    return {name: cap[name] for name in cap.names}, memory


def backward(model, cap, number):
    with cap.batch(mask=torch.arange(P) < torch.tensor([[5], [3], [number + 1]])):
        model(drawn(B)).sum().backward()


def specs_of(names=NAMES, **more):
    """For each module a projection of its own: other sizes, seeds, and a bias."""
    ways = {"q": (DIM, 0, False), "k": (DIM + 3, 5, True), "v": (DIM, 1, True), "o": (DIM, 0, False)}
    return [
        Spec(name, of="weight", project=Projection(dim, seed=seed), bias=bias, **more)
        for name, (dim, seed, bias) in ways.items()
        if name in names
    ]


def assert_same_as_alone(make, step, backend, **options):
    together, seen = run(make(), specs_of(), step, backend, **options)
    for name in NAMES:
        alone, _ = run(make(), specs_of([name]), step, backend, **options)
        for column, rows in alone.items():
            size = rows.flatten(1).norm(dim=1).max()
            assert rows.isfinite().all()
            assert size > 0
            torch.testing.assert_close(together[column], rows, rtol=0, atol=float(size) * 2**-20)
    return seen


def test_three_modules_share_one_product_and_another_has_its_own(backend):
    first, *later = assert_same_as_alone(built, backward, backend)
    assert len(set(first.values())) == 4, "in the first forward each makes its own"
    for seen in later:
        assert seen["q:weight"] == seen["k:weight"] == seen["v:weight"] != seen["o:weight"]


def test_no_bit_depends_on_what_ran_before(backend):
    """The first forward, which shows what is shared, has the rows of later ones; so a run that continues has, too."""

    def step(model, cap, number):
        model(drawn(B)).sum().backward()

    rows, _ = run(built(), specs_of(), step, backend)
    for of in rows.values():
        first, second, third = of.split(B)
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def in_place(h):
    return h.mul_(2)


def behind_a_view(h):
    h.detach().view(-1)[3] = 7
    return h


def other_memory(h):
    h.data = h.data * 3
    return h


def at_its_address(h):
    """Another tensor, where the first one lay, or may have."""
    made = torch.empty_like(h)
    values = h.sin()
    del h
    return made.copy_(values)


@pytest.mark.parametrize("between", [in_place, behind_a_view, other_memory, at_its_address])
def test_an_input_that_changes_between_modules_is_not_shared(between, backend):
    for seen in assert_same_as_alone(lambda: built(between=between), backward, backend):
        assert seen["q:weight"] != seen["k:weight"]
    assert seen["k:weight"] == seen["v:weight"]


def test_what_is_shared_may_change_from_step_to_step(backend):
    """In the second step the others read a copy: what was made for them isn't taken."""

    def step(model, cap, number):
        model.between = (lambda h: h + 1) if number == 1 else (lambda h: h)
        backward(model, cap, number)

    seen = assert_same_as_alone(built, step, backend)
    assert seen[1]["q:weight"] != seen[1]["k:weight"]
    assert seen[2]["q:weight"] == seen[2]["k:weight"]


def test_modules_that_are_called_twice(backend):
    """With another tensor, and with the same one again."""
    assert_same_as_alone(lambda: built(times=2), backward, backend, calls="sum")

    def step(model, cap, number):
        h = model.start(drawn(B)).tanh()
        made = sum(getattr(model, name)(h).square().sum() for name in "qkvkqo")
        made.backward()

    assert_same_as_alone(built, step, backend, calls="sum")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, backend):
    def step(model, cap, number):
        x = drawn(B).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    assert_same_as_alone(built, step, backend)


def test_two_forwards_in_flight_and_a_second_backward(backend):
    def step(model, cap, number):
        x = drawn(B)
        first, second = model(x).sum(), model(x * 2).sum()
        if number == 2:
            first.backward(retain_graph=True)
        first.backward()
        if number != 2:
            second.backward()

    assert_same_as_alone(built, step, backend, calls="sum")


def test_threads_on_one_input(backend):
    x = drawn(B)

    def step(model, cap, number):
        start = threading.Barrier(2)

        def work():
            start.wait()
            model(x).sum().backward()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert_same_as_alone(built, step, backend)


def test_a_frozen_module_and_others_that_learn(backend):
    def step(model, cap, number):
        for name in ("q", "v"):
            getattr(model, name).requires_grad_(True)
        backward(model, cap, number)

    seen = assert_same_as_alone(built, step, backend)
    assert seen[2]["q:weight"] == seen[2]["k:weight"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, in torch's own imports
def test_compiled_code_shares_nothing(backend):
    compiled = {}

    def step(model, cap, number):
        if cap not in compiled:
            torch._dynamo.reset()
            compiled[cap] = torch.compile(model, backend="aot_eager")
        compiled[cap](drawn(B)).sum().backward()

    for seen in assert_same_as_alone(built, step, backend, n_steps=2):
        assert len(set(seen.values())) == 4
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, backend):
    """What is made wide in parts, and what is wide already."""

    def step(model, cap, number):
        h = model.start(drawn(B).to(dtype))
        h = h.repeat(1, 800, 1)
        sum(getattr(model, name)(h).float().square().mean() for name in NAMES).backward()

    seen = assert_same_as_alone(lambda: built().to(dtype), step, backend, n_steps=2)
    assert seen[1]["q:weight"] == seen[1]["o:weight"]
