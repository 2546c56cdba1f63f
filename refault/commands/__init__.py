"""The verbs of the `refault` command, one module each: `configure(parser)` and `main(args) -> int`."""
