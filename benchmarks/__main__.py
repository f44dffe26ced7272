"""The entry point: ``python -m benchmarks NAME [options]``."""

import sys

from benchmarks.harness import main
from safebasin.errors import UserError

try:
    main()
except UserError as error:
    sys.exit(f"benchmarks: {error}")
