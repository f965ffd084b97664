"""Rectangles: the source image, the part a view shows, the token grid, and boxes between them.

There are four coordinate systems:

* *source* pixels: the upright original at the edge, `(width, height)` order;
* the *frame*: the rectangle of source pixels that the view shows (`Fit` says how it is chosen);
* the *view*: the small picture that is sent, the frame resized to the vision encoder's input;
* the *token grid*: rows × columns of equal cells over the view, hence over the frame.

A region crosses the wire as a `TokenBox`, four small integers, and both sides turn it into the
same pixel `Box` with `token_box_to_source`. Everything is integer arithmetic except the
centre of a token box, which is computed in IEEE double precision in one fixed order, so that a
browser gets the same pixels as Python.

Standard library only. Wrong arguments, a peer's included, raise `ValueError`.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

MAX_SIDE_PX = 1 << 31
"""Longest image, frame or token-box side accepted, in pixels. No picture format of this project
has longer sides, and every product formed here stays far below 2**53, beyond which doubles (and
so JavaScript) are not exact."""

MAX_GRID_SIDE = 1 << 12
"""Most rows or columns of a token grid. Vision encoders in use have 7 to 64."""


class Size(NamedTuple):
    """Width and height in pixels, in PIL's order."""

    width: int
    height: int


class Box(NamedTuple):
    """A rectangle of source pixels; `right` and `bottom` are exclusive, as in PIL."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def pixels(self) -> int:
        return self.width * self.height


class Grid(NamedTuple):
    """The visual tokens of a view: rows × columns, numbered row by row from the top-left."""

    rows: int
    columns: int


class Cell(NamedTuple):
    """The position of one visual token in its grid, from 0."""

    row: int
    column: int


class Fit(enum.StrEnum):
    """How a source image of any aspect ratio becomes a view of a fixed one."""

    STRETCH = "stretch"
    """The whole image, squeezed to the view's aspect."""
    PAD = "pad"
    """The whole image in its own aspect, centred between bars of one colour."""
    CROP = "crop"
    """The largest centred part of the image that has the view's aspect."""

    @property
    def warning(self) -> str | None:
        """A warning to users about this fit, in one line; None if there is none."""
        if self is not Fit.CROP:
            return None
        return (
            "the fit is crop: the model sees only the middle square of a picture that is not "
            "square, in both passes"
        )


class Frame(NamedTuple):
    """The source rectangle that the view shows, in source pixels.

    With `Fit.PAD` it is larger than the image, and `left` or `top` is negative.
    """

    left: int
    top: int
    width: int
    height: int


