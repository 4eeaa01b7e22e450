"""The native module: what tlfast.backends.python does in Python."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAME: str
TORCH_VERSION: str

def describe() -> str: ...
def cuda_status() -> dict[str, Any]: ...
def cuda_capability(device: int) -> tuple[int, int]: ...
def reduce_at_once(
    out: torch.Tensor,
    grad: torch.Tensor,
    reduce: str,
    over: Any,
    mask: torch.Tensor | None,
    scale: float,
    /,
) -> bool: ...
def call_natively(pre_hook: type, forward_hook: type) -> None: ...
def call_modules_natively(caller: type) -> None: ...
def choose_natively(chooser: type, ours: type, plain: type, checked: type) -> None: ...
def choose_for(all: bool, ids: dict[int, int]) -> None: ...
def learn_outputs(learning: bool) -> None: ...
def waiting(value: torch.Tensor) -> tuple[list[torch.Tensor], list[Any]]: ...

class FactorSums:
    def __init__(self, kind: str) -> None: ...
    def totals(self) -> list[torch.Tensor]: ...

class Whole:
    def __init__(
        self,
        factor: torch.Tensor | None,
        matrix: torch.Tensor | None,
        sketch: Sketcher | None,
        project: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None: ...

class Weight:
    def __init__(
        self,
        layer: str,
        row: str | FactorSums,
        bias: bool,
        left: torch.Tensor | None,
        right: torch.Tensor | None,
        row_scale: float,
        heads: int,
        padding_idx: int,
        norm: tuple[int, float],
        window: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], str, int] | None,
        instead: tuple[Sketcher | None, Sketcher | None, Whole | None],
        queries: Sequence[torch.Tensor],
    ) -> None: ...

class Sketcher:
    def __init__(
        self,
        width: int,
        dim: int,
        scale: float,
        input_signs: torch.Tensor,
        shifts: torch.Tensor | None,
        output_signs: torch.Tensor | None,
        samples: torch.Tensor | None,
    ) -> None: ...
    def rows(self, x: torch.Tensor) -> torch.Tensor | None: ...

class Column:
    name: str
    total: Column | None
    masked: bool
    ref: torch.Tensor | None
    rows: torch.Tensor | None
    n_writes: int
    counters: torch.Tensor
    counted: tuple[int, int]
    def __init__(
        self,
        name: str,
        reduce: str,
        dims: Sequence[int],
        dtype: torch.dtype | None,
        capacity: int,
        calls: str,
        of: str,
        heads: tuple[int, int] | None,
        at: int | Sequence[int] | None,
        weight: Weight | None,
    ) -> None: ...

class Recording:
    n_rows: int
    scratch: list[torch.Tensor]

class Ledger:
    n_ended: int
    extent: tuple[int, int]
    recording: bool
    cursor: torch.Tensor | None
    def __init__(self, rows: int) -> None: ...
    def committed(self) -> list[tuple[int, int, list[int]]]: ...
    def clear(self) -> None: ...
    def settle(self) -> None: ...
    def start_trial(self) -> None: ...
    def stop_trial(self) -> None: ...
    def start_recording(self, device: torch.device) -> None: ...
    def stop_recording(self) -> Recording: ...
    def replay(self, recording: Recording) -> None: ...
    def take_back(self, recording: Recording) -> None: ...

class Backwards:
    n_calls: int
    def __init__(self, ledger: Ledger, missing: str) -> None: ...
    def set_batch(
        self,
        mask: torch.Tensor | None,
        n_expected: int,
        scale: float,
        own: Sequence[tuple[Column, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
    ) -> None: ...
    def open(self, anchor: torch.Tensor | None) -> None: ...
    def close(self) -> None: ...
    run: int
    runs_here: bool
    anchor: torch.Tensor | None

class TensorCache:
    def __init__(self) -> None: ...
    def clear(self) -> None: ...
    def outputs(self) -> list[tuple[int, torch.Tensor | None]]: ...
    def gradients(self) -> list[tuple[int, torch.Tensor]]: ...
    def clashes(self) -> list[tuple[int, str]]: ...
    @property
    def n_outputs(self) -> int: ...

class Keeper: ...

class ColumnsKeeper(Keeper):
    def __init__(self, columns: list[Column]) -> None: ...

class CacheKeeper(Keeper):
    def __init__(
        self, cache: TensorCache, name: str, select: Callable[[torch.Tensor], torch.Tensor] | None, calls: str
    ) -> None: ...

class SinkKeeper(Keeper):
    def __init__(self, sink: Any, reduce: str, dims: Sequence[int]) -> None: ...

class Tap:
    name: str
    number: int
    last_call: int
    others: str
    output: int | str | None
    reads_outputs: bool
    reads_inputs: bool
    backwards: Backwards
    def __init__(
        self,
        backwards: Backwards,
        name: str,
        keeper: Keeper,
        output: int | str | None,
    ) -> None: ...
    def learn_references(self) -> None: ...
    def set_convert(
        self,
        convert: Callable[[torch.Tensor], torch.Tensor] | None,
        see: Callable[[torch.Tensor, torch.Tensor | None, list[torch.Tensor]], Any] | None,
    ) -> None: ...
    def set_side(self, side: str) -> None: ...
    def forward_pre(self) -> None: ...
    def forward(self, inputs: tuple[object, ...], output: object) -> object | None: ...
    def forward_of_layer(
        self, inputs: tuple[object, ...], named: dict[str, object], output: object
    ) -> object | None: ...
    def check_full(self, output: object) -> None: ...
    def full(self, grad_output: tuple[torch.Tensor | None, ...]) -> None: ...

class ModuleCall:
    def __init__(self, module: torch.nn.Module, hook: Any, before: Any, holders: int) -> None: ...

class PointHooks:
    def __init__(
        self,
        points: Sequence[tuple[torch.nn.Module, Any, Any, Any, Any, bool]],
        hook_id: int,
        lists: Sequence[str],
        own_ways: Sequence[str],
    ) -> None: ...
    def put(self) -> list[int]: ...
    def take_off(self) -> None: ...
