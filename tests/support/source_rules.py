"""The house rules as functions of a path and its text: floors, first lines, sizes, names."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

MOST_LINES, MOST_PARAMETERS = 60, 12  # of a function: a screen, without its docstring; more belongs into a dataclass
# What may have more parameters, and why; none has more lines.
MANY = {
    "collect": "the keywords that users write, which it makes CollectOptions of at once",
    "capture": "the keywords that users write, which it makes specs and CaptureOptions of at once",
    "run_with_cache": "the parameters of TransformerLens' own, and ours",
    "cache_fwd_and_bwd": "the parameters of run_with_cache",
    "forward": "a test's model whose arguments are called as all of ours are",
    "DatasetWriter.__init__": "the keywords that users write",
    "Weight.__init__": "what weight_arguments makes for both backends, in its order",
}

# From the ground up. A room's modules import from rooms above its own in this list, and in their own from rows above
# theirs. A new module needs a place here.
ROOMS = (
    ("", (("_C", "_build_info", "_disk", "errors", "globs", "markup"),)),
    ("projections", (("kept", "philox"), ("entries",), ("sketches",), ("projection",))),
    ("", (("spec",),)),
    (
        "backends",
        (
            ("__init__", "checkpoints", "interface", "plain", "streams"),
            ("cuda_status", "outputs", "reference"),
            ("calls", "factor_sums", "no_graph", "queries", "rows", "tensor_cache"),
            ("whole",),
            ("weight",),
            ("recipe", "shared_inputs"),
            ("column",),
            ("ledger",),
            ("backwards",),
            ("keepers",),
            ("taps",),
            ("python",),
            ("choice",),
        ),
    ),
    ("projections", (("applying",), ("__init__",))),
    (
        "hooks",
        (
            (
                "__init__",
                "dimensions",
                "experts",
                "inert",
                "layer_trial",
                "patches",
                "positions",
                "queries",
                "second_moments",
                "sums_file",
                "tokens",
            ),
            ("captured_rows", "points", "single_sided"),
            ("freeze", "full_hooks", "into", "layers", "options", "running", "step_inputs"),
            ("attachment", "bergson_normalizers", "normalizers"),
            ("diagnosis", "factors"),
            ("captured",),
            ("capture", "factoring", "graph_step", "summing"),
        ),
    ),
    # What tlfast.transformer_lens puts in the place of a tool; a recipe that streams or reads stands further down.
    (
        "recipes",
        (
            ("native_forms", "pairs", "places", "products"),
            ("norms", "patching"),
            ("projection_heads", "residual_graph"),
            ("additivity", "decoder_graph"),
            ("edges",),
        ),
    ),
    # What tlfast.transformer_lens puts in the place of a tool; a recipe that streams or reads stands further down.
    ("recipes", (("jacobian_graphs", "slopes"), ("jacobian_rows",))),
    (
        "transformer_lens",
        (
            ("library",),
            ("arguments", "loading", "names"),
            ("handles", "theirs"),
            ("caching_taps",),
            ("running", "tools"),
            ("caching", "capturing"),
            ("compatibility", "jacobian_lens"),
            ("acceleration",),
            ("__init__",),
        ),
    ),
    ("dataset", (("errors",),)),
    (
        "dataset.places",
        (
            ("__init__", "durable", "full_disk", "local_file", "mounts"),
            ("remote",),
            ("remote_store",),
            ("store",),
            ("write_store",),
        ),
    ),
    (
        "dataset.format",
        (
            ("__init__", "kept_fields", "plan", "rounding", "row_limits", "strict_json"),
            ("encodings",),
            ("coverage", "extension", "layout"),
            ("meaning",),
            ("description", "norms"),
            ("commits", "merged"),
            ("card", "row_table"),
        ),
    ),
    ("dataset.check", (("__init__", "verify"), ("repair",))),
    (
        "dataset.read",
        (
            ("__init__", "ahead", "arrow_rows", "conditions", "pretrained", "row_fields", "shuffle", "unit_files"),
            ("columns", "decoding", "hub"),
            ("showing", "token_columns"),
            ("found", "selection"),
            ("search",),
            ("converting",),
            ("views",),
            ("merged",),
            ("reader",),
            ("joined", "row_dataset"),
            ("shuffled_batches",),
        ),
    ),
    (
        "dataset.write",
        (
            ("__init__", "background", "folder", "native", "payload", "unit_contents"),
            ("staging", "unit_folder"),
            ("upload",),
            ("merge", "staged_units"),
            ("writer",),
        ),
    ),
    (
        "dataset.export",
        (
            ("__init__", "bergson_projection", "hf_folder"),
            ("bergson_index", "bergson_store"),
            ("bergson_examples", "formats"),
            ("bergson_import", "export"),
        ),
    ),
    ("dataset", (("__init__",),)),
    (
        "collecting",
        (
            (
                "__init__",
                "data_files",
                "determinism",
                "fields",
                "json_parts",
                "progress",
                "signals",
                "skipped",
                "spool",
                "tasks",
            ),
            (
                "chat",
                "csv_table",
                "fingerprint",
                "hub_data",
                "huggingface",
                "items",
                "media",
                "normalizer_files",
                "pack",
                "point_list",
                "text",
                "unit_queue",
            ),
            ("examples", "records"),
            ("tokenizing",),
            ("batches", "function_identity", "media_examples", "stored_examples"),
            ("drain", "graph_cache", "loss"),
            ("losses", "packing"),
            ("options",),
            ("checks", "identity", "settings", "unit"),
            ("fsdp", "loop", "probe", "resume"),
            ("begun_examples", "into", "work"),
            ("passes", "run", "stream"),
            ("factors", "from_text", "rehearsal", "running"),
            ("ray_cluster",),
        ),
    ),
    (
        "attribution",
        (
            ("bergson_files", "diagnostics", "factor_files", "given_examples", "pieces", "queries"),
            ("every_score", "moments"),
            ("gradient_queries", "methods"),
            ("result", "scores_of_batches", "sums"),
            ("example_scores",),
            ("faiss_index", "scores", "text_query"),
            ("__init__",),
        ),
    ),
    # The last four keep names by which modules were known before.
    ("", (("__init__", "attachment", "batches", "loss", "stopping"),)),
    (
        "recipes",
        (
            ("attributions", "gradient_pairs", "lens_file", "metric", "residual_stream"),
            ("gradient_paths", "jacobian_lens", "mlp_factors", "token_saliency"),
            ("__init__",),
        ),
    ),
    (
        "report",
        (("page", "positions", "summary", "texts", "timeline"), ("charts", "nearest"), ("writing",), ("__init__",)),
    ),
    (
        "commands",
        (
            ("__init__", "arguments", "bar", "doctor"),
            ("model_words",),
            ("collecting", "factoring", "inspecting", "listing", "scoring", "sharing"),
        ),
    ),
    ("", (("cli",), ("__main__",))),
)
FLOORS = tuple(
    tuple(f"{room}.{name}".strip(".").removesuffix(".__init__") for name in row) for room, rows in ROOMS for row in rows
)
# The rooms of csrc/ in the same way. A header that others than its source file need may have a floor of its own.
NATIVE_ROOMS = (
    (
        "kernel",
        (
            ("errors", "isa", "reduce"),
            ("choose", "loops", "view"),
            ("capture_cuda.h", "operands"),
            ("capture_cpu", "cuda_results", "no_cuda", "sketch"),
            ("capture_cuda",),
        ),
    ),
    ("disk", (("crc32c", "row_norms"), ("codes", "unit_writer"), ("disk_module",))),
    (
        "autograd",
        (
            ("bare", "moved", "plain.h", "streams.h"),
            ("device", "no_streams", "streams"),
            ("capture", "factor_sums", "step_input"),
            ("queries", "rows", "sketcher"),
            ("whole",),
            ("weight",),
            ("recipe", "shared_inputs"),
            ("column",),
            ("ledger", "tensor_cache"),
            ("backward",),
            ("backwards",),
            ("keeper.h",),
            ("tap",),
            ("full_call", "keeper"),
        ),
    ),
    (
        "python",
        (
            ("cuda_status", "py_objects", "python_result", "references"),
            ("plain", "py_callable", "py_reduce"),
            ("py_point_hooks",),
            ("py_full_call", "py_tap"),
            ("py_full_hooks", "py_module_call"),
            ("module",),
        ),
    ),
)
NATIVE_FLOORS = tuple(row for _, rows in NATIVE_ROOMS for row in rows)
# The dataset on disk knows nothing of capture: of the rest of the package it may import these alone. `backends.choice`
# says why there is no native code.
BELOW_DATASET = {"_disk", "errors", "globs", "markup", "backends.choice"}
CORE_LIBRARIES = {"torch", "numpy"}
VAGUE_FILES = re.compile(r"(^|_)(utils?|helpers?|misc|common|managers?|handlers?|stuff)(_|$)")
VAGUE_NAMES = re.compile(r"(Utils?|Helper|Manager|Handler)$")
# Folders of one machine; a path in an example is relative, or under /tmp, /data or the like.
MACHINE_PATHS = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|opt)/[\w.]")


def level(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    found = [number for number, names in enumerate(floors) if name in names]
    if len(found) != 1:
        raise AssertionError(
            f"{name} must stand once in the floors of tests/support/source_rules.py, got {len(found)} times"
        )
    return found[0]


def module_name(path: Path) -> str:
    """``tlfast/dataset/format/plan.py`` -> ``dataset.plan``, ``tlfast/dataset/__init__.py`` -> ``dataset``."""
    parts = list(path.with_suffix("").parts[1:])
    return ".".join(parts[:-1] or parts) if parts[-1] == "__init__" else ".".join(parts)


def package_imports(path: Path, source: str, known: set[str]) -> set[str]:
    """Names of the modules of tlfast that a file imports, anywhere in it."""
    package = ["tlfast", *path.parts[1:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tlfast":
                    found.add(alias.name.partition(".")[2] or "__init__")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[0] != "tlfast":
                continue
            for alias in node.names:
                inner = ".".join([*base[1:], alias.name])
                found.add(inner if inner in known else ".".join(base[1:]) or "__init__")
    return found


def outside_imports(source: str) -> set[str]:
    """Libraries imported when the module is: at its top level, in its classes, under if and try."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found - set(sys.stdlib_module_names) - {"tlfast"}


