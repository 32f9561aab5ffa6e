"""Text that others wrote, shown so that it can neither hide nor steer a terminal or a page."""

from typing import Any

# Characters that no eye can see, that reorder their surroundings, or that have no UTF-8, are spelled out.
UNSEEN = (
    *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0xFFFE, 0xFFFF,
    *range(0xD800, 0xE000),
)  # fmt: skip
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= {code: f"[U+{code:04X}]" for code in UNSEEN}


def visible(value: Any) -> Any:
    """Text with its invisible characters spelled out; anything else as it is."""
    return value.translate(VISIBLE) if isinstance(value, str) else value
