"""`python -m seprune`, for torchrun."""

from seprune.cli import main

if __name__ == "__main__":
    main()
