"""Fit a Jacobian lens: prompt by prompt, continued where it was stopped, into TransformerLens' own file."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..collecting.fingerprint import model_fingerprint
from ..dataset.places.durable import remove_stale
from ..errors import broken_rule
from ..hooks.freeze import at_work
from ..spec import Points
from .jacobian_rows import JacobianRows
from .lens_file import FittedLens, check_plain, write_whole
from .residual_stream import ResidualStream, residual_stream

_WHO = "fit_jacobian_lens"
_TRIED = 32  # tokens of the first prompt, to see whether the model is causal
_PART = ".part"  # behind the name of the file: the sums of a fit that isn't done
_ROUNDINGS = 64  # of an output may two runs differ in, whose products have other sizes


@dataclass(frozen=True)
class _Settings:
    """What the rows depend on beside the model and the prompts."""

    source_layers: list[int]
    target_layer: int
    dim_batch: int
    max_seq_len: int
    skip_first_positions: int

    @property
    def least(self) -> int:
        """The tokens of the shortest prompt that counts."""
        return self.skip_first_positions + 2

    def said(self) -> dict[str, Any]:
        """As TransformerLens' metadata have it."""
        return {
            "target_layer": self.target_layer,
            "dim_batch": self.dim_batch,
            "max_seq_len": self.max_seq_len,
            "skip_first_positions": self.skip_first_positions,
        }


class _Fit:
    """The sums of the prompts that are done, which these were, and the file in which that stands.

    Args:
        stream: the model.
        settings: how the rows are made.
        said: the metadata of the lens.
        path: the file of the lens; None: there is none.
    """

    def __init__(self, stream: ResidualStream, settings: _Settings, said: dict[str, Any], path: Path | None) -> None:
        self.stream, self.settings, self.said = stream, settings, said
        self.sums: dict[int, torch.Tensor] = {}
        self.n_done, self.next_prompt = 0, 0
        self.together: bool | None = None
        self._digest = hashlib.sha256()  # of the tokens until `next_prompt`
        self.path, self._part = path, None if path is None else path.with_name(path.name + _PART)
        self._shared: dict[str, Any] = {}  # what a run must share to continue another
        if path is not None:
            weights = model_fingerprint(getattr(stream.model, "original_model", stream.model))
            same = {name: value for name, value in said.items() if name != "n_prompts"}
            self._shared = {"model": weights, "source_layers": settings.source_layers, "metadata": same}

    def begin(self, prompts: Sequence[torch.Tensor]) -> None:
        """Take over what a fit that was stopped has left; ValueError if it was another one."""
        if self.path is None or self._part is None:
            return
        if not self.path.parent.is_dir():
            raise _wrong("out", "lie in a folder that is there", str(self.path), "Make the folder.")
        remove_stale(self.path.parent)
        if not self._part.exists():
            if self.path.exists():
                raise _wrong("out", "be new, or half done", str(self.path), "Give another name, or remove it.")
            return
        found = torch.load(self._part, map_location="cpu", weights_only=True)
        theirs, remedy = dict(found["tlfast"]), f"Give another out, or remove {self._part}."
        for name, value in self._shared.items():
            if theirs[name] != value:
                raise _wrong(name, f"be that of {self._part}, {theirs[name]}", value, remedy)
        self.next_prompt = found["next_idx"]
        for tokens in prompts[: self.next_prompt]:
            self._note(tokens)
        if len(prompts) < self.next_prompt or self._digest.hexdigest() != theirs["prompts"]:
            rule = f"begin with the {self.next_prompt} of {self._part}"
            raise _wrong("prompts", rule, "other ones", remedy)
        self.sums, self.n_done, self.together = found["jacobian_sum"], found["n_done"], theirs["together"]

    def add(self, rows: JacobianRows, tokens: torch.Tensor) -> None:
        """Take the next prompt through, or leave it out if it is too short."""
        place, least = self.next_prompt, self.settings.least
        if tokens.shape[1] < least:
            warnings.warn(f"{_WHO}: left out prompt {place}, of {tokens.shape[1]} tokens and not {least}", stacklevel=3)
        else:
            found = rows.of(self.stream.call, tokens.to(self.stream.device))
            if not all(bool(torch.isfinite(matrix).all()) for matrix in found):
                text = broken_rule(
                    _WHO, f"prompt {place}", "have a finite Jacobian", "a NaN or an infinity",
                    "Leave it out, or fit the model in float32.",
                )  # fmt: skip
                raise FloatingPointError(text)
            for layer, matrix in zip(self.settings.source_layers, found, strict=True):
                self.sums.setdefault(layer, torch.zeros_like(matrix)).add_(matrix)
            self.n_done += 1
        self.next_prompt += 1
        self._note(tokens)
        self._keep(rows.together)

    def _note(self, tokens: torch.Tensor) -> None:
        self._digest.update(f"{tokens.shape[1]};".encode())
        self._digest.update(tokens.numpy().tobytes())

    def _keep(self, together: bool | None) -> None:
        """Write the sums as the reference implementation keeps them, and beside its names what is shared."""
        if self._part is None or not self.n_done:
            return
        content = {
            "jacobian_sum": self.sums,
            "n_done": self.n_done,
            "next_idx": self.next_prompt,
            "source_layers": self.settings.source_layers,
            "target_layer": self.settings.target_layer,
            "skip_first": self.settings.skip_first_positions,
            "metadata": {**self.said, "n_prompts": self.n_done},
            "tlfast": {**self._shared, "prompts": self._digest.hexdigest(), "together": together},
        }
        write_whole(self._part, content)

    def finish(self) -> FittedLens:
        """The lens, in its file."""
        means = {layer: total / self.n_done for layer, total in self.sums.items()}
        width = next(iter(means.values())).shape[0]
        lens = FittedLens(means, self.n_done, width, {**self.said, "n_prompts": self.n_done})
        if self.path is not None and self._part is not None:
            lens.save(self.path)
            self._part.unlink()
        return lens


