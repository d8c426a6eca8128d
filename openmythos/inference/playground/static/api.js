// Asking the server: JSON, streams of events, errors in words, and the key where one is wanted.

import { byId } from "./nodes.js";

const KEY = "openmythos-key";
const SENDABLE = /^[\x21-\x7e]+$/; // what a header holds; the browser refuses to send most others

export class Refusal extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const isAbort = (error) => error?.name === "AbortError";

// The answer's JSON. Without a body it is a GET.
export async function ask(path, body, signal) {
  const response = await send(path, body, signal);
  return await response.json();
}

// The events of an answer, each parsed; ends with the server's [DONE].
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let ended = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (isAbort(error) || signal?.aborted) throw new DOMException("stopped", "AbortError");
        throw brokenOff();
      }
      if (part.done) throw brokenOff();
      text += part.value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment keeps the connection open
        const data = event.slice("data: ".length);
        if (data === "[DONE]") {
          while (!(await reader.read()).done); // to the end, or the browser calls it broken off
          ended = true;
          return;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(chunk.error.message, { code: chunk.error.code });
        yield chunk;
      }
    }
  } finally {
    if (!ended) reader.cancel().catch(() => {});
  }
}

const brokenOff = () =>
  new Refusal("The connection broke off before the text was finished: is the server still running?");

async function send(path, body, signal) {
  const headers = {};
  const key = keptKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new Refusal("The server cannot be reached: is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const changed = keptKey() !== key; // given to another request meanwhile
    if (changed || (await askForKey(key && "The server refused that key. Try again."))) {
      return await send(path, body, signal);
    }
    throw new Refusal("This server answers only with its key.", { status: 401 });
  }
  throw await refusalOf(response);
}

async function refusalOf(response) {
  try {
    const { error } = await response.json();
    return new Refusal(error.message, { status: response.status, code: error.code });
  } catch {
    return new Refusal(`The server answered with the status ${response.status}.`, {
      status: response.status,
    });
  }
}

let kept = null; // the key, where storage is forbidden: it then holds until the page is left

function keptKey() {
  try {
    return sessionStorage.getItem(KEY) ?? kept;
  } catch {
    return kept;
  }
}

function keepKey(key) {
  kept = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // `kept` has it
  }
}

let asking = null; // two requests that are refused together ask once

function askForKey(note) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    const value = byId("key-value");
    if (note) byId("key-note").textContent = note;
    value.value = "";
    byId("key-cancel").onclick = () => dialog.close("cancel");
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = value.value.trim();
      if (!SENDABLE.test(key)) {
        byId("key-note").textContent =
          "A key holds Latin letters, digits and signs, without accents or spaces. Try again.";
        value.select();
        return;
      }
      keepKey(key);
      dialog.close("use");
    };
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue === "use");
    };
    dialog.returnValue = "";
    dialog.showModal();
    value.focus();
  });
  return asking;
}
