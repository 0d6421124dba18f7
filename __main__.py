"""``python -m preceptor``, as ``torchrun -m preceptor`` calls it."""

import sys

from .cli import main

sys.exit(main())
