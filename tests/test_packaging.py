"""What is installed is what is in the tree."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_installed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("bloomq/**/__init__.py")
    }
    found |= {
        ".".join(["bloomq", *path.parent.relative_to(ROOT).parts])
        for path in ROOT.glob("converters/**/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_converters_are_a_part_of_bloomq() -> None:
    module = importlib.import_module("bloomq.converters")
    assert Path(module.__file__ or "").parent.name == "converters"


def test_the_core_needs_neither_torch_nor_bitsandbytes() -> None:
    core = " ".join(PROJECT["project"]["dependencies"])
    assert "torch" not in core
    assert "bitsandbytes" not in core
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "cuda",
        "jax",
        "grammar",
        "chat",
        "eval",
        "gguf",
        "hub",
        "fuzz",
        "test",
        "bench",
    }


def test_the_demo_pack_is_in_the_package_and_whole() -> None:
    from bloomq.loading import demo_pack
    from bloomq.pack import Pack

    pack = Pack.open(demo_pack())
    pack.verify()
    assert pack.nbytes < 16e6
