// `Link` is one connection with its questions; `LinkKeeper` keeps a connection to the server of this
// page.

import { CollabError, LostError, ProtocolError, ServerError } from "./errors.js";
import { ErrorCode, SUBPROTOCOL, tokenSubprotocol, websocketBytes } from "./messages.js";
import { EdgeSession } from "./session.js";

const CLIENT_NAME = "vlm-collab page";
const CONNECT_TIMEOUT_MS = 10_000;
const ACCESS_TIMEOUT_MS = 5_000;
const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 5_000;
// A server answers or refuses within two minutes; one that is silent for longer is gone, even if the
// network has not reported it.
const SILENCE_MS = 150_000;
// With these codes a server reports a protocol violation, which a retry would repeat.
const FATAL_CLOSE = new Set([1002, 1003, 1007, 1008, 1009]);
const PASSING_ERRORS = new Set([ErrorCode.BUSY, ErrorCode.SHUTTING_DOWN, ErrorCode.INTERNAL]);

/** URLs of the server's WebSocket and of its other routes. */
export function addresses(page) {
  const base = new URL(".", page);
  const endpoint = "/v1/collab";
  const socket = new URL(base);
  socket.protocol = base.protocol === "https:" ? "wss:" : "ws:";
  socket.pathname = base.pathname.endsWith(`${endpoint}/`)
    ? base.pathname.slice(0, -1)
    : `${base.pathname.slice(0, -1)}${endpoint}`;
  socket.search = socket.hash = "";
  return { socket: socket.href, access: new URL("page/access", base).href };
}

/** One question on one link. */
export class Exchange {
  bytesUp = 0;
  bytesDown = 0;
  #link;
  #events = [];
  #taker = null;

  constructor(link, id) {
    this.#link = link;
    this.id = id;
  }

  /** Wait for the next event; throws the error that ended the link. */
  async next() {
    if (this.#events.length === 0) {
      await new Promise((resolve) => (this.#taker = resolve));
    }
    const event = this.#events.shift();
    if (event instanceof Error) throw event;
    return event;
  }

  put(event) {
    this.#events.push(event);
    this.#taker?.();
    this.#taker = null;
  }

  /** Send the crop; returns false if the question ended or was cancelled meanwhile. */
  sendRegion(image) {
    if (!this.#wantsRegion()) return false;
    this.#link.session.sendRegion(this.id, image);
    this.#link.flush(this);
    return true;
  }

  decline(reason) {
    if (!this.#wantsRegion()) return;
    this.#link.session.decline(this.id, reason);
    this.#link.flush(this);
  }

  /** Cancel the question on the server, unless it has ended. */
  abandon() {
    const state = this.#link.session.state(this.id);
    if (this.#link.ended !== null || state === "ENDED" || state === "CANCELLED") return;
    this.#link.session.cancel(this.id);
    this.#link.flush(this);
  }

  #wantsRegion() {
    return this.#link.ended === null && this.#link.session.state(this.id) === "WANTED";
  }
}

/** One connection. Once `ended` is set, it sends nothing, and every exchange has got that error. */
export class Link {
  session = new EdgeSession();
  ended = null;
  retired = false; // the server shuts down; running questions may still be answered
  #socket;
  #traffic;
  #exchanges = new Map();
  #waiting = [];
  #silence = null;
  #resolveGreeting;
  #rejectGreeting;

  /** `traffic` is called with each frame's bytes: (up, down). */
  constructor(url, { token, codecs, resume, traffic }) {
    this.#traffic = traffic;
    const greeting = new Promise((resolve, reject) => {
      this.#resolveGreeting = resolve;
      this.#rejectGreeting = reject;
    });
    greeting.catch(() => {});
    this.greeting = greeting;
    const offered = [SUBPROTOCOL, ...(token ? [tokenSubprotocol(token)] : [])];
    this.#socket = new WebSocket(url, offered);
    this.#socket.binaryType = "arraybuffer";
    const timeout = setTimeout(() => this.drop(), CONNECT_TIMEOUT_MS);
    this.#socket.onopen = () => {
      this.session.hello(codecs, resume, CLIENT_NAME);
      this.flush(null);
    };
    this.#socket.onmessage = ({ data }) => {
      clearTimeout(timeout);
      this.#receive(data);
    };
    this.#socket.onclose = ({ code, reason }) => {
      clearTimeout(timeout);
      const why = FATAL_CLOSE.has(code)
        ? new ProtocolError(`The server closed the connection: ${reason || code}.`)
        : new LostError("The connection to the server was lost.");
      this.#end(why);
    };
  }

  get welcome() {
    return this.session.welcome;
  }

  get usable() {
    return this.ended === null && !this.retired;
  }

  /** Wait until the server takes one more question; `ask` must follow without an await. */
  async slot() {
    while (this.usable && this.#exchanges.size >= this.welcome.maxInFlight) {
      await new Promise((resolve) => this.#waiting.push(resolve));
    }
    if (!this.usable) throw this.ended ?? new LostError("The server is shutting down.");
  }

  /** Send a question, in the slot that `slot` waited for; arguments as `EdgeSession.ask`. */
  ask(...question) {
    const id = this.session.ask(...question);
    const exchange = new Exchange(this, id);
    this.#exchanges.set(id, exchange);
    this.flush(exchange);
    return exchange;
  }

  /** Send the session's pending frames on behalf of an exchange. */
  flush(exchange) {
    for (const frame of this.session.dataToSend()) {
      const bytes = websocketBytes(frame.length, true);
      if (exchange !== null) exchange.bytesUp += bytes;
      this.#traffic(bytes, 0);
      this.#socket.send(frame);
    }
    this.#listen();
  }

  /** Close the connection and treat it as lost. */
  drop(reason = "The server stopped answering.") {
    this.#end(new LostError(reason));
  }

  #receive(data) {
    if (this.ended !== null) return;
    try {
      if (!(data instanceof ArrayBuffer)) throw new ProtocolError("a text frame; all frames must be binary");
      const frame = new Uint8Array(data);
      this.#traffic(0, websocketBytes(frame.length, false));
      this.#take(this.session.receive(frame), websocketBytes(frame.length, false));
    } catch (error) {
      if (!(error instanceof CollabError)) console.error(error);
      this.#end(new ProtocolError(`The server does not speak the protocol: ${error.message}.`));
    }
  }

  #take(event, bytes) {
    if (event === null) return; // sent before the server read our Cancel
    if (event.kind === "Welcome") {
      this.#resolveGreeting(event);
    } else if (event.kind === "Error" && event.id === 0) {
      this.#end(connectionError(event));
    } else {
      const exchange = this.#exchanges.get(event.id);
      exchange.bytesDown += bytes;
      this.flush(exchange); // the session may have declined a region itself
      if (event.kind === "Error" && event.code === ErrorCode.SHUTTING_DOWN) this.retired = true;
      if (event.kind === "Answer" || event.kind === "Error") {
        this.#exchanges.delete(event.id);
        this.#wakeAll();
      }
      exchange.put(event);
    }
    this.#listen();
  }

