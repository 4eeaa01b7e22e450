"""The fields of an example beside its tokens: one value each, known by its bytes, and padded into those of a batch."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from ..errors import broken_rule

# A tensor on the CPU, a text, texts, or a mapping of such values.
Value = Any
Fields = dict[str, Value]
Side = Literal["right", "left"]

DECODED = ("decoder_input_ids", "labels")  # the first that an example has tells how long a decoder's sequence is
NOT_ASKED_FOR = -100  # a label that no loss looks at, as torch and transformers have it
MOST_KEPT = 1024  # values of a field that a row table keeps
_LABELS = ("label", "label_ids")
_ZERO = ("token_type_ids", "position_ids")
SOUND = ("input_values", "input_features")  # padded with silence, beside a mask where the model takes one
_OF_NUMPY = (torch.int64, torch.int32, torch.float32, torch.float64, torch.uint8, torch.bool)


class BadField(ValueError):
    """A field whose value can't be used; the text says why, without the example."""


def as_value(given: Any, name: str) -> Value:
    """A field's value as it is kept: numbers as a tensor on the CPU; BadField for what is none.

    Python's floats are float32, its ints int64; arrays and tensors keep their dtype.
    """
    if type(given) is np.ndarray and given.dtype == np.int64:  # labels, as our own readers make them
        return torch.from_numpy(given.copy())
    if isinstance(given, torch.Tensor):
        if given.layout is not torch.strided or given.is_nested or given.is_meta:
            raise BadField(f"{name} is no dense tensor")
        return given.detach().cpu()
    if isinstance(given, str):
        return str(given)
    if isinstance(given, Mapping):
        return {str(key): as_value(part, f"{name}.{key}") for key, part in given.items() if part is not None}
    try:
        if isinstance(given, (bool, int, float)):
            return torch.tensor(given)
        if isinstance(given, (np.ndarray, np.generic)) and given.dtype.kind in "biufc":
            return torch.from_numpy(np.array(given))
        if isinstance(given, (list, tuple)):
            return _of_list(given, name)
    except BadField:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadField(f"{name} is no array of numbers ({' '.join(str(error).split())[:80]})") from None
    raise BadField(f"{name} is a {type(given).__name__}, not numbers or text")


def is_unicode(text: str) -> bool:
    """Whether a text is one that UTF-8 can say: Python's may hold halves of surrogate pairs, out of JSON."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _of_list(given: Sequence[Any], name: str) -> Value:
    if given and all(isinstance(part, str) for part in given):
        return tuple(map(str, given))
    if any(isinstance(part, (torch.Tensor, np.ndarray, Mapping)) for part in given):
        parts = [as_value(part, f"{name}[{k}]") for k, part in enumerate(given)]
        return torch.stack(parts)  # a mapping among them is a TypeError
    return torch.tensor(given) if given else torch.empty(0, dtype=torch.bool)  # which any other dtype may join


def digest_of(fields: Mapping[str, Value]) -> bytes:
    """16 bytes that stand for the names and values of an example's fields, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in leaves(fields):
        if isinstance(value, torch.Tensor):
            digest.update(_begins(name, value.dtype, value.shape))
            digest.update(_as_array(value))
        else:
            digest.update(f"{name}\0{value!r};".encode(errors="surrogatepass"))
    return digest.digest()


