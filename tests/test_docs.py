"""The pages, the examples and the API reference say what is true: they are run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import warm

import bloomq

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


def run(*command: object, cwd: Path) -> str:
    done = warm.python(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_something(example: Path, tmp_path: Path):
    assert run(example, cwd=tmp_path).strip()


def test_the_code_for_those_who_come_from_transformers_runs(tmp_path: Path, demo_checkpoint: Path):
    shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")
    page = (ROOT / "docs" / "coming-from-transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "page.py").write_text("\n".join(blocks))
    assert run("page.py", cwd=tmp_path).strip()


def test_the_code_about_generation_runs(tmp_path: Path):
    page = (ROOT / "docs" / "generation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "page.py").write_text("\n".join(blocks))
    assert run("page.py", cwd=tmp_path).strip()


def test_the_commands_about_converting_run(tmp_path: Path, demo_checkpoint: Path):
    shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text())
    page = (ROOT / "docs" / "converting.md").read_text()
    commands = re.findall(r"^\$ bloomq (.+)$", page, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        run("-m", "bloomq", *command.split(), cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_public_name_is_in_the_api_reference(tmp_path: Path):
    pytest.importorskip("pdoc")
    run(ROOT / "docs" / "make_api.py", tmp_path / "api", cwd=tmp_path)
    page = (tmp_path / "api" / "bloomq.html").read_text()
    for name in bloomq.__all__:
        assert f'id="{name}"' in page, name
    assert "numpy._typing" not in re.sub(r"<[^>]+>", "", page)  # types by the names they go by


def test_every_public_name_says_what_it_is():
    for name in bloomq.__all__:
        assert (getattr(bloomq, name).__doc__ or "").strip(), name
