"""The command line `farms-fast`."""
