// The messages of vlm-collab/1, their encoder and decoder (docs/protocol.md).
//
// One table lists the fields of each message in wire order. New fields are only added at the end:
// absent trailing fields take their default, unknown ones are ignored.

import { Decoder } from "./vendor/msgpack/Decoder.mjs";
import { Encoder } from "./vendor/msgpack/Encoder.mjs";
import { ProtocolError } from "./errors.js";

export const VERSION = 1;
export const SUBPROTOCOL = "vlm-collab.v1";
export const TOKEN_SUBPROTOCOL = "vlm-collab.token.";

export const Codec = { JPEG: 1, PNG: 2, WEBP: 3 };
export const Stage = { FIRST: 1, SECOND: 2 };
export const Retransmit = { AUTO: 0, ALWAYS: 1, NEVER: 2 };
export const Fallback = {
  NONE: 0,
  DECLINED: 1,
  DEADLINE: 2,
  BAD_REGION: 3,
  OVERLOAD: 4,
  SERVER_FAILED: 5,
  LINK_LOST: 6,
  NO_DETAIL: 7,
};
export const Finish = { END: 0, LENGTH: 1, STOP: 2 };
export const DeclineReason = { LIMIT: 1, PRIVACY: 2, GONE: 3, BAD_REQUEST: 4, FAILED: 5 };
export const ErrorCode = {
  BAD_FRAME: 1,
  BAD_ORDER: 2,
  UNSUPPORTED_VERSION: 3,
  BAD_IMAGE: 4,
  TOO_LARGE: 5,
  BAD_QUESTION: 6,
  VIEW_GONE: 7,
  BUSY: 8,
  CANCELLED: 9,
  SHUTTING_DOWN: 10,
  DEADLINE: 11,
  BAD_OPTION: 12,
  INTERNAL: 13,
};

// A check takes a decoded value and returns whether it has the field's type and is in its bounds.
const int = (low, high) => (value) => Number.isInteger(value) && value >= low && value <= high;
const text = (longest = Infinity) => (value) => typeof value === "string" && value.length <= longest;
const bytes = (shortest = 0, longest = Infinity) => (value) =>
  value instanceof Uint8Array && value.length >= shortest && value.length <= longest;
const list = (check) => (value) => Array.isArray(value) && value.every(check);
const flag = (value) => typeof value === "boolean";
const number = (value) => typeof value === "number";
const optional = (check) => (value) => value === null || check(value);

const SIDE = 2 ** 20;
const U32 = 2 ** 32 - 1;
const COUNT = 2 ** 53;
const questionId = int(1, U32);
const anyId = int(0, U32);
const count = int(0, COUNT);
const side = int(1, SIDE);
const cells = int(1, 4096);
const shortMillis = int(0, 65535);
// The caller handles unknown codecs and codes.
const code = int(0, 255);

// [name, check, default]; a field without a default is required.
const OPTIONS = [
  ["retransmit", int(0, 2), 0],
  ["eta", optional(number), null],
  ["maxNewTokens", optional(int(1, 65535)), null],
  ["stream", flag, false],
  ["wantMap", flag, false],
];
const USAGE = [
  "bytesUp",
  "bytesDown",
  "prefilledTokens",
  "decodedTokens",
  "mflops",
  "queueMs",
  "firstMs",
  "regionMs",
  "secondMs",
].map((name) => [name, count, 0]);

