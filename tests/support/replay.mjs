// Runs the page's own modules on what a test sends, in node or in a browser.
//
// `base` is where the modules are; all numbers of the protocol go in and come out as JSON, bytes in
// hexadecimal and names as Python has them.

export const replay = async ({ base, transcripts, boxes, frames, tokens, pages }) => {
  const { EdgeSession } = await import(`${base}session.js`);
  const { decode, tokenSubprotocol } = await import(`${base}messages.js`);
  const { addresses } = await import(`${base}link.js`);
  const { frameOf, paddedExtent, tokenBoxToSource } = await import(`${base}geometry.js`);

  const toBytes = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  const toHex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const snake = (name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
  const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
  const renamed = (values, rename) =>
    Object.fromEntries(Object.entries(values).map(([name, value]) => [rename(name), value]));
  const plain = (value, depth = 0) => {
    if (value instanceof Uint8Array) return toHex(value);
    if (Array.isArray(value)) return value.map((part) => plain(part, depth + 1));
    if (value === null || typeof value !== "object") return value;
    const parts = Object.entries(value).filter(([name]) => name !== "kind" || depth === 0);
    return Object.fromEntries(parts.map(([name, part]) => [snake(name), plain(part, depth + 1)]));
  };

  const act = {
    hello: (session, { codecs, resume, client }) => session.hello(codecs, toBytes(resume), client),
    ask: (session, { question, view_id, source: [width, height], view, options, history }) =>
      session.ask(
        question,
        view_id,
        { width, height },
        view === null ? null : toBytes(view),
        options === null ? null : renamed(options, camel),
        history,
      ),
    send_region: (session, { id, image }) => session.sendRegion(id, toBytes(image)),
    decline: (session, { id, reason }) => session.decline(id, reason),
    cancel: (session, { id }) => session.cancel(id),
  };

  const conversation = (steps) => {
    const session = new EdgeSession();
    const done = steps.map((step) => {
      const result = { ...step };
      if (step.do) {
        act[step.do](session, step.with);
      } else {
        try {
          result.event = plain(session.receive(toBytes(step.receive)));
        } catch (error) {
          if (error.constructor.name !== "ProtocolError") throw error;
          result.event = "refused";
        }
      }
      result.frames = session.dataToSend().map(toHex);
      return result;
    });
    return { steps: done, up: session.bytesUp, down: session.bytesDown };
  };

  const size = ([width, height]) => ({ width, height });
  const box = ({ source, fit, view, grid: [rows, columns], token_box: token }) => {
    const frame = frameOf(size(source), fit, size(view));
    const extents = [
      paddedExtent(-frame.left, source[0], frame.width, view[0]),
      paddedExtent(-frame.top, source[1], frame.height, view[1]),
    ];
    const result = { frame: [frame.left, frame.top, frame.width, frame.height], extents };
    try {
      const [index, sidePx, across, down] = token;
      const window = { index, sidePx, columns: across, rows: down };
      const found = tokenBoxToSource(window, { rows, columns }, frame, size(source));
      result.box = [found.left, found.top, found.right, found.bottom];
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      result.box = null;
    }
    return result;
  };

  return {
    transcripts: Object.fromEntries(
      Object.entries(transcripts ?? {}).map(([name, steps]) => [name, conversation(steps)]),
    ),
    boxes: (boxes ?? []).map(box),
    frames: (frames ?? []).map((frame) => plain(decode(toBytes(frame)))),
    tokens: (tokens ?? []).map(tokenSubprotocol),
    pages: (pages ?? []).map((page) => Object.values(addresses(page))),
  };
};
