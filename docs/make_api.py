"""Write the API reference, from docstrings, as HTML: python docs/make_api.py [FOLDER]

FOLDER is build/api unless given. Needs pdoc (of the `test` extra).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import bloomq

# Beside what `import bloomq` offers: the interface that a backend implements, and what it is made
# of, for those who write one.
MODULES = ("bloomq", "bloomq.outputs", "bloomq.layers", "bloomq.weights", "bloomq.schemes")


# Types that say less when they are spelled out.
ALIASES = ("ArrayLike", "F32", "F64", "I64", "X", "Array")


def main(folder: Path) -> None:
    for name in bloomq.__all__:  # looked up when first used, which pdoc does not do
        setattr(bloomq, name, getattr(bloomq, name))
    for name, module in sys.modules.items():
        if name.startswith("bloomq"):
            named = {alias: type(alias, (), {"__module__": "builtins"}) for alias in ALIASES}
            vars(module).update({a: t for a, t in named.items() if a in vars(module)})
    pdoc.render.configure(docformat="markdown", show_source=False)
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"{folder / 'bloomq.html'}: {len(bloomq.__all__)} names")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
