"""Nothing of these tests reaches a hub, and none of its caches outside a temporary folder."""

import os
import tempfile

os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf_home_"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
