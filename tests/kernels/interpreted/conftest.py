"""These tests run Triton's kernels in its interpreter, which must be chosen before the import."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
