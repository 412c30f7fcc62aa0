"""The verbs of the `megamem` command: each module's ``main(argv)`` parses its arguments and calls the library."""