def fit_jacobian_lens(
    model: nn.Module,
    prompts: Iterable[Any],
    out: str | os.PathLike[str] | None = None,
    *,
    corpus: str,
    tokenizer: Any = None,
    blocks: Points | None = None,
    source_layers: Sequence[int] | None = None,
    dim_batch: int = 8,
    max_seq_len: int = 128,
    skip_first_positions: int = 16,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> FittedLens:
    """Fit a Jacobian lens (Gurnee et al., 2026): of each block the mean Jacobian of the last one's output by its own.

    ``J_l = mean over prompts of mean over t of sum over t' >= t of d h_last[t'] / d h_l[t]``, where h are the outputs
    of blocks, before the last norm, and t and t' are the positions of a prompt from ``skip_first_positions`` on,
    without the last. This is the estimator of TransformerLens' ``JacobianLens.fit``, and the file is its own: it is
    loaded there, and merged with others of the same corpus and settings. A fit on a bridge says of itself what
    TransformerLens says, so it merges with lenses that were fitted there.

    A prompt is run forward once, and ``dim_batch`` rows of all matrices are made by one backward through that graph.
    The rows are reduced into one block of memory, which goes to the host once for each prompt.

    Args:
        model: a causal language model of Hugging Face, or a TransformerBridge with its own weights (no compatibility
            mode). Or any causal module that takes tokens, with ``blocks``. It is in eval mode and frozen meanwhile.
        prompts: texts, or tokens [P]. One that is too short to have a position is left out, with a warning.
        out: the file; None: only what is returned. While the fit runs ``<out>.part`` has the sums, written after each
            prompt: the same call continues there, and makes the same file, to the byte, as a run that wasn't stopped.
            It is a fit checkpoint that TransformerLens loads as well.
        corpus: what the prompts are; it stands in the file.
        tokenizer: makes tokens of texts, as Hugging Face's do. A bridge has its own, and prepends a token where it is
            set up so.
        blocks: the modules whose outputs are the residual stream, in order; None: the model's layers.
        source_layers: which layers to fit; negative ones count from the last. None: all but the last.
        dim_batch: rows of a matrix in one backward.
        max_seq_len: prompts are cut to so many tokens.
        skip_first_positions: leading positions that don't count.
        metadata: more to stand in the file: numbers and texts.
        progress: hears after each prompt of (prompts done, prompts).

    Returns:
        The lens: ``jacobians``, float32 [D, D] by layer; ``save``, ``load``, ``merge``.

    Raises:
        ValueError: for bad arguments, a model that isn't causal, a file that is there already, or half of another fit;
            where no prompt is long enough.
        FloatingPointError: for a prompt whose Jacobian has a NaN or an infinity; those before it are kept.

    Example:
        >>> import torch, tlfast
        >>> layer = torch.nn.Linear(3, 3)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.Linear(3, 3), layer)
        >>> lens = tlfast.recipes.fit_jacobian_lens(
        ...     model, [[1, 2, 3, 4]], corpus="four tokens", blocks=["1", "2"], skip_first_positions=0)
        >>> torch.allclose(lens.jacobians[0], layer.weight)
        True
    """
    stream = residual_stream(model, tokenizer, blocks)
    settings = _settings(source_layers, len(stream.blocks), dim_batch, max_seq_len, skip_first_positions)
    given = _tokens(stream, settings, prompts)
    fit = _Fit(stream, settings, _said(stream, settings, corpus, metadata), None if out is None else Path(out))
    with at_work(model, stream.blocks[settings.source_layers[0]]):
        fit.begin(given)
        modules = [stream.blocks[k] for k in (*settings.source_layers, settings.target_layer)]
        rows = JacobianRows(model, modules, dim_batch, skip_first_positions, fit.together)
        _check_causal(fit, rows, given)
        for place in range(fit.next_prompt, len(given)):
            fit.add(rows, given[place])
            if progress is not None:
                progress(place + 1, len(given))
    return fit.finish()


def _wrong(argument: str, rule: str, got: object, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, argument, rule, got, remedy))


