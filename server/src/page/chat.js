"use strict";
// The chat page: keeps the conversation, asks the server it came from, shows what comes.

const at = (id) => document.getElementById(id);
const conversation = [];
let answering = null; // an AbortController while an answer comes

const headers = () => {
  const key = at("key").value;
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
};

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  article.textContent = text;
  at("chat").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function note(article, text) {
  const small = document.createElement("small");
  small.textContent = text;
  article.append(small);
}

function request() {
  const system = at("system").value.trim();
  const temperature = parseFloat(at("temperature").value);
  const limit = parseInt(at("limit").value, 10);
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...(Number.isNaN(temperature) ? {} : { temperature }),
    ...(Number.isNaN(limit) ? {} : { max_tokens: limit }),
  };
}

// The JSON documents of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
    }
  }
}

async function answer() {
  const article = show("assistant", "");
  const started = performance.now();
  const question = conversation.at(-1);
  let text = "";
  answering = new AbortController();
  at("send").textContent = "Stop";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: answering.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content;
      if (piece) {
        const chat = at("chat");
        const follows = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
        text += piece;
        article.textContent = text;
        if (follows) chat.scrollTop = chat.scrollHeight;
      }
      if (event.usage) {
        const seconds = (performance.now() - started) / 1000;
        const speed = (event.usage.completion_tokens / seconds).toFixed(1);
        note(article, `${event.usage.completion_tokens} tokens, ${speed} per second`);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") note(article, "stopped");
    else show("error", error.message);
  }
  // The chat may have been cleared meanwhile; a question without an answer is forgotten.
  if (conversation.at(-1) === question) {
    if (text) conversation.push({ role: "assistant", content: text });
    else conversation.pop();
  }
  answering = null;
  at("send").textContent = "Send";
  at("message").focus();
}

function send() {
  if (answering) return answering.abort();
  const text = at("message").value.trim();
  if (!text) return;
  at("message").value = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  answer();
}

function clear() {
  answering?.abort();
  conversation.length = 0;
  at("chat").replaceChildren();
  at("message").focus();
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("clear").addEventListener("click", clear);
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!answering) send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
  if (event.key === "Backspace" && event.ctrlKey && event.shiftKey) clear();
});

async function tellModel() {
  const response = await fetch("v1/models", { headers: headers() });
  const name = response.ok ? (await response.json()).data[0].id : "slimllm (give the API key)";
  at("model").textContent = name;
  document.title = name;
}
at("key").addEventListener("change", tellModel);
tellModel().catch(() => {});
