// Small helpers for the user interface.

export const $ = (id) => document.getElementById(id);

/** Make an element with properties and children; a child may be text, and null ones are skipped. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Format a number of bytes: 412 bytes, 6.1 kB, 2.34 MB. */
export function bytes(count) {
  if (count < 1000) return `${count}\u00a0${count === 1 ? "byte" : "bytes"}`;
  if (count < 999_950) return `${(count / 1e3).toFixed(1)}\u00a0kB`;
  return `${(count / 1e6).toFixed(2)}\u00a0MB`;
}

/** Format a share as a percentage; small ones keep a decimal. */
export function percent(share) {
  const value = share * 100;
  return `${value < 10 && value !== 0 ? value.toFixed(1) : Math.round(value)}\u00a0%`;
}

/** Announce a text to screen readers, once. */
export function announce(text) {
  $("announce").textContent = text;
}
