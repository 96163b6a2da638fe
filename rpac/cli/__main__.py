"""`python -m rpac.cli`."""

from rpac.cli import main

if __name__ == "__main__":
    main()
