// The edge's side of one connection as a state machine without a socket, like
// vlm_collab/protocol/edge_session.py: frames and requests in, frames and events out. It checks the
// order of messages and the limits, and counts bytes.

import { FITS, frameOf, tokenBoxToSource } from "./geometry.js";
import { ProtocolError, QuestionError } from "./errors.js";
import { DeclineReason, VERSION, decode, encode, websocketBytes } from "./messages.js";

// State of a question -> message -> next state; the same table as in Python.
const TRANSITIONS = {
  FIRST: { Partial: "FIRST", RegionRequest: "WANTED", Answer: "ENDED", Error: "ENDED", Cancel: "CANCELLED" },
  WANTED: { Region: "FINISHING", Decline: "FINISHING", Answer: "ENDED", Error: "ENDED", Cancel: "CANCELLED" },
  FINISHING: { Partial: "FINISHING", Answer: "ENDED", Error: "ENDED", Cancel: "CANCELLED" },
  CANCELLED: { Answer: "ENDED", Error: "ENDED" },
};
const CROSSED = new Set(["Partial", "RegionRequest"]); // may arrive after our Cancel
const MAX_FRAME_BYTES = 2 * 2 ** 20;
const MAX_TEXT_CHARS = 2 ** 20;
const MAX_VIEW_PIXELS = 1024 * 1024; // a larger view could be the whole picture

export class EdgeSession {
  welcome = null;
  bytesUp = 0;
  bytesDown = 0;
  #questions = new Map();
  #lastId = 0;
  #out = [];
  #greeted = false;
  #closed = false;

  /** Return the frames to send now, in order; each is returned once. */
  dataToSend() {
    return this.#out.splice(0);
  }

  /** State of a question; ids up to the largest used one that are not in flight have ended. */
  state(id) {
    return this.#questions.get(id)?.state ?? (id <= this.#lastId ? "ENDED" : "NEW");
  }

