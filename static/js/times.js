// The server writes times in UTC; here they become the reader's own.

import { moment } from "./format.js";

export function localiseTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.textContent = moment(time.dateTime);
  }
}
