"""Conversations: chat templates as text, and a model that answers turn by turn."""
