"""Quantdeck's pages. Nothing here imports torch or transformers: models run in processes of their own."""
