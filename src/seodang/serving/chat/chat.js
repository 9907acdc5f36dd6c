// A conversation with the model that serves this page, over its OpenAI-compatible API.

import { render } from "./markdown.js";
import { count, text, translate } from "./texts.js";

const REQUEST = { stream: true, max_tokens: 1024, temperature: 0.3, repeat_penalty: 1.1 };

const $ = (id) => document.getElementById(id);
const [scroll, messages, welcome, question] = ["scroll", "messages", "welcome", "question"].map($);

let conversation = []; // {role, content} as the API takes them
let running = null; // the AbortController of the answer under way

class Refused extends Error {}

// --- what the model is ---

async function introduce() {
  const [models, props] = await Promise.all(
    ["v1/models", "props"].map(async (path) => {
      const response = await fetch(path);
      if (!response.ok) throw new Refused(`${path}: ${response.status}`);
      return response.json();
    }),
  );
  const { id, meta } = models.data[0];
  const about = props.ui_settings?.seodang ?? {};
  $("model-name").textContent = id;
  document.title = `${id} · Seodang`;
  $("model-facts").textContent = [
    text("parameters")(count(meta.n_params)),
    meta.ftype,
    about.license,
  ].filter(Boolean).join(" · ");
  $("description").textContent = about.description ?? "";
  $("prompts").replaceChildren(...(about.prompts ?? []).map((prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => ask(prompt));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

// --- one answer ---

/** The events of a streamed response, parsed from its `data:` lines. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error, () => undefined);
  if (error?.type === "exceed_context_size_error") return new Refused(text("tooLong"));
  return new Refused(text("refused")(error?.message ?? `HTTP ${response.status}`));
}

/** Ask for the answer to `conversation`; `show(piece)` is called as it grows. */
async function answer(show, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...REQUEST, messages: conversation }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let ended = null;
  let timings = null;
  for await (const event of events(response)) {
    if (event.error) throw new Refused(text("refused")(event.error.message));
    const choice = event.choices?.[0];
    if (choice?.delta?.content) show(choice.delta.content);
    ended = choice?.finish_reason ?? ended;
    timings = event.timings ?? timings;
  }
  if (ended === null) throw new TypeError("the stream ended early");
  return { ended, timings };
}

function explain(error) {
  if (error instanceof Refused) return error.message;
  return text("unreachable");
}

function paragraph(content, name) {
  const made = document.createElement("p");
  made.className = name;
  made.textContent = content;
  return made;
}

function addMessage(role) {
  const item = document.createElement("li");
  item.className = role;
  const speaker = document.createElement("span");
  speaker.className = "hidden";
  speaker.textContent = text(role);
  const body = document.createElement("div");
  body.className = "text";
  item.append(speaker, body);
  messages.append(item);
  return { item, body };
}

/** A box that explains `error` and offers to replace the failed answer `item` by a new one. */
function problem(item, error) {
  const box = document.createElement("div");
  box.className = "problem";
  box.setAttribute("role", "alert");
  const retry = document.createElement("button");
  retry.type = "button";
  retry.className = "quiet";
  retry.textContent = text("retry");
  retry.addEventListener("click", () => {
    item.remove();
    reply();
  });
  box.append(paragraph(explain(error), ""), retry);
  return box;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

/** Answer the last question of the conversation. */
async function reply() {
  const asked = conversation;
  const { item, body } = addMessage("assistant");
  const waiting = document.createElement("span");
  waiting.className = "waiting";
  waiting.append(...Array.from({ length: 3 }, () => document.createElement("i")));
  body.append(waiting);
  $("status").textContent = text("answering");
  const controller = new AbortController();
  setRunning(controller);
  scroll.scrollTop = scroll.scrollHeight;

  let content = "";
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    following(() => body.replaceChildren(...render(content)));
  };
  const show = (piece) => {
    content += piece;
    drawing ||= requestAnimationFrame(draw);
  };

  let outcome;
  try {
    outcome = await answer(show, controller.signal);
  } catch (error) {
    outcome = controller.signal.aborted ? { ended: "stopped" } : { ended: "failed", error };
  }
  cancelAnimationFrame(drawing);
  draw();
  if (running === controller) setRunning(null);
  if (asked !== conversation) return; // a new conversation was started meanwhile
  if (outcome.ended === "failed") {
    $("status").textContent = "";
    following(() => item.append(problem(item, outcome.error)));
    return;
  }
  if (content !== "") asked.push({ role: "assistant", content });
  const { ended, timings } = outcome;
  const notes = [
    ended === "stopped" && text("stopped"),
    ended === "length" && text("cutOff"),
    ended === "stop" && content === "" && text("empty"),
    timings && text("speed")(timings.predicted_n, timings.predicted_per_second),
  ].filter(Boolean);
  following(() => item.append(paragraph(notes.join(" "), "note")));
  $("status").textContent = ended === "stop" ? content || text("empty") : notes[0];
}

/** Change the page, and stay at the end of the conversation if the reader is there. */
function following(change) {
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
  change();
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

// --- what the reader does ---

function ask(content) {
  if (running || content.trim() === "") return;
  welcome.hidden = true;
  // Two questions in a row, after a failed answer, would break the chat template: the new one counts.
  if (conversation.at(-1)?.role === "user") conversation.pop();
  document.querySelector(".problem button")?.remove();
  conversation.push({ role: "user", content: content.trim() });
  addMessage("user").body.textContent = content.trim();
  question.value = "";
  resize();
  question.focus();
  reply();
}

function startAnew() {
  running?.abort();
  setRunning(null);
  conversation = [];
  messages.replaceChildren();
  welcome.hidden = false;
  $("status").textContent = text("started");
  question.focus();
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  $("send").disabled = question.value.trim() === "";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(question.value);
});
question.addEventListener("keydown", (event) => {
  // While Hangul is being composed, Enter ends the syllable; it does not send.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(question.value);
  }
});
question.addEventListener("input", resize);
$("new").addEventListener("click", startAnew);
$("stop").addEventListener("click", () => {
  running?.abort();
  question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

translate();
resize();
introduce().catch(() => {
  $("model-facts").textContent = text("unreachable");
});
