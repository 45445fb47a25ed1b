"""The command line: every command, its messages and its exit codes."""
