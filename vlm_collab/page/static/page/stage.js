// The picture on show, with the heat map and the box over it.

import { $, bytes } from "./dom.js";
import { FITS, frameOf } from "./geometry.js";

// Colours of the attention: from clear through amber to red.
const COOL = [255, 196, 70];
const HOT = [228, 52, 22];
const MAX_ALPHA = 0.72;

export class Stage {
  #picture = null;
  #region = null;
  #drawn = false;

  constructor() {
    for (const [button, part] of [["show-heat", "heat-clip"], ["show-box", "box"]]) {
      $(button).addEventListener("click", () => {
        const on = $(button).getAttribute("aria-pressed") !== "true";
        $(button).setAttribute("aria-pressed", String(on));
        $(part).classList.toggle("off", !on);
      });
    }
  }

  get picture() {
    return this.#picture;
  }

  /**
   * Show a picture and its region (null for none). While the camera is on, the picture stays behind
   * the viewfinder.
   */
  async show(picture, region) {
    $("empty").hidden = true;
    $("figure").hidden = !$("viewfinder").hidden;
    this.#region = region;
    if (this.#picture === picture) {
      if (this.#drawn) this.#mark();
      return;
    }
    this.#picture?.release();
    this.#picture = picture;
    this.#drawn = false;
    const { width, height } = picture.size;
    const size = `${width} × ${height} px`;
    $("caption").textContent = `${picture.name}, ${size}, ${bytes(picture.originalBytes)}`;
    $("preview").setAttribute("aria-label", `The picture ${picture.name}, ${size}`);
    // Drawn off-screen first: the user may choose another picture before this one is decoded.
    const canvas = document.createElement("canvas");
    await picture.preview(canvas);
    if (this.#picture !== picture) {
      picture.release();
      return;
    }
    const preview = $("preview");
    preview.width = canvas.width;
    preview.height = canvas.height;
    preview.getContext("2d").drawImage(canvas, 0, 0);
    this.#drawn = true;
    this.#mark();
  }

  /** Show nothing, because the next question is not about the shown picture. */
  clear() {
    this.#picture?.release();
    this.#picture = this.#region = null;
    this.#drawn = false;
    this.viewfinder(!$("viewfinder").hidden);
  }

  /** Show or hide the camera. */
  viewfinder(on) {
    $("viewfinder").hidden = !on;
    $("empty").hidden = on || this.#picture !== null;
    $("figure").hidden = on || this.#picture === null;
  }

  /** Show or hide the heat map and the box. */
  #mark() {
    const { size } = this.#picture;
    const { request, box, welcome } = this.#region ?? {};
    const map = request?.map;
    const heated = this.#region !== null && map.length === welcome.rows * welcome.columns;
    $("show-heat").hidden = $("heat-clip").hidden = !heated;
    $("show-box").hidden = !box;
    $("box").classList.toggle("none", !box);
    if (heated) this.#heat(map, welcome, size);
    if (!box) return;
    const { left, top, right, bottom } = box;
    $("box").setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
    const inner = `M${left} ${top}H${right}V${bottom}H${left}Z`;
    $("shade").setAttribute("d", `M0 0H${size.width}V${size.height}H0Z${inner}`);
    const places = { x: left, y: top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(places)) $("box-line").setAttribute(name, value);
  }

  /** One pixel per token; the browser's scaling smooths it. */
  #heat(map, welcome, size) {
    const { rows, columns, viewWidth: width, viewHeight: height, fit } = welcome;
    const canvas = $("heat");
    canvas.width = columns;
    canvas.height = rows;
    const image = new ImageData(columns, rows);
    map.forEach((value, cell) => {
      const heat = value / 255;
      const colour = COOL.map((cool, channel) => cool + (HOT[channel] - cool) * heat);
      image.data.set([...colour, 255 * MAX_ALPHA * heat], cell * 4);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const frame = frameOf(size, FITS[fit], { width, height });
    canvas.style.left = `${(frame.left / size.width) * 100}%`;
    canvas.style.top = `${(frame.top / size.height) * 100}%`;
    canvas.style.width = `${(frame.width / size.width) * 100}%`;
    canvas.style.height = `${(frame.height / size.height) * 100}%`;
  }
}
