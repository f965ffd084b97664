// The page's user interface: takes pictures and questions, shows cards.

import { Camera, cameraKind } from "./camera.js";
import { Card } from "./card.js";
import { $, announce, bytes, percent } from "./dom.js";
import { CollabError } from "./errors.js";
import { LinkKeeper, addresses } from "./link.js";
import { Picture, encodable } from "./picture.js";
import { Question, ViewState } from "./question.js";
import { Stage } from "./stage.js";

const TOKEN = "vlm-collab.token";
const stage = new Stage();
const camera = new Camera();
const views = new Map(); // picture -> its view on the server
const counted = new Set(); // pictures in the meter: a plain upload would have sent them in full
const cards = []; // all questions of this session, oldest first
let selected = null;
let opening = 0;

const keeper = new LinkKeeper(addresses(location.href), await encodable(), sessionStorage.getItem(TOKEN));

// ---- the connection ----------------------------------------------------------------------------

keeper.onstate = ({ kind, text, welcome }) => {
  $("status").dataset.kind = kind;
  if ($("status-text").textContent !== text) $("status-text").textContent = text; // a change is read aloud
  if (welcome) $("model").textContent = welcome.model;
  const form = $("token-form");
  const appears = kind === "token" && form.hidden;
  const hadFocus = form.contains(document.activeElement);
  form.hidden = kind !== "token" && (kind === "open" || form.hidden);
  if (hadFocus && form.hidden) $("question").focus(); // otherwise hiding the form would lose the focus
  if (kind === "open") showMeter();
  if (kind === "token") {
    sessionStorage.removeItem(TOKEN);
    if (appears || document.activeElement === document.body) $("token").focus();
  }
};

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  if (token === "") return;
  $("token").value = "";
  sessionStorage.setItem(TOKEN, token);
  keeper.setToken(token);
});

addEventListener("online", () => keeper.retryNow());
addEventListener("offline", () => keeper.drop("This device is offline."));
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") keeper.retryNow();
});

// ---- pictures ----------------------------------------------------------------------------------

async function open(file, name) {
  const turn = ++opening;
  problem("");
  closeCamera();
  $("stage").setAttribute("aria-busy", "true");
  try {
    const picture = await Picture.open(file, name);
    if (turn !== opening) {
      picture.release(); // the user chose another one meanwhile
      return;
    }
    views.set(picture, new ViewState(views.size + 1));
    select(null);
    await stage.show(picture, null);
    showRefer();
    announce(`${name} is open. Ask your question.`);
    // No focus on phones, whose keyboard covers the screen, nor if the camera was opened meanwhile.
    if (cameraKind() !== "native" && $("viewfinder").hidden) $("question").focus();
  } catch (error) {
    if (turn !== opening) return;
    // Do not ask about the previous picture, which may be out of sight.
    stage.clear();
    select(null);
    problem(error);
  } finally {
    if (turn === opening) $("stage").removeAttribute("aria-busy");
  }
}

function pictureIn(transfer) {
  const file = [...transfer.files].find((each) => each.type.startsWith("image/")) ?? transfer.files[0];
  if (file) open(file, file.name || "The picture");
  return Boolean(file);
}

for (const input of [$("file"), $("capture")]) {
  input.addEventListener("change", () => {
    pictureIn(input);
    input.value = ""; // lets the user choose the same file again
  });
}
for (const button of document.querySelectorAll("[data-choose]")) {
  button.addEventListener("click", () => $("file").click());
}
for (const button of document.querySelectorAll("[data-camera]")) {
  button.hidden = cameraKind() === null;
  button.addEventListener("click", takePicture);
}

addEventListener("paste", (event) => {
  if (event.clipboardData.files.length > 0 && pictureIn(event.clipboardData)) event.preventDefault();
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault(); // otherwise the browser would open the picture instead of this page
  document.body.classList.remove("dropping");
  if (!pictureIn(event.dataTransfer)) problem("What you dropped is not a file.");
});

