"""Checkpoints into packs. Each reader knows one foreign format; `convert` knows none."""