def _tokens(stream: ResidualStream, settings: _Settings, prompts: Iterable[Any]) -> list[torch.Tensor]:
    """The tokens of all prompts, int64 [1, P] each, cut; so that a bad one is found before the first is run."""
    remedy = "Give a list of texts, or of lists of tokens."
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(broken_rule(_WHO, "prompts", "be several prompts", type(prompts).__name__, remedy))
    found = [stream.tokens(prompt, place)[:, : settings.max_seq_len] for place, prompt in enumerate(prompts)]
    longest = max((tokens.shape[1] for tokens in found), default=0)
    if longest < settings.least:
        rule, remedy = f"have {settings.least} tokens or more", "Or give a smaller skip_first_positions."
        raise _wrong("prompts", rule, f"{len(found)} prompts of at most {longest}", remedy)
    return found


def _settings(
    source_layers: Sequence[int] | None, n_layers: int, dim_batch: int, max_seq_len: int, skip: int
) -> _Settings:
    least = {"dim_batch": (dim_batch, 1), "skip_first_positions": (skip, 0), "max_seq_len": (max_seq_len, 2)}
    for name, (value, smallest) in least.items():
        if type(value) is not int or value < smallest:
            raise _wrong(name, f"be a number from {smallest} on", repr(value), "Leave it out.")
    if max_seq_len < skip + 2:
        rule, remedy = f"leave a position behind the first {skip}", "Or give a smaller skip_first_positions."
        raise _wrong("max_seq_len", rule, max_seq_len, remedy)
    last = n_layers - 1
    layers = list(range(last)) if source_layers is None else [n + n_layers if n < 0 else n for n in source_layers]
    if not layers or not all(0 <= layer < last for layer in layers):
        raise _wrong("source_layers", f"be layers below {last}, the last one", source_layers, "Leave it out for all.")
    return _Settings(sorted(set(layers)), last, dim_batch, max_seq_len, skip)


def _said(
    stream: ResidualStream, settings: _Settings, corpus: object, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    if not isinstance(corpus, str) or not corpus.strip():
        raise _wrong("corpus", "be a text", repr(corpus), "Say what the prompts are.")
    said = {
        **stream.said,
        "processing": {"compatibility_mode": False, "weight_basis": "raw_huggingface"},
        "hook_convention": "blocks.{layer}.hook_out",
        "corpus": corpus,
        "n_prompts": 0,
        "fit_dtype": stream.dtype,
        **settings.said(),
    }
    taken = sorted(said.keys() & (metadata or {}).keys())
    if taken:
        raise _wrong("metadata", "have names of its own", ", ".join(taken), "Rename them.")
    named = {**(metadata or {}), **said}
    check_plain(_WHO, named)
    return named


def _check_causal(fit: _Fit, rows: JacobianRows, prompts: Sequence[torch.Tensor]) -> None:
    """ValueError where what comes last in a prompt changes what was before it."""
    tokens = next(tokens for tokens in prompts if tokens.shape[1] >= fit.settings.least)[:, :_TRIED]
    tokens = tokens.to(fit.stream.device)
    others = tokens[tokens != tokens[0, -1]]
    if not len(others):
        return
    changed = torch.cat([tokens[:, :-1], others[:1, None]], 1)
    with torch.no_grad():
        before, after = (rows.residuals(fit.stream.call, given)[-1][:, :-1].detach() for given in (tokens, changed))
    if float((after - before).norm() / before.norm()) > _ROUNDINGS * torch.finfo(before.dtype).eps:
        got = f"{type(fit.stream.model).__name__}, which looks ahead"
        raise _wrong("model", "be causal", got, "A lens adds up what a position does to those behind it.")
