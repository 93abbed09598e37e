// Short messages in the corner, read aloud by screen readers.

import { fill } from "./slots.js";

const LASTS_MS = { info: 6000, success: 6000, error: 12000 };
const MOST = 4;

export function toast(title, body = "", kind = "info") {
  const region = document.getElementById("toasts");
  const element = fill("toast", { title, body });
  element.classList.add(kind);
  element.querySelector("button").addEventListener("click", () => element.remove());
  region.append(element);
  while (region.children.length > MOST) region.firstElementChild.remove();

  let timer = setTimeout(() => element.remove(), LASTS_MS[kind]);
  element.addEventListener("pointerenter", () => clearTimeout(timer));
  element.addEventListener("focusin", () => clearTimeout(timer));
  element.addEventListener("pointerleave", () => {
    timer = setTimeout(() => element.remove(), LASTS_MS[kind]);
  });
}
