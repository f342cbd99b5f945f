"""`python -m farms_fast`, the same as the command `farms-fast`."""

from farms_fast.cli.main import main

if __name__ == "__main__":
    main()
