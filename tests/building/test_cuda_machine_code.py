"""What is read from machine code: loads in flight in a loop, its instructions, and which kernels break a rule."""

import cuda_machine_code
import cuda_resources
import pytest

COLUMNS = "_ZN6tlfast4cuda7columnsINS_4bf16ENS_3AddELi8ELb1EEEvNS_11CudaCaptureENS0_3CutE"
PICKS = "_ZN6tlfast4cuda5picksINS_4bf16ES2_Li8EEEvNS_11CudaCaptureENS0_3CutE"
PRODUCTS = "_ZN6tlfast4cuda7columnsINS0_7ProductINS_4bf16ES3_EENS_3AddELi8ELb1EEEvNS_11CudaCaptureENS0_3CutE"
LOADS = [f"LDG.E.128.CONSTANT R{4 * i + 8}, desc[UR4][R2.64+0x{i}0]" for i in range(4)]
USES = [f"FADD R40, R40, R{4 * i + 8}" for i in range(4)]
TOGETHER = [*LOADS, *USES]
MORE = [f"LDG.E.128.CONSTANT R{4 * i + 48}, desc[UR4][R6.64+0x{i}0]" for i in range(4)]
BOTH = [*LOADS, *MORE, *USES]
ONE_BY_ONE = [line for pair in zip(LOADS, USES, strict=True) for line in pair]


def sass(*loops: list[str], kernel: str = COLUMNS, arch: str = "sm_90", before: tuple[str, ...] = ()) -> str:
    """The text that cuobjdump prints of one kernel: some instructions, then loops."""
    instructions = [*before]
    for body in loops:
        start = 16 * len(instructions)
        instructions += [*body, f"@P0 BRA 0x{start:x}"]
    lines = [
        f"        /*{16 * at:04x}*/    {text} ;   /* 0x0000000000000000 */" for at, text in enumerate(instructions)
    ]
    return "\n".join([f"\tcode for {arch}", f"\t\tFunction : {kernel}", *lines, ""])


def complaints(text: str) -> list[str]:
    codes = cuda_machine_code.read(text)
    return cuda_machine_code.complaints(codes, cuda_resources.short_names([code.kernel for code in codes]))


def test_loads_are_counted_up_to_the_first_wait():
    assert cuda_machine_code.in_flight(TOGETHER) == [4]
    assert cuda_machine_code.in_flight(ONE_BY_ONE) == [1, 1, 1, 1]
    assert cuda_machine_code.in_flight([LOADS[0], USES[0], *LOADS[1:], *USES[1:]]) == [1, 3]
    assert cuda_machine_code.in_flight(["LDG.E.64 R8, desc[UR4][R2.64]", "FADD R1, R8, R8"]) == []


def test_a_write_into_a_loaded_register_waits_too():
    assert cuda_machine_code.in_flight([LOADS[0], "MOV R11, RZ", LOADS[1]]) == [1, 1]


def test_loops_are_found():
    (code,) = cuda_machine_code.read(sass(TOGETHER, ["NOP"], ONE_BY_ONE, before=("NOP", "BRA 0x20")))
    assert (code.kernel, code.arch, code.n_bytes) == (COLUMNS, "sm_90", 16 * (2 + 9 + 2 + 9))
    assert [(loop.in_flight, loop.instructions) for loop in code.loops] == [([4], 9), ([1, 1, 1, 1], 9)]


def test_good_kernels_pass():
    rare = [LOADS[0], USES[0]]
    assert complaints(sass(rare, TOGETHER, TOGETHER) + sass(TOGETHER, kernel=PICKS)) == []
    assert complaints(sass(rare, BOTH, BOTH, kernel=PRODUCTS)) == []


def test_the_parameters_of_a_kernel():
    (name,) = cuda_resources.short_names([PRODUCTS]).values()
    assert cuda_machine_code.template_of(name) == ("columns", ["Product<bf16, bf16>", "Add", "8", "true"])
    assert cuda_machine_code.template_of("picks<Product<float, double>, bf16, 1>")[1][-1] == "1"
    assert cuda_machine_code.template_of("merge<float, Add>") == ("merge", ["float", "Add"])
    assert cuda_machine_code.template_of("advance") == ("advance", [""])


@pytest.mark.parametrize(
    "loops, said",
    [
        ([TOGETHER, TOGETHER], "must have 8 wide loads in flight in both its loops, got [[4], [4]]."),
        ([BOTH + 400 * ["NOP"]] * 2, "must take in an element by 9.6 instructions, got 12.9."),
    ],
)
def test_a_broken_rule_of_products_is_told(loops, said):
    assert complaints(sass(*loops, kernel=PRODUCTS)) == [
        f"cuda-compile: columns<Product<bf16, bf16>, Add, 8, true> on sm_90 {said}"
    ]


def test_a_product_reduced_within_a_warp_may_wait_between_four_loads_and_four():
    rows = PRODUCTS.replace("7columns", "4rows")
    assert complaints(sass([*TOGETHER, *MORE, *USES], kernel=rows)) == []
    assert complaints(sass(BOTH, kernel=rows)) == []
    (line,) = complaints(sass([*ONE_BY_ONE, *BOTH], kernel=rows))
    assert "must have 8 wide loads in flight in its loop" in line


@pytest.mark.parametrize(
    "text, said",
    [
        (sass(ONE_BY_ONE, TOGETHER), "must have 4 wide loads in flight in both its loops, got [[1, 1, 1, 1], [4]]."),
        (sass(TOGETHER), "must have 4 wide loads in flight in both its loops, got [[4]]."),
        (sass(ONE_BY_ONE, kernel=PICKS), "must have 4 wide loads in flight in its loop, got [[1, 1, 1, 1]]."),
        (sass(TOGETHER, TOGETHER + 300 * ["NOP"]), None),  # the shorter loop is the one without a mask
        (
            sass(*2 * [TOGETHER + 300 * ["NOP"]]),
            "must take in an element by 4.8 instructions, got 9.7.",
        ),
        (sass(TOGETHER, [*TOGETHER, "CALL.REL.NOINC 0x5460"]), "must call nothing in a loop that loads, got 1."),
        (sass(TOGETHER, [*TOGETHER, "CALL.REL.NOINC 0x5460"], arch="sm_80"), None),
        (
            sass(TOGETHER, TOGETHER, before=("STL [R1], R2", "LDL R2, [R1]")),
            "must keep its arrays in registers, got 2 accesses of local memory.",
        ),
        (sass(TOGETHER, TOGETHER, before=4000 * ("NOP",)), "must have at most 49152 bytes of code, got 64288."),
    ],
)
def test_a_broken_rule_is_told(text, said):
    got = complaints(text)
    if said is None:
        assert got == []
    else:
        (line,) = got
        name = "picks<bf16, bf16, 8>" if PICKS in text else "columns<bf16, Add, 8, true>"
        assert line == f"cuda-compile: {name} on sm_90 {said}"


def test_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_machine_code.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(cuda_machine_code, "USUAL_PLACE", tmp_path)
    with pytest.raises(cuda_machine_code.NoDisassembler, match="pip install nvidia-cuda-cuobjdump"):
        cuda_machine_code.find_cuobjdump()
