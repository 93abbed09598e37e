// The phone's screen: a picture after each action; pointer and keyboard become taps, swipes and keys.

import { call } from "./api.js";
import { text } from "./strings.js";

const AFTER_ACTION_MS = [150, 700, 1600];
const RETRY_MS = 1500;
const MOVED_PX = 10;
const HELD_MS = 450;
const TYPED_TOGETHER_MS = 80;
const KEYS = {
  Enter: "ENTER", Backspace: "DEL", Delete: "FORWARD_DEL", Escape: "BACK", Home: "MOVE_HOME", End: "MOVE_END",
  ArrowUp: "DPAD_UP", ArrowDown: "DPAD_DOWN", ArrowLeft: "DPAD_LEFT", ArrowRight: "DPAD_RIGHT",
};

export function startScreen(api) {
  const glass = document.getElementById("screen");
  const picture = glass.querySelector("img");
  const note = glass.querySelector("[data-screen-note]");
  const blank = picture.src;
  let state = "";
  let underWay = false;
  let wanted = false;
  let timers = [];
  let typed = "";
  let queue = Promise.resolve();

  function say(message, waiting) {
    note.hidden = message === "";
    note.querySelector("[data-screen-text]").textContent = message;
    note.querySelector("[data-spinner]").hidden = !waiting;
  }

  /** Fetches the screen now; one request at a time, and one more if it was asked for meanwhile. */
  async function refresh() {
    wanted = true;
    if (underWay) return;
    underWay = true;
    while (wanted && state === "running") {
      wanted = false;
      await fetchPicture();
    }
    underWay = false;
  }

  async function fetchPicture() {
    try {
      const response = await fetch(`${api}/screenshot`, { cache: "no-store", headers: { Accept: "image/png" } });
      if (!response.ok) throw new Error(String(response.status));
      const address = URL.createObjectURL(await response.blob());
      const before = picture.src;
      picture.src = address;
      await picture.decode();
      if (before.startsWith("blob:")) URL.revokeObjectURL(before);
      if (state === "running") say("", false);
    } catch {
      if (state !== "running" || picture.src !== blank) return;
      say(text("screen.unreadable"), false);
      timers.push(setTimeout(refresh, RETRY_MS));
    }
  }

  function refreshSoon() {
    timers.forEach(clearTimeout);
    timers = AFTER_ACTION_MS.map((afterMs) => setTimeout(refresh, afterMs));
  }

  /** Sends inputs one after the other: a phone that gets "b" before "a" reads "ba". */
  function send(input) {
    if (state !== "running") return queue;
    queue = queue.then(() => call("POST", `${api}/input`, input)).then(refreshSoon, () => {});
    return queue;
  }

  function follow(now) {
    const changed = state !== now;
    state = now;
    if (now !== "running") {
      picture.src = blank;
      say(text(`screen.${now}`), !["stopped", "failed"].includes(now));
    } else if (changed) {
      say(text("screen.waiting"), true);
      refreshSoon();
      refresh();
    }
  }

  // Pointer

  let start = null;

  function place(event) {
    const box = picture.getBoundingClientRect();
    // A rotated phone sends a picture of other measures than its plan has.
    const width = picture.src === blank ? Number(glass.dataset.width) : picture.naturalWidth;
    const height = picture.src === blank ? Number(glass.dataset.height) : picture.naturalHeight;
    const within = (share, size) => Math.round(Math.min(Math.max(share, 0), 1) * (size - 1));
    return {
      x: within((event.clientX - box.left) / box.width, width),
      y: within((event.clientY - box.top) / box.height, height),
    };
  }

  function ripple(event) {
    const box = glass.getBoundingClientRect();
    const mark = document.createElement("span");
    mark.className = "touch";
    mark.style.left = `${event.clientX - box.left}px`;
    mark.style.top = `${event.clientY - box.top}px`;
    glass.append(mark);
    setTimeout(() => mark.remove(), 500);
  }

  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || state !== "running") return;
    picture.setPointerCapture(event.pointerId);
    start = { ...place(event), atMs: event.timeStamp, clientX: event.clientX, clientY: event.clientY };
    ripple(event);
  });
  picture.addEventListener("pointerup", (event) => {
    if (!start) return;
    const { x, y, atMs, clientX, clientY } = start;
    start = null;
    const heldMs = Math.round(event.timeStamp - atMs);
    const moved = Math.hypot(event.clientX - clientX, event.clientY - clientY) > MOVED_PX;
    if (!moved && heldMs < HELD_MS) {
      send({ type: "tap", x, y });
    } else {
      const to = moved ? place(event) : { x, y };
      const durationMs = Math.min(Math.max(heldMs, 50), 5000);
      send({ type: "swipe", x, y, to_x: to.x, to_y: to.y, duration_ms: durationMs });
      if (moved) ripple(event);
    }
  });
  picture.addEventListener("pointercancel", () => {
    start = null;
  });

  // Keyboard

  function flush() {
    if (typed) send({ type: "text", text: typed });
    typed = "";
  }

  let flushTimer = null;
  glass.addEventListener("keydown", (event) => {
    if (event.target !== glass || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (KEYS[event.key]) {
      flush();
      send({ type: "key", key: KEYS[event.key] });
    } else if ([...event.key].length === 1) {
      typed += event.key;
      clearTimeout(flushTimer);
      flushTimer = setTimeout(flush, TYPED_TOGETHER_MS);
    } else {
      return;
    }
    event.preventDefault();
  });
  glass.addEventListener("paste", (event) => {
    const pasted = event.clipboardData.getData("text/plain");
    if (event.target === glass && pasted) send({ type: "text", text: pasted });
  });

  for (const button of document.querySelectorAll("[data-key]")) {
    button.addEventListener("click", () => send({ type: "key", key: button.dataset.key }));
  }
  document.querySelector("[data-refresh]").addEventListener("click", refresh);

  const typing = document.getElementById("typing");
  typing.addEventListener("submit", (event) => {
    event.preventDefault();
    const field = typing.elements.text;
    // An empty box sends the Enter key: that is how a form on the phone is sent off.
    send(field.value ? { type: "text", text: field.value } : { type: "key", key: "ENTER" });
    field.value = "";
    field.focus();
  });

  return { follow, refresh, refreshSoon };
}
