"""One module per page, each with `build(demo, home, ...)`."""
