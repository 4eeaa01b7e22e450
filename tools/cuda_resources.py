"""Show what each CUDA kernel takes of a GPU (registers, shared memory, stack), and fail where registers spilled.

`make cuda-compile` runs it: it compiles csrc/kernel/capture_cuda.cu, or takes the object of the last build if that is
still right, reads what ptxas said, and then the machine code (cuda_machine_code.py). A stack that is no spill (an array
indexed at run time) is shown and allowed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_build
import cuda_machine_code

MOST_LINES = 150  # of a table that is still read; there are about 220 kernels
HEAD = f"{'registers':>9} {'shared':>6} {'stack':>6} {'spills':>6}"


@dataclass
class Usage:
    """What one kernel takes on one architecture; bytes but for the registers."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spilled(self) -> int:
        return self.spill_stores + self.spill_loads

    def numbers(self) -> str:
        return f"{self.registers:>9} {self.shared:>6} {self.stack:>6} {self.spilled:>6}"


def parse(log: str) -> list[Usage]:
    """The usage of every kernel in what ``ptxas -v`` printed.

    Raises:
        ValueError: if a kernel is named and its numbers are not there: then nothing is known about its spills.
    """
    found: list[Usage] = []
    known: dict[int, set[str]] = {}
    for line in log.splitlines():
        if named := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            found.append(Usage(named[1], named[2]))
            known[len(found)] = set()
            continue
        if not found:
            continue
        use = found[-1]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        # Functions that were not inlined have lines of their own, and count for the kernel before them.
        if frame:
            use.stack, stores, loads = max(use.stack, int(frame[1])), int(frame[2]), int(frame[3])
            use.spill_stores, use.spill_loads = use.spill_stores + stores, use.spill_loads + loads
            known[len(found)].add("frame")
        if taken := re.search(r"Used (\d+) registers", line):
            use.registers = int(taken[1])
            use.shared = sum(int(n) for n in re.findall(r"(\d+) bytes smem", line))
            known[len(found)].add("registers")
    unknown = [use.kernel for number, use in enumerate(found, 1) if known[number] != {"frame", "registers"}]
    if unknown or not found:
        names = ", ".join(unknown) or "no kernel at all"
        raise ValueError(
            f"cuda_resources: log must hold the numbers of every kernel, got none for {names}. Use ptxas -v."
        )
    return found


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled name -> ``columns<bf16, float>``; without c++filt (of binutils) the names stay as they are."""
    filt = shutil.which("c++filt")
    if filt is None:
        return {name: name for name in mangled}
    done = subprocess.run([filt], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return {name: _shorten(plain) for name, plain in zip(mangled, done.stdout.splitlines(), strict=True)}


def _shorten(name: str) -> str:
    """Drop the return type, the namespaces and the parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::(?=\w|\()|_GLOBAL__N__\w+::", "", name)
    name = re.sub(r"^(?:void|int) ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def table(found: list[Usage]) -> list[str]:
    """A line for each kernel, with four numbers an architecture; where those were too many lines, one for all kernels
    of a template, with the largest number of each kind."""
    names = short_names([use.kernel for use in found])
    rows: dict[str, list[Usage]] = {}
    for use in found:
        rows.setdefault(names[use.kernel], []).append(use)
    if len(rows) > MOST_LINES:
        rows = _by_template(rows)
    archs = list(dict.fromkeys(use.arch for use in found))
    width = max(len("kernel"), *map(len, rows))
    lines = [" ".join([f"{'':<{width}}", *(f"| {arch:<{len(HEAD)}}" for arch in archs)]).rstrip()]
    lines.append(" ".join([f"{'kernel':<{width}}", *(f"| {HEAD}" for _ in archs)]))
    for name, uses in sorted(rows.items()):
        shown = {use.arch: use.numbers() for use in uses}
        lines.append(
            " ".join([f"{name:<{width}}", *(f"| {shown.get(arch, ''):<{len(HEAD)}}" for arch in archs)]).rstrip()
        )
    return lines


def _by_template(rows: dict[str, list[Usage]]) -> dict[str, list[Usage]]:
    groups: dict[str, list[list[Usage]]] = {}
    for name, uses in rows.items():
        groups.setdefault(name.partition("<")[0], []).append(uses)
    merged = {}
    for template, kernels in groups.items():
        most: dict[str, Usage] = {}
        for use in (use for uses in kernels for use in uses):
            so_far = most.setdefault(use.arch, Usage(template, use.arch))
            for kind in ("registers", "shared", "stack", "spill_stores", "spill_loads"):
                setattr(so_far, kind, max(getattr(so_far, kind), getattr(use, kind)))
        merged[f"{template}<...> ({len(kernels)})" if len(kernels) > 1 else template] = list(most.values())
    return merged


def spills(found: list[Usage]) -> list[str]:
    """One line for each kernel whose registers did not suffice."""
    names = short_names([use.kernel for use in found])
    return [
        f"cuda-compile: {names[use.kernel]} on {use.arch} must not spill registers, got {use.spill_stores} bytes of "
        f"stores and {use.spill_loads} of loads. Give it fewer live values, or smaller blocks."
        for use in found
        if use.spilled
    ]


def main() -> int:
    """Compile, print the table, and return 1 if a kernel spills."""
    try:
        archs = cuda_build.parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        toolkit = cuda_build.find_toolkit(archs)
        made, new = cuda_build.compile_kernels(toolkit, archs)
    except (ValueError, cuda_build.CannotBuildCuda) as error:
        print(f"cuda-compile: CUDA must be there to compile, got: {error}", file=sys.stderr)
        return 1
    state = "compiled" if new else "up to date"
    print(f"cuda-compile: {cuda_build.SOURCE} by CUDA {toolkit.version} for {cuda_build.arch_words(archs)}: {state}")
    found = parse(Path(cuda_build.ROOT / made).with_suffix(".log").read_text())
    print(*table(found), sep="\n")
    wrong = spills(found)
    try:
        codes = cuda_machine_code.read(cuda_machine_code.disassemble(cuda_build.ROOT / made))
    except cuda_machine_code.NoDisassembler as error:
        print(f"cuda-compile: the machine code must be read, got: {error}", file=sys.stderr)
        return 1
    names = short_names([code.kernel for code in codes])
    print("", "wide loads before each wait, in so many instructions a turn, by loop", sep="\n")
    print(*cuda_machine_code.summary(codes, names), sep="\n")
    n_spills = len(wrong)
    wrong += cuda_machine_code.complaints(codes, names)
    print(*wrong[:MOST_LINES], sep="\n", end="\n" if wrong else "", file=sys.stderr)
    print(f"{len(found)} kernels, {n_spills} with spills; {len(wrong) - n_spills} complaints of the machine code")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
