"""What the tab says beside the effort: how long a run takes with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from lib_estimate.errors import EstimateError
from lib_estimate.interfaces.fields import identifier
from lib_estimate.interfaces.markup import efforts
from lib_estimate.interfaces.view import takes
from lib_estimate.request import EstimateRequest

# Of which it is told anew when they change.
COSTLY = (
    "target", "stages", "part", "use", "images", "sampling_steps", "width", "height", "steps", "trajectories",
)  # fmt: skip


class EffortTab:
    """A line below the effort."""

    def lay_out(self) -> None:
        self.line = gr.HTML(self.said(EstimateRequest()), elem_id=identifier("takes"))

    @staticmethod
    def said(request: EstimateRequest) -> str:
        return efforts(takes(request))

    def connect(self, fields: Mapping[str, Any], request: Callable[[Sequence[Any]], EstimateRequest]) -> None:
        """request: of the values of all fields."""

        def told(*values: Any) -> Any:
            try:
                return self.said(request(values))
            except (EstimateError, ValueError, TypeError, ArithmeticError):  # of a field that is still being filled in
                return gr.update()

        for name in COSTLY:
            fields[name].change(
                told, inputs=[*fields.values()], outputs=[self.line], queue=False, show_progress="hidden"
            )
