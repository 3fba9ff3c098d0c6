"""`python -m seprune`, for torchrun."""

import sys
from pathlib import Path

# `-m` puts the working folder first: modules that lie there by chance are not the library's, nor
# are those of this package (`statistics`) where it is started from inside of itself
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from seprune.cli import main

if __name__ == "__main__":
    main()
