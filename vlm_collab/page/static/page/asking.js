// One question from asking to its answer, over as many links and attempts as it takes, after
// edge_client/link/question.py. Once the server has asked for a region there is a first answer to fall
// back on, and from then on a question always ends with an answer.

import { CollabError, LostError, ServerError, StoppedError } from "./errors.js";
import { FITS, frameOf } from "./geometry.js";
import { pauseMs } from "./link.js";
import { DeclineReason, ErrorCode, Fallback, Stage } from "./messages.js";

const RESCUE_GRACE_MS = 5_000;
const ASK_AGAIN_MS = 60_000; // for so long: it may be the question itself that brings the server down
const MAX_VIEW_GONE = 5;
const SHORTEST_WAIT_MS = 50;
const VIEW_QUALITY = 90;
const OPTIONS = { stream: true, wantMap: true };
// Refusals that a server may decide on before it stores the view that came with the question.
const VIEW_NOT_KEPT = new Set([
  ErrorCode.BUSY,
  ErrorCode.SHUTTING_DOWN,
  ErrorCode.TOO_LARGE,
  ErrorCode.BAD_IMAGE,
  ErrorCode.BAD_OPTION,
  ErrorCode.BAD_QUESTION,
]);

/** What is known of a picture's view on the server: its number, and who was sent it last. */
export class ViewState {
  session = null;

  constructor(id) {
    this.id = id;
  }
}

/**
 * Drives one question; `run` once. `tell` is called with what happens:
 *
 *   { kind: "text", stage, text }                  a text as it grows
 *   { kind: "region", request, box }               the server is unsure; box is null if declined
 *   { kind: "sent", what: "view" | "region", image }  pixels that left
 *   { kind: "bytes", up, down }                    this question's bytes so far
 *   { kind: "again", text }                        it is asked once more, and why
 */
export class Asking {
  #picture;
  #question;
  #history;
  #view;
  #keeper;
  #tell;
  #stop = new AbortController();
  #seen = null;
  #rescuing = false;
  #losses = 0;
  #lostAt = null; // when it lost a link for the first time
  #sentAt = 0;
  #gone = 0;
  #carry = false;
  #up = 0;
  #down = 0;
  #began = performance.now();

  constructor({ picture, question, history, view, keeper, tell }) {
    this.#picture = picture;
    this.#question = question;
    this.#history = history;
    this.#view = view;
    this.#keeper = keeper;
    this.#tell = tell;
  }

  /** The user gives the question up. */
  stop() {
    this.#stop.abort(new StoppedError("You stopped this question."));
  }

