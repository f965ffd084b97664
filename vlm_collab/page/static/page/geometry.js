// Rectangles, computed exactly as in vlm_collab/geometry.py: which part of its source a view shows,
// and the source pixels of a region. All products stay below 2^53, so integer division is exact.

export const FITS = ["stretch", "pad", "crop"];
const MAX_SIDE_PX = 2 ** 31;
const MAX_GRID_SIDE = 4096;

/** The source rectangle that a view shows; with "pad" it is larger than the source. */
export function frameOf(source, fit, view) {
  checkSize(source);
  checkSize(view);
  const { width, height } = source;
  if (fit === "stretch") return { left: 0, top: 0, width, height };
  const wider = width * view.height >= height * view.width;
  if (fit === "pad") {
    if (wider) {
      const padded = Math.ceil((width * view.height) / view.width);
      return { left: 0, top: 0 - Math.floor((padded - height) / 2), width, height: padded };
    }
    const padded = Math.ceil((height * view.width) / view.height);
    return { left: 0 - Math.floor((padded - width) / 2), top: 0, width: padded, height };
  }
  if (wider) {
    const kept = Math.max(1, Math.floor((height * view.width) / view.height));
    return { left: Math.floor((width - kept) / 2), top: 0, width: kept, height };
  }
  const kept = Math.max(1, Math.floor((width * view.height) / view.width));
  return { left: 0, top: Math.floor((height - kept) / 2), width, height: kept };
}

/** The pixel box of a region. Throws `RangeError` for a window that is not on the grid. */
export function tokenBoxToSource(tokenBox, grid, frame, source) {
  checkSize(source);
  if (!(inside(grid.rows, 1, MAX_GRID_SIDE) && inside(grid.columns, 1, MAX_GRID_SIDE))) {
    throw new RangeError("impossible token grid");
  }
  if (!(frame.width > 0 && frame.height > 0)) throw new RangeError("impossible frame");
  const { index, sidePx, columns, rows } = tokenBox;
  if (!inside(index, 0, grid.rows * grid.columns - 1)) throw new RangeError("the token is not on the grid");
  const row = Math.floor(index / grid.columns);
  const column = index % grid.columns;
  if (!(inside(columns, 1, grid.columns - column) && inside(rows, 1, grid.rows - row))) {
    throw new RangeError("the window is not inside the grid");
  }
  if (!inside(sidePx, 1, MAX_SIDE_PX) || sidePx % 2) throw new RangeError("the side is not a positive even number");
  const half = sidePx / 2;
  const [left, right] = extent(column, columns, grid.columns, half, frame.left, frame.width, source.width);
  const [top, bottom] = extent(row, rows, grid.rows, half, frame.top, frame.height, source.height);
  return { left, top, right, bottom };
}

/** Start and length in view pixels of a picture that starts `offset` px into its frame. */
export function paddedExtent(offset, length, frame, side) {
  const start = roundHalfEven((offset * side) / frame);
  const end = roundHalfEven(((offset + length) * side) / frame);
  return [start, Math.max(end - start, 1)];
}

function extent(first, span, cells, half, offset, length, limit) {
  // The order of these operations is part of the protocol.
  const cell = length / cells;
  let centre = Math.floor(first * cell + (span * cell) / 2);
  centre = Math.min(Math.max(centre, half), length - half);
  let start = Math.max(centre - half, 0);
  const long = Math.min(Math.min(centre + half, length) - start, limit);
  start = Math.min(Math.max(start + offset, 0), limit - long);
  return [start, start + long];
}

function roundHalfEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

function checkSize({ width, height }) {
  if (!(inside(width, 1, MAX_SIDE_PX) && inside(height, 1, MAX_SIDE_PX))) {
    throw new RangeError(`impossible size ${width} x ${height}`);
  }
}

function inside(value, low, high) {
  return value >= low && value <= high;
}
