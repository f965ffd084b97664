// Errors; `message` is one line for the user.

/** Base of all errors that are shown to the user. */
export class CollabError extends Error {}

/** A picture cannot be used. */
export class PictureError extends CollabError {}

/** A question is empty or too long. */
export class QuestionError extends CollabError {}

/** A message breaks the protocol. */
export class ProtocolError extends CollabError {}

/** The link was lost; a retry can help, after `retryAfterMs` if known. */
export class LostError extends CollabError {
  constructor(message, retryAfterMs = null) {
    super(message);
    this.retryAfterMs = retryAfterMs;
  }
}

/** The server refused a question, with a code from the protocol's closed list. */
export class ServerError extends CollabError {
  constructor(message, code, retryAfterMs = null) {
    super(message);
    this.code = code;
    this.retryAfterMs = retryAfterMs;
  }
}

/** The user stopped the question. */
export class StoppedError extends CollabError {}
