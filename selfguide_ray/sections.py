"""What settings are made of: sections that refuse what they do not know, and values for either family of tasks."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")


class Section(BaseModel):
    """A group of settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _complete_families(cls, value: Any) -> Any:
        """A setting given for one family keeps its default for the other; a section left empty has all its defaults."""
        if not isinstance(value, dict):
            return {} if value is None else value
        completed = dict(value)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, dict) and isinstance(value.get(name), dict):
                completed[name] = {**field.default, **value[name]}
        return completed


class PerFamily(Section, Generic[T]):
    """A setting that differs between classification and generation tasks; one value stands for both."""

    classification: T
    generation: T

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        return value if isinstance(value, dict | PerFamily) else {"classification": value, "generation": value}

    def of(self, labels: Sequence[str]) -> T:
        """The value for a task with these labels."""
        return self.classification if labels else self.generation


def per_family(classification: Any, generation: Any) -> Any:
    """The default of a PerFamily field."""
    return Field({"classification": classification, "generation": generation})
