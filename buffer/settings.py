"""The base class of every settings section."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen section of settings. A knob is a field; the string under it says meaning, unit and why this default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
