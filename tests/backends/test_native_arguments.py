"""The native modules raise at wrong arguments, whatever is called: no check may be left to those who call it."""

import ast
import os
from pathlib import Path

import pytest
import torch
from models import HookPoint, chain, inputs
from torch import nn

import tlfast
import tlfast.backends.choice
from tlfast.dataset.write import native as native_writer
from tlfast.hooks import attachment

pytestmark = pytest.mark.sanitize

STUBS = [ast.parse((Path(tlfast.__file__).parent / f"{name}.pyi").read_text()) for name in ("_C", "_disk")]

# What is wrong at an argument, by its name or else by its annotation. Every entry must raise.
BY_NAME = {
    "reduce": ["average", "", None, 1],
    "calls": ["stop", "", None, 1],
    "of": ["weights", "", None, 1],
    "layer": ["dense", "", None, 1],
    "row": ["sum", "", None, 1],
    "heads": [-1, "1", (1,), (1, 2, 3), ("n", "d"), object()],
    "padding_idx": [-2, None, "1"],
    "norm": [(0, 1.0), (1, -1.0), None, "1", (1,)],
    "left": [1, "mask", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 2)],
    "right": [1, "mask", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, 2)],
    "row_scale": [None, "1", float("nan")],
    "window": [1, "3", (), ([3], [1], [1], [1, 1], "constant", 1), ([3], [1], [1], [1], "constant", 1)],
    "weight": [1, "0", object()],
    "instead": [1, "0", (None,), (1, None, None), (None, None, 1), object()],
    "factor": [1, "mask", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 2), None],
    "matrix": [1, "mask", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 2)],
    "sketch": [1, "0", object()],
    "project": [1, "0", object()],
    "queries": [
        1, "0", None, (None,), (torch.ones(2),), (torch.ones(2, 2, dtype=torch.int64),), (torch.ones(0, 2),),
        (torch.ones(2, 2, 3), torch.ones(2, 2, 2)), (torch.ones(2, 2, 2),), object(),
    ],
    "side": ["inside", "", None, 1],
    "missing": ["zero", "", None, 1],
    "rows": [0, -1, None, "1", 2**70],
    "capacity": [0, -1, None, "1", 2**70],
    "position": [1, -4096, None, 2**70],
    "piece_bytes": [0, 1, -4096, None],
    "crc": [-1, 2**32, None, "1"],
    "sink": [None, 1, object(), torch.ones(2)._neg_view(), torch.ones(2, 2).to_sparse()],
    "data": [None, 1, "text", memoryview(b"abcdef")[::2], memoryview(b"abcdef")[::-1]],
    "pre_hook": [None, 1, int, type("Bare", (), {})],
    "forward_hook": [None, 1, int, type("Bare", (), {})],
    "chooser": [None, 1, int, type("Bare", (), {})],
    "caller": [None, 1, int, type("Bare", (), {})],
    "module": [None, 1, object()],
    "hook": [None, 1, object()],
    "points": [None, 1, [None], [(nn.Identity(),)], [(1, None, None, None, None, False)]],
    "hook_id": [None, "1", 1.5, object()],
    "lists": [None, 1, [1]],
    "own_ways": [None, 1, [1]],
    "ours": [None, 1],
    "plain": [None, 1],
    "checked": [None, 1],
    "ids": [None, 1, []],
    "blocks": [
        None, 1, [None], [(1,)], [(0, 1, 1, "F32", 0, 0)], [(0, -1, 1, "F32", 0, 0)], [(0, 0, -1, "F32", 0, 0)],
        [(0, 0, 1, "F8", 0, 0)],
    ],
    "row_dtype": ["F64", "I8", "", None],
    "coded": [
        None, 1, (), ("int2", 0, 1, 1, 0, 0), ("int8", -1, 1, 1, 4, 4), ("int8", 1, 1, 1, 0, 4),
        ("int8", 1, 1, 1, 4, 0), ("int8", 0, 0, 1, 0, 0), ("int8", 0, 1, 0, 0, 0), ("int4", 0, 4, 3, 0, 0),
    ],
    "random": [1, (), (0, 0, 4), (0, 0, 0, 4), (0, 0, 4, 0), (-1, 0, 4, 4), (2**32, 0, 4, 4), ("0", 0, 4, 4)],
    "own": [None, 1, [None], [(None, None, None, None)], [(1, None, None, None)], [()]],
    "lengths": [[1], [-1], [-1, 1], None, ["1"]],
    "norms": [0, -1, None, "1"],
    "width": [0, -1, 3, None, "1", 2**70],
    "dim": [0, 3, 5, None, "1", 2**70],
    "input_signs": [None, 1, torch.ones(8), torch.ones(1, 8).half(), torch.ones(1, 8).T, torch.ones(1, 8)._neg_view()],
    "shifts": [None, 1, torch.zeros(1, 3).long(), torch.zeros(1, 2), torch.tensor([[0, 4]]), torch.tensor([[-1, 0]])],
    "output_signs": [1, torch.ones(2, 4)],
    "samples": [1, torch.arange(4)],
}  # fmt: skip
BY_ANNOTATION = {
    "tuple[int, int, int, str, int, int]": [
        None,
        1,
        (0, 1, 1, "F32", 0),
        (0, -1, 1, "F32", 0, 0),
        (0, 1, 1, "F8", 0, 0),
    ],
    "int": [None, "1", 1.5, object(), 2**70],
    "float": [None, "1", object()],
    "bool": ["yes", object()],
    "str": [None, 1, object()],
    "Sequence[int]": [None, 1, "1", ["1"], [None], [1.5]],
    "Ledger": [None, 1, object()],
    "Backwards": [None, 1, object()],
    "Keeper": [None, 1, object()],
    "TensorCache": [None, 1, object()],
    "Recording": [None, 1, object()],
    "list[Column]": [None, 1, [None], [1], ["0"]],
    "torch.dtype | None": ["float32", 1, float],
    "torch.device": [None, "cpu", 0],
    "torch.Tensor": [None, 1, object()],
    "tuple[int, int] | None": [1, (1,), (1, 2, 3), ("n", "d"), object()],
    "int | Sequence[int] | None": ["name", 1.5, [None], object()],
    "torch.Tensor | None": [1, "mask", [True], object()],
    "Callable[[torch.Tensor], torch.Tensor] | None": [1, "f", object()],
    "Callable[[torch.Tensor, torch.Tensor | None, list[torch.Tensor]], Any] | None": [1, "f", object()],
    "tuple[object, ...]": [None, 1, "1"],
    "dict[str, object]": [None, 1, ()],
    "object": [None, 1, object(), {}],
    "tuple[torch.Tensor | None, ...]": [None, 1, [torch.ones(2)]],
}
UNCHECKED = {  # any value will do
    ("Tap", "output"), ("PayloadStream", "path"), ("forward", "inputs"), ("ModuleCall", "before"),
}  # fmt: skip


