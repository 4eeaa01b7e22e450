"""Read the machine code of the CUDA kernels: loads in flight in each loop, instructions a turn, calls, local memory.

A load of 16 bytes takes about as long as a hundred instructions, so a loop is fast where several are on their way
before the first is waited for. What the compiler made of a loop shows in the machine code alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WIDE = re.compile(r"LDG\.E\.128\b")
USUAL_PLACE = Path("/usr/local/cuda/bin")
_REGISTER = re.compile(r"\bR(\d+)(?:\.64)?\b")
# Instructions for each element that is taken in by the loop without a mask. Measured with nvcc 13.0 on sm_90, and a
# third more: Add 2.0 (double) to 3.6 (bfloat16), AddSquare 2.5 to 5.0, MaxAbs 5.4 to 10.8.
MOST_INSTRUCTIONS = {"Add": 4.8, "AddSquare": 6.7, "MaxAbs": 14.4, "Add of a product": 9.6}
IN_FLIGHT = 4  # kInFlight and kPieceLoads of csrc/kernel/cuda_results.cuh, for each operand
MOST_BYTES = 48 << 10
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)")


@dataclass
class Loop:
    """An innermost loop with wide loads: how many are asked for before each wait, and its instructions."""

    start: int
    in_flight: list[int]
    instructions: int
    calls: int

    @property
    def most(self) -> int:
        return max(self.in_flight, default=0)


@dataclass
class Code:
    """The machine code of one kernel on one architecture."""

    kernel: str
    arch: str
    n_bytes: int = 0
    local: int = 0  # loads and stores of local memory: arrays that found no place in registers
    calls_in_loops: int = 0
    loops: list[Loop] = field(default_factory=list)


class NoDisassembler(Exception):
    """Why machine code can't be read here."""


