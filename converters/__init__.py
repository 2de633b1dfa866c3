"""Foreign formats: checkpoints into packs, and adapters. Each reader knows one; `convert` knows
none.
"""
