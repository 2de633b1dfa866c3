"""`python -m bloomq` is the `bloomq` command."""

from bloomq.cli import main

main()
