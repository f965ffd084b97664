// One question until its answer, over several links and attempts if necessary, as in
// edge_client/link/question.py. A region request carries a first answer, so after it a question
// always ends with an answer.

import { CollabError, LostError, ServerError, StoppedError } from "./errors.js";
import { FITS, frameOf } from "./geometry.js";
import { pauseMs } from "./link.js";
import { DeclineReason, ErrorCode, Fallback, Stage } from "./messages.js";

const RESCUE_GRACE_MS = 5_000;
const ASK_AGAIN_MS = 60_000; // stop after this time: the question itself may crash the server
const MAX_VIEW_GONE = 5;
const SHORTEST_WAIT_MS = 50;
const VIEW_QUALITY = 90;
const OPTIONS = { stream: true, wantMap: true };
// Refusals that a server may send before it stores the view that came with the question.
const VIEW_NOT_KEPT = new Set([
  ErrorCode.BUSY,
  ErrorCode.SHUTTING_DOWN,
  ErrorCode.TOO_LARGE,
  ErrorCode.BAD_IMAGE,
  ErrorCode.BAD_OPTION,
  ErrorCode.BAD_QUESTION,
]);

/** A picture's view on the server: its id, and the session to which it was sent last. */
export class ViewState {
  session = null;

  constructor(id) {
    this.id = id;
  }
}

/**
 * One question; call `run` once. `onevent` is called with events:
 *
 *   { kind: "text", stage, text }                  a text as it grows
 *   { kind: "region", request, box }               the server is unsure; box is null if declined
 *   { kind: "sent", what: "view" | "region", image }  pixels that were sent
 *   { kind: "bytes", up, down }                    this question's bytes so far
 *   { kind: "again", text }                        it is asked again; the text says why
 */
export class Question {
  #picture;
  #text;
  #history;
  #view;
  #keeper;
  #onevent;
  #stop = new AbortController();
  #region = null; // the last region event
  #rescuing = false;
  #losses = 0;
  #lostAt = null; // time of its first lost link
  #sentAt = 0;
  #viewsGone = 0;
  #resendView = false;
  #up = 0;
  #down = 0;
  #began = performance.now();

  constructor({ picture, question, history, view, keeper, onevent }) {
    this.#picture = picture;
    this.#text = question;
    this.#history = history;
    this.#view = view;
    this.#keeper = keeper;
    this.#onevent = onevent;
  }

  /** Stop the question on the user's behalf. */
  stop() {
    this.#stop.abort(new StoppedError("You stopped this question."));
  }

