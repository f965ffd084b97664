// One question in the session's list: its growing text, what was sent for it, and its outcome.

import { announce, bytes, element, percent } from "./dom.js";
import { Fallback, Finish, Stage } from "./messages.js";

const WHY_FIRST = {
  [Fallback.DECLINED]: "the region was not sent",
  [Fallback.DEADLINE]: "the refined one did not come in time",
  [Fallback.BAD_REGION]: "the server could not use the region",
  [Fallback.OVERLOAD]: "the server had no room for a second look",
  [Fallback.SERVER_FAILED]: "the server failed at the second look",
  [Fallback.LINK_LOST]: "the connection was lost",
  [Fallback.NO_DETAIL]: "no region would show more than the view does",
};
const NO_TEXT = "(no text)";
const TYPES = { 1: "image/jpeg", 2: "image/png", 3: "image/webp" };

export class Card {
  region = null;
  text = null; // of the answer
  #bytesUp = 0;
  #ended = false;

  /** `actions` has the buttons' functions: `select`, `stop` and `again`. */
  constructor(question, picture, actions) {
    this.question = question;
    this.picture = picture;
    this.#make(actions);
  }

  #make(actions) {
    this.title = element("button", { type: "button", className: "title", onclick: actions.select }, this.question);
    this.answer = element("p", { className: "answer growing" });
    this.note = element("p", { className: "note" }, "Waiting for the server …");
    this.first = element("dd");
    this.firstRow = element("div", { hidden: true }, element("dt", {}, "First answer"), this.first);
    this.place = element("dd");
    this.placeRow = element("div", { hidden: true }, element("dt", {}, "Looked at"), this.place);
    this.refined = element("dd");
    this.refinedRow = element("div", { hidden: true }, element("dt", {}, "Refined"), this.refined);
    this.cost = element("dd", { className: "cost", data: { bytes: 0 } });
    this.costRow = element("div", { hidden: true }, element("dt", {}, "Sent"), this.cost);
    this.images = element("ul", { className: "images", ariaLabel: "Pictures that were sent" });
    this.stop = element("button", { type: "button", onclick: actions.stop }, "Stop");
    this.again = element("button", { type: "button", onclick: actions.again, hidden: true }, "Ask again");
    this.node = element(
      "li",
      { className: "card", data: { state: "asking" } },
      this.title,
      this.answer,
      this.note,
      element(
        "div",
        { className: "more" },
        element("dl", { className: "steps" }, this.firstRow, this.placeRow, this.refinedRow, this.costRow),
        this.images,
      ),
      element("div", { className: "buttons" }, this.stop, this.again),
    );
  }

  /** Show or hide the details; one question at a time shows its picture and region. */
  select(on) {
    this.node.classList.toggle("selected", on);
    this.title.setAttribute("aria-expanded", String(on));
  }

  /** Handle an event of `Question`. */
  handle(event) {
    if (this.#ended) return;
    switch (event.kind) {
      case "text":
        this.answer.textContent = event.text;
        this.note.textContent = event.stage === Stage.SECOND ? "Looking closer …" : "Answering …";
        break;
      case "region":
        this.region = event;
        this.#unsure(event);
        break;
      case "sent":
        this.#sent(event);
        break;
      case "bytes":
        this.#cost(event.up);
        break;
      case "again":
        this.note.textContent = event.text;
        break;
    }
  }

  #unsure({ request, box }) {
    this.answer.textContent = visible(request.first);
    this.note.textContent = box ? "Unsure: looking closer …" : "Unsure, but the requested region is not valid.";
    this.#firstAnswer(request.first, request.uncertaintyMicro);
    if (box) {
      const { width, height } = this.picture.size;
      const size = `${box.right - box.left} × ${box.bottom - box.top} px`;
      this.place.textContent = `${size} at (${box.left}, ${box.top}) of ${width} × ${height}`;
      this.placeRow.hidden = false;
    }
    announce(`First answer: ${visible(request.first)}. The server is unsure and looks closer.`);
  }

  #firstAnswer(text, uncertaintyMicro) {
    this.first.replaceChildren(...textAndUncertainty(text, uncertaintyMicro));
    this.firstRow.hidden = false;
  }

  #sent({ what, image, codec }) {
    const picture = element("img", { alt: what === "view" ? "The small view" : "The region" });
    const address = URL.createObjectURL(new Blob([image], { type: TYPES[codec] }));
    const size = element("span", {}, `${what}, ${bytes(image.length)}`);
    picture.onload = () => {
      size.textContent = `${what} ${picture.naturalWidth} × ${picture.naturalHeight}, ${bytes(image.length)}`;
      URL.revokeObjectURL(address);
    };
    picture.src = address;
    this.images.append(element("li", { data: { what, bytes: image.length } }, picture, size));
  }

  #cost(up) {
    this.#bytesUp = up;
    const whole = this.picture.originalBytes;
    this.cost.dataset.bytes = up;
    const bar = element("span", { className: "bar" });
    bar.style.setProperty("--share", `${Math.min(1, up / whole) * 100}%`);
    this.cost.replaceChildren(`${bytes(up)} of ${bytes(whole)} (${percent(up / whole)})`, bar);
    this.costRow.hidden = up === 0;
  }

  /** Show the answer. */
  answered(answer) {
    const refined = answer.stage === Stage.SECOND;
    const sure = answer.region === null && answer.fallback === Fallback.NONE;
    this.#end(refined ? "refined" : sure ? "sure" : "first");
    this.text = answer.text;
    this.answer.textContent = visible(answer.text);
    const cost = `${(answer.elapsedMs / 1000).toFixed(1)} s, ${bytes(this.#bytesUp)} sent`;
    if (refined) {
      // No colour for certainty here: the two numbers show which answer is surer.
      this.note.textContent = `Refined after a closer look: ${cost}`;
      this.refined.replaceChildren(...textAndUncertainty(answer.text, answer.uncertaintyMicro));
      this.refinedRow.hidden = false;
    } else {
      // The final first answer can be longer than the one in the region request.
      this.#firstAnswer(answer.text, answer.uncertaintyMicro);
      const why = WHY_FIRST[answer.fallback] ?? "the server kept it";
      this.note.textContent =
        sure ? `Sure of the first answer: ${cost}` : `The first answer stands: ${why}. ${cost}`;
    }
    if (answer.finish === Finish.LENGTH) this.note.textContent += " (cut off at the maximum length)";
    if (answer.hidden > 0) {
      this.note.textContent += ` The model sees only the middle: ${percent(answer.hidden)} of the picture, at its edges, are hidden from it.`;
    }
    announce(`${refined ? "Refined answer" : "Answer"}: ${visible(answer.text)}. Sent ${bytes(this.#bytesUp)}.`);
  }

  /** Show why the question has no answer. */
  failed(text) {
    this.#end("failed");
    this.note.textContent = text;
    this.again.hidden = false;
    announce(text);
  }

  #end(state) {
    this.#ended = true;
    this.node.dataset.state = state;
    this.answer.classList.remove("growing");
    // Move the focus, which would be lost when a focused button is removed.
    if (document.activeElement === this.stop) this.title.focus();
    this.stop.hidden = true;
  }
}

/** An answer as shown; a placeholder if it is empty or blank. */
function visible(text) {
  return text.trim() === "" ? NO_TEXT : text;
}

/** Child nodes for a text and its uncertainty. */
function textAndUncertainty(text, uncertaintyMicro) {
  const uncertainty = `uncertainty ${(uncertaintyMicro / 1e6).toFixed(3)}`;
  return [visible(text), " ", element("span", { className: "uncertainty" }, uncertainty)];
}
