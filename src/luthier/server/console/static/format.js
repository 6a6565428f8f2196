// Numbers, times and sizes in words.

const LOCALE = "en";
const UNITS = ["bytes", "kB", "MB", "GB", "TB"];

/**
 * @param {?number} value
 * @param {number} [digits] significant digits of what is no whole number
 * @returns {string} with thousands separated; a dash for nothing
 */
export function number(value, digits = 3) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString(LOCALE);
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(Math.max(0, digits - 1));
  return value.toLocaleString(LOCALE, { maximumSignificantDigits: Math.max(digits, wholeDigits(value)) });
}

/**
 * @param {?number} value bytes
 * @returns {string} such as `1.4 GB`
 */
export function bytes(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  let unit = 0;
  // Rounded as it is shown: 999,999 bytes are 1 MB, not 1,000 kB.
  const rounded = () => Math.abs(unit ? Number(value.toPrecision(3)) : Math.round(value));
  while (rounded() >= 1000 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${number(unit ? value : Math.round(value))} ${UNITS[unit]}`;
}

/**
 * @param {?number} seconds
 * @returns {string} such as `2 min 5 s`
 */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return seconds <= 0 ? "0 s" : seconds < 0.01 ? "under 0.01 s" : `${number(seconds, 2)} s`;
  if (seconds < 10) return `${number(seconds, 2)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return pair(Math.floor(whole / 60), "min", whole % 60, "s");
  // Rounded to the smaller unit before it is split: there is no 60th minute of an hour.
  const minutes = Math.round(whole / 60);
  if (minutes < 1440) return pair(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.round(whole / 3600);
  return pair(Math.floor(hours / 24), "d", hours % 24, "h");
}

/**
 * @param {?string} moment ISO 8601, in UTC where it names no zone
 * @returns {string} in the zone of the reader
 */
export function time(moment) {
  const date = dateOf(moment);
  return date ? date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : "–";
}

/**
 * @param {?string} moment
 * @returns {string} such as `5 min ago`
 */
export function age(moment) {
  const date = dateOf(moment);
  if (!date) return "–";
  const seconds = (Date.now() - date.getTime()) / 1000;
  if (seconds < 10) return "just now";
  const [size, unit] =
    seconds < 60 ? [1, "s"] : seconds < 3600 ? [60, "min"] : seconds < 86400 ? [3600, "h"] : [86400, "d"];
  return `${Math.floor(seconds / size)} ${unit} ago`;
}

/**
 * @param {?number} share from 0 to 1
 * @returns {string} such as `45 %`
 */
export function percent(share) {
  if (typeof share !== "number" || !Number.isFinite(share)) return "–";
  return `${(100 * share).toLocaleString(LOCALE, { maximumFractionDigits: share < 0.1 && share > 0 ? 1 : 0 })} %`;
}

/**
 * @param {?string} moment
 * @returns {?Date}
 */
export function dateOf(moment) {
  if (!moment) return null;
  const zoned = /(Z|[+-]\d\d:?\d\d)$/.test(moment) || !moment.includes("T");
  const date = new Date(zoned ? moment : `${moment}Z`);
  return Number.isNaN(date.getTime()) ? null : date;
}

/**
 * The last part of an ARN, path or address.
 * @param {string} text
 * @returns {string}
 */
export function shortName(text) {
  return text.replace(/\/+$/, "").split("/").pop() || text;
}

/**
 * A text of the server with a capital letter and without underscores.
 * @param {string} text such as `CONTINUED_PRE_TRAINING`
 * @returns {string} such as `Continued pre training`
 */
export function words(text) {
  const lower = String(text).replaceAll("_", " ").toLowerCase();
  return lower.charAt(0).toUpperCase() + lower.slice(1);
}

function pair(first, firstUnit, second, secondUnit) {
  return second ? `${first} ${firstUnit} ${second} ${secondUnit}` : `${first} ${firstUnit}`;
}

function wholeDigits(value) {
  return Math.max(1, Math.floor(Math.log10(Math.abs(value) || 1)) + 1);
}
