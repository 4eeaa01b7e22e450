"""Writing a dataset, to a path or a URL: units, each whole and durable before its commit says that it exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import dataset_error, extra
from ..format.card import dataset_card
from ..format.commits import (
    Commit,
    CommittedFile,
    commit_path,
    committed_names,
    data_path,
    publish,
    read_commits,
    rows_path,
)
from ..format.description import Description, describe, differences, read_description
from ..format.encodings import Encoded
from ..format.layout import Column, unit_layout
from ..format.plan import FLAG_NON_FINITE, Example, Plan, Unit
from ..format.row_table import encode_rows
from ..places.durable import PendingFile
from ..places.write_store import WriteFolder, as_write_store
from .background import BackgroundWriter
from .folder import check_disk_space, clear, create, holds_dataset, our_files, publish_extension, refuse_stranger
from .native import pick_writer
from .payload import writing
from .staged_units import StagedUnits
from .unit_contents import UnitContents, unit_contents
from .unit_folder import OwnFolder, UnitFolder

__all__ = ["BackgroundWriter", "Column", "DatasetWriter", "Example", "Plan", "Unit", "estimate_bytes"]

_WHO = "DatasetWriter"
MAX_STAGED = 4  # units on the local disk: one is written, one on its way, two for a store that stutters


def estimate_bytes(columns: Mapping[str, Any], n: int, tokens: int = 512) -> int:
    """Return about how many bytes ``n`` rows take on disk, with ``tokens`` tokens per example."""
    row_bytes = sum(
        column.row_bytes * (tokens if column.per == "token" else 1)
        for column in (Column(*column) for column in columns.values())
    )
    return n * (row_bytes + 4 * len(columns) + 4 * tokens + 64)


class DatasetWriter:
    """Create the dataset in the folder ``out``, or continue the one that is there, unit by unit.

    At a URL a unit that `write_unit` has returned for is durable in a staging folder of this machine, and will be at
    the URL after `flush` or `close`, or after the next run of the same process: see docs/remote.md. Leaving a ``with``
    block closes the writer, and waits for no upload where the block raised.

    Args:
        out: the folder, a path or a URL. New, empty, or a dataset with the same header, columns and plan, which is then
            continued.
        header: what the data are (model, spec, loss, ...), JSON; part of the identity.
        columns: of each point, in order, the dtype and shape of a row, or a Column, which also says what the rows are
            of, whether each example or each token has one, and how they are encoded.
        plan: which examples form which unit.
        config: text, or a mapping written as YAML, for config.yaml; not part of the identity.
        overwrite: remove the dataset that lies in ``out`` first.
        about: what else to say of this run, JSON; not part of the identity, and kept from the run that began.
        backend: what encodes and writes the rows: "auto", "native" or "python". The bytes are the same.
        max_units: how many of its units this machine's disk must have room for, where they are moved away; None: all.
            At a URL so many are staged at most, and `write_unit` waits for more room; None: four.
        replace_unused: remove another dataset that lies in ``out`` too, if it has no unit and nobody writes to it: the
            remains of a run that failed before its first one. At a URL, where nobody can see who writes, it stays.
        staging: where units lie until they are uploaded, a folder on a local disk; None: ``tlfast/staging`` in the
            user's cache folder.
        fields: what the row tables keep of each example beside its tokens, ``FieldExample.kept``: types by name, of
            "int64", "float64", "bool", "string", and "list<int64>" and its like; part of the identity.

    Attributes:
        native: the native module that encodes and writes rows; None: Python does.

    Raises:
        DatasetError: where ``out`` is a stranger's folder, another dataset (names what differs), or the disk too full;
            for ``staging`` where ``out`` is no URL.
        OSError: where the store of a URL can't be reached.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan
        >>> out = tempfile.mkdtemp()
        >>> writer = DatasetWriter(out, header={}, columns={"h.0": (torch.bfloat16, (4,))}, plan=Plan(1, 1))
        >>> writer.write_unit(Plan(1, 1).unit(0), {"h.0": torch.ones(1, 4).bfloat16()}, [Example(0, [1, 2], "a", 0, 2)])
        True
    """

    def __init__(
        self,
        out: str | PathLike[str],
        *,
        header: Mapping[str, Any],
        columns: Mapping[str, Any],
        plan: Plan,
        config: str | Mapping[str, Any] = "",
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
        backend: str = "auto",
        max_units: int | None = None,
        replace_unused: bool = False,
        staging: str | PathLike[str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        for module in ("google_crc32c", "pyarrow.parquet"):  # before any work, not after the first unit
            extra(module, _WHO)
        self.native = pick_writer(_WHO, backend)
        self._store = as_write_store(out)
        self.bytes_written = 0
        self._abandoned = self._closed = False
        description = describe(_WHO, header, columns, plan, about, fields)
        self._tokens_per_example = _tokens_per_example(description)
        self._units: UnitFolder
        if isinstance(self._store, WriteFolder):
            if staging is not None:
                remedy = "A folder needs none."
                raise dataset_error(_WHO, "staging", "be left out unless out is a URL", repr(str(staging)), remedy)
            self.out: Path | str = self._store.folder
            self._units = OwnFolder(self._store)
        else:
            max_units = MAX_STAGED if max_units is None else max_units
            self.out = self._store.url
            self._units = StagedUnits(self._store, description.config_hash, staging, max_units, _WHO)
        self._max_rows = None if max_units is None else max_units * plan.rows_per_unit
        self._make(description, as_yaml(config), overwrite, replace_unused)
        try:
            self._begin(description)
        except BaseException:
            self._units.release(wait=True)
            raise

    def _make(self, description: Description, config: str, overwrite: bool, replace_unused: bool) -> None:
        """Make the dataset, unless it is there."""
        refuse_stranger(self._store, _WHO)
        exists = holds_dataset(self._store, _WHO)
        if overwrite or not exists:
            removed = our_files(self._store, _WHO) if exists else []
            self._check_disk_space(description.plan.n_examples, description.columns, self._units.freed(removed))
            if exists:
                clear(self._store, removed)
        elif replace_unused:
            self._units.remove_unused(description, _WHO)
        create(self._store, description, config, dataset_card(description), _WHO)

    def _begin(self, description: Description) -> None:
        """Find out what is there to be continued."""
        self._units.enter(_WHO)
        self.description = self._same(description)
        self.columns = self.description.columns
        self.plan = self.description.plan
        self.done = {commit.unit.name for commit in read_commits(self._store, self.description, _WHO)}
        self.done |= self._units.begin(self.description, self.done, _WHO)
        remaining = self.plan.n_examples - sum(len(self.plan.unit_named(name)) for name in self.done)
        self._check_disk_space(remaining, self.columns)

    def _check_disk_space(self, n_rows: int, columns: Mapping[str, Any], freed: int = 0) -> None:
        n_rows = n_rows if self._max_rows is None else min(n_rows, self._max_rows)
        n_bytes = estimate_bytes(columns, n_rows, *self._tokens_per_example)
        check_disk_space(self._units.folder, n_bytes, _WHO, freed)

    def _same(self, description: Description) -> Description:
        there = read_description(self._store, _WHO)
        if there.config_hash != description.config_hash:
            what = "; ".join(differences(there, description))
            what += "" if committed_names(self._store, _WHO) else "; it has no unit"
            remedy = f"Use the same settings to continue it, another {self._store.noun}, or overwrite it."
            raise dataset_error(_WHO, "out", "be the same dataset to continue it", f"{self.out}: {what}", remedy)
        return there

    def extend(self, n_examples: int, examples: Mapping[str, Any], config: str | Mapping[str, Any] = "") -> None:
        """Add ``n_examples`` examples to the plan for good, in units behind those that are there.

        Args:
            n_examples: how many.
            examples: what is said of them, JSON, as ``examples`` in the header says it of the first ones.
            config: what config.yaml is to hold from now on; empty: what it held.

        Raises:
            DatasetError: where another process has extended the dataset by other examples, or the disk is too full.
            RuntimeError: after `close`.
        """
        self._check_open("extend", f"{n_examples} examples")
        new = self.description.extended(n_examples, examples)
        self._check_disk_space(n_examples, self.columns)
        publish_extension(self._store, new, as_yaml(config), (dataset_card(self.description), dataset_card(new)))
        self._units.extended(new)
        self.description, self.plan = new, new.plan

    def committed(self) -> set[str]:
        """Look up the names of all units that have a commit by now, whichever process made it; and of those staged."""
        with suppress(OSError):  # a store that stutters: then it is not known, which costs work and nothing else
            self.done |= set(committed_names(self._store, _WHO))
        return set(self.done)

    def write_unit(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None = None,
    ) -> bool:
        """Write the rows of one unit and commit it; when this returns they survive a power cut.

        Args:
            unit: one of the plan's.
            tensors: per point [len(unit), *row_shape] of the column's dtype, on any device. Of a column per token
                [tokens, *row_shape]: ``example.length`` rows for each example, behind each other. For an encoded column
                rows of float32, bfloat16 or float16, which are encoded here, or an Encoded.
            examples: the unit's examples, by rising id.
            flags: per row, FLAG_... bits; FLAG_NON_FINITE is added where a row's values ask for it.

        Returns:
            True, or False where another writer had committed the unit first: its rows stay.

        Raises:
            DatasetError: for tensors or examples that are not the unit's.
            OSError: where the disk fails; nothing of the unit exists then.
            RuntimeError: after `close`; nothing of the unit exists then.
            UploadError: where the upload of an earlier unit has failed.
        """
        self._check_open("write_unit", unit.name)
        contents = self._checked(unit, tensors, examples, flags)
        self._units.wait_for_room()
        won = False
        if not self._is_committed(unit):
            try:
                won = self._write(unit, contents, examples, [0] * len(unit) if flags is None else flags)
                self._units.written(unit)
            except OSError:
                self._check_open("write_unit", unit.name)  # another thread's close has removed the staging folder
                raise
        self.done.add(unit.name)
        return won

    def _is_committed(self, unit: Unit) -> bool:
        with suppress(OSError):  # a store that stutters: the upload looks again, patiently
            return self._store.exists(commit_path(unit))
        return False

    def _write(self, unit: Unit, contents: UnitContents, examples: Sequence[Example], flags: Sequence[int]) -> bool:
        folder = self._units.folder
        layout = unit_layout(self.columns, unit, contents.n_tokens or 0)
        with PendingFile(folder / data_path(unit), layout.n_bytes) as data:
            data.start_with(layout.header)
            in_order = {name: contents.fields[name] for name in layout.blocks}
            with writing(data, in_order, self.native, contents.lengths) as (found, bad):
                # The table is made while the disk is at work.
                norms = contents.norms(found, self.native)
                flag_bits = np.where(bad, FLAG_NON_FINITE, 0) | np.asarray(flags)
                table = encode_rows(examples, flag_bits.tolist(), norms, self.description.kept)
            self.bytes_written += layout.n_bytes - len(layout.header)
            data.seal()
            with PendingFile(folder / rows_path(unit), len(table)) as rows:
                rows.append(table)
                rows.seal()
                self.bytes_written += len(table)
                files = tuple(
                    CommittedFile(f"{f.final.parent.name}/{f.final.name}", f.n_bytes, f.crc) for f in (data, rows)
                )
                planned_by, n_bad = self.description.hash_of(unit), int(bad.sum())
                commit = Commit(unit, planned_by, (files[0], files[1]), n_bad, contents.n_tokens)
                self._check_open("write_unit", unit.name)  # another thread may have closed it, which gives up the lock
                if not self._units.still_there():
                    self._same(self.description)
                return publish(folder, commit, (data, rows))

    @property
    def waits_for(self) -> str:
        """What a unit waits for that is written and not yet where it belongs: "the disk" or "the upload"."""
        return self._units.waits_for

    @property
    def waited_s(self) -> float:
        """How long `flush` has waited, in seconds."""
        return self._units.waited_s

    def still_to_do(self) -> str:
        """Return what is to be said of units that are not where they belong yet; nothing if they all are."""
        return self._units.still_to_do()

    def flush(self, time_s: float | None = None) -> bool:
        """Wait until every unit is where it belongs; False if ``time_s`` seconds were not enough.

        Raises:
            UploadError: where an upload has failed.
        """
        return self._units.flush(time_s)

    def abandon(self) -> None:
        """Let nothing be waited for: a unit that is being uploaded is whole later, or never exists."""
        self._abandoned = True

    @property
    def closed(self) -> bool:
        """Whether it writes no more: `close` was called, or its ``with`` block was left."""
        return self._closed

    def close(self) -> None:
        """Wait until every unit is where it belongs, and end: other processes see that this one writes no more.

        `write_unit`, `extend` and a ``with`` block are errors from then on; what was written can be read.

        Raises:
            UploadError: where an upload has failed.
        """
        try:
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        self._closed = True  # first: nothing may be written without the lock
        self._units.release(wait=not self._abandoned)

    def _check_open(self, what: str, got: str) -> None:
        if self._closed:
            raise RuntimeError(broken_rule(_WHO, what, "come before close", got, "Open it again."))

    def __enter__(self) -> DatasetWriter:
        self._check_open("a with block", str(self.out))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # the units that wait are uploaded by the next run
            self._release()

    def _checked(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None,
    ) -> UnitContents:
        if self.plan.unit_named(unit.name) != unit:
            raise dataset_error(_WHO, "unit", f"be {self.plan.unit_named(unit.name)}", unit, "Take it from the plan.")
        contents = unit_contents(_WHO, self.columns, unit, tensors, examples, self.native)
        if [example.id for example in examples] != list(range(unit.start, unit.stop)):
            ids = [example.id for example in examples][:5]
            rule = f"be {unit.start}..{unit.stop - 1}, in this order"
            raise dataset_error(_WHO, "ids of examples", rule, f"{len(examples)}: {ids}...", "Number them as planned.")
        if flags is not None and len(flags) != len(unit):
            raise dataset_error(_WHO, "flags", f"have {len(unit)} values", len(flags), "Give one per row, or None.")
        return contents


def _tokens_per_example(description: Description) -> tuple[int, ...]:
    """How many tokens make up the rows per token, as far as the header says; otherwise a disk is too small for one."""
    if not description.has_tokens:
        return ()
    n_tokens = description.all_examples().get("tokens")
    return (n_tokens // description.plan.n_examples if type(n_tokens) is int else 1,)


def as_yaml(config: str | Mapping[str, Any]) -> str:
    if isinstance(config, str):
        return config
    return str(extra("yaml", _WHO).safe_dump(dict(config), sort_keys=False, allow_unicode=True))
