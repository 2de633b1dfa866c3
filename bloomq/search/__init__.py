"""Search: several continuations under way at once, of which the best are kept."""
