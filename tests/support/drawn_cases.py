"""Calls of the fused ops that hypothesis draws: odd sizes, any layout, dtypes, dims and masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from op_cases import GRAD_DTYPES, MASKS, Case, dim_choices, stored_dtypes

SIZES = st.integers(0, 9) | st.just(67)
OUT_LAYOUTS = st.sampled_from(["rows", "sliced", "transposed"])


def odd_case(data: Any, layouts: tuple[str, ...], reductions: tuple[str, ...]) -> Case:
    """A call without a second operand."""
    n_dims = data.draw(st.integers(1, 4))
    grad_dtype, reduce = data.draw(st.sampled_from(GRAD_DTYPES)), data.draw(st.sampled_from(reductions))
    return Case(
        shape=tuple(data.draw(st.lists(SIZES, min_size=n_dims, max_size=n_dims))),
        layout=data.draw(st.sampled_from(layouts)),
        grad_dtype=grad_dtype,
        dtype=data.draw(st.sampled_from(stored_dtypes(grad_dtype))),
        reduce=reduce,
        dims=() if reduce == "none" else data.draw(st.sampled_from(dim_choices(n_dims))),
        mask=data.draw(st.sampled_from(MASKS)),
        scale=data.draw(st.sampled_from([1.0, 1.0, 1e-3, 3.0])),
    )


def odd_product(data: Any, layouts: tuple[str, ...], reductions: tuple[str, ...]) -> Case:
    """A call with one."""
    ref_layout, ref_dtype = data.draw(st.sampled_from(layouts)), data.draw(st.sampled_from(GRAD_DTYPES))
    return replace(odd_case(data, layouts, reductions), ref_layout=ref_layout, ref_dtype=ref_dtype)