  /** Return the answer; throws the error if there is none. */
  async run() {
    try {
      return await this.#rounds(this.#stop.signal);
    } catch (error) {
      if (this.#region === null || error instanceof StoppedError || !(error instanceof CollabError)) throw error;
      if (!(error instanceof LostError)) return this.#firstAnswer(fallbackOf(error));
    }
    return this.#rescue();
  }

  /** Ask again for a while after the link was lost in the second stage. */
  async #rescue() {
    this.#rescuing = true;
    const patience = new AbortController();
    const limitMs = this.#region.request.deadlineMs + RESCUE_GRACE_MS;
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

  /** Try until an attempt succeeds, or fails with an error that a retry cannot fix. */
  async #rounds(signal) {
    for (;;) {
      signal.throwIfAborted();
      try {
        return await this.#attempt(signal);
      } catch (error) {
        if (signal.aborted || (this.#region !== null && !this.#rescuing)) throw error;
        await this.#recover(error, signal);
      }
    }
  }

  /** Prepare another attempt; throws if it would not help. */
  async #recover(error, signal) {
    const busy = error instanceof ServerError && error.code === ErrorCode.BUSY;
    const gone = error instanceof ServerError && error.code === ErrorCode.VIEW_GONE;
    if (busy && error.retryAfterMs !== null) {
      this.#onevent({ kind: "again", text: "The server is busy; this question waits." });
      await pause(Math.max(error.retryAfterMs, SHORTEST_WAIT_MS) * (1 + Math.random() / 2), signal);
    } else if (gone && ++this.#viewsGone <= MAX_VIEW_GONE) {
      // If this Ask carried the view, the server has no memory for it at the moment.
      if (this.#resendView) await pause(SHORTEST_WAIT_MS * 2 ** (this.#viewsGone - 1), signal);
      this.#resendView = true;
    } else if (error instanceof LostError) {
      this.#losses += 1;
      const now = performance.now();
      this.#lostAt ??= now;
      if (now - this.#lostAt > ASK_AGAIN_MS) {
        throw new CollabError(`Given up after ${this.#losses} lost connections: ${error.message}`);
      }
      this.#onevent({ kind: "again", text: "The connection was lost; this question waits for it." });
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
    // There is no await from here to the end of `ask`, so the first of several questions about a new
    // picture is sent, with its view, before the others refer to the view.
    const key = welcome.session.join();
    const carriesView = this.#resendView || this.#view.session !== key;
    const sent = carriesView ? image : null;
    this.#sentAt = performance.now();
    const exchange = link.ask(this.#text, this.#view.id, this.#picture.size, sent, OPTIONS, this.#history);
    this.#view.session = key;
    if (carriesView) this.#onevent({ kind: "sent", what: "view", image, codec });
    const stop = () => exchange.put(signal.reason);
    signal.addEventListener("abort", stop, { once: true });
    try {
      return await this.#converse(exchange, carriesView, welcome);
    } finally {
      signal.removeEventListener("abort", stop);
      exchange.abandon();
      this.#count(exchange);
    }
  }

  /** Follow one exchange to its end. */
  async #converse(exchange, carriesView, welcome) {
    let region = null;
    for (;;) {
      this.#count(exchange);
      const event = await exchange.next();
      switch (event.kind) {
        case "TextUpdate":
          this.#onevent({ kind: "text", stage: event.stage, text: event.text });
          break;
        case "RegionWanted":
        case "RegionDeclined":
          this.#region = region = { request: event.request, box: event.box ?? null, welcome };
          this.#onevent({ kind: "region", ...region });
          // Not awaited: the server may end the question meanwhile.
          if (event.kind === "RegionWanted") this.#sendRegion(exchange, event, welcome);
          break;
        case "Answer":
          this.#keeper.resetPauses();
          this.#count(exchange);
          // A field of its own, because older pages do not know the fallback code.
          if (event.noDetail) event.fallback = Fallback.NO_DETAIL;
          return { ...event, region, hidden: this.#hidden(welcome), elapsedMs: performance.now() - this.#began };
        case "Error":
          if (carriesView && region === null && VIEW_NOT_KEPT.has(event.code)) this.#view.session = null;
          throw errorOf(event);
      }
    }
  }

  /** Share of the picture that its view leaves out, so that the model sees it only in a crop. */
  #hidden({ fit, viewWidth, viewHeight }) {
    const { size } = this.#picture;
    const frame = frameOf(size, FITS[fit], { width: viewWidth, height: viewHeight });
    const shown = Math.min(frame.width, size.width) * Math.min(frame.height, size.height);
    return 1 - shown / (size.width * size.height);
  }

  /** Crop, encode and send the region, or decline, so that the server does not wait. */
  async #sendRegion(exchange, { box, request }, welcome) {
    const requestedAt = performance.now();
    const target = { width: request.targetWidth, height: request.targetHeight };
    if (!this.#keeper.codecs.includes(request.codec)) {
      exchange.decline(DeclineReason.BAD_REQUEST);
      return;
    }
    try {
      const image = await this.#picture.region(box, target, request.codec, request.quality);
      if (performance.now() - requestedAt > request.deadlineMs) return; // the server no longer waits
      if (image.length + 64 > welcome.maxFrameBytes) {
        exchange.decline(DeclineReason.LIMIT);
      } else if (exchange.sendRegion(image)) {
        this.#onevent({ kind: "sent", what: "region", image, codec: request.codec });
      }
    } catch (error) {
      // If the picture fails, the question continues without its region.
      console.error(error);
      exchange.decline(DeclineReason.FAILED);
    }
    this.#count(exchange);
  }

  /** Add an exchange's bytes to those of this question. */
  #count(exchange) {
    this.#up += exchange.bytesUp;
    this.#down += exchange.bytesDown;
    exchange.bytesUp = exchange.bytesDown = 0;
    this.#onevent({ kind: "bytes", up: this.#up, down: this.#down });
  }

  /** The first answer, in place of the refined one that did not come. */
  #firstAnswer(fallback) {
    const { request } = this.#region;
    return {
      text: request.first,
      stage: Stage.FIRST,
      fallback,
      uncertaintyMicro: request.uncertaintyMicro,
      usage: null,
      region: this.#region,
      elapsedMs: performance.now() - this.#began,
    };
  }
}

function errorOf({ code, text, retryAfterMs }) {
  // Another server may answer after a shutdown, so treat it as a lost link.
  if (code === ErrorCode.SHUTTING_DOWN) return new LostError(text, retryAfterMs);
  return new ServerError(`The server refused this question: ${text}.`, code, retryAfterMs);
}

/** The fallback code for an error that ended the second stage. */
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