  /** Bound the server's silence while a question is in flight. */
  #listen() {
    clearTimeout(this.#silence);
    if (this.#exchanges.size > 0) this.#silence = setTimeout(() => this.drop(), SILENCE_MS);
  }

  #end(error) {
    if (this.ended !== null) return;
    this.ended = error;
    clearTimeout(this.#silence);
    this.#rejectGreeting(error);
    for (const exchange of this.#exchanges.values()) exchange.put(error);
    this.#exchanges.clear();
    this.#wakeAll();
    this.#socket.close();
    this.onended?.(error);
  }

  #wakeAll() {
    for (const wake of this.#waiting.splice(0)) wake();
  }
}

/**
 * Provides a usable link, and connects again if there is none.
 *
 * `onstate` is called with `{ kind, text }`, where kind is `connecting`, `open`, `lost` (it retries
 * by itself), `token` (a token is needed), or `refused` (the user cannot fix it).
 */
export class LinkKeeper {
  onstate = () => {};
  bytesUp = 0;
  bytesDown = 0;
  #addresses;
  #token;
  #link = null;
  #key = new Uint8Array();
  #failures = 0;
  #connecting = false;
  #blocked = null;
  #waiting = [];
  #wakeEarly = () => {};

  constructor(addresses, codecs, token) {
    this.#addresses = addresses;
    this.codecs = codecs;
    this.#token = token;
  }

  get welcome() {
    return this.#link?.welcome ?? null;
  }

  /** Wait for a usable link; throws if there will be none, or on `signal`. */
  async link(signal) {
    if (this.#blocked === "refused") this.#blocked = null; // a new question is a reason to retry
    while (!this.#link?.usable) {
      this.connect();
      await new Promise((resolve, reject) => {
        this.#waiting.push({ resolve, reject });
        signal.addEventListener("abort", () => reject(signal.reason), { once: true });
        if (signal.aborted) reject(signal.reason);
      });
    }
    return this.#link;
  }

  /** Reset the retry pauses after an answered question. */
  resetPauses() {
    this.#failures = 0;
  }

  /** Connect, unless connected, connecting, or waiting for a token. */
  connect() {
    if (this.#connecting || this.#blocked !== null || this.#link?.usable) return;
    this.#connecting = true;
    this.#connect().finally(() => (this.#connecting = false));
  }

  /** Retry at once, because the network or the user came back. */
  retryNow() {
    this.#wakeEarly();
    if (this.#blocked !== "token") this.#blocked = null;
    this.connect();
  }

  /** Drop the link, because the browser is offline. */
  drop(reason) {
    this.#link?.drop(reason);
  }

  /** Set the token and connect. */
  setToken(token) {
    this.#token = token;
    this.#blocked = null;
    this.#failures = 0;
    this.connect();
  }

  async #connect() {
    let retryAfterMs = 0;
    for (;;) {
      await this.#pause(retryAfterMs);
      // Later attempts keep the last message, which says what is wrong.
      if (this.#failures === 0) this.onstate({ kind: "connecting", text: "Connecting …" });
      const token = this.#token;
      const link = new Link(this.#addresses.socket, {
        token,
        codecs: this.codecs,
        resume: this.#key,
        traffic: (up, down) => {
          this.bytesUp += up;
          this.bytesDown += down;
        },
      });
      let problem;
      try {
        const welcome = await link.greeting;
        this.#link = link;
        this.#key = welcome.session;
        link.onended = (error) => this.#lost(error);
        if (link.ended === null) {
          this.onstate({ kind: "open", text: "Connected", welcome });
          for (const { resolve } of this.#waiting.splice(0)) resolve();
          return;
        }
        problem = { kind: "lost", text: link.ended.message };
      } catch (error) {
        problem = await this.#why(error, token);
      }
      if (token !== this.#token) continue; // the user entered another one meanwhile
      this.#failures += 1;
      this.onstate(problem);
      if (problem.kind !== "lost") {
        this.#blocked = problem.kind;
        if (problem.kind === "refused") {
          for (const { reject } of this.#waiting.splice(0)) reject(new CollabError(problem.text));
        }
        return;
      }
      retryAfterMs = problem.retryAfterMs ?? 0;
    }
  }

  #lost(error) {
    this.#failures += 1;
    this.onstate({ kind: "lost", text: `${error.message} Trying again …` });
    this.connect();
  }

  /** Ask the server why the WebSocket failed, since the browser does not say. */
  async #why(error, token) {
    if (error instanceof ProtocolError) return { kind: "refused", text: error.message };
    try {
      const response = await fetch(this.#addresses.access, {
        method: "POST", // so that the browser sends this page's origin
        // A header cannot carry other characters, so no valid token has them.
        headers: /^[!-~ ]+$/.test(token ?? "") ? { Authorization: `Bearer ${token}` } : {},
        credentials: "omit",
        cache: "no-store",
        signal: AbortSignal.timeout(ACCESS_TIMEOUT_MS),
      });
      const line = (await response.text()).split("\n")[0].slice(0, 300);
      if (response.status === 401) {
        const text = token ? "The token was not accepted." : "This server asks for a token.";
        return { kind: "token", text };
      }
      if (response.status === 403) return { kind: "refused", text: line };
      const busy = response.status === 503 && "The server accepts no more connections now. Trying again …";
      const retryAfterMs = 1000 * (Number(response.headers.get("Retry-After")) || 0);
      return { kind: "lost", text: busy || `${error.message} Trying again …`, retryAfterMs };
    } catch {
      return { kind: "lost", text: "The server cannot be reached. Trying again …" };
    }
  }

  async #pause(atLeastMs) {
    if (this.#failures === 0) return;
    await new Promise((resolve) => {
      this.#wakeEarly = resolve;
      setTimeout(resolve, Math.max(pauseMs(this.#failures), atLeastMs));
    });
  }
}

/** Exponential backoff with jitter, so that clients do not reconnect all at once. */
export function pauseMs(failures) {
  const longest = Math.min(FIRST_PAUSE_MS * 2 ** Math.min(failures - 1, 30), LONGEST_PAUSE_MS);
  return longest * (0.5 + Math.random() / 2);
}

/** The error for an `Error` message about the whole connection. */
function connectionError({ code, text, retryAfterMs }) {
  const line = `The server ended the connection: ${text}.`;
  if (PASSING_ERRORS.has(code)) return new LostError(line, retryAfterMs);
  if (code <= ErrorCode.UNSUPPORTED_VERSION) return new ProtocolError(line);
  return new ServerError(line, code, retryAfterMs);
}
