"""Prototypes of single images: caught up lazily, a few in memory, the rest in a store."""
