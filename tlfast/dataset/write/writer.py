"""Writing a dataset: units, each whole and durable before its commit says that it exists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch

from ...backends.choice import pick_native
from ..errors import dataset_error, extra
from ..format.card import dataset_card
from ..format.commits import (
    FOLDERS,
    Commit,
    CommittedFile,
    check_folders,
    commit_path,
    committed_names,
    data_path,
    publish,
    read_commits,
    rows_path,
)
from ..format.description import Description, describe, differences, read_description
from ..format.encodings import Encoded
from ..format.extension import FOLDER as EXTENSIONS
from ..format.layout import Column, unit_layout
from ..format.plan import FLAG_NON_FINITE, Example, Plan, Unit
from ..format.row_table import encode_rows
from ..places.durable import PendingFile, hold, remove_stale
from ..places.remote import url_of
from .background import BackgroundWriter
from .folder import (
    check_disk_space,
    clear,
    create,
    is_dataset,
    our_files,
    publish_extension,
    refuse_stranger,
    remove_unused,
)
from .payload import writing
from .unit_contents import UnitContents, unit_contents

__all__ = ["BackgroundWriter", "Column", "DatasetWriter", "Example", "Plan", "Unit", "estimate_bytes"]

_WHO = "DatasetWriter"


def estimate_bytes(columns: Mapping[str, Any], n: int, tokens: int = 512) -> int:
    """Return about how many bytes ``n`` rows take on disk, with ``tokens`` tokens per example."""
    row_bytes = sum(
        column.row_bytes * (tokens if column.per == "token" else 1)
        for column in (Column(*column) for column in columns.values())
    )
    return n * (row_bytes + 4 * len(columns) + 4 * tokens + 64)


class DatasetWriter:
    """Create the dataset folder ``out``, or continue the one that is there, unit by unit.

    Args:
        out: the folder. New, empty, or a dataset with the same header, columns and plan, which is then continued.
        header: what the data are (model, spec, loss, ...), JSON; part of the identity.
        columns: of each point, in order, the dtype and shape of a row, or a Column, which also says what the rows are
            of, whether each example or each token has one, and how they are encoded.
        plan: which examples form which unit.
        config: text, or a mapping written as YAML, for config.yaml; not part of the identity.
        overwrite: remove the dataset that lies in ``out`` first.
        about: what else to say of this run, JSON; not part of the identity, and kept from the run that began.
        backend: what writes the rows: "auto", "native" or "python". The bytes are the same.
        max_units: how many of its units the disk must have room for, where they are moved away; None: all.
        replace_unused: remove another dataset that lies in ``out`` too, if it has no unit and nobody writes to it: the
            remains of a run that failed before its first one.

    Raises:
        DatasetError: where ``out`` is a stranger's folder, another dataset (names what differs), or the disk too full.

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
    ) -> None:
        for module in ("google_crc32c", "pyarrow.parquet"):  # before any work, not after the first unit
            extra(module, _WHO)
        self._native = pick_native(_WHO, backend, {"cpu"})
        if url_of(out):
            raise dataset_error(_WHO, "out", "be a folder", repr(out), "Use collect, or open_writer, for a URL.")
        self.out = Path(out)
        self.bytes_written = 0
        description = describe(_WHO, header, columns, plan, about)
        self._tokens_per_example = _tokens_per_example(description)
        self._max_rows = None if max_units is None else max_units * plan.rows_per_unit
        refuse_stranger(self.out, _WHO)
        exists = is_dataset(self.out)
        if exists and overwrite:
            freed = sum(file.lstat().st_size for file in our_files(self.out, _WHO) if file.exists())
            check_disk_space(self.out, self._space(description.columns, plan.n_examples), _WHO, freed)
            clear(self.out, _WHO)
        elif not exists:
            check_disk_space(self.out, self._space(description.columns, plan.n_examples), _WHO)
        if exists and replace_unused and not overwrite:
            remove_unused(self.out, description, _WHO)
        create(self.out, description, as_yaml(config), dataset_card(description))
        self._begin_work()
        self.description = self._same(description)
        self.columns = self.description.columns
        self.plan = self.description.plan
        self._remove_stale()
        self.done = self._committed()
        self._check_disk_space()

    def _begin_work(self) -> None:
        """Let other processes see that this one may write units, until `end_work`, or until it is gone."""
        # Not on dataset.json: a kill may leave a temporary name of it, whose lock would say that its writer is alive.
        check_folders(self.out, _WHO)
        self._held = hold(self.out / "commits")
        self._work = finalize(self, os.close, self._held) if self._held is not None else None

    def end_work(self) -> None:
        """Say that nothing will be written any more."""
        self._held = None
        if self._work is not None:
            self._work()

    def _check_still_there(self) -> None:
        """DatasetError where another process has put another dataset in the place of this one."""
        if self._held is None:
            return
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._held), os.stat(self.out / "commits")):
                return
        self._same(self.description)

    def _check_disk_space(self) -> None:
        remaining = self.plan.n_examples - sum(len(self.plan.unit_named(name)) for name in self.done)
        check_disk_space(self.out, self._space(self.columns, remaining), _WHO)

    def _space(self, columns: Mapping[str, Any], n_rows: int) -> int:
        n_rows = n_rows if self._max_rows is None else min(n_rows, self._max_rows)
        return estimate_bytes(columns, n_rows, *self._tokens_per_example)

    def extend(self, n_examples: int, examples: Mapping[str, Any], config: str | Mapping[str, Any] = "") -> None:
        """Add ``n_examples`` examples to the plan for good, in units behind those that are there.

        Args:
            n_examples: how many.
            examples: what is said of them, JSON, as ``examples`` in the header says it of the first ones.
            config: what config.yaml is to hold from now on; empty: what it held.

        Raises:
            DatasetError: where another process has extended the dataset by other examples, or the disk is too full.
        """
        new = self.description.extended(n_examples, examples)
        check_disk_space(self.out, self._space(self.columns, n_examples), _WHO)
        cards = (dataset_card(self.description), dataset_card(new))
        publish_extension(self.out, new, as_yaml(config), cards)
        self.description, self.plan = new, new.plan

    def _same(self, description: Description) -> Description:
        there = read_description(self.out, _WHO)
        if there.config_hash != description.config_hash:
            what = "; ".join(differences(there, description))
            remedy = "Use the same settings to continue it, another folder, or overwrite it."
            raise dataset_error(_WHO, "out", "be the same dataset to continue it", f"{self.out}: {what}", remedy)
        return there

    def _remove_stale(self) -> None:
        check_folders(self.out, _WHO)
        for folder in (self.out, *(self.out / name for name in (*FOLDERS, EXTENSIONS))):
            if folder.is_dir() and not folder.is_symlink():
                remove_stale(folder)

    def _committed(self) -> set[str]:
        return {commit.unit.name for commit in read_commits(self.out, self.description, _WHO)}

    def committed(self) -> set[str]:
        """Look up the names of all units that have a commit by now, whichever process made it."""
        names = set(committed_names(self.out, _WHO))
        self.done |= names
        return names

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
        """
        contents = self._checked(unit, tensors, examples, flags)
        if os.path.lexists(self.out / commit_path(unit)):
            self.done.add(unit.name)
            return False
        layout = unit_layout(self.columns, unit, contents.n_tokens or 0)
        with PendingFile(self.out / data_path(unit), layout.n_bytes) as data:
            data.start_with(layout.header)
            in_order = {name: contents.fields[name] for name in layout.blocks}
            with writing(data, in_order, self._native, contents.lengths) as (found, bad):
                # The table is made while the disk is at work.
                norms = contents.norms(found)
                flag_bits = np.where(bad, FLAG_NON_FINITE, 0) | np.asarray([0] * len(unit) if flags is None else flags)
                table = encode_rows(examples, flag_bits.tolist(), norms)
            self.bytes_written += layout.n_bytes - len(layout.header)
            data.seal()
            with PendingFile(self.out / rows_path(unit), len(table)) as rows:
                rows.append(table)
                rows.seal()
                self.bytes_written += len(table)
                files = tuple(
                    CommittedFile(f"{f.final.parent.name}/{f.final.name}", f.n_bytes, f.crc) for f in (data, rows)
                )
                planned_by, n_bad = self.description.hash_of(unit), int(bad.sum())
                commit = Commit(unit, planned_by, (files[0], files[1]), n_bad, contents.n_tokens)
                self._check_still_there()
                won = publish(self.out, commit, (data, rows))
        self.done.add(unit.name)
        return won

    def _checked(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None,
    ) -> UnitContents:
        if self.plan.unit_named(unit.name) != unit:
            raise dataset_error(_WHO, "unit", f"be {self.plan.unit_named(unit.name)}", unit, "Take it from the plan.")
        contents = unit_contents(_WHO, self.columns, unit, tensors, examples)
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