def functions():
    """(class or None, function, is static, [(argument, annotation)]) of everything in the stubs."""
    for node in (node for stub in STUBS for node in stub.body):
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                static = bool(function.decorator_list)
                arguments = [(a.arg, ast.unparse(a.annotation)) for a in function.args.args if a.annotation]
                yield (node.name if isinstance(node, ast.ClassDef) else None), function.name, static, arguments


def hadamard_sketcher(module, *samples, width=4):
    return module.Sketcher(
        width, 1, 1.0, torch.ones(1, 2 * width), None, torch.ones(2, width), torch.tensor(samples)
    )  # fmt: skip


class Made:
    """The native modules, and what is right at each argument."""

    def __init__(self, module, disk, path):
        self.disk = disk
        self.module, self.ledger = module, module.Ledger(4)
        self.backwards = module.Backwards(self.ledger, "raise")
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.column = module.Column("0", "sum", [1], None, 4, "raise", "grad", None, None, None)
        self.keeper = module.ColumnsKeeper([self.column])
        self.hooks = [type("Hook", (), {"__call__": lambda *_: None}) for _ in range(2)]

    def right(self, name, annotation):
        by_name = {
            "reduce": "sum", "of": "grad", "side": "input", "calls": "raise", "missing": "raise", "fd": self.fd,
            "position": 0, "piece_bytes": 4096, "sink": torch.ones(2), "data": b"abc", "blocks": [],
            "pre_hook": self.hooks[0],
            "forward_hook": self.hooks[1], "chooser": self.hooks[0], "ours": self.hooks[1], "plain": self.hooks[0],
            "checked": self.hooks[0], "ids": {}, "layer": "linear", "row": "gradient", "padding_idx": -1,
            "caller": self.hooks[0], "module": nn.Identity(), "hook": attachment.Hook(self.owner("Tap")), "points": [],
            "lists": (), "own_ways": (), "own": [], "instead": (None, None, None),
            "norm": (1, 1e-5), "queries": (), "factor": torch.ones(2, 2),
            "row_dtype": "F32", "coded": ("int8", 0, 1, 1, 0, 0), "lengths": [],
            "input_signs": torch.ones(1, 8), "shifts": torch.zeros(1, 2).long(),
        }  # fmt: skip
        if name in by_name:
            return by_name[name]
        if annotation.endswith("None"):
            return None
        kinds = {
            "int": 4, "float": 1.0, "bool": False, "str": "0", "Ledger": self.ledger, "list[Column]": [self.column],
            "Backwards": self.backwards, "Keeper": self.keeper,
            "Sequence[int]": [1], "torch.device": torch.device("cpu"), "TensorCache": self.module.TensorCache(),
            "object": torch.ones(2, requires_grad=True) * 1, "torch.Tensor": torch.ones((), requires_grad=True) * 1,
            "tuple[object, ...]": (), "dict[str, object]": {},
        }  # fmt: skip
        return kinds.get(annotation)

    def owner(self, name):
        if name == "PayloadStream":
            return self.disk.PayloadStream(self.fd, 0, 0, 4096, "path")
        if name == "Tap":
            return self.module.Tap(self.backwards, "0", self.keeper, None)
        made = {"Ledger": self.ledger, "Backwards": self.backwards, "Column": self.column}
        made["PointHooks"] = self.module.PointHooks([], 1, (), ())
        made["FactorSums"] = self.module.FactorSums("products")
        made["Sketcher"] = hadamard_sketcher(self.module, 3)
        return {**made, "TensorCache": self.module.TensorCache()}[name]

    def named(self, name):
        return getattr(self.disk if hasattr(self.disk, name) else self.module, name)

    def call(self, owner, name, static):
        if owner is None:
            return self.named(name)
        kind = self.named(owner)
        if name == "__init__":
            return kind
        return getattr(kind if static else self.owner(owner), name)


