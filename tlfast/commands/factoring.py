"""`tlfast factors`: factors of the curvature of a model on text or records, into a file; and parts of them, merged."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from functools import reduce
from typing import Any

from ..collecting.factors import factors as add_up
from ..errors import SpeakingAs, broken_rule
from ..hooks.factors import FACTOR_KINDS, Factors
from ..spec import one_of
from .arguments import OK, Arguments
from .model_words import add_model_words, loaded, model_words

_WHO = "tlfast factors"


def factors(args: list[str]) -> int:
    """Add up what the curvature is made of, or merge what was added up of parts."""
    wanted = _read(args)
    _check(wanted)
    if wanted.merge:
        made = reduce(Factors.merge, [Factors.load(path) for path in wanted.merge])
        made = made.eigen() if wanted.eigen else made
    else:
        basis = None if wanted.basis is None else Factors.load(wanted.basis)
        basis = basis.eigen() if basis is not None and not basis.has_basis else basis
        with redirect_stdout(sys.stderr):  # what a model prints is not the answer
            made = _added_up(wanted, basis)
    made.save(wanted.out)
    print(made)
    print(wanted.out)
    return OK


def _read(args: list[str]) -> Any:
    arguments = Arguments("factors", "Factors of the curvature of a model.", "a model with data, or --merge FILE ...")
    arguments.add_argument("model", nargs="?", metavar="MODEL", help="a folder or name of transformers' models")
    arguments.add_argument("--out", required=True, metavar="FILE", help="a new .npz file")
    arguments.add_argument(
        "--points", nargs="+", default=["**"], metavar="GLOB", help="layers with factors; without it all"
    )
    arguments.add_argument("--kinds", nargs="+", default=["kfac"], metavar="KIND", help=", ".join(FACTOR_KINDS))
    arguments.add_argument("--bias", action="store_true", help="with the bias of each layer")
    arguments.add_argument("--basis", metavar="FILE", help='of "ekfac": the merged "kfac" of all parts')
    arguments.add_argument("--part", nargs=2, type=int, metavar=("K", "N"), help="each N-th example, from number K on")
    arguments.add_argument("--merge", nargs="+", default=[], metavar="FILE", help="add up the parts in these files")
    arguments.add_argument("--eigen", action="store_true", help="of --merge: with the eigenvectors of all parts")
    add_model_words(arguments)
    return arguments.read(args)


def _check(wanted: Any) -> None:
    """ValueError for words that can be seen to be wrong, before a model is loaded."""
    folder = os.path.dirname(os.path.abspath(wanted.out))
    if not wanted.out.endswith(".npz") or os.path.exists(wanted.out) or not os.path.isdir(folder):
        rule, remedy = "be a new .npz file in a folder that is there", "Give another."
        raise ValueError(broken_rule(_WHO, "--out", rule, repr(wanted.out), remedy))
    if bool(wanted.model) == bool(wanted.merge):
        got = "both" if wanted.merge else "none"
        raise ValueError(broken_rule(_WHO, "the model", "be given, or --merge", got, "See tlfast factors --help."))
    if wanted.eigen and not wanted.merge:
        rule, remedy = "be given with --merge", "Say --kinds kfac ekfac, which makes them, too."
        raise ValueError(broken_rule(_WHO, "--eigen", rule, "it alone", remedy))
    given = {"--basis": wanted.basis, "--part": wanted.part, "--bias": wanted.bias} | model_words(wanted)
    odd = next((flag for flag, value in given.items() if wanted.merge and value), None)
    if odd is not None:
        raise ValueError(broken_rule(_WHO, odd, "be left out with --merge", "both", "Files say what they are of."))
    for kind in wanted.kinds:
        one_of(_WHO, "--kinds", kind, FACTOR_KINDS)
    if wanted.part is not None and not 0 <= wanted.part[0] < wanted.part[1]:
        rule, remedy = "be K and N with 0 <= K < N", "The first of two parts is 0 2."
        raise ValueError(broken_rule(_WHO, "--part", rule, " ".join(map(str, wanted.part)), remedy))


def _added_up(wanted: Any, basis: Factors | None) -> Factors:
    with SpeakingAs(_WHO, "collect"), loaded(wanted, wanted.points) as ours:
        examples: Any = ours.examples
        if wanted.part is not None:
            examples = list(examples)[wanted.part[0] :: wanted.part[1]]
        return add_up(
            ours.model, examples, list(wanted.points), kinds=wanted.kinds, basis=basis, bias=wanted.bias, **ours.options
        )
