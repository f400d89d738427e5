"""The command line. Each command is one file; what a command needs is imported when it runs."""
