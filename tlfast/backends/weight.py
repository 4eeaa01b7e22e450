"""The gradient of a module's weight, for each example: of what its forward keeps and its backward brings.

Does what csrc/autograd/weight.cpp does, in plain Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import broken_rule
from ..spec import one_of
from .factor_sums import FactorSums
from .queries import Queries
from .reference import accumulator, check_mask
from .whole import Whole

LAYERS = ("linear", "conv", "embedding", "layer_norm", "rms_norm")
ROWS = ("gradient", "norm", "scores", "factors", "token norms", "token scores")
# (kernel, stride, dilation, padding as F.pad takes it, padding mode, groups)
Window = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], str, int]
_ELEMENTS, _LEAST_ROWS = 1 << 20, 64  # of the gradients that are there at once, for scores
_POSITIONS = 256  # whose products with all others are there at once, for norms


class Weight:
    """Takes an input a [B, T, I] and a gradient g [B, T, O] to G = sum_t g a^T [B, O, I], or to L G R^T.

    With a bias, a has a last 1. A convolution has its windows in place of positions, an embedding one-hot inputs. The
    weight of a norm is a vector: G = sum_t g x, where x is the normalized input; the right matrix alone projects it.

    Args:
        layer: what the module does with its weight: linear, conv, embedding, layer_norm or rms_norm.
        row: what a row is: the gradient, its norm, or its dot products with queries ("scores"); of each position the
            two factors, side by side, the norm, or these products; or running sums of a linear layer or a convolution,
            where a row is the number of positions that were added.
        bias: whether the bias belongs to the weight.
        left: L [p, O], or of each head [n, p, O / n].
        right: R [p, I].
        row_scale: the factor on the rows, beside that of the loss.
        heads: as which the outputs are taken; 0: as one.
        padding_idx: the token that has no gradient, of an embedding; -1: none.
        norm: how many dimensions a norm has, and its epsilon.
        window: of a convolution.
        instead: native code that does what L does, and R without its bias, not used here; and what whole gradients go
            through, which are made first then, and projected by L and R, or at once.
        queries: of scores: whole ones, or their two factors, as `Queries` takes them; () where there are none.
    """

    def __init__(
        self, layer: str, row: str | FactorSums, bias: bool, left: torch.Tensor | None, right: torch.Tensor | None,
        row_scale: float, heads: int, padding_idx: int, norm: tuple[int, float], window: Window | None,
        instead: tuple[Any, Any, Whole | None], queries: Sequence[torch.Tensor],
    ):  # fmt: skip
        self._running, self._whole = None if isinstance(row, str) else row, instead[2]
        self.layer = one_of("capture", "layer", layer, LAYERS)
        self.row = one_of("capture", "row", row, ROWS) if isinstance(row, str) else "sums"
        self.bias, self.left, self.right, self._scale, self.heads = bias, left, right, row_scale, heads
        self.padding_idx, self.window = padding_idx, window
        self.normalized, self.eps = norm
        has_factors = layer == "linear" or (layer == "conv" and self.groups == 1)
        if self._running is not None and (not has_factors or heads or (left is not None and left.dim() > 2)):
            rule = "be there, of a linear layer without heads or a convolution without groups"
            raise ValueError(broken_rule("capture", "sums", rule, "another", 'Make it by Spec(of="weight").'))
        self.of_norm = layer in ("layer_norm", "rms_norm")
        small = right is not None and right.shape[0] < right.shape[1]
        self._early = small and not self.of_norm and self._whole is None
        self._moved: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._per_token, self._scores = self.row in ROWS[3:], self.row.endswith("scores")
        self._queries = Queries(queries, self._like) if queries else None
        if self._scores != (self._queries is not None):
            rule, remedy = "be there for scores, and for these alone", 'Make it by Spec(of="weight").'
            raise ValueError(broken_rule("capture", "queries", rule, int(self._scores), remedy))
        if self._whole is not None and (layer not in ("linear", "conv") or self._per_token or self._running):
            rule, remedy = (
                "be of rows of linear layers and convolutions, for each example",
                'Make it by Spec(of="weight").',
            )
            raise ValueError(broken_rule("capture", "whole", rule, "another", remedy))

    @property
    def groups(self) -> int:
        return self.window[5] if self.window is not None else 1

    def scale(self, of_loss: float) -> float:
        """The factor on the rows."""
        if self._running is not None:
            return 1.0
        return self._scale if self.row == "factors" and not self.of_norm else self._scale * of_loss

    def keep(self, who: str, given: torch.Tensor) -> torch.Tensor:
        """What a forward keeps of its input: projected, where that is smaller."""
        with _bare(given):
            given = given.detach()
            if self.layer == "linear":
                if given.dim() < 2:
                    raise _no_batch(who, "the input", "have the batch before its last dimension", given)
                return self._project_input(_in_positions(given)) if self._early else given
            if self.window is not None:
                if given.dim() != len(self.window[0]) + 2:
                    raise _no_batch(who, "the input", "have the batch as its first dimension", given)
                return self._convolved(given) if self._early else given
            if self.layer == "embedding":
                if given.dim() < 2:
                    raise _no_batch(who, "the input", "be tokens of a batch, [B, P]", given)
                return given
            return self._normal(given)

    def shares(self, given: torch.Tensor) -> bool:
        """Whether `keep` is a product with R of this input, which may be made for several weights at once."""
        if self.layer != "linear" or not self._early or given.dim() < 2 or not given.is_floating_point():
            return False
        return self.right is not None and given.shape[-1] == self.right.shape[1] - self.bias

    @staticmethod
    def keep_for(weights: Sequence[Weight], given: torch.Tensor) -> list[torch.Tensor]:
        """What each of these weights, which share an input, keeps of it."""
        with _bare(given):
            a = _wide(_in_positions(given.detach()))
            rights = [weight._like(weight.right, a) for weight in weights if weight.right is not None]
            turned = [right[:, : a.shape[-1]].T for right in rights]
            product = a @ (turned[0] if len(turned) == 1 else torch.cat(turned, 1))
            parts = list(product.split([len(right) for right in rights], -1))
            for weight, right, part in zip(weights, rights, parts, strict=True):
                if weight.bias:
                    part += right[:, -1]
            return parts

    def rows(
        self, who: str, kept: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None, scale: float = 1.0
    ) -> torch.Tensor:
        """The rows of one call [B, ...], float32 or float64.

        ``scale``: the factor on the gradient, which is on the rows, too, but where these are pairs of factors.
        """
        with _bare(grad):
            return self._of_norm(who, kept, grad, mask) if self.of_norm else self._of_map(who, kept, grad, mask, scale)

    def size(self, who: str, kept: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """What is made of the magnitudes of what is multiplied and added up."""
        with _bare(grad):
            if self.of_norm:
                return self._of_norm(who, kept.abs(), grad.abs(), None, sizes=True)
            return self._of_map(who, kept, grad, None, 1.0, sizes=True)

    def _of_map(
        self, who: str, kept: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None, scale: float,
        sizes: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if self.window is not None and mask is not None:
            remedy = "Its windows are no tokens: capture it on its own."
            raise ValueError(broken_rule(who, "mask", "be left out at a convolution", "one", remedy))
        given = self._outputs(who, grad)
        inputs = self._inputs(kept, given)
        if inputs.shape[:2] != given.shape[:2]:
            rule = "have the positions of the gradient"
            got, remedy = list(inputs.shape), "Leave this point out."
            raise ValueError(broken_rule(who, "the input that was kept", rule, got, remedy))
        out = _left_out(who, mask, grad)
        if self.padding_idx >= 0:  # torch gives this token no gradient
            padding = kept.flatten(1).eq(self.padding_idx).unsqueeze(2)
            out = padding if out is None else out | padding
        outputs = _without(self._project_outputs(given), out)
        one, same = (
            self.bias and (self.right is None or self._whole is not None),
            self.layer == "embedding" and self.right is None,
        )
        if not same:
            inputs = _without(inputs, out)
        if sizes:
            outputs, inputs = outputs.abs(), inputs if same else inputs.abs()
        if self._running is not None:
            return self._running.add(outputs, inputs, one, out, scale)
        if self._whole is not None:
            return self._of_whole(self._sums(outputs, inputs, one), self._whole, sizes)
        n_positions = outputs.shape[1]
        size = outputs.shape[2] * (n_positions if same else inputs.shape[2])
        if self.row == "norm" and self.groups == 1 and (same or 2 * n_positions**2 < size):
            return _norms_by_products(outputs, inputs, one, same)
        if self._per_token and grad.dim() < 3:
            rule, remedy = "have positions as dimension 1", 'Use per="example" there.'
            raise ValueError(broken_rule(who, "a gradient", rule, list(grad.shape), remedy))
        if self._scores:
            return self._scored(outputs, inputs, one, same, sizes)
        return self._row(outputs, inputs, one, same, scale)

    def _of_whole(self, gradients: torch.Tensor, whole: Whole, sizes: bool) -> torch.Tensor:
        """The rows of gradients [B, O, I] that are made first."""
        row = whole.sizes(gradients) if sizes else whole.normalized(gradients)
        if whole.projects:
            row = row if sizes else whole.projected(row.flatten(1))
        else:
            row = _split(row, 1, self.heads, -1) if self.heads else row
            left = None if self.left is None else self._like(self.left, row)
            right = None if self.right is None else self._like(self.right, row)
            if sizes and left is not None and right is not None:
                n, m = left.shape[-2], right.shape[-2]
                row = torch.linalg.vector_norm(row, 2, (-2, -1), keepdim=True).expand(*row.shape[:-2], n, m)
            else:
                row = row if left is None else left @ row
                row = row if right is None else row @ right.T
        if self._queries is not None:
            queries = self._queries.of_magnitudes() if sizes else self._queries
            return queries.of_gradients(row)
        if self.row == "norm":
            norms: torch.Tensor = torch.linalg.vector_norm(row.flatten(1), 2, 1)
            return norms
        return row

    def _row(self, outputs: torch.Tensor, inputs: torch.Tensor, one: bool, same: bool, scale: float) -> torch.Tensor:
        if self.row == "token norms":
            norms: torch.Tensor = torch.linalg.vector_norm(outputs, 2, 2)
            return norms if same else norms * (inputs.square().sum(2) + int(one)).sqrt()
        if self.row == "factors":
            dtype = torch.promote_types(outputs.dtype, inputs.dtype)
            pair = [(outputs * scale).to(dtype), inputs.to(dtype)]
            if one:
                pair.append(outputs.new_ones(*outputs.shape[:2], 1).to(dtype))
            return torch.cat(pair, -1)
        sums = self._sums(outputs, inputs, one)
        if self.row == "norm":
            norms = torch.linalg.vector_norm(sums, 2, (1, 2))
            return norms
        return _split(sums, 1, self.heads, -1) if self.heads else sums

    def _sums(self, outputs: torch.Tensor, inputs: torch.Tensor, one: bool) -> torch.Tensor:
        """G of [B * groups, T, O] and [B * groups, T, I]."""
        dtype = torch.promote_types(outputs.dtype, inputs.dtype)
        sums = torch.bmm(outputs.to(dtype).transpose(1, 2), inputs.to(dtype))
        if one:
            sums = torch.cat([sums, outputs.sum(1).to(dtype).unsqueeze(2)], 2)
        if self.groups == 1:
            return sums
        sums = _split(sums, 0, -1, self.groups)
        return sums.flatten(1, 2) if self.left is None or self._whole is not None else sums.sum(1)

    def _scored(
        self, outputs: torch.Tensor, inputs: torch.Tensor, one: bool, tokens: bool, sizes: bool
    ) -> torch.Tensor:
        """The dot products of G, or of each position's, with the queries.

        Some rows of G are there at a time, of all examples: queries, which are large, are read once.
        """
        assert self._queries is not None
        queries = self._queries.of_magnitudes() if sizes else self._queries
        whole = self.groups > 1 or (not tokens and queries.want_gradients(outputs.shape[1]))
        if self._per_token or not whole:
            if one:
                inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], -1)
            if not tokens:
                dtype = torch.promote_types(outputs.dtype, inputs.dtype)
                outputs, inputs = outputs.to(dtype), inputs.to(dtype)
            each = queries.of_positions(outputs, inputs, tokens)
            return each if self._per_token else each.sum(1)
        if self.groups > 1:
            return queries.of_gradients(self._sums(outputs, inputs, one))
        step = max(_LEAST_ROWS, _ELEMENTS // max(1, len(outputs) * (inputs.shape[2] + int(one))))
        total = outputs.new_zeros(())
        for start in range(0, outputs.shape[2], step):
            rows = self._sums(outputs[..., start : start + step], inputs, one)
            total = total + queries.of_gradients(rows, start)
        return total

    def _of_norm(
        self, who: str, kept: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None, sizes: bool = False
    ) -> torch.Tensor:
        if kept.shape != grad.shape:
            rule = f"have its input's shape {list(kept.shape)}"
            raise ValueError(
                broken_rule(who, "the gradient of a norm", rule, list(grad.shape), "Leave this point out.")
            )
        n = self.normalized

        def last(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(-n, -1) if n > 1 else tensor

        out = _left_out(who, mask, last(grad))
        g = _without(_in_positions(last(_wide(grad))), out)
        each = g * _without(_in_positions(last(kept)), out)
        if self.bias:
            each = torch.cat([each, g], -1)
        if not self._per_token:
            each = each.sum(1)
        if self.right is not None:
            each = each @ self._like(self.right, each).T
        if self._queries is not None:
            queries = self._queries.of_magnitudes() if sizes else self._queries
            return _split(queries.of_gradients(each.flatten(0, -2)), 0, *each.shape[:-1])
        return torch.linalg.vector_norm(each, 2, -1) if self.row in ("norm", "token norms") else each

    # The input.

    def _inputs(self, kept: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The input as it was kept, [B, T, Q], or of a convolution [B * groups, T, Q]."""
        if self.layer == "embedding":
            tokens = kept.flatten(1)
            return tokens if self.right is None else self._like(self.right, given).T[tokens]
        if self._early:
            if self.window is None:
                return kept
            return _split(kept.flatten(2), 1, self.groups, -1).flatten(0, 1).transpose(1, 2)
        a = _in_positions(_wide(kept)) if self.window is None else self._windows(_wide(kept)).flatten(0, 1)
        return a if self.right is None or self._whole is not None else self._project_input(a)

    def _project_input(self, given: torch.Tensor) -> torch.Tensor:
        """[B, T, I] to R a, [B, T, p]."""
        assert self.right is not None
        a = _wide(given)
        right = self._like(self.right, a)
        return a @ right[:, :-1].T + right[:, -1] if self.bias else a @ right.T

    def _convolved(self, given: torch.Tensor) -> torch.Tensor:
        """The same of a convolution's windows: one more convolution, whose weights are the matrix."""
        assert self.window is not None
        assert self.right is not None
        kernel, stride, dilation, padding, mode, groups = self.window
        a = _wide(given)
        right = self._like(self.right, a)
        p, n = right.shape[0], right.shape[1] - self.bias
        weights = right[:, :n].expand(groups, p, n).reshape(groups * p, a.shape[1] // groups, *kernel)
        bias = right[:, n].repeat(groups) if self.bias else None
        none = [0] * len(kernel)
        padded = F.pad(a, list(padding), mode)
        return torch.convolution(padded, weights, bias, stride, none, dilation, False, none, groups)

    def _windows(self, a: torch.Tensor) -> torch.Tensor:
        """The windows of an input [B, C, ...] as [B, groups, T, C / groups * kernel]."""
        assert self.window is not None
        kernel, stride, dilation, padding, mode, groups = self.window
        seen, n = F.pad(a, list(padding), mode), len(kernel)
        for d in range(n):
            seen = seen.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
        seen = _split(seen.flatten(2 + n, -1).flatten(2, 1 + n), 1, groups, -1)  # [B, groups, C', T, kernel]
        return seen.transpose(2, 3).flatten(3, 4)

    def _normal(self, given: torch.Tensor) -> torch.Tensor:
        a = _wide(given)
        if self.layer == "layer_norm":
            return F.layer_norm(a, a.shape[a.dim() - self.normalized :], None, None, self.eps)
        mean = a.square().mean(list(range(a.dim() - self.normalized, a.dim())), keepdim=True)
        return a * (mean + self.eps).rsqrt()

    # The gradient.

    def _outputs(self, who: str, grad: torch.Tensor) -> torch.Tensor:
        """The gradient as [B, T, O]; of a convolution as [B * groups, T, O / groups]."""
        if grad.dim() < 2:
            raise _no_batch(who, "a gradient", "have the batch before its last dimension", grad)
        if self.window is None:
            return _in_positions(_wide(grad))
        return _split(_wide(grad).flatten(2), 1, self.groups, -1).flatten(0, 1).transpose(1, 2)

    def _project_outputs(self, g: torch.Tensor) -> torch.Tensor:
        """[B, T, O] to L g, [B, T, p], or of n heads [B, T, n * p]."""
        if self.left is None or self._whole is not None:
            return g
        left = self._like(self.left, g)
        if self.groups > 1:
            each = _split(left, 1, self.groups, -1).transpose(0, 1)
            by_group = _split(g, 0, -1, self.groups).transpose(0, 1).flatten(1, 2)
            made = torch.bmm(by_group, each.transpose(1, 2))
            return _split(made, 1, -1, g.shape[1]).transpose(0, 1).flatten(0, 1)
        if left.dim() == 2:
            return g @ left.T
        by_head = _split(g, 2, left.shape[0], -1).flatten(0, 1).transpose(0, 1)
        return torch.bmm(by_head, left.transpose(1, 2)).transpose(0, 1).reshape(*g.shape[:2], -1)

    def _like(self, matrix: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        key = id(matrix), tensor.device, tensor.dtype
        if key not in self._moved or self._moved[key][0] is not matrix:
            self._moved[key] = matrix, matrix.to(tensor).contiguous()
        return self._moved[key][1]


@contextmanager
def _bare(tensor: torch.Tensor) -> Iterator[None]:
    """What is computed has no history, and the dtypes that it says: autocast would make other ones of them."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(accumulator(tensor.dtype))


def _split(tensor: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """One dimension as several."""
    made: torch.Tensor = tensor.unflatten(dim, sizes)
    return made


def _in_positions(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ..., D] as [B, T, D], where [B, D] has one position."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _left_out(who: str, mask: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor | None:
    """The positions [B, T, 1] of a gradient [B, ..., D] that a mask leaves out."""
    if mask is None:
        return None
    if mask.dim() >= max(grad.dim(), 2):  # of positions that a gradient hasn't; may have the size of its last dimension
        rule = f"have fewer dimensions than a gradient of shape {list(grad.shape)}"
        remedy = "This point has no positions: capture it on its own."
        raise ValueError(broken_rule(who, "mask", rule, list(mask.shape), remedy))
    check_mask(who, mask, grad)
    real = mask
    while real.dim() < max(grad.dim() - 1, 2):
        real = real.unsqueeze(-1)
    if grad.dim() > 2:
        real = real.expand(grad.shape[:-1]).flatten(1)
    return ~real.unsqueeze(2)


def _without(tensor: torch.Tensor, left_out: torch.Tensor | None) -> torch.Tensor:
    """Positions that are left out count for nothing, whatever lies there."""
    return tensor if left_out is None else tensor.masked_fill(left_out, 0)


def _norms_by_products(outputs: torch.Tensor, inputs: torch.Tensor, one: bool, same: bool) -> torch.Tensor:
    """The norms of G of examples whose G is larger than what holds the products of each two positions; in parts.

    ``same``: the inputs are tokens of one-hot inputs, which have a product where they are equal.
    """
    total = outputs.new_zeros(len(outputs))
    for g, a in zip(outputs.split(_POSITIONS, 1), inputs.split(_POSITIONS, 1), strict=True):
        products = torch.bmm(g, outputs.transpose(1, 2))
        if same:
            products *= a.unsqueeze(2) == inputs.unsqueeze(1)
        else:
            products *= torch.bmm(a, inputs.transpose(1, 2)) + int(one)
        total += products.sum((1, 2))
    return total.clamp_min_(0).sqrt_()


def _no_batch(who: str, argument: str, rule: str, given: torch.Tensor) -> ValueError:
    return ValueError(broken_rule(who, argument, rule, list(given.shape), "Give the model a batch."))
