// EXIF orientation, for formats to which the browser does not apply it.
//
// Browsers rotate a JPEG by its EXIF data. Chromium does not rotate a WebP, and cameras and phones
// write such files. Whether the browser rotates a format is tested once with a file of two pixels,
// so that no picture is rotated twice.

const ORIENTATION = 0x0112;
const SHORT = 3;
// Two black pixels side by side, with orientation 6: upright, one lies above the other.
const TURNED = {
  webp:
    "UklGRkoAAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TAkAAAAvAQAAAIiI/gcARVhJRhoAAABNTQAqAAAACAABARIA" +
    "AwAAAAEABgAAAAAAAA==",
  png:
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAAAAADRSSBWAAAAGmVYSWZNTQAqAAAACAABARIAAwAAAAEABgAAAAAAANZnS2k" +
    "AAAALSURBVHicY2BgAAAAAwABuK06YwAAAABJRU5ErkJggg==",
};
// For each orientation, the canvas transform that turns a stored picture of w × h upright.
const TRANSFORMS = {
  2: (w, h) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: (w, h) => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w, h) => [0, -1, 1, 0, 0, w],
};
const applied = new Map(); // format -> a promise of whether the browser rotates it

/** Decode a picture to an upright bitmap. */
export async function upright(blob) {
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  const format = formatOf(await part(blob, 0, 16));
  if (format === null) return bitmap;
  const orientation = await (format === "webp" ? ofWebp(blob) : ofPng(blob));
  if (!(orientation in TRANSFORMS) || (await applies(format))) return bitmap;
  return turned(bitmap, orientation);
}

function applies(format) {
  if (!applied.has(format)) {
    const bytes = Uint8Array.from(atob(TURNED[format]), (letter) => letter.charCodeAt(0));
    const trial = createImageBitmap(new Blob([bytes]), { imageOrientation: "from-image" });
    applied.set(format, trial.then(({ width }) => width === 1));
  }
  return applied.get(format);
}

async function turned(bitmap, orientation) {
  const { width, height } = bitmap;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = orientation > 4 ? [height, width] : [width, height];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.setTransform(...TRANSFORMS[orientation](width, height));
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return createImageBitmap(canvas);
}

function formatOf(bytes) {
  const letters = String.fromCharCode(...bytes);
  if (/^RIFF....WEBP/s.test(letters)) return "webp";
  return letters.startsWith("\x89PNG\r\n\x1a\n") ? "png" : null;
}

async function ofWebp(blob) {
  for (let place = 12; place + 8 <= blob.size; ) {
    const head = await part(blob, place, place + 8);
    const size = view(head).getUint32(4, true);
    if (letters(head, 0) === "EXIF") return orientationIn(await part(blob, place + 8, place + 8 + size));
    place += 8 + size + (size % 2);
  }
  return 1;
}

async function ofPng(blob) {
  for (let place = 8; place + 12 <= blob.size; ) {
    const head = await part(blob, place, place + 8);
    const size = view(head).getUint32(0);
    if (letters(head, 4) === "eXIf") return orientationIn(await part(blob, place + 8, place + 8 + size));
    if (letters(head, 4) === "IDAT") return 1; // EXIF data after the pixels is rare, and they have many chunks
    place += 12 + size;
  }
  return 1;
}

/** The orientation in EXIF data; 1, upright, if there is none. */
function orientationIn(bytes) {
  const from = letters(bytes, 0) === "Exif" ? 6 : 0; // some writers keep the prefix of a JPEG
  const order = letters(bytes, from).slice(0, 2);
  if (order !== "II" && order !== "MM") return 1;
  const little = order === "II";
  const tiff = view(bytes.subarray(from));
  try {
    const directory = tiff.getUint32(4, little);
    const count = tiff.getUint16(directory, little);
    for (let entry = directory + 2; entry < directory + 2 + count * 12; entry += 12) {
      if (tiff.getUint16(entry, little) !== ORIENTATION) continue;
      return tiff.getUint16(entry + 2, little) === SHORT ? tiff.getUint16(entry + 8, little) : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // truncated data
  }
  return 1;
}

async function part(blob, from, to) {
  return new Uint8Array(await blob.slice(from, to).arrayBuffer());
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function letters(bytes, place) {
  return String.fromCharCode(...bytes.subarray(place, place + 4));
}
