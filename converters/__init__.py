"""Foreign formats: checkpoints into packs, and adapters. Each reader knows one; `convert` knows
none.

Installed as `bloomq.converters`, another name than the folder's: so its modules import each other
relatively, and type checkers see them by either.
"""
