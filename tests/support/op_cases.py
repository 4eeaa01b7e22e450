"""The table of the fused ops: shapes x strides x dtypes x reductions x dims x masks, and a second operand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import tlfast.backends.reference

REDUCTIONS = ("none", "sum", "mean", "last", "norm", "absmax")
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
OF_PRODUCTS = ("none", "sum", "mean", "last")

# Odd sizes on both sides of the vector widths and blocks of the kernels; sizes zero and one in every place.
SHAPES = (
    (0,), (1,), (7,), (769,), (3, 0), (0, 3), (1, 1), (5, 17), (2, 769), (2, 0, 3), (1, 7, 1), (3, 5, 17),
    (2, 7, 769), (2, 2049, 3), (1, 1, 1, 1), (2, 3, 5, 7), (2, 9, 1, 65), (3, 4, 0, 2),
)  # fmt: skip
LAYOUTS = ("contiguous", "expanded", "transposed", "sliced", "offset")
REF_LAYOUTS = (*LAYOUTS, "one for a vector")
MASKS = ("none", "right padding", "left padding", "one empty", "random")


@dataclass(frozen=True)
class Case:
    """One call of the op."""

    shape: tuple[int, ...]
    layout: str
    grad_dtype: torch.dtype
    dtype: torch.dtype
    reduce: str
    dims: tuple[int, ...]
    mask: str
    scale: float = 1.0
    ref_layout: str = ""  # of a product
    ref_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        parts = (list(self.shape), self.layout, self.grad_dtype, self.dtype, self.reduce, self.dims, self.mask)
        ref = () if self.ref_dtype is None else ("x", self.ref_layout, self.ref_dtype)
        return " ".join(map(str, (*parts, self.scale, *ref)))


def stored_dtypes(grad_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a gradient of a dtype can be stored as."""
    return (torch.float32, *HALVES, *([torch.float64] if grad_dtype == torch.float64 else []))


def dim_choices(n_dims: int) -> list[tuple[int, ...]]:
    """Positions, batch, both, the last, the outer two, all; those that a gradient of so many dimensions has."""
    choices = [(1,), (0,), (0, 1), (-1,), (0, -1), (-1, 1), (-2,), tuple(range(n_dims))]
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}
    for dims in choices:
        if all(-n_dims <= d < n_dims for d in dims) and len({d % n_dims for d in dims}) == len(dims):
            seen.setdefault(tuple(sorted(d % n_dims for d in dims)), dims)
    return list(seen.values())


def make_gradient(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A random gradient with the strides that autograd can hand out."""
    if layout == "expanded":  # loss.sum(): one number everywhere; here one vector along the last dimension
        return torch.randn(shape[-1]).to(dtype).expand(shape)
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn([2 * s + 1 for s in shape]).to(dtype)[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "one for a vector":  # a weight of each position
        return torch.randn(*shape[:-1], 1).to(dtype).expand(shape)
    if layout == "offset":  # starts at an odd address of the vector
        n = torch.Size(shape).numel()
        return torch.randn(n + 1).to(dtype)[1:].view(shape)
    return torch.randn(shape).to(dtype)


def make_mask(shape: tuple[int, ...], kind: str) -> torch.Tensor | None:
    """Bool [B, P] (bool [B] for one dimension), True at real tokens."""
    if kind == "none":
        return None
    sizes = shape[:2]
    mask = torch.ones(sizes, dtype=torch.bool)
    if kind == "random":
        return torch.rand(sizes) < 0.6
    for b in range(sizes[0]):
        if len(sizes) == 1:
            mask[b] = b % 2 == 0
        elif kind == "right padding":
            mask[b, max(1, sizes[1] - b) :] = False
        elif kind == "left padding":
            mask[b, : min(b, max(0, sizes[1] - 1))] = False
    if kind == "one empty" and sizes[0]:
        mask[sizes[0] // 2] = False
    return mask


def make_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory full of NaN, the part of it that is to be written): rows of a ring, or something with gaps."""
    if layout == "sliced" and shape:
        memory = torch.full([2 * s + 1 for s in shape], torch.nan, dtype=dtype)
        return memory, memory[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "transposed" and shape:
        memory = torch.full([3, *shape[::-1]], torch.nan, dtype=dtype)
        return memory, memory[1].permute(*reversed(range(len(shape))))
    memory = torch.full([3, *shape], torch.nan, dtype=dtype)
    return memory, memory[1]


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that shows every write."""
    return torch.full(shape, torch.nan).to(dtype)


def left_shape(case: Case) -> tuple[int, ...]:
    """The shape of the result."""
    if case.reduce == "none":
        return case.shape
    gone = {d % len(case.shape) for d in case.dims}
    return tuple(s for d, s in enumerate(case.shape) if d not in gone)


def cases(grad_dtype: torch.dtype, reduce: str, share: float = 1.0) -> Iterator[Case]:
    """A share of all shapes x layouts x dims x masks, drawn once and for all; stored dtype and scale drawn with it."""
    draw = random.Random(f"{grad_dtype} {reduce} {share}")
    for shape in SHAPES:
        choices = [()] if reduce == "none" else dim_choices(len(shape))
        for layout, dims, mask in itertools.product(LAYOUTS, choices, MASKS):
            dtype, scale = draw.choice(stored_dtypes(grad_dtype)), draw.choice((1.0, 1.0, 1.0, 0.125, 1 / 3))
            if draw.random() < share:
                yield Case(shape, layout, grad_dtype, dtype, reduce, dims, mask, scale)


def make_ref(case: Case) -> torch.Tensor:
    """The second operand of a product."""
    assert case.ref_dtype is not None
    return make_gradient(case.shape, case.ref_layout, case.ref_dtype)


def product_cases(grad_dtype: torch.dtype, reduce: str, share: float = 1.0) -> Iterator[Case]:
    """The same for products; the dtype and the layout of the second operand are drawn, too."""
    draw = random.Random(f"product {grad_dtype} {reduce} {share}")
    for case in cases(grad_dtype, reduce, share):
        yield replace(case, ref_layout=draw.choice(REF_LAYOUTS), ref_dtype=draw.choice((grad_dtype, *GRAD_DTYPES)))


def run_op(
    backend: str,
    out: torch.Tensor,
    grad: torch.Tensor,
    reduce: str,
    dims: tuple[int, ...],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    ref: torch.Tensor | None = None,
) -> None:
    """Call one implementation of the op, of the one for products where there is a ``ref``."""
    if backend != "native":
        tlfast.backends.reference.capture(out, grad, reduce, dims, mask, scale, ref=ref)
    elif ref is None:
        torch.ops.tlfast.capture(out, grad, reduce, dims, mask, scale)
    else:
        torch.ops.tlfast.capture_product(out, grad, ref, reduce, dims, mask, scale)
