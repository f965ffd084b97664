// Taking a picture. On phones the camera app takes it, because only that gives the sensor's full
// resolution; elsewhere the browser does.

import { $ } from "./dom.js";
import { PictureError } from "./errors.js";

const QUALITY = 0.95;
const CONSTRAINTS = { video: { facingMode: "environment", width: { ideal: 4096 }, height: { ideal: 3072 } } };

/** `native` for the phone's camera app, `browser`, or null without a camera. */
export function cameraKind() {
  if (matchMedia("(pointer: coarse)").matches && "capture" in HTMLInputElement.prototype) return "native";
  return navigator.mediaDevices?.getUserMedia ? "browser" : null; // absent without TLS
}

export class Camera {
  #stream = null;
  #turn = 0;

  /**
   * Show the live picture. Returns false if the camera was closed or opened again before the browser
   * allowed it. Throws `PictureError` if there is no camera.
   */
  async open() {
    this.close();
    const turn = this.#turn;
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia(CONSTRAINTS);
    } catch (error) {
      if (turn !== this.#turn) return false;
      const refused = error.name === "NotAllowedError";
      throw new PictureError(refused ? "This page is not allowed to use the camera." : "No usable camera was found.");
    }
    if (turn !== this.#turn) {
      stop(stream); // the camera was closed before the user allowed it
      return false;
    }
    $("video").srcObject = this.#stream = stream;
    return true;
  }

  /** Return the current frame as a file. */
  async shoot() {
    const video = $("video");
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    if (canvas.width === 0) throw new PictureError("The camera shows nothing yet.");
    canvas.getContext("2d").drawImage(video, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
  }

  close() {
    this.#turn++;
    if (this.#stream) stop(this.#stream);
    $("video").srcObject = this.#stream = null;
  }
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}