class TokenBox(NamedTuple):
    """A region as it crosses the wire; its pixel box can be restored exactly.

    `index` and `side_px` are b = [b₁, b₂] of Song and Kim, *Collaborative Edge-to-Server Inference
    for Vision-Language Models* (2025, arXiv 2512.16349), Eq. 11. If the cells are not square, b
    alone does not determine the window's span.

    Attributes:
        index: token at the window's top-left, row-major.
        side_px: side of the square in source pixels before clipping; even, since it is 2q.
        columns: width of the window in cells.
        rows: height of the window in cells.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which no box needs
    side_px: int
    columns: int
    rows: int


def frame_of(source: Size, fit: Fit, view: Size) -> Frame:
    """The source rectangle that a view of the given size shows.

    Stretch: the image itself. Pad: the smallest enclosing rectangle of the view's aspect, its
    free side rounded up, the image placed ⌊free / 2⌋ pixels from its left or top. Crop: the
    largest rectangle of that aspect inside, its free side rounded down but at least 1 px, placed
    ⌊free / 2⌋ pixels from the image's left or top. Integers only, so both sides agree.

    Args:
        source: size of the upright source image, px.
        fit: how the image is brought to the view's aspect.
        view: size of the view, px; only its aspect matters.

    Raises:
        ValueError: a side is not positive, or beyond `MAX_SIDE_PX`.
    """
    _check_size(source, "source")
    _check_size(view, "view")
    width, height = source
    if fit is Fit.STRETCH:
        return Frame(0, 0, width, height)
    # Compare aspects by cross-multiplication; a quotient would round.
    wider = width * view.height >= height * view.width
    if fit is Fit.PAD:
        if wider:
            padded = -(-width * view.height // view.width)
            return Frame(0, -((padded - height) // 2), width, padded)
        padded = -(-height * view.width // view.height)
        return Frame(-((padded - width) // 2), 0, padded, height)
    if wider:
        kept = max(1, height * view.width // view.height)
        return Frame((width - kept) // 2, 0, kept, height)
    kept = max(1, width * view.height // view.width)
    return Frame(0, (height - kept) // 2, width, kept)


def shown_share(source: Size, fit: Fit, view: Size) -> float:
    """Share of a picture's area that its view shows; below 1 only with `Fit.CROP`.

    Raises:
        ValueError: as `frame_of`.
    """
    frame = frame_of(source, fit, view)
    width, height = min(frame.width, source.width), min(frame.height, source.height)
    return width * height / (source.width * source.height)


def token_box_to_source(token_box: TokenBox, grid: Grid, frame: Frame, source: Size) -> Box:
    """Restore the pixel box of a region, the same on every side of the wire.

    With window origin (x, y), span (w, h) cells, cells of W/C × H/R frame pixels and half side
    q = side_px / 2: centre = (⌊x·(W/C) + w·(W/C)/2⌋, ⌊y·(H/R) + h·(H/R)/2⌋), moved to at least q
    and then to at most W − q (H − q); the box is centre ± q, clipped. These are the roundings of
    ViCrop (Zhang et al., *MLLMs Know Where to Look: Training-free Perception of Small Visual
    Details with Multimodal LLMs*, 2025, arXiv 2502.17422); Song and Kim adopt its search
    (section VI-B).

    All this happens in the frame's own coordinates. The box is then translated into the source
    image, moved inside it by the shortest way, and clipped where it is longer than the image.
    Only with `Fit.PAD` is it ever moved: a window may lie partly or wholly on the bars, where
    there are no pixels to send.

    Args:
        token_box: the region as received.
        grid: the token grid of the view.
        frame: the result of `frame_of` for that view.
        source: size of the upright source image, px.

    Returns:
        A box of at least one pixel, inside the image.

    Raises:
        ValueError: the window is not inside the grid, or the side is not a positive even number.
    """
    _check_grid_and_frame(grid, frame)
    _check_size(source, "source")
    index, side_px, columns, rows = token_box
    if not 0 <= index < grid.rows * grid.columns:
        raise ValueError(f"token {index} is not on a grid of {grid.rows} x {grid.columns}")
    row, column = divmod(index, grid.columns)
    if not (1 <= columns <= grid.columns - column and 1 <= rows <= grid.rows - row):
        raise ValueError(
            f"a window of {rows} x {columns} cells at row {row}, column {column} is not inside "
            f"a grid of {grid.rows} x {grid.columns}"
        )
    if not 0 < side_px <= MAX_SIDE_PX or side_px % 2:
        raise ValueError(f"the side of a region must be an even number of pixels, not {side_px}")
    half = side_px // 2
    left, right = _extent(
        column, columns, grid.columns, half, frame.left, frame.width, source.width
    )
    top, bottom = _extent(row, rows, grid.rows, half, frame.top, frame.height, source.height)
    return Box(left, top, right, bottom)


def whole_image(grid: Grid, frame: Frame) -> TokenBox:
    """The token box of everything the view shows.

    Its square has the frame's longer side (rounded up to even). Clipping it gives exactly the part
    of the image inside the frame.

    Raises:
        ValueError: the grid or the frame is impossible.
    """
    _check_grid_and_frame(grid, frame)
    return TokenBox(0, 2 * -(-max(frame.width, frame.height) // 2), grid.columns, grid.rows)


def adds_detail(box: Box, target: Size, frame: Frame, view: Size) -> bool:
    """Whether the local view of a box would show more detail of it than the global view does.

    In the global view the box is ``box.width · view.width / frame.width`` pixels wide, or
    ``box.width`` if the view is enlarged. In the local view, which is never enlarged, it is
    ``min(box.width, target.width)`` wide. The local view adds detail if it is at least one whole
    pixel wider or higher, or if part of the box is outside the frame. Less than one pixel is
    rounding.

    Integers only, so both sides get the same result.

    Args:
        box: the region, in source px; not empty.
        target: largest size of the local view, px.
        frame: the part that the global view shows.
        view: size of the global view, px.
    """
    right, bottom = frame.left + frame.width, frame.top + frame.height
    if box.left < frame.left or box.top < frame.top or box.right > right or box.bottom > bottom:
        return True
    return _shows_more(box.width, target.width, frame.width, view.width) or _shows_more(
        box.height, target.height, frame.height, view.height
    )


def has_more_detail(source: Size, target: Size, frame: Frame, view: Size) -> bool:
    """Whether any region inside the frame adds detail; see `adds_detail`.

    Args:
        source: size of the upright source image, px.
        target, frame, view: as in `adds_detail`.
    """
    # The gain grows with the box, until the box is larger than the target.
    width, height = min(source.width, target.width), min(source.height, target.height)
    return _shows_more(width, target.width, frame.width, view.width) or _shows_more(
        height, target.height, frame.height, view.height
    )


def cell_to_source(row: int, column: int, grid: Grid, frame: Frame, source: Size) -> Box:
    """The source pixels that one visual token shows.

    A cell has the pixels whose centres are inside it; a centre on the line between two cells
    belongs to the later one. So the cells of a grid cover the frame's pixels without gap or
    overlap. If cells are smaller than pixels, a cell without a pixel centre gets the pixel that
    contains the cell's own centre.

    Returns:
        A box inside the image. It is empty (`pixels` is 0) for a cell that shows only the bars
        of `Fit.PAD`.

    Raises:
        ValueError: the cell is not on the grid, or the grid or the frame is impossible.
    """
    _check_grid_and_frame(grid, frame)
    _check_size(source, "source")
    if not (0 <= row < grid.rows and 0 <= column < grid.columns):
        raise ValueError(
            f"row {row}, column {column} is not on a grid of {grid.rows} x {grid.columns}"
        )
    left, right = _cell_extent(column, grid.columns, frame.left, frame.width, source.width)
    top, bottom = _cell_extent(row, grid.rows, frame.top, frame.height, source.height)
    return Box(left, top, right, bottom)


def source_to_cell(x: int, y: int, grid: Grid, frame: Frame) -> Cell | None:
    """The cell that shows the source pixel in column `x`, row `y`; inverse of `cell_to_source`.

    Returns:
        The cell that contains the pixel's centre; None if the view does not show the pixel (cut
        off by `Fit.CROP`, or outside the image).

    Raises:
        ValueError: the grid or the frame is impossible.
    """
    _check_grid_and_frame(grid, frame)
    x, y = x - frame.left, y - frame.top
    if not (0 <= x < frame.width and 0 <= y < frame.height):
        return None
    row = (2 * y + 1) * grid.rows // (2 * frame.height)
    return Cell(row, (2 * x + 1) * grid.columns // (2 * frame.width))


def _extent(
    first: int, span: int, cells: int, half: int, offset: int, length: int, limit: int
) -> tuple[int, int]:
    """One axis of `token_box_to_source`: start and end in source pixels."""
    # The order of these operations is part of the protocol; see the module's docstring.
    cell = length / cells
    centre = math.floor(first * cell + span * cell / 2)
    centre = min(max(centre, half), length - half)
    start, end = max(centre - half, 0), min(centre + half, length)
    extent = min(end - start, limit)
    start = min(max(start + offset, 0), limit - extent)
    return start, start + extent


def _shows_more(length: int, target: int, frame: int, view: int) -> bool:
    """One axis of `adds_detail`, multiplied by the frame's side, so that nothing is rounded."""
    return (min(length, target) - 1) * frame >= length * min(view, frame)


