"""The ways to projected weight gradients on disk that `weights` compares, and how their rows are read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tlfast
import tlfast.dataset
from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss

from .rivals import first_tensor
from .storing import hooked

BASE = "transformer."  # the models are GPT-2: bergson names modules inside of it


@dataclass(frozen=True)
class Work:
    """What all ways do: a row L G R^T [dim, dim] of float32 for each example at each of these linear layers.

    ``kind`` is that of the matrices: of another than signs tlfast alone makes rows here.
    """

    model: Any  # frozen in every way, so that nobody pays for gradients that nobody wants
    batches: list[Batch]
    points: tuple[str, ...]
    dim: int
    rows_per_unit: int
    kind: Any = "rademacher"
    begin: Callable[[], None] = lambda: None  # called where a step begins, by what doesn't run the model

    @property
    def project(self) -> tlfast.Projection:
        """As `tlfast.capture` takes it."""
        return tlfast.Projection(self.dim, self.kind)

    @property
    def n_examples(self) -> int:
        """Examples in all batches."""
        return sum(len(batch.input_ids) for batch in self.batches)

    def sizes(self, point: str) -> tuple[int, int]:
        """Outputs and inputs of a layer; transformers' Conv1D keeps its weight as [inputs, outputs]."""
        inputs, outputs = self.model.get_submodule(point).weight.shape
        return outputs, inputs

    def backward(self, batch: Batch) -> None:
        """One forward and backward, with the loss that all ways have."""
        next_token_loss(self.model, batch).backward()  # type: ignore[no-untyped-call]


Matrices = tuple[torch.Tensor, torch.Tensor]  # L [dim, outputs] and R [dim, inputs], scaled


@dataclass(frozen=True)
class Way:
    """One way to do the work into a folder.

    ``read`` takes what ``run`` has returned, and gives a point's rows [examples, dim, dim]; ``matrices`` are those that
    the way projects a point with.
    """

    run: Callable[[Work, Path], Any]
    read: Callable[[Any, Work, str], torch.Tensor] | None = None
    matrices: Callable[[Work, str], Matrices] | None = None


def floor(work: Work, out: Path) -> None:
    """The frozen forward and backward; nothing is captured."""
    with tlfast.freeze(work.model):
        for batch in work.batches:
            work.backward(batch)


def products(work: Work, out: Path) -> None:
    """The arithmetic of the rows and nothing else: matrix products of the same shapes, into memory that is there."""
    n, length = work.batches[0].input_ids.shape
    inside = torch.ones(2, n, length, work.dim)
    row = torch.empty(n, work.dim, work.dim)
    wide = {size: torch.ones(n * length, size) for point in work.points for size in work.sizes(point)}
    for _ in work.batches:
        work.begin()
        for point in work.points:
            for side, matrix in enumerate(_signs(work, point)):
                torch.mm(wide[matrix.shape[1]], matrix.T, out=inside[side].view(n * length, work.dim))
            torch.bmm(inside[0].mT, inside[1], out=row)


def _signs(work: Work, point: str) -> Matrices:
    """Two matrices of signs, as good as any."""
    outputs, inputs = work.sizes(point)
    seed = 2 * work.points.index(point)
    return _made(work.dim, outputs, seed), _made(work.dim, inputs, seed + 1)


@cache
def _made(rows: int, columns: int, seed: int) -> torch.Tensor:
    signs = torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs / rows**0.5


def python_hooks(work: Work, out: Path) -> Path:
    """What is best in Python: tensor hooks, inputs projected in the forward, `bmm` into a preallocated row.

    One write a batch, and one sync.
    """
    most = max(len(batch.input_ids) for batch in work.batches)
    rows = torch.empty(len(work.points), most, work.dim, work.dim)
    kept: dict[int, torch.Tensor] = {}
    n = most

    def attach(k: int, left: torch.Tensor, right: torch.Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def backward(grad: torch.Tensor) -> None:
            torch.bmm((grad @ left.T).mT, kept.pop(k), out=rows[k, :n])

        def forward(module: nn.Module, args: Any, output: Any) -> None:
            kept[k] = args[0].detach() @ right.T
            first_tensor(output).register_hook(backward)

        return forward

    matrices = [_signs(work, point) for point in work.points]
    handles = [
        work.model.get_submodule(point).register_forward_hook(attach(k, *matrices[k]))
        for k, point in enumerate(work.points)
    ]
    with (out / "rows.bin").open("wb") as file, tlfast.freeze(work.model), hooked(handles):
        for batch in work.batches:
            n = len(batch.input_ids)
            work.backward(batch)
            file.write(rows[:, :n].contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return out / "rows.bin"


def read_blocks(found: Path, work: Work, point: str) -> torch.Tensor:
    """The rows of a point out of blocks [points, examples, dim, dim], one for each batch."""
    values, k, at, parts = torch.from_numpy(np.fromfile(found, np.float32)), work.points.index(point), 0, []
    for batch in work.batches:
        n = len(work.points) * len(batch.input_ids) * work.dim**2
        parts.append(values[at : at + n].view(len(work.points), -1, work.dim, work.dim)[k])
        at += n
    return torch.cat(parts)


def bergson_collector(work: Work, out: Path) -> Path:
    """bergson's own collection into an index, which it syncs by flushing its map.

    By itself it makes the embedding trainable, which here is the unembedding, too. It is spared that: it asks for some
    parameter with a gradient, and gets the smallest.
    """
    from bergson.collection import collect_gradients
    from bergson.config.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    ids = [row.tolist() for batch in work.batches for row in batch.input_ids]
    data = Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]})
    starts = np.cumsum([0, *(len(batch.input_ids) for batch in work.batches)]).tolist()
    batches = [list(range(start, stop)) for start, stop in pairwise(starts)]
    settings = IndexConfig(run_path=str(out / "index"), projection_dim=work.dim)
    with tlfast.freeze(work.model):
        work.model.transformer.ln_f.bias.requires_grad_(True)
        collect_gradients(
            work.model, data, GradientProcessor(projection_dim=work.dim), settings, batches=batches,
            target_modules={point.removeprefix(BASE) for point in work.points},
        )  # fmt: skip
        work.model.transformer.ln_f.bias.requires_grad_(False)
    return settings.partial_run_path


