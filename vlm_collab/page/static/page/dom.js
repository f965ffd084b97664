// Small helpers for what people see.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; a child may be text, and absent ones are left out. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Bytes for people: 412 bytes, 6.1 kB, 2.34 MB. */
export function bytes(count) {
  if (count < 1000) return `${count}\u00a0${count === 1 ? "byte" : "bytes"}`;
  if (count < 999_950) return `${(count / 1e3).toFixed(1)}\u00a0kB`;
  return `${(count / 1e6).toFixed(2)}\u00a0MB`;
}

/** A share for people; small ones keep a digit. */
export function percent(share) {
  const value = share * 100;
  return `${value < 10 && value !== 0 ? value.toFixed(1) : Math.round(value)}\u00a0%`;
}

/** Tell a screen reader, once. */
export function announce(text) {
  $("announce").textContent = text;
}
