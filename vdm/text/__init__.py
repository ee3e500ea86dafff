"""Prompts in, tokens and their embeddings out."""
