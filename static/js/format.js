// Numbers, money and times as the reader writes them.

export const language = document.documentElement.lang || "en";

/** An amount in minor units (cents, fen) with its currency. */
export function money(amountMinor, currency) {
  const format = new Intl.NumberFormat(language, { style: "currency", currency });
  return format.format(amountMinor / 10 ** format.resolvedOptions().maximumFractionDigits);
}

/** A size in decimal units. */
export function fileSize(bytes) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte"];
  let size = bytes;
  let step = 0;
  while (size >= 999.5 && step < units.length - 1) {
    size /= 1000;
    step += 1;
  }
  const digits = step && size < 100 ? 1 : 0;
  return new Intl.NumberFormat(language, {
    style: "unit", unit: units[step], unitDisplay: "short", maximumFractionDigits: digits,
  }).format(size);
}

/** A length of time in its two largest units, as the server writes it; a minute is the least. */
export function stretch(seconds) {
  const minutes = Math.max(1, Math.floor(seconds / 60));
  const parts = [["day", Math.floor(minutes / 1440)], ["hour", Math.floor(minutes / 60) % 24], ["minute", minutes % 60]];
  const first = parts.findIndex(([, count]) => count);
  return parts
    .slice(first, first + 2)
    .filter(([, count]) => count)
    .map(([unit, count]) => new Intl.NumberFormat(language, { style: "unit", unit, unitDisplay: "short" }).format(count))
    .join(" ");
}

/** A share of one, such as 43 %. */
export function percent(share) {
  return new Intl.NumberFormat(language, { style: "percent" }).format(share);
}

/** A point in time in the reader's own time zone. */
export function moment(at) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(new Date(at));
}
