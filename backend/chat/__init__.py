"""Two models in their own processes, streaming side by side.

`client` and `side_by_side` are for pages and import no torch; `model_process` is the child that does.
"""
