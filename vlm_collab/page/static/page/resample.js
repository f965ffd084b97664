// Downscaling with an antialiased bicubic filter, as Pillow does it (see
// vlm_collab/pictures/images.py).
//
// Vision encoders are trained with that filter. A canvas resizes with a filter of its browser's
// choice, sometimes without antialiasing, so it is only used to read pixels.

const OVERSAMPLING = 2; // blocks are averaged first, to no less than twice the target size
const TILE_PX = 4096;
const TURN_MS = 30; // the event loop runs at least this often

/**
 * Downscale the pixels of a box to `size`; transparent ones become white.
 *
 * Only one tile of a large picture is in memory as plain pixels at a time, and the event loop runs
 * between two tiles.
 */
export async function resample(bitmap, box, size) {
  const width = box.right - box.left;
  const height = box.bottom - box.top;
  const byX = Math.max(1, Math.floor(width / size.width / OVERSAMPLING));
  const byY = Math.max(1, Math.floor(height / size.height / OVERSAMPLING));
  const reduced = await averaged(bitmap, box, byX, byY);
  const across = bicubic(reduced.width, size.width, width / byX);
  const down = bicubic(reduced.height, size.height, height / byY);
  const half = along(reduced.values, reduced.height, reduced.width * 3, 3, across);
  const values = down === null ? half : along(half, 1, 0, size.width * 3, down);
  const image = new ImageData(size.width, size.height);
  for (let from = 0, to = 0; from < values.length; from += 3, to += 4) {
    image.data[to] = values[from];
    image.data[to + 1] = values[from + 1];
    image.data[to + 2] = values[from + 2];
    image.data[to + 3] = 255;
  }
  return image;
}

/** Average blocks of byX × byY pixels; the last block of a row or column may be smaller. */
async function averaged(bitmap, box, byX, byY) {
  const boxWidth = box.right - box.left;
  const boxHeight = box.bottom - box.top;
  const width = Math.ceil(boxWidth / byX);
  const height = Math.ceil(boxHeight / byY);
  const values = new Float32Array(width * height * 3);
  // Tiles of whole blocks: canvases are limited, in some browsers to 4096 px per side.
  const columns = Math.max(1, Math.floor(TILE_PX / byX)) * byX;
  const rows = Math.max(1, Math.floor(TILE_PX / byY / 8)) * byY;
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(columns, boxWidth);
  canvas.height = Math.min(rows, boxHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
  let since = performance.now();
  for (let top = 0; top < boxHeight; top += rows) {
    const tall = Math.min(rows, boxHeight - top);
    for (let left = 0; left < boxWidth; left += columns) {
      const wide = Math.min(columns, boxWidth - left);
      context.fillStyle = "#fff";
      context.fillRect(0, 0, wide, tall);
      context.drawImage(bitmap, box.left + left, box.top + top, wide, tall, 0, 0, wide, tall);
      const { data } = context.getImageData(0, 0, wide, tall);
      for (let y = 0, from = 0; y < tall; y++) {
        const line = (Math.floor((top + y) / byY) * width + left / byX) * 3;
        for (let x = 0, to = line; x < wide; to += 3) {
          for (const end = Math.min(x + byX, wide); x < end; x++, from += 4) {
            values[to] += data[from];
            values[to + 1] += data[from + 1];
            values[to + 2] += data[from + 2];
          }
        }
      }
      if (performance.now() - since > TURN_MS) {
        await new Promise((resume) => setTimeout(resume));
        since = performance.now();
      }
    }
  }
  if (byX * byY > 1) {
    for (let y = 0, to = 0; y < height; y++) {
      const tall = Math.min(byY, boxHeight - y * byY);
      for (let x = 0; x < width; x++) {
        const pixels = tall * Math.min(byX, boxWidth - x * byX);
        for (let channel = 0; channel < 3; channel++, to++) {
          values[to] = Math.round(values[to] / pixels);
        }
      }
    }
  }
  return { values, width, height };
}

/** For each output pixel: start and weights of its filter taps; null if the size stays the same. */
function bicubic(available, size, length) {
  if (available === size && length === size) return null;
  const scale = length / size;
  const stretch = Math.max(scale, 1);
  const support = 2 * stretch;
  return Array.from({ length: size }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const start = Math.max(0, Math.floor(centre - support + 0.5));
    const end = Math.min(available, Math.floor(centre + support + 0.5));
    const weights = new Float32Array(end - start);
    let sum = 0;
    for (let i = start; i < end; i++) {
      sum += weights[i - start] = kernel((i - centre + 0.5) / stretch);
    }
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/** Keys' cubic convolution with a = -1/2. */
function kernel(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/** Apply taps along one axis: `lines` lines, `stride` apart, of pixels that are `step` apart. */
function along(values, lines, stride, step, taps) {
  if (taps === null) return values;
  const out = new Uint8ClampedArray(lines * taps.length * step); // rounds and clamps
  for (let line = 0, to = 0; line < lines; line++) {
    for (const { start, weights } of taps) {
      const from = line * stride + start * step;
      for (let part = 0; part < step; part++, to++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += values[from + i * step + part] * weights[i];
        out[to] = sum;
      }
    }
  }
  return out;
}