@lru_cache(4096)
def _begins(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What a digest has of a tensor before its bytes."""
    return f"{name}\0{dtype} {list(shape)};".encode()


def _as_array(value: torch.Tensor) -> Any:
    """The bytes of a tensor as an array, without a copy where they lie in order."""
    if value.dim() == 1 and value.is_contiguous() and value.dtype in _OF_NUMPY:
        return value.numpy()
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def bytes_of(value: torch.Tensor) -> bytes:
    """The bytes of a tensor, in the order of its elements."""
    found: bytes = _as_array(value).tobytes()
    return found


def packed(fields: Fields) -> bytes:
    """An example's fields as bytes, which `unpacked` makes them of again; nothing in these is ever run."""
    if all(type(value) is torch.Tensor for value in fields.values()):
        known = _layout(tuple((name, value.dtype, value.shape) for name, value in fields.items()))
        return b"".join((known, *map(bytes_of, fields.values())))
    data: list[bytes] = []
    layout = json.dumps(_laid_out(fields, data)).encode()
    return b"".join((len(layout).to_bytes(4, "little"), layout, *data))


def told_and_packed(fields: Fields) -> tuple[bytes, bytes]:
    """What `digest_of` and `packed` say of the same fields, for which the bytes of tensors are looked at once."""
    if not all(type(value) is torch.Tensor for value in fields.values()):
        return digest_of(fields), packed(fields)
    data = {name: bytes_of(value) for name, value in fields.items()}
    told = [part for n in sorted(data) for part in (_begins(n, fields[n].dtype, fields[n].shape), data[n])]
    known = _layout(tuple((name, value.dtype, value.shape) for name, value in fields.items()))
    return hashlib.blake2b(b"".join(told), digest_size=16).digest(), b"".join((known, *data.values()))


def each_told_and_packed(name: str, values: Iterable[array[int]]) -> tuple[list[bytes], list[bytes]]:
    """`told_and_packed` of examples with one field each, int64 [n]."""
    told, data, known = list[bytes](), list[bytes](), dict[int, tuple[bytes, bytes]]()
    for value in values:
        n, of_value = len(value), value.tobytes()
        if n not in known:
            known[n] = _begins(name, torch.int64, (n,)), _layout(((name, torch.int64, (n,)),))
        begins, layout = known[n]
        told.append(hashlib.blake2b(begins + of_value, digest_size=16).digest())
        data.append(layout + of_value)
    return told, data


@lru_cache(4096)  # most examples of a collection have one of a few
def _layout(tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    layout = json.dumps({name: [str(dtype)[6:], list(shape)] for name, dtype, shape in tensors}).encode()
    return len(layout).to_bytes(4, "little") + layout


def unpacked(data: bytes) -> Fields:
    """The fields of which `packed` made these bytes."""
    start = 4 + int.from_bytes(data[:4], "little")
    fields: Fields = _read_back(json.loads(data[4:start]), _Bytes(data, start))
    return fields


def _laid_out(value: Value, data: list[bytes]) -> Any:
    """What JSON says of a value: of a tensor [dtype, shape], its bytes go to ``data``; of texts [[text, ...]]."""
    if isinstance(value, torch.Tensor):
        data.append(bytes_of(value))
        return [str(value.dtype)[6:], list(value.shape)]
    if isinstance(value, dict):
        return {key: _laid_out(part, data) for key, part in value.items()}
    return value if isinstance(value, str) else [list(value)]


@dataclass
class _Bytes:
    """Bytes that are read in order."""

    data: bytes
    at: int

    def take(self, n: int) -> bytearray:
        self.at += n
        return bytearray(self.data[self.at - n : self.at])


def _read_back(said: Any, data: _Bytes) -> Value:
    if isinstance(said, str):
        return said
    if isinstance(said, dict):
        return {key: _read_back(part, data) for key, part in said.items()}
    if len(said) == 1:
        return tuple(said[0])
    dtype, shape = getattr(torch, said[0]), said[1]
    n = prod(shape) * dtype.itemsize
    return torch.frombuffer(data.take(n), dtype=dtype).view(shape) if n else torch.empty(shape, dtype=dtype)


def leaves(fields: Mapping[str, Value], above: str = "") -> Iterator[tuple[str, Value]]:
    """Yield name and value of each field, by rising name; those of a mapping as ``name.key``."""
    for name in sorted(fields) if len(fields) > 1 else fields:
        value = fields[name]
        if type(value) is dict:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def pad_value(name: str, pad_id: int) -> int | None:
    """What stands behind a shorter value of this name; None where nothing is known to mean nothing."""
    leaf = name.rpartition(".")[2]
    if leaf in _LABELS or leaf.endswith("labels"):
        return NOT_ASKED_FOR
    if leaf in _ZERO or leaf in SOUND or leaf.endswith("mask"):
        return 0
    return pad_id if leaf.endswith("_ids") else None


def is_apart(name: str) -> bool:
    """Whether a field of this name is no input of an encoder: labels, or what a decoder reads, which has a mask."""
    return pad_value(name, 0) == NOT_ASKED_FOR or name.rpartition(".")[2].startswith("decoder_")


@dataclass
class _Seen:
    """What the values of one field have had in common so far."""

    kind: str
    n_dims: int
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None  # None: they differ
    as_tokens: bool  # each is as long as the tokens of its example


def _kind(value: Value) -> str:
    if not isinstance(value, torch.Tensor):
        return "text" if isinstance(value, str) else "texts"
    return "numbers"


class FieldRules:
    """What all examples of a collection agree on, and how their fields are put together.

    Args:
        pad_id: the token at padded positions.
        apart: fields that have nothing to do with the positions of ``input_ids``, even where they are as long.
    """

    def __init__(self, pad_id: int = 0, apart: Iterable[str] = ()) -> None:
        self._pad_id, self._apart = pad_id, frozenset(apart)
        self._seen: dict[str, _Seen] | None = None
        self._left_out = set[str]()  # of batches: fields that are kept and can't be put together
        self.names: tuple[str, ...] = ()  # of the fields; those of a mapping count as one
        self.has_tokens = True

    def to_json(self) -> dict[str, Any]:
        """What all examples have been found to agree on."""
        seen = {name: asdict(one) | {"dtype": str(one.dtype)[6:]} for name, one in (self._seen or {}).items()}
        return {"names": list(self.names), "has_tokens": self.has_tokens, "seen": seen}

    def recall(self, said: Mapping[str, Any]) -> None:
        """Know what `to_json` has said of the same examples."""
        self.names, self.has_tokens = tuple(said["names"]), said["has_tokens"]
        self._seen = {
            name: _Seen(
                one["kind"], one["n_dims"], getattr(torch, one["dtype"], None),
                None if one["shape"] is None else tuple(one["shape"]), one["as_tokens"],
            )
            for name, one in said["seen"].items()
        }  # fmt: skip

    def refusal(self, fields: Mapping[str, Value], n_tokens: int | None) -> str | None:
        """Why an example doesn't go with those before it; None where it does, which is then remembered.

        ``n_tokens`` is None for an example without ``input_ids``.
        """
        if self._are_alike(fields, n_tokens is not None):
            for name, value in fields.items():
                self._add(self._seen[name], value, n_tokens)  # type: ignore[index]
            return None
        found = dict(leaves(fields))
        if self._seen is None:
            self.names, self.has_tokens = tuple(fields), n_tokens is not None
            self._seen = {name: self._first(name, value, n_tokens) for name, value in found.items()}
            return None
        if self.has_tokens != (n_tokens is not None):
            return f"{'no' if self.has_tokens else 'with'} input_ids, other than the first"
        if found.keys() != self._seen.keys():
            odd = sorted(found.keys() ^ self._seen.keys())[0]
            return f"{'no' if odd in self._seen else 'a'} field {odd!r}, other than the first"
        for name, value in found.items():
            seen = self._seen[name]
            if _kind(value) != seen.kind or (seen.dtype is not None and value.ndim != seen.n_dims):
                return f"field {name!r} of another kind than that of the first"
        for name, value in found.items():
            self._add(self._seen[name], value, n_tokens)
        return None

    def _are_alike(self, fields: Mapping[str, Value], has_tokens: bool) -> bool:
        """Whether an example has the fields that all before it have, tensors of the same kind: as most do."""
        seen = self._seen
        if seen is None or len(fields) != len(seen) or self.has_tokens != has_tokens:
            return False
        for name, value in fields.items():
            one = seen.get(name)
            if one is None or type(value) is not torch.Tensor or value.dtype is not one.dtype:
                return False
            if value.dim() != one.n_dims:
                return False
        return True

    def _first(self, name: str, value: Value, n_tokens: int | None) -> _Seen:
        if not isinstance(value, torch.Tensor):
            return _Seen(_kind(value), 0, None, None, False)
        leaf = name.rpartition(".")[2]
        apart = name in self._apart or leaf.startswith("decoder_") or leaf in SOUND or pad_value(name, 0) is None
        as_tokens = value.dim() > 0 and value.shape[0] == n_tokens and not apart
        return _Seen("numbers", value.dim(), value.dtype, tuple(value.shape), as_tokens)

    @staticmethod
    def _add(seen: _Seen, value: Value, n_tokens: int | None) -> None:
        if seen.dtype is None:
            return
        if seen.dtype != value.dtype:
            seen.dtype = torch.promote_types(seen.dtype, value.dtype)
        shape = value.shape
        seen.as_tokens = seen.as_tokens and shape[0] == n_tokens
        if seen.shape is not None and seen.shape != shape:
            trailing = seen.shape[1:] == shape[1:] and seen.n_dims > 0
            seen.shape = (-1, *seen.shape[1:]) if trailing else None

    def kept_type(self, name: str) -> str:
        """The type that a field has in a row table: int64, float64, bool or string, or a list of such numbers."""
        seen = (self._seen or {})[name]
        if seen.dtype is None:
            return "string"
        kind = "float64" if seen.dtype.is_floating_point else "bool" if seen.dtype == torch.bool else "int64"
        return f"list<{kind}>" if seen.n_dims else kind

    def check(self, kept: Iterable[str] = ()) -> None:
        """ValueError for a field whose values have several shapes, and that nobody knows how to pad.

        One that is kept is left out of batches then.
        """
        for name, seen in (self._seen or {}).items():
            if seen.dtype is None or self.one_shape(name):
                continue
            if seen.shape is None or pad_value(name, 0) is None:
                if name not in kept:
                    rule, got = "have one shape in all examples, or a name that is padded", f"several in {name!r}"
                    remedy = "Names that end in labels, _ids or mask are padded; collate= puts others together."
                    raise ValueError(broken_rule("collect", "a field", rule, got, remedy))
                self._left_out.add(name)

    def decoder_mask(self, examples: Sequence[Mapping[str, Value]]) -> torch.Tensor | None:
        """Where a decoder beside an encoder reads real tokens, bool [B, L]; None: everywhere, or there is none."""
        name = next((name for name in DECODED if name in examples[0]), None)
        if "labels" not in self._apart or name is None or examples[0][name].dim() != 1:
            return None
        lengths = torch.tensor([len(example[name]) for example in examples])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return None if bool(mask.all()) else mask

    def one_shape(self, name: str) -> bool:
        """Whether a field has one shape in all examples."""
        seen = (self._seen or {}).get(name)
        return seen is not None and seen.shape is not None and -1 not in seen.shape

    @property
    def uneven(self) -> bool:
        """Whether a field of numbers that is an input has several shapes, which aren't those of the tokens."""
        return any(
            one.dtype is not None and not one.as_tokens and not self.one_shape(name) and not is_apart(name)
            for name, one in (self._seen or {}).items()
        )

    def collated(self, examples: Sequence[Mapping[str, Value]], n_positions: int, side: Side) -> Fields:
        """The fields of a batch: numbers as a tensor [B, ...], texts as a list, mappings as mappings."""
        return self._collated(examples, "", n_positions, side)

    def _collated(self, examples: Sequence[Mapping[str, Value]], above: str, n_positions: int, side: Side) -> Fields:
        found: Fields = {}
        for key in examples[0]:
            values, name = [example[key] for example in examples], above + key
            if name in self._left_out:
                continue
            if isinstance(values[0], dict):
                found[key] = self._collated(values, f"{name}.", n_positions, side)
            elif isinstance(values[0], torch.Tensor):
                found[key] = self._padded(name, values, n_positions, side)
            else:
                found[key] = [list(value) if isinstance(value, tuple) else value for value in values]
        return found

    def _padded(self, name: str, values: Sequence[torch.Tensor], n_positions: int, side: Side) -> torch.Tensor:
        seen = (self._seen or {})[name]
        if seen.as_tokens:
            length = n_positions
        elif seen.shape is not None and -1 not in seen.shape:
            return torch.stack([value.to(seen.dtype) for value in values])
        else:
            length, side = max(len(value) for value in values), "right"
        fill = pad_value(name, self._pad_id)
        padded = torch.full((len(values), length, *values[0].shape[1:]), fill or 0, dtype=seen.dtype)
        for row, value in zip(padded, values, strict=True):
            row[length - len(value) :].copy_(value) if side == "left" else row[: len(value)].copy_(value)
        return padded


@dataclass
class FieldUse:
    """The names of the fields that batches had, and of those that the model or the loss has asked for."""

    given: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)


class NoField(KeyError, ValueError):
    """A field that was asked for and isn't there."""

    def __str__(self) -> str:
        return str(self.args[0])


class FieldsOfBatch(Mapping[str, Any]):
    """The fields of a batch by name; ``use`` hears which of them somebody asks for."""

    def __init__(self, values: Mapping[str, Any] | None = None, use: FieldUse | None = None) -> None:
        self._values = dict(values or {})
        self.use = FieldUse() if use is None else use
        self.use.given |= self._values.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            there = ", ".join(self._values) or "none"
            rule, remedy = f"be a field of the examples ({there})", "Give each example that field."
            raise NoField(broken_rule("collect", "what is asked of a batch", rule, repr(name), remedy))
        self.use.read.add(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"FieldsOfBatch({', '.join(self._values)})"

    def peek(self) -> dict[str, Any]:
        """All of them, without having asked for any."""
        return dict(self._values)

    def moved(self, move: Any) -> FieldsOfBatch:
        """The same with ``move`` called on each tensor."""
        return FieldsOfBatch(_moved(self._values, move), self.use)


def _moved(value: Any, move: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {key: _moved(part, move) for key, part in value.items()}
    return value


def as_kept(name: str, value: Value, place: str = "") -> Any:
    """A field as a row table keeps it: a number, a text, or numbers; ValueError for what isn't small, at ``place``."""
    if isinstance(value, str):
        return value
    if isinstance(value, torch.Tensor) and value.dim() < 2 and value.numel() <= MOST_KEPT and not value.is_complex():
        return value.tolist()
    got = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    got += f" in {place}" if place else ""
    rule = f"be a number, a text or {MOST_KEPT} numbers at most, to be kept"
    raise ValueError(broken_rule("collect", f"field {name!r}", rule, got, "Leave it out of keep_fields=."))