  /** The answer, or an error that says why there is none. */
  async run() {
    try {
      return await this.#rounds(this.#stop.signal);
    } catch (error) {
      if (this.#seen === null || error instanceof StoppedError || !(error instanceof CollabError)) throw error;
      if (!(error instanceof LostError)) return this.#firstAnswer(fallbackOf(error));
    }
    return this.#rescue();
  }

  /** Ask again after the second stage lost its link, for a while. */
  async #rescue() {
    this.#rescuing = true;
    const patience = new AbortController();
    const limitMs = this.#seen.request.deadlineMs + RESCUE_GRACE_MS;
    const timer = setTimeout(() => patience.abort(new LostError("no time left")), limitMs);
    this.#stop.signal.addEventListener("abort", () => patience.abort(this.#stop.signal.reason));
    try {
      return await this.#rounds(patience.signal);
    } catch (error) {
      if (error instanceof StoppedError || !(error instanceof CollabError)) throw error;
      return this.#firstAnswer(Fallback.LINK_LOST);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Attempts until one ends well, or with an error that another would not cure. */
  async #rounds(signal) {
    for (;;) {
      signal.throwIfAborted();
      try {
        return await this.#attempt(signal);
      } catch (error) {
        if (signal.aborted || (this.#seen !== null && !this.#rescuing)) throw error;
        await this.#recover(error, signal);
      }
    }
  }

  /** Prepare another attempt, or throw if there is no point in one. */
  async #recover(error, signal) {
    const busy = error instanceof ServerError && error.code === ErrorCode.BUSY;
    const gone = error instanceof ServerError && error.code === ErrorCode.VIEW_GONE;
    if (busy && error.retryAfterMs !== null) {
      this.#tell({ kind: "again", text: "The server is busy; this question waits." });
      await pause(Math.max(error.retryAfterMs, SHORTEST_WAIT_MS) * (1 + Math.random() / 2), signal);
    } else if (gone && ++this.#gone <= MAX_VIEW_GONE) {
      // If the view was in that very Ask, the server is short of room just now.
      if (this.#carry) await pause(SHORTEST_WAIT_MS * 2 ** (this.#gone - 1), signal);
      this.#carry = true;
    } else if (error instanceof LostError) {
      this.#losses += 1;
      const now = performance.now();
      this.#lostAt ??= now;
      if (now - this.#lostAt > ASK_AGAIN_MS) {
        throw new CollabError(`Given up after ${this.#losses} lost connections: ${error.message}`);
      }
      this.#tell({ kind: "again", text: "The connection was lost; this question waits for it." });
      const dueMs = this.#sentAt + pauseMs(this.#losses) - now;
      await pause(Math.max(dueMs, error.retryAfterMs ?? 0), signal);
    } else {
      throw error;
    }
  }

  async #attempt(signal) {
    const link = await this.#keeper.link(signal);
    const { welcome } = link;
    const side = { width: welcome.viewWidth, height: welcome.viewHeight };
    const codec = welcome.codecs.find((each) => this.#keeper.codecs.includes(each));
    if (codec === undefined) throw new CollabError("This browser and the server have no picture format in common.");
    const image = await this.#picture.view(side, FITS[welcome.fit], codec, VIEW_QUALITY);
    await link.slot();
    signal.throwIfAborted();
    // From here to the end of `ask` nothing waits, so the first of several questions on a new
    // picture carries its view and is on the wire before the others refer to it.
    const key = welcome.session.join();
    const carries = this.#carry || this.#view.session !== key;
    const sent = carries ? image : null;
    this.#sentAt = performance.now();
    const exchange = link.ask(this.#question, this.#view.id, this.#picture.size, sent, OPTIONS, this.#history);
    this.#view.session = key;
    if (carries) this.#tell({ kind: "sent", what: "view", image, codec });
    const stop = () => exchange.put(signal.reason);
    signal.addEventListener("abort", stop, { once: true });
    try {
      return await this.#converse(exchange, carries, welcome);
    } finally {
      signal.removeEventListener("abort", stop);
      exchange.abandon();
      this.#count(exchange);
    }
  }

  /** Follow one exchange, which may carry the view, to its end. */
  async #converse(exchange, carries, welcome) {
    let seen = null;
    for (;;) {
      this.#count(exchange);
      const event = await exchange.next();
      switch (event.kind) {
        case "TextUpdate":
          this.#tell({ kind: "text", stage: event.stage, text: event.text });
          break;
        case "RegionWanted":
        case "RegionDeclined":
          this.#seen = seen = { request: event.request, box: event.box ?? null, welcome };
          this.#tell({ kind: "region", ...seen });
          // Beside listening: the server may end the question meanwhile.
          if (event.kind === "RegionWanted") this.#sendRegion(exchange, event, welcome);
          break;
        case "Answer":
          this.#keeper.worked();
          this.#count(exchange);
          // Older pages would not know the number, so it travels as a field of its own.
          if (event.noDetail) event.fallback = Fallback.NO_DETAIL;
          return { ...event, seen, hidden: this.#hidden(welcome), elapsedMs: performance.now() - this.#began };
        case "Error":
          if (carries && seen === null && VIEW_NOT_KEPT.has(event.code)) this.#view.session = null;
          throw ended(event);
      }
    }
  }

  /** Share of the picture that its view leaves out, and so the model never sees: only a crop does. */
  #hidden({ fit, viewWidth, viewHeight }) {
    const { size } = this.#picture;
    const frame = frameOf(size, FITS[fit], { width: viewWidth, height: viewHeight });
    const shown = Math.min(frame.width, size.width) * Math.min(frame.height, size.height);
    return 1 - shown / (size.width * size.height);
  }

  /** Crop, encode and send; or decline, so that the server need not wait. */
  async #sendRegion(exchange, { box, request }, welcome) {
    const came = performance.now();
    const target = { width: request.targetWidth, height: request.targetHeight };
    if (!this.#keeper.codecs.includes(request.codec)) {
      exchange.decline(DeclineReason.BAD_REQUEST);
      return;
    }
    try {
      const image = await this.#picture.region(box, target, request.codec, request.quality);
      if (performance.now() - came > request.deadlineMs) return; // nobody waits for it any more
      if (image.length + 64 > welcome.maxFrameBytes) {
        exchange.decline(DeclineReason.LIMIT);
      } else if (exchange.sendRegion(image)) {
        this.#tell({ kind: "sent", what: "region", image, codec: request.codec });
      }
    } catch (error) {
      // Whatever goes wrong with a picture, the question goes on without its region.
      console.error(error);
      exchange.decline(DeclineReason.FAILED);
    }
    this.#count(exchange);
  }

  /** Move an exchange's bytes to this question's. */
  #count(exchange) {
    this.#up += exchange.bytesUp;
    this.#down += exchange.bytesDown;
    exchange.bytesUp = exchange.bytesDown = 0;
    this.#tell({ kind: "bytes", up: this.#up, down: this.#down });
  }

  /** The first answer, standing in for the one that did not come. */
  #firstAnswer(fallback) {
    const { request } = this.#seen;
    return {
      text: request.first,
      stage: Stage.FIRST,
      fallback,
      uncertaintyMicro: request.uncertaintyMicro,
      usage: null,
      seen: this.#seen,
      elapsedMs: performance.now() - this.#began,
    };
  }
}

function ended({ code, text, retryAfterMs }) {
  // The successor of a server that shuts down may answer; to this question it is a lost link.
  if (code === ErrorCode.SHUTTING_DOWN) return new LostError(text, retryAfterMs);
  return new ServerError(`The server refused this question: ${text}.`, code, retryAfterMs);
}

/** Why the first answer stands, when an error ended the second stage. */
function fallbackOf(error) {
  if (error.code === ErrorCode.BUSY) return Fallback.OVERLOAD;
  if (error.code === ErrorCode.DEADLINE) return Fallback.DEADLINE;
  return Fallback.SERVER_FAILED;
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener("abort", stop, { once: true });
  });
}
