"""The errors of bloomq: one tree, so that `except bloomq.BloomqError` catches all and nothing else.

    BloomqError
    ├── UsageError (ValueError)          an argument that cannot be: an option, an empty prompt
    ├── InputNotFound (FileNotFoundError)  no such path
    ├── CheckpointError (ValueError)     a checkpoint that is damaged, incomplete or of another kind
    ├── ConfigError (ValueError)         a config.json that bloomq cannot honour
    ├── TokenizerError (ValueError)      a tokenizer.json that is damaged or does not fit the model
    ├── PackError (ValueError)           a pack that is damaged, or written by a newer version
    ├── PromptCacheError (ValueError)    a prompt's cache that is damaged or of another model
    ├── OutputError (OSError)            the output cannot be written: exists, disk full, no rights
    ├── BackendError (RuntimeError)      a backend that is unknown, absent or cannot run this pack
    ├── CapacityError (ValueError)       more tokens than the cache has room for
    └── NumericError (ArithmeticError)   NaN or infinity, with the name of the layer or the tensor

A message is one line: what and where, what was expected and what was found, the remedy.
"""


class BloomqError(Exception):
    """Base of every error that bloomq raises on purpose."""


class UsageError(BloomqError, ValueError):
    """An argument whose value cannot be."""


class InputNotFound(BloomqError, FileNotFoundError):
    """A path that does not exist."""


class CheckpointError(BloomqError, ValueError):
    """A checkpoint that is damaged, incomplete or not a BLOOM."""


class ConfigError(BloomqError, ValueError):
    """A model configuration that bloomq cannot honour."""


class TokenizerError(BloomqError, ValueError):
    """A tokenizer file that cannot be read or does not fit the model."""


class PackError(BloomqError, ValueError):
    """A pack that is damaged, incomplete or of a newer format."""


class PromptCacheError(BloomqError, ValueError):
    """A file of a prompt's keys and values that is damaged, or belongs to another model."""


class OutputError(BloomqError, OSError):
    """An output that cannot be written."""


class BackendError(BloomqError, RuntimeError):
    """A backend that is unknown, not available here or unable to run the pack."""


class CapacityError(BloomqError, ValueError):
    """More tokens than the key/value cache has room for."""


class NumericError(BloomqError, ArithmeticError):
    """NaN or infinity where a number belongs; the message names the layer or tensor."""
