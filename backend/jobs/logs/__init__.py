"""A job's log: written line by line, bounded on disk, without secrets, whatever a program prints; and read by many.

What is written are whole lines of plain text. The log is a row of files, `log.log` (the newest), `log.log.1`,
`log.log.2`, ...
"""
