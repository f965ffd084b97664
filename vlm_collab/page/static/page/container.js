// Removing metadata from encoded pictures.
//
// When a canvas is encoded, browsers add a colour profile and the like, the same few hundred bytes
// each time. The server assumes sRGB, which a canvas has.

import { Codec } from "./messages.js";

const CHUNKS_KEPT = new Set(["IHDR", "PLTE", "tRNS", "IDAT", "IEND"]);

/** The same picture without metadata; unchanged if its format is not understood. */
export function pixelsOnly(bytes, codec) {
  const strip = { [Codec.JPEG]: jpeg, [Codec.PNG]: png, [Codec.WEBP]: webp }[codec];
  return strip(bytes, new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)) ?? bytes;
}

function jpeg(bytes, view) {
  const kept = [bytes.subarray(0, 2)];
  let place = 2;
  while (place + 4 <= bytes.length && bytes[place] === 0xff) {
    const marker = bytes[place + 1];
    const end = place + 2 + view.getUint16(place + 2);
    // Of the application segments only JFIF's is kept; comments are removed.
    const extra = (marker > 0xe0 && marker <= 0xef) || marker === 0xfe;
    if (marker === 0xda) return joined([...kept, bytes.subarray(place)]); // the rest is pixels
    if (!extra) kept.push(bytes.subarray(place, end));
    place = end;
  }
  return null;
}

function png(bytes, view) {
  const kept = [bytes.subarray(0, 8)];
  for (let place = 8; place + 12 <= bytes.length; ) {
    const end = place + 12 + view.getUint32(place);
    if (CHUNKS_KEPT.has(name(bytes, place + 4))) kept.push(bytes.subarray(place, end));
    place = end;
  }
  return joined(kept);
}

function webp(bytes, view) {
  for (let place = 12; place + 8 <= bytes.length; ) {
    const size = view.getUint32(place + 4, true);
    const end = place + 8 + size + (size % 2);
    if (["VP8 ", "VP8L"].includes(name(bytes, place))) {
      const head = bytes.slice(0, 12);
      new DataView(head.buffer).setUint32(4, 4 + end - place, true);
      return joined([head, bytes.subarray(place, end)]);
    }
    if (name(bytes, place) === "ALPH") return null; // transparency is not metadata
    place = end;
  }
  return null;
}

function name(bytes, place) {
  return String.fromCharCode(...bytes.subarray(place, place + 4));
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}
