// The words of this page, in the reader's language: <meta name="strings"> holds them.

const words = {};
for (const meta of document.querySelectorAll('meta[name="strings"]')) {
  Object.assign(words, JSON.parse(meta.content));
}

/** The text under a path such as "device.running", its {name}s filled in; "" where there is none. */
export function text(path, params = {}) {
  const found = path.split(".").reduce((level, key) => level?.[key], words) ?? "";
  return found.replace(/\{(\w+)\}/g, (whole, name) => params[name] ?? whole);
}
