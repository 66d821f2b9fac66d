"""Checkpoint folders: validated headers, sizes, the AutoAWQ format, a streaming writer, and a loader."""