def _cell_extent(index: int, cells: int, offset: int, length: int, limit: int) -> tuple[int, int]:
    """One axis of `cell_to_source`: start and end in source pixels, clipped to the image."""
    # The first pixel whose centre is at or beyond i·length/cells is ⌈i·length/cells − 1/2⌉.
    start = -((cells - 2 * index * length) // (2 * cells))
    end = -((cells - 2 * (index + 1) * length) // (2 * cells))
    if start == end:
        start = (2 * index + 1) * length // (2 * cells)
        end = start + 1
    start, end = (min(max(edge + offset, 0), limit) for edge in (start, end))
    return start, end


def _check_size(size: Size, name: str) -> None:
    if not (0 < size.width <= MAX_SIDE_PX and 0 < size.height <= MAX_SIDE_PX):
        raise ValueError(f"impossible {name} size {size.width} x {size.height}")


def _check_grid_and_frame(grid: Grid, frame: Frame) -> None:
    if not (0 < grid.rows <= MAX_GRID_SIDE and 0 < grid.columns <= MAX_GRID_SIDE):
        raise ValueError(f"impossible token grid {grid.rows} x {grid.columns}")
    # A frame is derived, not received; padding to an extreme aspect may exceed MAX_SIDE_PX.
    if not (frame.width > 0 and frame.height > 0):
        raise ValueError(f"impossible frame size {frame.width} x {frame.height}")
