"""Quantdeck's engine room: everything that is not a page."""
