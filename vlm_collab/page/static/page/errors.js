// What can go wrong; `message` is one line for a person.

/** Base of the errors that a user may meet. */
export class CollabError extends Error {}

/** A picture cannot be used. */
export class PictureError extends CollabError {}

/** A question is empty or too long. */
export class QuestionError extends CollabError {}

/** A message breaks the protocol. */
export class ProtocolError extends CollabError {}

/** The link is not there now; another attempt can help, after `retryAfterMs` where it is known. */
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
