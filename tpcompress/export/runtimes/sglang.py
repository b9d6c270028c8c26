"""SGLang, which prunes videos of one model (see README.md; read in its source, not run)."""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime
from tpcompress.insertion.plan import PruningPlan


class SGLang(Runtime):
    """SGLang: no plan; its EVS serves videos of Nemotron Nano VL alone, no image of a family here."""

    name = "sglang"
    title = "SGLang"

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        return "it prunes videos of NemotronH_Nano_VL_V2 only and has no hook for other models"
