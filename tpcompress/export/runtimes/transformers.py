"""transformers, with tpcompress imported: runs every plan."""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime
from tpcompress.insertion.plan import PruningPlan


class Transformers(Runtime):
    """transformers with tpcompress imported, which is how exports are written and verified."""

    name = "transformers"
    title = "transformers"

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        return None
