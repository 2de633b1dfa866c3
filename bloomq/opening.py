"""From a path to a pack: a pack as it is, a checkpoint by converting it on the way in."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound, UsageError
from bloomq.files import exists
from bloomq.pack import MANIFEST, Pack
from bloomq.schemes import get_scheme


def open_or_convert(
    path: str | os.PathLike[str], scheme: str | None = None, save_pack: Path | None = None
) -> Pack:
    """The pack at `path`, or one of the checkpoint there.

    scheme: how a checkpoint's matrices are quantized; None: stored as they are. A pack has its
    scheme already; one that is asked for must be that. save_pack: where a checkpoint's pack is kept
    for the next time, and taken from if it is there and was made of this checkpoint, as far as its
    fingerprint tells; None: a temporary folder, gone with the `Pack`'s last user.

    Raises: InputNotFound, PackError, UsageError, and those of `bloomq.convert`.
    """
    path = Path(path)
    if scheme is not None:
        get_scheme(scheme)  # refuses what is none
    if exists(path / MANIFEST):
        if save_pack is not None:
            raise UsageError(f"{path}: is a pack already: save_pack is for that of a checkpoint")
        return _of_scheme(Pack.open(path), scheme)
    if not exists(path):
        raise InputNotFound(f"{path}: no such pack or checkpoint")
    if not exists(path / "config.json"):
        raise CheckpointError(f"{path}: neither a pack (manifest.json) nor a checkpoint")
    from bloomq.converters.convert import convert
    from bloomq.converters.reading import read_checkpoint

    checkpoint = read_checkpoint(path)
    wanted = str(checkpoint.provenance["dtype"]).lower() if scheme is None else scheme
    if save_pack is not None:
        if not exists(save_pack):
            convert(path, save_pack, scheme=wanted)
        return _of_scheme(_made_from(Pack.open(save_pack), path, checkpoint.fingerprint), wanted)
    folder = tempfile.TemporaryDirectory(prefix="bloomq-", ignore_cleanup_errors=True)
    target = Path(folder.name) / path.resolve().name
    try:
        convert(path, target, scheme=wanted)
        pack = Pack.open(target)
    except BaseException:  # Ctrl-C too
        folder.cleanup()
        raise
    weakref.finalize(pack, folder.cleanup)
    return pack


def _of_scheme(pack: Pack, scheme: str | None) -> Pack:
    found = pack.schemes["h.0.attn.qkv"].name
    if scheme not in (None, found):
        raise UsageError(
            f"{pack.path}: is {found} already, expected {scheme}: convert the checkpoint to it"
        )
    return pack


def _made_from(pack: Pack, checkpoint: Path, fingerprint: str) -> Pack:
    """A saved pack must be of this very checkpoint: config, tokenizer and weights."""
    origin = pack.manifest.get("provenance")
    if not isinstance(origin, dict) or origin.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{pack.path}: was not made from {checkpoint} as it is now: remove it, or choose "
            "another save_pack"
        )
    return pack
