"""Where models and text come from: the built-in demo, local folders and files, the Hub."""
