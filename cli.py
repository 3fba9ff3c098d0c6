"""Put the checkout's command line behind `python cli.py ...`."""

from seprune.cli import main

if __name__ == "__main__":
    main()
