// Pictures: an original that stays on this device, its encoded view, and crops of it.

import { pixelsOnly } from "./container.js";
import { PictureError } from "./errors.js";
import { frameOf, paddedExtent } from "./geometry.js";
import { Codec } from "./messages.js";
import { upright } from "./orientation.js";
import { resample } from "./resample.js";

const MAX_SOURCE_BYTES = 2 ** 30;
const MAX_SIDE_PX = 2 ** 20; // limit of the protocol
const PAD_COLOUR = "rgb(122, 116, 104)"; // the mean colour that CLIP encoders subtract
const PREVIEW_PX = 1600;
const TYPES = { [Codec.JPEG]: "image/jpeg", [Codec.PNG]: "image/png", [Codec.WEBP]: "image/webp" };

/** The codecs that this browser can encode. */
export async function encodable() {
  const canvas = newCanvas(1, 1);
  const known = [Codec.JPEG, Codec.WEBP, Codec.PNG];
  const blobs = await Promise.all(known.map((codec) => toBlob(canvas, codec, 90)));
  // A browser that lacks an encoder makes a PNG instead.
  return known.filter((codec, place) => blobs[place]?.type === TYPES[codec]);
}

/**
 * An original, kept as its file. All sizes are those of the upright picture, with the EXIF
 * orientation applied. Decoded pixels are large: `release` frees them until they are needed again.
 */
export class Picture {
  #blob;
  #bitmap;
  #users = 0;
  #released = false;
  #views = new Map();

  /** Use `open`. */
  constructor(blob, name, bitmap) {
    this.#blob = blob;
    this.#bitmap = Promise.resolve(bitmap);
    this.name = name;
    this.originalBytes = blob.size;
    this.size = { width: bitmap.width, height: bitmap.height };
  }

  /** Open a file. Throws `PictureError`. */
  static async open(blob, name) {
    if (blob.size === 0) throw new PictureError(`${name} is empty.`);
    if (blob.size > MAX_SOURCE_BYTES) throw new PictureError(`${name} is larger than 1 GiB.`);
    const bitmap = await decoded(blob, name);
    if (Math.max(bitmap.width, bitmap.height) > MAX_SIDE_PX) {
      throw new PictureError(`${name} is too large: ${bitmap.width} × ${bitmap.height} pixels.`);
    }
    return new Picture(blob, name, bitmap);
  }

  /** Make the encoded view, once for each combination of arguments. */
  async view(side, fit, codec, quality) {
    const key = JSON.stringify([side, fit, codec, quality]);
    if (!this.#views.has(key)) this.#views.set(key, this.#view(side, fit, codec, quality));
    try {
      return await this.#views.get(key);
    } catch (error) {
      this.#views.delete(key);
      throw error;
    }
  }

  async #view(side, fit, codec, quality) {
    const frame = frameOf(this.size, fit, side);
    const canvas = newCanvas(side.width, side.height);
    const context = canvas.getContext("2d");
    if (fit === "pad") {
      const { width: sourceWidth, height: sourceHeight } = this.size;
      const [left, width] = paddedExtent(-frame.left, sourceWidth, frame.width, side.width);
      const [top, height] = paddedExtent(-frame.top, sourceHeight, frame.height, side.height);
      context.fillStyle = PAD_COLOUR;
      context.fillRect(0, 0, side.width, side.height);
      const whole = { left: 0, top: 0, right: sourceWidth, bottom: sourceHeight };
      context.putImageData(await this.#pixels(whole, { width, height }), left, top);
    } else {
      const { left, top, width, height } = frame;
      const shown = { left, top, right: left + width, bottom: top + height };
      context.putImageData(await this.#pixels(shown, side), 0, 0);
    }
    return encoded(canvas, codec, quality);
  }

  /** Crop a box at full resolution and encode it, reduced to at most `target`, never enlarged. */
  async region(box, target, codec, quality) {
    const width = Math.min(box.right - box.left, target.width);
    const height = Math.min(box.bottom - box.top, target.height);
    const canvas = newCanvas(width, height);
    canvas.getContext("2d").putImageData(await this.#pixels(box, { width, height }), 0, 0);
    return encoded(canvas, codec, quality);
  }

  /** Draw the picture onto a visible canvas; on white, as it is sent. */
  async preview(canvas) {
    const shrink = Math.min(1, PREVIEW_PX / Math.max(this.size.width, this.size.height));
    canvas.width = Math.max(1, Math.round(this.size.width * shrink));
    canvas.height = Math.max(1, Math.round(this.size.height * shrink));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.#released = false;
    await this.#with((bitmap) => context.drawImage(bitmap, 0, 0, canvas.width, canvas.height));
  }

  /** Free the decoded pixels as soon as they are not in use, now and after each later use. */
  release() {
    this.#released = true;
    this.#freeIfUnused();
  }

  #freeIfUnused() {
    if (!this.#released || this.#users > 0) return;
    this.#bitmap?.then((bitmap) => bitmap.close()).catch(() => {});
    this.#bitmap = null;
  }

  async #with(work) {
    this.#users += 1;
    try {
      this.#bitmap ??= decoded(this.#blob, this.name);
      return await work(await this.#bitmap);
    } finally {
      this.#users -= 1;
      this.#freeIfUnused();
    }
  }

  #pixels(box, size) {
    return this.#with((bitmap) => resample(bitmap, box, size));
  }
}

async function decoded(blob, name) {
  try {
    return await upright(blob);
  } catch {
    const start = new Uint8Array(await blob.slice(0, 12).arrayBuffer().catch(() => []));
    const letters = String.fromCharCode(...start);
    if (/^(\xff\xd8\xff|\x89PNG|RIFF....WEBP)/s.test(letters)) {
      throw new PictureError(`${name} is broken, or too large for this browser.`);
    }
    const hint = letters.slice(4, 8) === "ftyp" ? " Save it as a JPEG first." : "";
    throw new PictureError(`${name} is not a picture that this browser can read.${hint}`);
  }
}

/** Encode a canvas, without metadata. */
async function encoded(canvas, codec, quality) {
  const blob = await toBlob(canvas, codec, quality);
  if (blob?.type !== TYPES[codec]) throw new PictureError("This browser cannot encode the picture.");
  return pixelsOnly(new Uint8Array(await blob.arrayBuffer()), codec);
}

function toBlob(canvas, codec, quality) {
  return new Promise((done) => canvas.toBlob(done, TYPES[codec], quality / 100));
}

function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}
