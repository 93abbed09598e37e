// One command after the other on the phone; arrow up and down walk through the earlier ones.

import { busy } from "./actions.js";
import { call } from "./api.js";
import { text } from "./strings.js";

export function startShell(api, screenChanged) {
  const form = document.getElementById("shell");
  const field = form.elements.command;
  const output = form.querySelector("[data-output]");
  const exit = form.querySelector("[data-exit]");
  const earlier = [];
  let at = 0;

  async function run(command) {
    exit.hidden = false;
    exit.textContent = text("shell_running");
    try {
      const result = await call("POST", `${api}/shell`, { command });
      output.textContent = `$ ${command}\n${result.stdout}${result.stderr}`;
      output.hidden = false;
      output.scrollTop = 0;
      exit.textContent = text("shell_exit", { code: result.exit_code });
      screenChanged();
    } catch (problem) {
      exit.textContent = problem.message;
      throw problem;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const command = field.value.trim();
    if (!command) return;
    at = earlier.push(command);
    field.select();
    busy(event.submitter, () => run(command));
  });

  field.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step || at + step < 0 || at + step > earlier.length) return;
    event.preventDefault();
    at += step;
    field.value = earlier[at] ?? "";
  });
}
