"""The rollout tool on a model whose files nobody could look at before they load, as of one still to be fetched."""

from __future__ import annotations

import sys

from cpinfer.models import loading
from cpinfer_tools import rollout

if __name__ == "__main__":
    loading.local_folder = lambda model: None
    sys.exit(rollout.main())
