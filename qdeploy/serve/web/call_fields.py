"""Fields that say which of the model's calls are made, at top level in the bodies of all interfaces."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.speed import EXACT

Name = Annotated[str, Field(max_length=200)]


class CallFields(BaseModel):
    """``speed`` is `exact`, `balanced` or `fast`; the others are as the runtime takes them."""

    speed: Name | None = None
    forecast: Name | None = None
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @property
    def calls(self) -> CallSchedule:
        """Which are made; UsageError that begins with the field's name."""
        interval = None if self.guidance_interval is None else (self.guidance_interval[0], self.guidance_interval[1])
        return CallSchedule.from_options(interval, self.forecast, EXACT if self.speed is None else self.speed)


class CallFieldsOfForm(CallFields):
    """The same in a form, where an interval is a text: `0.2,0.8`."""

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def split_text(cls, value: Any) -> Any:
        """Parts of a text; anything else as it is."""
        return value.split(",") if isinstance(value, str) else value
