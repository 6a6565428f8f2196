// Numbers, times and sizes as text.

const LOCALE = "en";
const UNITS = ["bytes", "kB", "MB", "GB", "TB"];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Return a number with thousands separated; other numbers than integers with `digits` significant digits. */
export function number(value, digits = 3) {
  if (!isNumber(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString(LOCALE);
  if (Math.abs(value) < 1e-3) return value.toExponential(Math.max(0, digits - 1));
  const whole = Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toLocaleString(LOCALE, { maximumSignificantDigits: Math.max(1, digits, whole) });
}

/** Return a count such as `135M`. */
export function compact(value) {
  return isNumber(value) ? value.toLocaleString(LOCALE, { notation: "compact", maximumSignificantDigits: 3 }) : "–";
}

/** Return a size such as `1.4 GB`. */
export function bytes(value) {
  if (!isNumber(value)) return "–";
  let unit = 0;
  // The rounded size decides on the unit: 999,999 bytes are 1 MB, not 1,000 kB.
  const rounded = () => Math.abs(unit ? Number(value.toPrecision(3)) : Math.round(value));
  for (; rounded() >= 1000 && unit < UNITS.length - 1; unit += 1) value /= 1000;
  return `${number(unit ? value : Math.round(value))} ${UNITS[unit]}`;
}

/** Return a time such as `2 min 5 s`. */
export function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds <= 0) return "0 s";
  if (seconds < 10) return seconds < 0.01 ? `${number(1000 * seconds, 1)} ms` : `${number(seconds, 2)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return pair(whole, 60, "min", "s");
  // Rounding comes before splitting, so that no hour has 60 minutes.
  const minutes = Math.round(whole / 60);
  return minutes < 1440 ? pair(minutes, 60, "h", "min") : pair(Math.round(whole / 3600), 24, "d", "h");
}

function pair(value, size, large, small) {
  const rest = value % size;
  return `${Math.floor(value / size)} ${large}${rest ? ` ${rest} ${small}` : ""}`;
}

/** Return the moment in the time zone of the user. */
export function time(moment) {
  return dateOf(moment)?.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) ?? "–";
}

/** Return an age such as `5 min ago`. */
export function age(moment) {
  const date = dateOf(moment);
  if (!date) return "–";
  const seconds = (Date.now() - date.getTime()) / 1000;
  if (seconds < 10) return "just now";
  const [size, unit] = seconds < 60 ? [1, "s"] : seconds < 3600 ? [60, "min"] : seconds < 86400 ? [3600, "h"] : [86400, "d"];
  return `${Math.floor(seconds / size)} ${unit} ago`;
}

/** Return a share from 0 to 1 such as `45 %`. */
export function percent(share) {
  if (!isNumber(share)) return "–";
  return `${(100 * share).toLocaleString(LOCALE, { maximumFractionDigits: share < 0.1 && share > 0 ? 1 : 0 })} %`;
}

/** Names of scores from any range. */
const NO_SHARES = /^(reward|pearson|cosine|psnr|degraded_psnr)$|(loss|error|margin)$/;

/**
 * Return a score as text. Shares have one decimal as in the CLI, so that 99.96 % does not read as 100 %. `shares` are
 * measures from 0 to 1, `errors` measures where lower is better; other values from 0 to 1 are shares.
 */
export function scoreText(name, value, { shares = new Set(), errors = new Set() } = {}) {
  const isShare = shares.has(name) || (value >= 0 && value <= 1 && !errors.has(name) && !NO_SHARES.test(name));
  return isShare ? `${(100 * value).toFixed(1)}\u00a0%` : number(value, 4);
}

/** Return the date of an ISO 8601 moment, which is in UTC if it names no zone; null for other text. */
export function dateOf(moment) {
  if (!moment) return null;
  const zoned = /(Z|[+-]\d\d:?\d\d)$/.test(moment) || !moment.includes("T");
  const date = new Date(zoned ? moment : `${moment}Z`);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** Return the last part of an ARN, path or address. */
export const shortName = (text) => text.replace(/\/+$/, "").split("/").pop() || text;

/** Return a name such as `CONTINUED_PRE_TRAINING` as `Continued pre training`. */
export function words(text) {
  const lower = String(text).replaceAll("_", " ").toLowerCase();
  return lower.charAt(0).toUpperCase() + lower.slice(1);
}
