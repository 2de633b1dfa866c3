"""The README's commands and code do what it says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import heads
import pytest
import warm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (bloomq .+?(?:\\\n.+?)*)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the checkpoints the README names, and nothing else."""
    shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")
    for head, name in (("sequence", "languages"), ("token", "tags"), ("question", "answers")):
        heads.assemble(head, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(workplace: Path) -> None:
    assert len(COMMANDS) >= 3
    for command in COMMANDS:
        done = warm.python("-m", "bloomq", *shlex.split(command)[1:])
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_python_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PYTHON
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_link_and_file_of_the_map_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    for name in re.findall(r"^\| `([\w/.]+)` \|", README, re.MULTILINE):
        assert (ROOT / name).exists() or (ROOT / "bloomq" / name).exists(), name


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
