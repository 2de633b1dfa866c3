"""The `bloomq` command: text on stdout, everything else on stderr.

Exit codes: 0 done; 1 a `BloomqError`, in one line; 2 wrong usage; 130 Ctrl-C, what was produced
kept.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import NoReturn

import click

from bloomq import __version__, console
from bloomq.cli.chat import chat
from bloomq.cli.compare import compare
from bloomq.cli.convert import convert
from bloomq.cli.explore import explore
from bloomq.cli.export import export
from bloomq.cli.perplexity import perplexity
from bloomq.cli.plan import plan
from bloomq.cli.score import score
from bloomq.cli.tasks import answer, classify, embed, tag
from bloomq.cli.text import generate
from bloomq.cli.tools import bench, info, verify, warmup
from bloomq.errors import BloomqError, UsageError
from bloomq.parallel.workers import Workers, started

_ON_RANKS = ("generate", "score", "perplexity")  # what torchrun may start several of


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command and exit; every error of ours is one line. Started by torchrun, this process
    is one of several that run it together."""
    workers: Workers | None = None
    try:
        workers = started()
        with workers or nullcontext():
            if workers is not None:
                workers.speak_as_one()
            code = commands.main(args, prog_name="bloomq", standalone_mode=False, obj=workers)
    except UsageError as error:
        _fail(error, 2, workers)
    except BloomqError as error:
        _fail(error, 1, workers)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(console.INTERRUPTED)
    except BrokenPipeError:  # the reader of our pipe has left: nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of stdout: files of ours raise errors of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(OSError(f"standard output cannot be written: {error.strerror}"), 1, workers)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, code: int, workers: Workers | None) -> NoReturn:
    """Say what is wrong, the first of the workers alone, and exit."""
    if workers is None or workers.may_report():
        out = sys.stderr if workers is None else sys.__stderr__
        click.echo("error: " + " ".join(str(error).split()), file=out)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def commands() -> None:
    """BLOOM language models, quantized, on this machine's CPU."""
    context = click.get_current_context()
    if context.obj is not None and context.invoked_subcommand not in _ON_RANKS:
        raise UsageError(
            f"'bloomq {context.invoked_subcommand}' runs in one process, {', '.join(_ON_RANKS)} on "
            "several: start it without torchrun"
        )


for _command in (
    generate, chat, explore, classify, tag, answer, embed, score, perplexity, convert,
    export, compare, plan, info, verify, warmup, bench,
):  # fmt: skip
    commands.add_command(_command)