@pytest.fixture
def made(native, tmp_path):
    module = tlfast.backends.choice.loaded()
    made = Made(module, native_writer.loaded(), tmp_path / "file")
    yield made
    os.close(made.fd)


RAISED = (TypeError, ValueError, RuntimeError, BufferError, OverflowError)


@pytest.mark.parametrize(
    "owner, name, static, arguments", list(functions()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_wrong_arguments_raise(made, owner, name, static, arguments):
    right = [made.right(*argument) for argument in arguments]
    with pytest.raises(TypeError):
        made.call(owner, name, static)(*right, None)
    if right:
        with pytest.raises(TypeError):
            made.call(owner, name, static)(*right[:-1])
    for place, (argument, annotation) in enumerate(arguments):
        if (name if owner is None or name != "__init__" else owner, argument) in UNCHECKED:
            continue
        for wrong in BY_NAME.get(argument) or BY_ANNOTATION[annotation]:
            try:
                made.call(owner, name, static)(*right[:place], wrong, *right[place + 1 :])
            except RAISED:
                continue
            pytest.fail(f"{owner}.{name}({argument}={wrong!r}) did not raise")


def test_nothing_is_left_out_of_the_stubs(made):
    for module, stub, others in ((made.module, STUBS[0], {"NAME", "TORCH_VERSION"}), (made.disk, STUBS[1], set())):
        public = {name for name in vars(module) if not name.startswith("_")}
        stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert public - stubbed == others


WORDS = {
    "calls": (
        lambda m: m.Column("0", "sum", [1], None, 4, "stop", "grad", None, None, None),
        "capture: calls must be one of raise, sum, last, stack, got 'stop'. Check the spelling.",
    ),
    "missing": (
        lambda m: m.Backwards(m.Ledger(1), "zero"),
        "capture: missing must be one of raise, nan, got 'zero'. Check the spelling.",
    ),
    "reduce": (
        lambda m: m.Column("0", "average", [1], None, 4, "raise", "grad", None, None, None),
        "capture: reduce must be one of none, sum, mean, last, norm, absmax, got 'average'. Check the spelling.",
    ),
    "rows": (lambda m: m.Ledger(0), "capture: rows must be a positive number, got 0. Give the rows to hold."),
    "data": (
        lambda m: native_writer.loaded().crc32c(memoryview(b"abcd")[::2], 0),
        "crc32c: data must be contiguous, got a buffer with gaps. Make bytes of it.",
    ),
    "codes": (
        lambda m: native_writer.loaded().encode_rows(4, "F32", 1.0, ("int2", 0, 1, 1, 0, 0), None),
        "encode_rows: codes must be int8, float8_e4m3fn or int4, got int2. Encode in Python.",
    ),
    "blocks": (
        lambda m: native_writer.loaded().decoded_norms(("int4", 2, 4, 3, 4, 4), [], 4),
        (
            "decoded_norms: codes must be whole bytes at an address, got 2 rows of 4 in blocks of 3. "
            "Pass what is allocated."
        ),
    ),
    "row_dtype": (
        lambda m: native_writer.loaded().encode_rows(4, "F64", 1.0, ("int8", 0, 1, 1, 0, 0), None),
        "encode_rows: row_dtype must be F32, F16 or BF16, got F64. Cast the rows.",
    ),
    "no rows": (
        lambda m: native_writer.loaded().encode_rows(0, "F32", 1.0, ("int8", 0, 1, 1, 0, 0), None),
        "encode_rows: rows must have an address, got 0. Pass what is allocated.",
    ),
    "lengths": (
        lambda m: native_writer.loaded().decoded_norms(("int8", 0, 1, 1, 0, 0), [1], 4),
        "decoded_norms: lengths must be those of all 0 rows, got [1]. Count the rows of each example.",
    ),
    "signs of blocks": (
        lambda m: hadamard_sketcher(m, 0, width=0),
        (
            "Sketcher: input_signs must be floats [n_parts, columns] in blocks of a width, got [1, 0]. "
            "Make it by tlfast.projections."
        ),
    ),
    "a table of another shape": (
        lambda m: hadamard_sketcher(m, 0, 1),
        "Sketcher: samples must be contiguous on the CPU with shape [1], got [2]. Make it by tlfast.projections.",
    ),
    "neither sketch": (
        lambda m: hadamard_sketcher(m, 0, width=3),
        "Sketcher: dim must be that of a count sketch or of a Hadamard sketch, got 1. Make it by tlfast.projections.",
    ),
    "outside of a block": (
        lambda m: hadamard_sketcher(m, 4),
        "Sketcher: samples must be from 0 to 3, got 4. Make it by tlfast.projections.",
    ),
    "columns": (
        lambda m: hadamard_sketcher(m, 3).rows(torch.ones(2, 7)),
        "Sketcher: x must be floats [n, 8] on the CPU, got [2, 7]. Call tlfast.projections.apply.",
    ),
    "double rows of float signs": (
        lambda m: hadamard_sketcher(m, 3).rows(torch.ones(2, 8).double()),
        "Sketcher: x must be floats [n, 8] on the CPU, got [2, 8]. Call tlfast.projections.apply.",
    ),
    "norms": (
        lambda m: native_writer.loaded().decoded_norms(("int8", 0, 1, 1, 0, 0), [], 0),
        "decoded_norms: norms must have an address, got 0. Pass what is allocated.",
    ),
}


@pytest.mark.parametrize("make, text", WORDS.values(), ids=WORDS)
def test_words_of_the_house(made, make, text):
    with pytest.raises(ValueError, match="must ") as error:
        make(made.module)
    assert str(error.value) == text


def test_a_hook_called_in_another_way_raises(native):
    setup = chain()
    with tlfast.capture(setup.model, "hook", rows=4, backend="native") as cap:
        (pre,) = setup.model.hook._forward_pre_hooks.values()
        (forward,) = setup.model.hook._forward_hooks.values()
        x = inputs()
        for hook, rule in ((pre, "(module, args)"), (forward, "(module, args, output)")):
            for arguments, named in (
                ((), {}),
                ((setup.model,), {}),
                ((1, 2, 3, 4), {}),
                ((), {"module": 1, "args": 2}),
            ):
                with pytest.raises(TypeError) as error:
                    hook(*arguments, **named)
                assert str(error.value) == (
                    f"capture: a hook must be called with {rule}, got {len(arguments)} arguments and {len(named)} by "
                    "name. Leave the call to the module."
                )
        with pytest.raises((TypeError, AttributeError)):
            pre(object(), ())
        setup.loss().backward()
    assert cap.rows == x.shape[0]


def test_a_hook_without_its_tap_raises(native):
    made = tlfast.backends.choice.loaded()
    attachment._prepare(made)
    for kind, arguments in (
        (attachment._NativePreHook, (nn.Identity(), ())),
        (attachment._NativeForwardHook, (nn.Identity(), (), torch.ones(2))),
    ):
        hook = kind.__new__(kind)
        with pytest.raises(AttributeError, match="tap"):
            hook(*arguments)
        hook.tap = "none of ours"
        with pytest.raises(TypeError) as error:
            hook(*arguments)
        assert str(error.value) == "capture: a hook's tap must be a native one, got str. Leave it as it was."


def test_gradients_of_a_full_hook_in_another_way_raise(native):
    made = tlfast.backends.choice.loaded()
    tap = made.Tap(made.Backwards(made.Ledger(1), "nan"), "0", made.ColumnsKeeper([]), None)
    with pytest.raises(IndexError):
        tap.full(())
    tap.check_full((1, torch.ones(2, requires_grad=True) * 1))
    with pytest.raises(IndexError):
        tap.full((torch.ones(2),))
    tap.full((None, None))
    assert isinstance(HookPoint(), nn.Module)
