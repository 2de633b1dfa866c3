"""Run the demo and draw its terminal as docs/demo.svg.

python docs/make_picture.py
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 92
SAMPLING = ["--temperature", "0.7", "--top-p", "0.9"]
COMMANDS = (
    ["generate", "Once upon a time", "-n", "80", *SAMPLING, "--seed", "7"],
    ["generate", "Il était une fois", "-n", "60", *SAMPLING, "--seed", "1"],
)


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for arguments in COMMANDS:
        shown = " ".join(f'"{a}"' if " " in a else a for a in arguments)
        console.print(Text("$ ", "bold green") + Text(f"bloomq {shown}", "bold"))
        done = subprocess.run(
            [sys.executable, "-m", "bloomq", *arguments], capture_output=True, text=True, check=True
        )
        notes = done.stderr.strip().splitlines()
        console.print(Text(notes[0], "dim"))
        console.print(Text.assemble((arguments[1], "bold"), done.stdout.rstrip("\n")))
        console.print(Text(notes[-1], "dim"))
        console.print()
    target = Path(__file__).parent / "demo.svg"
    picture = console.export_svg(title="bloomq")
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # no fetching


if __name__ == "__main__":
    main()
