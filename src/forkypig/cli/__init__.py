"""The command line: one module per noun. Printing and exit codes live only here; all else is the SDK's."""