async function takePicture() {
  problem("");
  if (cameraKind() === "native") {
    $("capture").click();
    return;
  }
  try {
    if (!(await camera.open())) return;
    stage.viewfinder(true);
    $("shoot").focus();
  } catch (error) {
    problem(error);
  }
}

function closeCamera() {
  camera.close();
  const hadFocus = $("viewfinder").contains(document.activeElement);
  stage.viewfinder(false);
  // Return the focus to the button that opened it.
  if (hadFocus) [...document.querySelectorAll("[data-camera]")].find((each) => each.offsetParent).focus();
}

$("close-camera").addEventListener("click", closeCamera);
$("shoot").addEventListener("click", async () => {
  try {
    const blob = await camera.shoot();
    closeCamera();
    await open(blob, `Camera ${new Date().toLocaleTimeString()}`);
  } catch (error) {
    problem(error);
  }
});

// ---- questions ---------------------------------------------------------------------------------

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if ($("stage").hasAttribute("aria-busy")) {
    problem("The picture is still being opened; ask again in a moment.");
  } else if (!$("viewfinder").hidden) {
    problem("Take the picture first, or close the camera.");
  } else if (stage.picture === null) {
    problem("Choose a picture first.");
  } else if (question === "") {
    problem("Type a question first.");
  } else {
    problem("");
    $("question").value = "";
    ask(stage.picture, question);
  }
});

/** Earlier questions and answers about a picture, oldest first, if the user refers to them. */
function historyOf(picture) {
  if (!$("refer").checked) return [];
  return cards
    .filter((card) => card.picture === picture && card.text !== null)
    .map((card) => [card.question, card.text]);
}

async function ask(picture, question, history = historyOf(picture)) {
  const card = new Card(question, picture, {
    select: () => select(card),
    stop: () => running.stop(),
    again: () => {
      ask(picture, question, history);
      cards.at(-1).title.focus(); // before the focused button is removed
      card.again.hidden = true;
    },
  });
  const running = new Question({
    picture,
    question,
    history,
    view: views.get(picture),
    keeper,
    onevent: (event) => {
      card.handle(event);
      if (event.kind === "region" && selected === card) stage.show(picture, card.region);
      if (event.kind === "sent") counted.add(picture);
      if (event.kind === "bytes") showMeter();
    },
  });
  $("history").hidden = false;
  $("questions").prepend(card.node);
  cards.push(card);
  select(card);
  try {
    card.answered(await running.run());
  } catch (error) {
    card.failed(lineOf(error));
  }
  showMeter();
  showRefer();
  if (selected === card) card.node.scrollIntoView({ block: "nearest" });
}

/** Show a question's picture with the region that the server asked for. */
function select(card) {
  selected?.select(false);
  selected = card;
  card?.select(true);
  if (card) {
    closeCamera();
    stage.show(card.picture, card.region).catch(problem);
  }
  showRefer();
}

/** Offer to refer to earlier answers, if there are some and the server supports it. */
function showRefer() {
  const earlier = cards.some((card) => card.picture === stage.picture && card.text !== null);
  $("refer-field").hidden = !earlier || !keeper.welcome?.features.includes("history");
}

function showMeter() {
  const sent = keeper.bytesUp;
  let whole = 0;
  for (const picture of counted) whole += picture.originalBytes;
  for (const [id, value] of [["sent", sent], ["whole", whole]]) {
    $(id).textContent = bytes(value);
    $(id).dataset.bytes = value;
  }
  $("saved").textContent = whole > 0 && sent < whole ? percent(1 - sent / whole) : "–";
}

function problem(error) {
  $("problem").textContent = lineOf(error);
  if ($("problem").textContent !== "") $("problem").scrollIntoView({ block: "nearest" });
}

/** One line for the user about an error. */
function lineOf(error) {
  if (typeof error === "string") return error;
  if (error instanceof CollabError) return error.message;
  console.error(error);
  return "Something went wrong on this page. Reload it to continue.";
}

keeper.connect();
