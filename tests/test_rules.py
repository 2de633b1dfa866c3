"""Rules of the source tree, read from the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import bloomq

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch", "numba", "jax", "transformers", "tokenizers", "safetensors", "rich", "llguidance",
    "jinja2", "bitsandbytes", "triton",
)  # fmt: skip

# Level of every module: imports of ours go to a lower level, or to one named here.
LEVELS = {
    "errors": 0, "grids": 0,
    "checks": 1, "files": 1, "config": 1, "outputs": 1, "losses": 1, "schemes": 1, "weights": 1,
    "encoding": 1, "byte_level": 1, "tokenizer_config": 1, "tensorfile": 1,
    "chat.sandbox": 1, "levels": 1,
    "journal": 1, "taken_folder": 1,
    "layers": 2, "lora": 2, "pack": 2, "pack_writer": 2, "shards": 2,
    "weight_files": 2, "scheme_choice": 2, "chat.template": 2,
    "backends.reference": 3, "backends.numba_cpu": 3, "backends.jax": 3,
    "backends.cuda": 3, "backends.placed": 3,
    "parallel": 3, "model": 3, "heads": 3, "inputs": 3, "tracing": 3, "forward": 3, "tokenizer": 3,
    "sampling": 4, "search": 4, "speculation": 4, "text": 4, "generation": 4, "scoring": 4,
    "sharing": 4, "divergence": 4, "windows": 4, "token_texts": 4, "prompts": 4, "writing": 5,
    "constraints": 5, "perplexity": 5, "answers": 5, "evaluation": 5, "chat": 5, "exploration": 5,
    "comparison": 5,
    "prompt_cache": 5,
    "backends": 5, "opening": 5, "modeling": 5, "flax": 5, "language_model": 5, "loading": 5,
    "placing": 5,
    "describe": 5, "console": 5, "bench": 5, "pipelines": 5, "placement": 4,
    "cli": 6, "__main__": 7,
    "converters": 3, "converters.calibration": 5, "": 8,
}  # fmt: skip
SAME_LEVEL = {
    ("config", "files"), ("tensorfile", "files"), ("tensorfile", "schemes"),
    ("weights", "schemes"), ("weights", "config"), ("losses", "config"),
    ("tokenizer", "encoding"), ("tokenizer", "byte_level"), ("tokenizer", "tokenizer_config"),
    ("byte_level", "encoding"), ("tokenizer_config", "encoding"), ("tokenizer_config", "files"),
    ("pipelines", "modeling"), ("pack_writer", "pack"), ("heads", "model"), ("forward", "heads"),
    ("inputs", "heads"), ("tracing", "heads"), ("tracing", "inputs"), ("forward", "inputs"),
    ("forward", "tracing"),
    ("pack_writer", "weight_files"), ("weight_files", "shards"), ("weight_files", "pack"),
    ("shards", "pack"), ("journal", "files"),
    ("flax", "backends"), ("flax", "opening"), ("flax", "modeling"),
    ("modeling", "placing"), ("modeling", "opening"), ("language_model", "modeling"),
    ("placing", "backends"), ("loading", "placing"),
    ("loading", "modeling"), ("loading", "language_model"),
    ("generation", "sampling"), ("generation", "text"), ("generation", "speculation"),
    ("search", "sampling"),
    ("search", "generation"),
    ("scoring", "sharing"), ("divergence", "scoring"),
    ("language_model", "perplexity"), ("answers", "language_model"), ("evaluation", "answers"),
    ("evaluation", "language_model"),
    ("evaluation", "loading"), ("exploration", "language_model"), ("chat", "language_model"),
    ("language_model", "constraints"), ("chat", "constraints"),
    ("writing", "constraints"), ("language_model", "writing"),
    ("prompt_cache", "language_model"),
    ("describe", "loading"), ("describe", "backends"), ("loading", "backends"),
    ("comparison", "backends"), ("comparison", "perplexity"),
    ("converters", "tokenizer"),  # a pack's is looked through
    ("converters", "converters.calibration"),  # which runs blocks: convert imports it on demand
    ("converters", "cli"),  # `python -m bloomq.converters.hf` is the command `convert`
}  # fmt: skip
# What a level may import of the outside: the model and the loop know no engine and no file.
NO_ENGINE = (
    "model", "heads", "sampling", "speculation", "text", "generation", "search", "layers",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name below `bloomq`."""
    found = {}
    for base, prefix in ((ROOT / "bloomq", ""), (ROOT / "converters", "converters.")):
        for path in base.rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[prefix + ".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def package_of(path: Path, level: int) -> str:
    """What `level` dots at the start of an import mean; those of `converters` are the only ones."""
    if not level:
        return ""
    assert path.is_relative_to(ROOT / "converters"), f"{path}: import by the whole name"
    folder = path.relative_to(ROOT).parents[level - 1]
    return ".".join(["bloomq", *folder.parts])


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports: anywhere in it, or when it is imported itself."""
    tree = tree_of(path)
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package_of(path, node.level), node.module]))
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def group(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    found = module
    while found not in LEVELS:
        found = found.rpartition(".")[0]
    assert found or not module, f"{module} has no level: give it one"
    return found


def own_imports(path: Path) -> set[str]:
    known = set(modules())
    names = {n.removeprefix("bloomq").lstrip(".") for n in imports(path) if n.startswith("bloomq")}
    return {name for name in names if name in known and name}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_only_go_down(module: str) -> None:
    here = group(module)
    for other in own_imports(modules()[module]):
        there = group(other)
        allowed = here == there or LEVELS[there] < LEVELS[here] or (here, there) in SAME_LEVEL
        assert allowed, f"{module} (level {LEVELS[here]}) imports {other} (level {LEVELS[there]})"


def test_backends_do_not_import_each_other_or_the_model() -> None:
    for module, path in modules().items():
        if not module.startswith("backends."):
            continue
        mine = ".".join(module.split(".")[:2])
        for other in own_imports(path):
            assert other not in ("model", "heads", "generation", "sampling", "loading")
            assert not other.startswith("backends.") or other.startswith(mine)


@pytest.mark.parametrize("module", [m for m in sorted(modules()) if m.split(".")[0] in NO_ENGINE])
def test_the_model_and_the_loop_know_no_engine(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(modules()[module])}
    assert not roots & {"numba", "torch", "jax", "llvmlite", "safetensors", "tokenizers", "os"}


def test_import_is_light() -> None:
    code = f"import sys, bloomq; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom bloomq.cli import main\n"
        f"try: main(['--help'])\nexcept SystemExit: print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_every_exported_name_is_there() -> None:
    for name in bloomq.__all__:
        assert getattr(bloomq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bloomq.nonsense


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_catches_every_exception(module: str) -> None:
    """A backend's panic is a BaseException, so one place catches that, and re-raises what is
    not.
    """
    for node in ast.walk(tree_of(modules()[module])):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno} has a bare except"
            assert ast.unparse(node.type) != "Exception" or module == "tokenizer"


def is_compiled(function: ast.AST) -> bool:
    """Is it declared to be compiled by Numba?"""
    names = {"kernel", "compiled", "called", "njit", "_inlined"}
    return isinstance(function, ast.FunctionDef) and any(
        isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in names
        for decorator in function.decorator_list
        for node in ast.walk(decorator)
    )


def test_kernels_hold_constants_of_modules_that_their_cache_knows():
    """Else a changed constant would find kernels compiled with the old one."""
    from bloomq.backends.numba_cpu.jit import CONSTANTS

    sources = {
        node.module
        for path in (ROOT / "bloomq/backends/numba_cpu").glob("*.py")
        if re.search(r"numba_cpu\.jit|llvmlite", path.read_text())  # compiles, or is compiled
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and "numba_cpu" not in (node.module or "")
        if (node.module or "").startswith("bloomq.")
        if any(name.name.isupper() for name in node.names)
    }
    assert sources == {f"bloomq.{name}" for name in CONSTANTS}


def test_kernels_set_no_slices_to_arrays():
    """Numba compiles the words of the error that this can end in: seconds of a first run. A number
    has no shape to check."""
    functions = 0
    for path in (ROOT / "bloomq/backends/numba_cpu").glob("*.py"):
        for function in filter(is_compiled, ast.walk(tree_of(path))):
            functions += 1
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                    sliced = any(isinstance(x, ast.Slice) for x in ast.walk(node.targets[0].slice))
                    number = re.fullmatch(r"[\d.]+|np\.float32\(.*\)", ast.unparse(node.value))
                    assert number or not sliced, ast.unparse(node)
    assert functions > 30


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_unpickles(module: str) -> None:
    names = imports(modules()[module]) - {"pickle.UnpicklingError"}  # what Numba's cache may raise
    roots = {name.split(".")[0] for name in names if name != "pickle" or "jit" not in module}
    assert not roots & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    assert "torch.load" not in modules()[module].read_text()


def test_every_module_says_what_it_is() -> None:
    for module, path in modules().items():
        tree = tree_of(path)
        assert not tree.body or ast.get_docstring(tree), module


def test_error_messages_are_one_lower_case_line_without_a_full_stop() -> None:
    """Of every `raise SomethingError("...")` with a literal start."""
    for module, path in modules().items():
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            texts = [ast.unparse(arg) for arg in node.exc.args]
            for text in texts:
                assert "\\n" not in text, f"{module}:{node.lineno}"
                assert not re.search(r"\.['\"]\)?$", text), f"{module}:{node.lineno}"