def upward_imports(path: Path, source: str, known: set[str]) -> list[str]:
    own = module_name(path)
    wrong = []
    for other in sorted(package_imports(path, source, known) - {own}):
        if level(other, FLOORS) >= level(own, FLOORS):
            wrong.append(f"{path} imports tlfast.{other}, which is not on a floor beneath it")
        elif own.split(".")[0] == "dataset" != other.split(".")[0] and other not in BELOW_DATASET:
            wrong.append(f"{path} imports tlfast.{other}, but the dataset may use only {sorted(BELOW_DATASET)}")
    return wrong


def upward_includes(path: Path, source: str) -> list[str]:
    named = {name for names in NATIVE_FLOORS for name in names}

    def floor(file: Path) -> int:  # a header that others than its source file need has a floor of its own
        return level(file.name if file.name in named else file.stem, NATIVE_FLOORS)

    others = re.findall(r'^\s*#\s*include\s*"([^"]+)"', source, flags=re.MULTILINE)
    higher = [o for o in others if Path(o).stem != path.stem and floor(Path(o)) >= floor(path)]
    return [f"{path} includes {other}, which is not on a floor beneath it" for other in higher]


def long_function(path: Path, function: ast.FunctionDef, owner: str = "") -> list[str]:
    """What makes a function, or a method of the class ``owner``, longer than a screen or than a dozen parameters."""
    start = function.body[0].lineno if ast.get_docstring(function) is None else function.body[0].end_lineno
    n_lines = (function.end_lineno or 0) - (start or 0)
    given = function.args
    n_parameters = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
    if n_lines <= MOST_LINES and (
        n_parameters <= MOST_PARAMETERS or {function.name, f"{owner}.{function.name}"} & MANY.keys()
    ):
        return []
    rule = f"have at most {MOST_LINES} lines and {MOST_PARAMETERS} parameters"
    return [f"{path}: {function.name} must {rule}, got {n_lines} and {n_parameters}"]


def broken_laws(path: Path, source: str) -> list[str]:
    """What a file breaks of the laws that hold for every source file."""
    lines = source.splitlines()
    wrong = []
    if VAGUE_FILES.search(path.stem):
        wrong.append(f"{path} must be named after what it holds")
    if MACHINE_PATHS.search(source):
        wrong.append(f"{path} must name no folder of one machine, got {MACHINE_PATHS.search(source)[0]!r}...")
    first = lines[0] if lines else ""
    if path.suffix in (".py", ".pyi"):
        if not re.match(r'"""\S.{9,}', first):
            wrong.append(f"{path} must say in a docstring on its first line what it holds, got {first!r}")
        nodes = list(ast.walk(ast.parse(source)))
        owners = {id(part): node.name for node in nodes if isinstance(node, ast.ClassDef) for part in node.body}
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        wrong += [text for node in functions for text in long_function(path, node, owners.get(id(node), ""))]
        classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
        vague = filter(VAGUE_NAMES.search, classes)
        wrong += [f"{path}: class {name} must be named with a term of the field" for name in vague]
    elif not re.match(r"// \S.{9,}", first):
        wrong.append(f"{path} must say in a comment on its first line what it holds, got {first!r}")
    return wrong
