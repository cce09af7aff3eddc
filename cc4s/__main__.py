"""`python -m cc4s`, also for torchrun."""

import sys

from cc4s.cli import main

sys.exit(main())
