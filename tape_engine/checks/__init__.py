"""Rules and gradients checked: against finite differences, and against ``torch.autograd`` where that knows the way.

`case` is one operation with the contents of its values, `ways` are the three ways to its gradients: the rule,
torch, differences. `compare` holds them against each other, `hints` recognises what a wrong gradient looks like.
`rules` is ``te.check_rule``, with `manners` and `second`; `again` runs a tape once more in float64, and `tapes` is
``te.check``. `reports` are what they give.
"""

from __future__ import annotations

from .reports import CallReport, Fault, GradientReport, RuleReport
from .rules import check_rule
from .tapes import check

__all__ = ["CallReport", "Fault", "GradientReport", "RuleReport", "check", "check_rule"]