const MESSAGES = {
  Hello: [1, ["version", int(1, 255)], ["codecs", list(code)], ["resume", bytes(0, 32), new Uint8Array()], ["client", text(64), ""]],
  Ask: [3, ["id", questionId], ["question", text()], ["viewId", anyId], ["view", optional(bytes())], ["sourceWidth", side], ["sourceHeight", side], ["options", OPTIONS, null], ["history", list(list(text())), []]],
  Region: [4, ["id", questionId], ["image", bytes()]],
  Decline: [5, ["id", questionId], ["reason", code]],
  Cancel: [7, ["id", questionId]],
  Welcome: [16, ["session", bytes(8, 32)], ["model", text(512)], ["viewWidth", side], ["viewHeight", side], ["fit", int(0, 2)], ["rows", cells], ["columns", cells], ["codecs", list(code)], ["maxFrameBytes", count], ["maxQuestionBytes", count], ["maxInFlight", count], ["features", list(text(512)), []]],
  Partial: [17, ["id", questionId], ["stage", int(1, 2)], ["keep", count], ["text", text()]],
  RegionRequest: [18, ["id", questionId], ["first", text()], ["uncertaintyMicro", anyId], ["index", count], ["sidePx", int(1, 2 ** 21)], ["columns", cells], ["rows", cells], ["targetWidth", int(1, 65535)], ["targetHeight", int(1, 65535)], ["codec", code], ["quality", int(1, 100)], ["deadlineMs", shortMillis], ["map", bytes(), new Uint8Array()], ["picture", code, 0]],
  Answer: [19, ["id", questionId], ["text", text()], ["stage", int(1, 2)], ["fallback", code], ["uncertaintyMicro", anyId], ["usage", USAGE], ["finish", code, 0], ["tokens", Array.isArray, []], ["noDetail", flag, false]],
  Error: [20, ["id", anyId], ["code", code], ["text", text()], ["retryAfterMs", optional(anyId), null]],
};
const BY_TAG = new Map(Object.entries(MESSAGES).map(([kind, [tag, ...fields]]) => [tag, [kind, fields]]));
const UP = new Set(["Hello", "Ask", "Region", "Decline", "Cancel"]);

const encoder = new Encoder();
const decoder = new Decoder();

/** Encode a message as the payload of one binary frame. `message.kind` is its name. */
export function encode(message) {
  const [tag, ...fields] = MESSAGES[message.kind];
  return encoder.encode([tag, ...pack(fields, message)]);
}

/** Decode a frame from a server. Throws `ProtocolError` if it is no message of that direction. */
export function decode(frame) {
  let array;
  try {
    array = decoder.decode(frame);
  } catch (error) {
    throw new ProtocolError(`not a message: ${error.message}`);
  }
  const known = Array.isArray(array) ? BY_TAG.get(array[0]) : undefined;
  if (known === undefined || UP.has(known[0])) throw new ProtocolError("not a message: unknown tag");
  return { kind: known[0], ...unpack(known[1], array.slice(1), known[0]) };
}

/** Values in wire order, without trailing defaults. */
function pack(fields, values) {
  const packed = fields.map(([name, check, missing]) => {
    const value = values[name] === undefined ? missing : values[name];
    return Array.isArray(check) && value !== null ? pack(check, value) : value;
  });
  while (packed.length > 0 && isDefault(packed.at(-1), fields[packed.length - 1][2])) packed.pop();
  return packed;
}

/** Whether a value is its field's default; an undefined `missing` means that there is none. */
function isDefault(value, missing) {
  return value === missing || (missing?.length === 0 && value.length === 0);
}

function unpack(fields, array, kind) {
  const values = {};
  fields.forEach(([name, check, missing], place) => {
    if (place >= array.length && missing !== undefined) {
      values[name] = missing;
      return;
    }
    const value = array[place];
    if (Array.isArray(check)) {
      if (!Array.isArray(value)) throw new ProtocolError(`not a message: ${kind}.${name}`);
      values[name] = unpack(check, value, `${kind}.${name}`);
    } else if (place < array.length && check(value)) {
      values[name] = value;
    } else {
      throw new ProtocolError(`not a message: ${kind}.${name}`);
    }
  });
  return values;
}

/** Bytes of one unfragmented WebSocket frame with this payload (RFC 6455, section 5.2). */
export function websocketBytes(payloadBytes, masked) {
  const length = payloadBytes < 126 ? 0 : payloadBytes < 65536 ? 2 : 8;
  return 2 + length + (masked ? 4 : 0) + payloadBytes;
}

/** A token as a subprotocol to offer: a browser cannot set headers on a WebSocket. */
export function tokenSubprotocol(token) {
  const binary = String.fromCharCode(...new TextEncoder().encode(token));
  const base64url = btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return TOKEN_SUBPROTOCOL + base64url;
}
