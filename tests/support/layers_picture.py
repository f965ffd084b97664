"""Draw the layers of the four packages: ``python -m tests.support.layers_picture``.

It writes `docs/layers.svg` from the `layers` contracts in `pyproject.toml`; a test compares both.
"""

from __future__ import annotations

from html import escape

from tests.support.structure import ROOT, layers

PICTURE = ROOT / "docs" / "layers.svg"

_IMPORTS = {
    "vlm_collab": "imports none of the others",
    "edge_client": "imports vlm_collab",
    "server_plugin": "imports vlm_collab",
    "eval": "imports all three",
}
_WIDTH, _HEIGHT, _GAP, _TOP = 210, 38, 8, 74


def picture() -> str:
    """The picture as SVG: a column for each package, its highest layer on top."""
    packages = {layer[0][0].partition(".")[0]: layer for layer in layers()}
    most = max(map(len, packages.values()))
    width = len(packages) * (_WIDTH + _GAP) + _GAP
    height = _TOP + most * (_HEIGHT + _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="14" '
        'text-anchor="middle">',
        "<title>Layers of the four packages; a room imports only rooms below it</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for column, (package, stack) in enumerate(packages.items()):
        left = _GAP + column * (_WIDTH + _GAP)
        centre = left + _WIDTH // 2
        parts += [
            _text(centre, 32, package, 'font-weight="bold" font-size="17"'),
            _text(centre, 54, _IMPORTS[package], 'fill="#555555" font-size="12"'),
        ]
        for number, rooms in enumerate(stack):
            top = height - (number + 1) * (_HEIGHT + _GAP)
            parts.append(
                f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" '
                'fill="#e8eaf6" stroke="#3f51b5"/>'
            )
            names = ", ".join(room.partition(".")[2] for room in rooms)
            size = 'font-size="11"' if len(names) > 26 else ""
            parts.append(_text(centre, top + 24, names, size))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: int, y: int, text: str, more: str) -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(text)}</text>'.replace(" >", ">")


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