def disassemble(made: Path) -> str:
    """What ``cuobjdump -sass`` prints of an object file.

    Raises:
        NoDisassembler: if it isn't there, or fails.
    """
    tool = find_cuobjdump()
    if shutil.which("c++filt") is None:  # the rules go by the names of the kernels
        raise NoDisassembler("no c++filt; install binutils")
    # It calls nvdisasm, which lies beside it.
    around = dict(os.environ, PATH=f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    done = subprocess.run([tool, "-sass", made], capture_output=True, text=True, check=False, env=around)
    if done.returncode != 0 or "Function :" not in done.stdout:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NoDisassembler(f"{tool} cannot read {made}: {said[0] if said else 'it prints no function'}")
    return done.stdout


def find_cuobjdump() -> Path:
    """cuobjdump of CUDA_HOME, the PATH, pip's packages (nvidia-cuda-cuobjdump, triton) or the usual place."""
    places = [Path(home) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    if on_path := shutil.which("cuobjdump"):
        places.append(Path(on_path).parent)
    packages = Path(sysconfig.get_path("purelib"))
    places += sorted(packages.glob("nvidia/cu[0-9]*/bin"), reverse=True)
    places += [packages / "triton/backends/nvidia/bin", USUAL_PLACE]
    for place in places:
        if os.access(place / "cuobjdump", os.X_OK) and shutil.which("nvdisasm", path=_with(place)):
            return place / "cuobjdump"
    raise NoDisassembler("no cuobjdump with nvdisasm beside it; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def _with(place: Path) -> str:
    return f"{place}{os.pathsep}{os.environ.get('PATH', '')}"


def read(sass: str) -> list[Code]:
    """What is said of each kernel in what ``cuobjdump -sass`` printed."""
    found, arch = [], ""
    for part in re.split(r"^\s*(?=Function :|code for )", sass, flags=re.MULTILINE):
        if named := re.match(r"code for (\w+)", part):
            arch = named[1]
        elif named := re.match(r"Function : (\S+)", part):
            found.append(_read_kernel(Code(named[1], arch), list(_instructions(part))))
    return found


def _instructions(text: str) -> Iterator[tuple[int, str]]:
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            yield int(found[1], 16), found[2]


def _read_kernel(code: Code, instructions: list[tuple[int, str]]) -> Code:
    code.n_bytes = 16 * len(instructions)
    code.local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in instructions)
    bounds = [(int(to[1], 16), at) for at, text in instructions if (to := _BRANCH.search(text)) and int(to[1], 16) < at]
    calls = [at for at, text in instructions if re.search(r"\bCALL\b", text)]
    code.calls_in_loops = sum(any(start <= at <= end for start, end in bounds) for at in calls)
    for start, end in sorted(bounds):
        inside = [text for at, text in instructions if start <= at <= end]
        inner = any(start <= s and e <= end and (s, e) != (start, end) for s, e in bounds if _wide(instructions, s, e))
        if not inner and _wide(instructions, start, end):
            code.loops.append(Loop(start, in_flight(inside), len(inside), sum("CALL" in text for text in inside)))
    return code


def _wide(instructions: list[tuple[int, str]], start: int, end: int) -> bool:
    return any(start <= at <= end and WIDE.search(text) for at, text in instructions)


def in_flight(instructions: Iterable[str]) -> list[int]:
    """How many wide loads were asked for before each wait for one of them, in the order of the code."""
    groups: list[int] = []
    waiting: dict[int, int] = {}  # register -> the load that fills it
    for text in instructions:
        registers = [int(number) for number in _REGISTER.findall(text)]
        load = WIDE.search(text)
        read = registers[1:] if load else registers
        if waiting and any(register in waiting for register in read):
            groups.append(len(set(waiting.values())))
            waiting.clear()
        if load:
            number = max(waiting.values(), default=0) + 1
            waiting.update({registers[0] + i: number for i in range(4)})
    return groups + ([len(set(waiting.values()))] if waiting else [])


def complaints(codes: Iterable[Code], names: dict[str, str]) -> list[str]:
    """One line for each rule that a kernel breaks; ``names`` are those that `cuda_resources.short_names` makes."""
    wrong = []
    for code in codes:
        who = f"cuda-compile: {names[code.kernel]} on {code.arch}"
        wrong += [f"{who} must {rule}, got {got}." for rule, got in _broken(code, names[code.kernel])]
    return wrong


def _broken(code: Code, name: str) -> Iterator[tuple[str, object]]:
    if code.local:
        yield "keep its arrays in registers", f"{code.local} accesses of local memory"
    if code.n_bytes > MOST_BYTES:
        yield f"have at most {MOST_BYTES} bytes of code", code.n_bytes
    # sm_80 has calls of its own that bring the lanes of a warp together.
    if code.arch >= "sm_90" and (calls := sum(loop.calls for loop in code.loops)):
        yield "call nothing in a loop that loads", calls
    template, parameters = template_of(name)
    wide = "true" in parameters or (template == "picks" and parameters[-1] != "1")
    if not wide:
        return
    product = parameters[0].startswith("Product<")
    in_flight = IN_FLIGHT * (2 if product else 1)
    # The columns have a third loop, for dimensions that can't be joined: rare, and one row at a time.
    wanted = 2 if template == "columns" else 1
    full = [loop for loop in code.loops if _is_full(loop.in_flight, in_flight, template == "rows" and product)]
    if len(full) < wanted or len(code.loops) - len(full) > (template == "columns"):
        rule = f"have {in_flight} wide loads in flight in {'both its loops' if wanted == 2 else 'its loop'}"
        yield rule, [loop.in_flight for loop in code.loops]
    elif template == "columns":
        most = MOST_INSTRUCTIONS[parameters[1] + (" of a product" if product else "")]
        least = min(loop.instructions for loop in full) / (IN_FLIGHT * int(parameters[2]))
        if least > most:
            yield f"take in an element by {most} instructions", round(least, 1)


def _is_full(groups: list[int], in_flight: int, parted: bool) -> bool:
    """Whether a loop waits for none of its loads before all of them are under way.

    Of a product that is reduced within a warp the compiler may take in the first of the pairs before the last are
    loaded, so ``parted`` asks for as many at once as of one operand.
    """
    return groups == [in_flight] or (parted and sum(groups) == in_flight and groups[0] >= IN_FLIGHT)


def template_of(name: str) -> tuple[str, list[str]]:
    """``columns<Product<bf16, bf16>, Add, 8, true>`` -> columns and its four parameters."""
    template, _, rest = name.removesuffix(">").partition("<")
    return template, [word.strip() for word in re.split(r",(?![^<]*>)", rest)]


def summary(codes: Iterable[Code], names: dict[str, str]) -> list[str]:
    """A line for each kernel with wide loads: loads in flight before each wait and instructions a turn, by loop."""
    lines = []
    for code in sorted(codes, key=lambda code: (names[code.kernel], code.arch)):
        loops = ", ".join(f"{'+'.join(map(str, loop.in_flight))} in {loop.instructions}" for loop in code.loops)
        if loops:
            lines.append(f"{names[code.kernel]:<40} {code.arch:<6} {code.n_bytes:>6} bytes  {loops}")
    return lines