  hello(codecs, resume = new Uint8Array(), client = "") {
    if (this.#greeted || this.#closed) throw new ProtocolError("Hello was sent already");
    this.#greeted = true;
    this.#push({ kind: "Hello", version: VERSION, codecs, resume, client: client.slice(0, 64) });
  }

  /**
   * Ask, and return the question's id. `view` is null if the server has it under `viewId`;
   * `history` has earlier [question, answer] pairs, oldest first.
   */
  ask(question, viewId, source, view, options, history = []) {
    const welcome = this.welcome;
    if (welcome === null || this.#closed) throw new ProtocolError("Ask before Welcome");
    if (this.#questions.size >= welcome.maxInFlight) {
      throw new ProtocolError(`the server takes at most ${welcome.maxInFlight} questions at once`);
    }
    const questionBytes = new TextEncoder().encode([question, ...history.flat()].join("")).length;
    if (questionBytes > welcome.maxQuestionBytes) {
      const what = history.length > 0 ? "The question and the earlier ones have" : "The question has";
      throw new QuestionError(`${what} ${questionBytes} bytes; the server takes at most ${welcome.maxQuestionBytes}.`);
    }
    if (view !== null && view.length + 64 + questionBytes > welcome.maxFrameBytes) {
      throw new QuestionError("The view has more bytes than the server takes.");
    }
    const id = ++this.#lastId;
    this.#questions.set(id, { state: "FIRST", source, text: "", stage: 1, up: 0, down: 0 });
    const { width: sourceWidth, height: sourceHeight } = source;
    this.#push({ kind: "Ask", id, question, viewId, view, sourceWidth, sourceHeight, options, history });
    return id;
  }

  sendRegion(id, image) {
    this.#mine(id, "Region");
    this.#push({ kind: "Region", id, image });
  }

  decline(id, reason) {
    this.#mine(id, "Decline");
    this.#push({ kind: "Decline", id, reason });
  }

  cancel(id) {
    this.#mine(id, "Cancel");
    this.#push({ kind: "Cancel", id });
  }

  /** Bytes (up, down) of a question in flight, WebSocket headers included. */
  bytesOf(id) {
    const { up, down } = this.#questions.get(id);
    return [up, down];
  }

  /**
   * Take one frame from the server. Returns what happened: a `Welcome`, `Answer` or `Error`
   * message, a `TextUpdate`, `RegionWanted` or `RegionDeclined` event, or null for a message that
   * crossed one of ours. Throws `ProtocolError`; the session is then closed.
   */
  receive(frame) {
    if (this.#closed) throw new ProtocolError("the session is closed");
    try {
      if (frame.length > MAX_FRAME_BYTES) throw new ProtocolError("a frame is over the limit");
      return this.#receive(frame);
    } catch (error) {
      this.#closed = true;
      throw error;
    }
  }

  #receive(frame) {
    const message = decode(frame);
    const { kind } = message;
    const size = websocketBytes(frame.length, false);
    this.bytesDown += size;
    if (kind === "Welcome") {
      if (!this.#greeted || this.welcome !== null) throw new ProtocolError("Welcome is not allowed now");
      const { viewWidth, viewHeight } = message;
      if (viewWidth * viewHeight > MAX_VIEW_PIXELS) {
        throw new ProtocolError(
          `it requires views of ${viewWidth} × ${viewHeight} pixels, ` +
            `but this page sends at most ${MAX_VIEW_PIXELS}`,
        );
      }
      this.welcome = message;
      return message;
    }
    if (kind === "Error" && message.id === 0) {
      this.#closed = true;
      return message;
    }
    const question = this.#questions.get(message.id);
    if (question !== undefined) question.down += size;
    if (question?.state === "CANCELLED" && CROSSED.has(kind)) return null;
    if (!this.#move(message.id, kind)) {
      throw new ProtocolError(`${kind} is not allowed for question ${message.id} (state: ${this.state(message.id)})`);
    }
    if (kind === "Partial") return this.#text(question, message);
    if (kind === "RegionRequest") return this.#checkRequest(question, message);
    return message;
  }

  #text(question, { id, stage, keep, text }) {
    if (question.stage !== stage) {
      question.stage = stage;
      question.text = "";
    }
    const characters = [...question.text]; // `keep` counts code points
    if (keep > characters.length) throw new ProtocolError("Partial.keep is longer than the text so far");
    question.text = characters.slice(0, keep).join("") + text;
    if (question.text.length > MAX_TEXT_CHARS) throw new ProtocolError("the streamed text is too long");
    return { kind: "TextUpdate", id, stage, text: question.text };
  }

  /** Compute the box in the original; one outside the picture is declined here. */
  #checkRequest({ source }, request) {
    const { viewWidth: width, viewHeight: height, rows, columns, fit } = this.welcome;
    try {
      if (request.picture !== 0) throw new RangeError("there is one picture");
      const frame = frameOf(source, FITS[fit], { width, height });
      const box = tokenBoxToSource(request, { rows, columns }, frame, source);
      return { kind: "RegionWanted", id: request.id, box, request };
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.decline(request.id, DeclineReason.BAD_REQUEST);
      return { kind: "RegionDeclined", id: request.id, reason: DeclineReason.BAD_REQUEST, request };
    }
  }

  #mine(id, kind) {
    const before = this.state(id);
    if (!this.#move(id, kind)) throw new ProtocolError(`${kind} is not allowed for question ${id} (state: ${before})`);
  }

  #move(id, kind) {
    const after = TRANSITIONS[this.state(id)]?.[kind];
    if (after === undefined) return false;
    if (after === "ENDED") this.#questions.delete(id);
    else this.#questions.get(id).state = after;
    return true;
  }

  #push(message) {
    const frame = encode(message);
    const size = websocketBytes(frame.length, true);
    this.bytesUp += size;
    const question = this.#questions.get(message.id);
    if (question !== undefined) question.up += size;
    this.#out.push(frame);
  }
}
