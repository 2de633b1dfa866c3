"""Foreign formats out of packs: each module writes one."""
