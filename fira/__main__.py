"""`python -m fira` is the `fira` command."""
from fira.cli import main

if __name__ == "__main__":
    main()
