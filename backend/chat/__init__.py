"""Two models, each in a process of its own or behind a server, streaming side by side.

`answering` is what both kinds have in common, `client` the first kind (`backend.served.client` is the second). They and
`side_by_side` are for pages and import no torch; `model_process` is the child that does.
"""
