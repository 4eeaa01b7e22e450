"""What the benches of a GPU run: frozen GPT-2 shapes with random weights, and the right gradients of their points."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss

from .clock import Clock
from .measure import WrongResult, check_close, reduction_bound
from .rivals import first_tensor
from .storing import Work


@dataclass(frozen=True)
class Shape:
    """A GPT-2; ``tied``: the unembedding is the embedding."""

    name: str
    n_layers: int
    width: int
    n_heads: int
    vocabulary: int
    length: int
    tied: bool = True


SMALL = Shape("GPT-2 small", 12, 768, 12, 50257, 1024)
# 12 layers of width 768 and two matrices of 50304 x 768 are 162 million parameters, as Pythia-160M has them.
MIDDLE = Shape("GPT-2 shape of 160M", 12, 768, 12, 50304, 1024, tied=False)
TINY = Shape("tiny GPT-2", 2, 32, 2, 64, 16)


def make_model(shape: Shape, clock: Clock, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model in eval mode, so without dropout; nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.n_layers, n_embd=shape.width, n_head=shape.n_heads, n_positions=shape.length,
        vocab_size=shape.vocabulary, bos_token_id=0, eos_token_id=0, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(clock.device, dtype).eval()


def points_of(shape: Shape) -> tuple[str, ...]:
    """Every residual point (the output of a block) and every MLP output."""
    return tuple(f"transformer.h.{layer}{part}" for layer in range(shape.n_layers) for part in ("", ".mlp"))


@dataclass(frozen=True)
class Timed(Work):
    """The same for all variants: the first unit warms up, the units behind it are timed.

    So the time is that of going on: graphs are made and files are created before, and while as many units are written
    as are computed, the first of them is written in the time and the last one behind it.
    """

    clock: Clock
    span: list[float] = field(default_factory=list)  # when the timed units began and ended

    def stepping(self) -> Iterator[Batch]:
        """All batches in turn; the time begins with the second unit."""
        n_rows = 0
        for batch in self.batches:
            if n_rows == self.rows_per_unit:
                self.clock.finish()
                self.span[:] = [time.perf_counter()]
            n_rows += len(batch.input_ids)
            yield batch

    def end(self) -> None:
        """The last unit has left the model and the GPU."""
        self.clock.finish()
        self.span.append(time.perf_counter())

    @property
    def step_time_s(self) -> float:
        """Seconds of a timed step."""
        begin, end = self.span
        n_warm = self.rows_per_unit // len(self.batches[0].input_ids)
        return (end - begin) / (len(self.batches) - n_warm)


def make_work(shape: Shape, model: nn.Module, clock: Clock, batch: int, steps_per_unit: int, n_units: int) -> Timed:
    """Random tokens, on the device before anything is timed; one unit more than is timed."""
    n_batches = steps_per_unit * (n_units + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (batch * n_batches, shape.length), generator=generator)
    batches = [Batch(ids.to(clock.device), None) for ids in tokens.split(batch)]
    return Timed(model, batches, points_of(shape), "mean", steps_per_unit * batch, clock)


@dataclass(frozen=True)
class Watched(Timed):
    """The same work, and the gradients of all points as the last backward made them.

    They are copied out of the very backward whose rows are checked: kernels that add up in a changing order, as
    some of attention do, then make no difference. In a graph the copies are a part of it, and every replay renews them.
    """

    last: dict[str, torch.Tensor] = field(default_factory=dict)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss that `collect` uses; what goes through it is watched."""
        self.last.clear()

        def watch(name: str, output: object) -> None:
            first_tensor(output).register_hook(lambda grad: self.last.__setitem__(name, grad.detach().clone()))

        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: watch(name, output)  # type: ignore[misc]
            )
            for name in self.points
        ]
        try:
            return next_token_loss(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, batch: Batch) -> None:
        self.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]


def watched(work: Timed, n_batches: int) -> Watched:
    """The first batches, as one unit, to be checked."""
    batches = work.batches[:n_batches]
    n_rows = sum(len(batch.input_ids) for batch in batches)
    return Watched(work.model, batches, work.points, work.reduce, n_rows, work.clock)


def check_rows(name: str, work: Watched, rows: dict[str, torch.Tensor]) -> None:
    """Compare the rows of all examples with the last backward, which made the last of them.

    Raises:
        WrongResult: for a row that is off, for a wrong number of rows, and where no gradient was watched.
    """
    n_last = len(work.batches[-1].input_ids)
    if set(work.last) != set(work.points):
        raise WrongResult(f"{name}: a gradient must be seen at every point, got {len(work.last)} points")
    for point, grad in work.last.items():
        kept = rows[point]
        if len(kept) != work.n_examples:
            raise WrongResult(f"{name} at {point}: there must be {work.n_examples} rows, got {len(kept)}")
        value, bound = reduction_bound(grad, 1, work.reduce, torch.bfloat16)
        check_close(f"{name} at {point}", kept[-n_last:].to(grad.device), value, bound)
        if bool(kept[:-n_last].isnan().any()):
            raise WrongResult(f"{name} at {point}: every row must be written, got NaN")
