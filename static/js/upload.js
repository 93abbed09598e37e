// Sends one file with real progress, which fetch cannot tell.

import { csrfToken, Problem } from "./api.js";

/** Posts `file` as the multipart part "file"; resolves to {status, app}, rejects with a Problem. */
export function upload(path, file, { progressed, sent }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const body = new FormData();
    body.append("file", file);
    request.open("POST", path);
    request.responseType = "json";
    request.setRequestHeader("Accept", "application/json");
    request.setRequestHeader("Accept-Language", document.documentElement.lang);
    request.setRequestHeader("X-CSRF-Token", csrfToken);
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) progressed(event.loaded / event.total);
    });
    request.upload.addEventListener("load", sent);
    request.addEventListener("load", () => {
      const { status, response } = request;
      if (status === 200 || status === 201) resolve({ status, app: response });
      else reject(new Problem(status, response ?? {}));
    });
    request.addEventListener("error", () => reject(new Problem(0)));
    request.send(body);
  });
}
