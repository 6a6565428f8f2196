// Elements from plain values. Text is always set as text: nothing that comes from data is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Properties that an attribute does not change once a person has typed. */
const AS_PROPERTY = new Set(["value", "checked", "selected", "disabled", "open", "indeterminate"]);

/**
 * Make an HTML element.
 * @param {string} tag name of the element
 * @param {?Object} props `class`, listeners such as `onclick`, and attributes; `null` and `false` leave one out
 * @param {...*} children nodes, strings, numbers, arrays of them; `null` and `false` are left out
 * @returns {HTMLElement}
 */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/**
 * Make an SVG element; as {@link h}.
 * @returns {SVGElement}
 */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/**
 * Put children in place of what an element holds.
 * @param {Element} root
 * @param {...*} children as in {@link h}
 * @returns {Element} root
 */
export function replace(root, ...children) {
  const made = document.createDocumentFragment();
  append(made, children);
  root.replaceChildren(made);
  return root;
}

/**
 * As {@link replace}, for what is drawn again and again: who is at something within `root` stays at it, and what was
 * scrolled sideways stays scrolled.
 * @param {HTMLElement} root
 * @param {...*} children
 * @returns {HTMLElement} root
 */
export function replaceKeepingFocus(root, ...children) {
  const focused =
    root !== document.activeElement && root.contains(document.activeElement) ? document.activeElement : null;
  const alike = (mark) => [...root.querySelectorAll(focused.tagName)].filter((each) => markOf(each) === mark);
  const mark = focused && markOf(focused);
  const place = focused && alike(mark).indexOf(focused);
  const scrolled = [...root.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  replace(root, ...children);
  root.querySelectorAll(".scroll").forEach((each, index) => (each.scrollLeft = scrolled[index] ?? 0));
  if (focused) {
    const found = alike(mark);
    const next = found[Math.min(place, found.length - 1)] ?? root;
    // Where it is gone, the keyboard goes on from the part of the page that it was in.
    if (next === root) root.tabIndex = -1;
    next.focus({ preventScroll: true });
  }
  return root;
}

/** By what an element is known again once it was drawn anew. */
function markOf(element) {
  const named = ["id", "href", "aria-label"].map((name) => element.getAttribute(name));
  return JSON.stringify([...named, /^(A|BUTTON|SUMMARY)$/.test(element.tagName) ? element.textContent : null]);
}

/**
 * Say something to people who hear the page.
 * @param {string} text
 */
export function announce(text) {
  const status = document.getElementById("status");
  if (status) status.textContent = text;
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) {
      if (typeof value !== "function") throw new TypeError(`${name} is no function`);
      element.addEventListener(name.slice(2), value);
    } else if (AS_PROPERTY.has(name) && name in element) {
      element[name] = value;
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  append(element, children);
  // The choice of a select exists only once its options do.
  if (element.tagName === "SELECT" && props?.value !== undefined) element.value = props.value;
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false || child === true) continue;
    if (Array.isArray(child)) append(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}
