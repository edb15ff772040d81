"""The frozen records that travel from stage to stage. They carry data and no behaviour."""

from quantkit.records.judging import (
    EXIT_CODES,
    Artifact,
    Check,
    EvalResult,
    Judgement,
    Metric,
    Verdict,
)
from quantkit.records.plan import (
    AllocatedUnit,
    Allocation,
    BlockPlan,
    FoldPlan,
    GroupPlan,
    KvCachePlan,
    LinearPlan,
    Plan,
    Source,
    TensorInfo,
    UnitCost,
)
from quantkit.records.progress import (
    Event,
    Progress,
)
from quantkit.records.report import (
    ArtifactReport,
    Report,
    Result,
)
from quantkit.records.solving import (
    KvRecord,
    KvStats,
    LayerRecord,
    LayerStats,
    QuantizedLayer,
    SolvedBlock,
    TokenWindows,
)

__all__ = [
    "EXIT_CODES",
    "AllocatedUnit",
    "Allocation",
    "Artifact",
    "ArtifactReport",
    "BlockPlan",
    "Check",
    "EvalResult",
    "Event",
    "FoldPlan",
    "GroupPlan",
    "Judgement",
    "KvCachePlan",
    "KvRecord",
    "KvStats",
    "LayerRecord",
    "LayerStats",
    "LinearPlan",
    "Metric",
    "Plan",
    "Progress",
    "QuantizedLayer",
    "Report",
    "Result",
    "SolvedBlock",
    "Source",
    "TensorInfo",
    "TokenWindows",
    "UnitCost",
    "Verdict",
]