def read_index(found: Path, work: Work, point: str) -> torch.Tensor:
    """The rows of a point out of bergson's index."""
    sizes = json.loads((found / "info.json").read_text(encoding="utf-8"))["grad_sizes"]
    stored = np.fromfile(found / "gradients.bin", np.float32).reshape(work.n_examples, -1)
    at = list(sizes).index(point.removeprefix(BASE)) * work.dim**2
    return torch.from_numpy(stored[:, at : at + work.dim**2]).view(-1, work.dim, work.dim)


def _ours(work: Work, point: str) -> Matrices:
    return _matrices(work.project, point, work.sizes(point))


def _bergsons(work: Work, point: str) -> Matrices:
    return _matrices(tlfast.Projection(work.dim, scheme="bergson-2"), point.removeprefix(BASE), work.sizes(point))


def _matrices(projection: tlfast.Projection, name: str, sizes: tuple[int, int]) -> Matrices:
    left, right = projection.matrix(name, "left", sizes[0]), projection.matrix(name, "right", sizes[1])
    return left * projection.scale, right * projection.scale


def collect(work: Work, out: Path) -> Path:
    """The whole job of `tlfast.collect`, with its set-up."""
    examples = [batch.input_ids for batch in work.batches]
    settings: Any = {"of": "weight", "project": work.project}
    tlfast.collect(
        work.model, examples, out, points=list(work.points), dtype=torch.float32, batch_tokens=examples[0].numel(),
        rows_per_unit=work.rows_per_unit, progress=False, **settings,
    )  # fmt: skip
    return out


def read_dataset(found: Path, work: Work, point: str) -> torch.Tensor:
    """The rows of a point out of a dataset."""
    return tlfast.open_dataset(found)[f"{point}:weight"][:]


def capture(work: Work, out: Path) -> dict[str, torch.Tensor]:
    """A capture whose rows stay in memory: what the step itself pays."""
    settings: Any = {"of": "weight", "project": work.project}
    with (
        tlfast.freeze(work.model),
        tlfast.capture(work.model, list(work.points), rows=work.n_examples, dtype=torch.float32, **settings) as cap,
    ):
        for batch in work.batches:
            work.backward(batch)
    return {point: cap[f"{point}:weight"] for point in work.points}


def into(work: Work, out: Path) -> Path:
    """A loop of one's own, whose rows go to disk unit by unit, each synced and committed; no set-up of a collection."""
    settings: Any = {"of": "weight", "project": work.project}
    plan = tlfast.dataset.Plan(work.n_examples, work.rows_per_unit)
    with (
        tlfast.freeze(work.model),
        tlfast.capture(work.model, list(work.points), rows=work.rows_per_unit, dtype=torch.float32, **settings) as cap,
        cap.into(out / "dataset", plan=plan) as rows,
    ):
        for batch, ids in zip(work.batches, rows.batches(len(work.batches[0].input_ids)), strict=True):
            with cap.batch(ids=ids):
                work.backward(batch)
    return out / "dataset"


FLOOR = "forward and backward (floor)"
PRODUCTS = "the matrix products alone"
PYTHON = "tensor hooks, bmm, one file"
BERGSON = "bergson"
CAPTURE = "tlfast.capture, in memory"
INTO = "tlfast.capture, into a dataset"
COLLECT = "tlfast.collect, with its set-up"

WAYS: dict[str, Way] = {
    FLOOR: Way(floor),
    PRODUCTS: Way(products),
    PYTHON: Way(python_hooks, read_blocks, _signs),
    BERGSON: Way(bergson_collector, read_index, _bergsons),
    CAPTURE: Way(capture, lambda found, work, point: found[point], _ours),
    INTO: Way(into, read_dataset, _ours),
    COLLECT: Way(collect, read_dataset, _ours),
}
