// One WebSocket for the whole page: every notification, once, in order, across reconnections.
//
// For each one `document` gets a CustomEvent named after its topic ("device.state") and one named
// "notification", both with the notification as `detail`. After a reconnection whose answer shows
// that this page fell behind, what was missed arrives the same way.

import { text } from "./strings.js";

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15000;
const SIGNED_OUT = new Set([1008, 4001, 4401]);

let lastId = Number(document.body.dataset.since);
let waitMs = FIRST_WAIT_MS;
let socket = null;
let timer = null;

function show(state) {
  const dot = document.querySelector(".live");
  dot.dataset.live = state;
  dot.querySelector("[data-live-text]").textContent = text(`live.${state}`);
}

function connect() {
  clearTimeout(timer);
  const address = new URL(document.body.dataset.stream, location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.searchParams.set("since", lastId);
  socket = new WebSocket(address);
  socket.addEventListener("message", (message) => receive(JSON.parse(message.data)));
  socket.addEventListener("close", (event) => {
    socket = null;
    show("off");
    if (!SIGNED_OUT.has(event.code)) retry();
  });
}

function retry() {
  // Spread out, so that a restarted server does not meet all its pages in one moment.
  timer = setTimeout(connect, waitMs * (0.5 + Math.random() / 2));
  waitMs = Math.min(waitMs * 2, LONGEST_WAIT_MS);
}

function receive(frame) {
  if (frame.type === "hello") {
    waitMs = FIRST_WAIT_MS;
    show("on");
    document.dispatchEvent(new CustomEvent("live"));
  } else if (frame.type === "notification" && frame.id > lastId) {
    lastId = frame.id;
    for (const name of ["notification", frame.topic]) {
      document.dispatchEvent(new CustomEvent(name, { detail: frame }));
    }
  }
}

export function startLive() {
  connect();
  const now = () => {
    if (!socket && document.visibilityState === "visible") {
      waitMs = FIRST_WAIT_MS;
      connect();
    }
  };
  window.addEventListener("online", now);
  document.addEventListener("visibilitychange", now);
  window.addEventListener("pageshow", (event) => event.persisted && now());
}
