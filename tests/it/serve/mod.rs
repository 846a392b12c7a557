//! `serve`: the API, its errors, texts in company, and what ends a server.

mod client;

use std::{io::Read, time::Instant};

use serde_json::{Value, json};

use crate::command::{fail, succeed};
use client::{Response, Server, model};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

/// A request with more fields.
fn with(body: Value, more: Value) -> Value {
    let mut body = body;
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn greedy(prompt: &str, tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0})
}

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0})
}

fn text(response: &Response) -> String {
    response.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

fn content(response: &Response) -> String {
    response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[test]
fn chat_and_its_stream_are_one_text() {
    let server = Server::start(&[]);
    let response = server.post(CHAT, &hello());
    let json = response.json();
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny");
    assert_eq!(json["choices"][0]["message"]["role"], "assistant");
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 12);

    let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
    let streamed = server.post(CHAT, &with(hello(), stream));
    assert!(streamed.headers.contains("content-type: text/event-stream"), "{}", streamed.headers);
    let events = streamed.events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), content(&response));
    let [.., end, usage] = &events[..] else { panic!("{events:?}") };
    assert_eq!(end["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["choices"], json!([]));
    // The second time all of the prompt but its last token was there already.
    let prompt = json["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], prompt - 1);
    assert_eq!(usage["usage"]["total_tokens"], prompt + 12);
}

#[test]
fn completion_is_the_text_that_run_writes() {
    let server = Server::start(&[]);
    let served = text(&server.post(COMPLETION, &greedy("the fox", 20)));
    let run =
        ["run", &model(), "-p", "the fox", "-n", "20", "--temperature", "0", "--device", "cpu"];
    // What is printed has control characters visible.
    assert_eq!(succeed(&run).stdout, format!("{}\n", served.replace('\0', "\\u{0}")));
    let lists =
        server.post(COMPLETION, &greedy("the fox", 20).with_prompt(json!(["the fox", "a"])));
    assert_eq!(lists.json()["choices"][0]["text"], served);
    assert_eq!(lists.json()["choices"][1]["index"], 1);
    let usual = server.post(COMPLETION, &json!({"prompt": "the fox", "temperature": 0}));
    assert_eq!(usual.json()["usage"]["completion_tokens"], 16);
}

trait WithPrompt {
    fn with_prompt(self, prompt: Value) -> Value;
}

impl WithPrompt for Value {
    fn with_prompt(self, prompt: Value) -> Value {
        with(self, json!({"prompt": prompt}))
    }
}

#[test]
fn texts_in_company_are_those_alone() {
    let server = Server::start(&["--parallel", "4"]);
    let prompts = ["the fox", "a dog and", "where", "x y z", "the end of the", "b"];
    let endless = json!({"logit_bias": {"268": -100, "270": -100}});
    let ask =
        |prompt: &&str| text(&server.post(COMPLETION, &with(greedy(prompt, 100), endless.clone())));
    let alone: Vec<_> = prompts.iter().map(ask).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let asked = prompts.iter().map(|prompt| scope.spawn(|| ask(prompt)));
        let asked: Vec<_> = asked.collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
    assert_eq!(server.metric("slimllm_generated_tokens_total"), 1200.0);
    // Rounds were shared.
    assert!(server.metric("slimllm_rounds_total") < 1150.0);
}

#[test]
fn seeds_repeat_texts_and_choices_have_their_own() {
    let server = Server::start(&[]);
    let drawn = json!({"prompt": "the", "max_tokens": 24, "temperature": 2, "top_k": 0, "top_p": 1,
                       "min_p": 0, "seed": 7, "n": 2});
    let json = server.post(COMPLETION, &drawn).json();
    let texts = |json: &Value| [0, 1].map(|index| json["choices"][index]["text"].clone());
    assert_eq!(texts(&server.post(COMPLETION, &drawn).json()), texts(&json));
    assert_ne!(texts(&json)[0], texts(&json)[1]);
    let second = server.post(COMPLETION, &with(drawn.clone(), json!({"seed": 8, "n": 1}))).json();
    assert_eq!(second["choices"][0]["text"], texts(&json)[1]);
    let other = server.post(COMPLETION, &with(drawn, json!({"seed": null, "n": 1}))).json();
    assert_ne!(other["choices"][0]["text"], texts(&json)[0]);
}

#[test]
fn stop_string_across_tokens_ends_a_text_and_is_no_part_of_it() {
    let server = Server::start(&[]);
    let whole = text(&server.post(COMPLETION, &greedy("the fox", 40)));
    let letters: Vec<_> = whole.char_indices().map(|(at, _)| at).collect();
    // Wherever tokens end, one of these windows lies across.
    for start in [8, 9, 10, 11] {
        let stop = &whole[letters[start]..letters[start + 5]];
        let expected = whole.split_once(stop).unwrap().0;
        let body = with(greedy("the fox", 40), json!({"stop": ["never found", stop]}));
        let json = server.post(COMPLETION, &body).json();
        assert_eq!(json["choices"][0]["text"], expected);
        assert_eq!(json["choices"][0]["finish_reason"], "stop");
        let events = server.post(COMPLETION, &with(body, json!({"stream": true}))).events();
        let pieces = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap());
        assert_eq!(pieces.collect::<String>(), expected);
    }
}

#[test]
fn log_probabilities_are_told_with_each_token() {
    let server = Server::start(&[]);
    let body = with(hello(), json!({"logprobs": true, "top_logprobs": 3}));
    let json = server.post(CHAT, &body).json();
    let tokens = json["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 12);
    let mut bytes = Vec::new();
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        // Greedy: the token is the most likely one.
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["logprob"], token["logprob"]);
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
    }
    let content = json["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), content);
    let legacy = server.post(COMPLETION, &with(greedy("the", 5), json!({"logprobs": 2}))).json();
    let logprobs = &legacy["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(logprobs["text_offset"][0], 0);
    let biased = with(greedy("the", 3), json!({"logit_bias": {"70": 100}, "logprobs": 0}));
    let biased = server.post(COMPLETION, &biased).json();
    let tokens = biased["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    assert!(tokens.iter().all(|token| *token == tokens[0]), "{tokens:?}");
}

#[test]
fn forms_are_kept() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "blue"]}, "ok": {"type": "boolean"},
            "list": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0},
                     "maxItems": 3},
        },
        "required": ["color", "ok", "list"], "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let long = json!({"max_tokens": 200, "temperature": 1, "seed": 3});
    let asked = with(with(hello(), long), json!({"response_format": format}));
    let response = server.post(CHAT, &asked);
    assert_eq!(response.json()["choices"][0]["finish_reason"], "stop");
    let made: Value = serde_json::from_str(&content(&response)).unwrap();
    assert!(["red", "blue"].contains(&made["color"].as_str().unwrap()), "{made}");
    assert!(made["ok"].is_boolean() && made["list"].is_array(), "{made}");

    let grammar = with(greedy("the", 50), json!({"grammar": "start: \"ab\" /[xyz]{3}/ \"!\""}));
    let made = text(&server.post(COMPLETION, &grammar));
    assert!(made.starts_with("ab") && made.len() == 6 && made.ends_with('!'), "{made}");

    let broken = with(greedy("the", 9), json!({"grammar": "start: nothing"}));
    assert_eq!(server.post(COMPLETION, &broken).fails(400, "`grammar`: ")["param"], "grammar");
    let odd = json!({"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}});
    let odd = with(hello(), json!({"response_format": odd}));
    server.post(CHAT, &odd).fails(400, "`response_format`: ");
}

#[test]
fn tools_are_called() {
    let server = Server::start(&[]);
    let tool = |name: &str, values: Value| {
        let parameters = json!({"type": "object", "properties": {"unit": {"enum": values}},
                                "required": ["unit"], "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let tools = json!([tool("weather", json!(["C", "F"])), tool("time", json!(["h"]))]);
    let choice = json!({"type": "function", "function": {"name": "weather"}});
    let asked = with(hello(), json!({"tools": tools, "tool_choice": choice, "max_tokens": 200}));
    let json = server.post(CHAT, &asked).json();
    assert_eq!(json["choices"][0]["finish_reason"], "tool_calls", "{json}");
    let message = &json["choices"][0]["message"];
    assert_eq!(message["content"], Value::Null);
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"]["name"], "weather");
    let arguments = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    assert!(["C", "F"].contains(&arguments["unit"].as_str().unwrap()));

    let events = server.post(CHAT, &with(asked.clone(), json!({"stream": true}))).events();
    let called = |event: &&Value| event["choices"][0]["delta"]["tool_calls"].is_array();
    let delta = events.iter().find(called).unwrap();
    assert_eq!(delta["choices"][0]["delta"]["tool_calls"][0]["function"]["name"], "weather");

    // What came of a call goes back to the model.
    let messages = json!([
        {"role": "user", "content": "hello"}, message,
        {"role": "tool", "tool_call_id": call["id"], "content": "12"},
    ]);
    server.post(CHAT, &with(asked.clone(), json!({"messages": messages}))).json();
    let none = with(asked.clone(), json!({"tool_choice": "none"}));
    let plain = server.post(CHAT, &with(none, json!({"max_tokens": 12})));
    assert_eq!(content(&plain), content(&server.post(CHAT, &hello())));
    let missing = json!({"tool_choice": {"type": "function", "function": {"name": "rain"}}});
    server.post(CHAT, &with(asked, missing)).fails(400, "there is no such tool");
}

#[test]
fn other_paths_answer() {
    let server = Server::start(&["--parallel", "2", "--context", "300"]);
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(server.get("/v1/models/tiny").json(), models["data"][0]);
    server.get("/v1/models/other").fails(404, "there is no model `other` here");
    server.get("/nothing").fails(404, "there is no path `/nothing`");
    server.get(CHAT).fails(405, "another method");
    let page = server.get("/");
    assert!(page.headers.contains("content-security-policy: default-src 'none'"));
    for file in ["chat.css", "chat.js"] {
        assert!(page.text.contains(file));
        assert_eq!(server.get(&format!("/{file}")).status, 200);
    }
    assert!(!page.text.contains("http"), "the page asks nobody else");
    server.post(COMPLETION, &greedy("the", 3)).json();
    let metrics = server.get("/metrics").text;
    for line in [
        "slimllm_requests_total{path=\"/v1/completions\",status=\"200\"} 1",
        "slimllm_generated_tokens_total 3",
        "slimllm_texts_running 0",
        "slimllm_first_token_seconds_count 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "`{line}` in\n{metrics}");
    }
}

#[test]
fn key_and_host_are_checked() {
    let server = Server::start(&["--api-key", "secret"]);
    for headers in [&[][..], &[("Authorization", "Bearer secre")], &[("Authorization", "secret")]] {
        let refused = server.send("GET", "/v1/models", headers, "");
        assert_eq!(refused.fails(401, "API key")["code"], "invalid_api_key");
    }
    let key = [("Authorization", "Bearer secret")];
    server.send("GET", "/v1/models", &key, "").json();
    server.get("/metrics").fails(401, "API key");
    assert_eq!([server.get("/health").status, server.get("/").status], [200, 200]);

    let open = Server::start(&[]);
    let rebound = "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    let mut stream = std::net::TcpStream::connect(&open.address).unwrap();
    std::io::Write::write_all(&mut stream, rebound.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

#[test]
fn what_cannot_be_read_is_refused_with_a_sentence() {
    let server = Server::start(&["--parallel", "2", "--context", "300"]);
    let json = [("Content-Type", "application/json")];
    let raw = |body: &str| server.send("POST", COMPLETION, &json, body);
    for (body, fragment) in [
        ("", "the body is no JSON"),
        ("{\"prompt\": ", "the body is no JSON"),
        ("[1]", "no object"),
        (&"[".repeat(100_000), "the body is no JSON: recursion limit"),
        ("{\"prompt\": \"a\", \"temperature\": 1e999}", "the body is no JSON: number out of range"),
    ] {
        raw(body).fails(400, fragment);
    }
    for (field, value, fragment) in [
        ("temperature", json!(3), "found 3, expected 0 to 2"),
        ("temperature", json!("hot"), "invalid type"),
        ("top_p", json!(-1), "expected 0 to 1"),
        ("max_tokens", json!(301), "found 301, expected 0 to 300"),
        ("max_tokens", json!(-1), "invalid value"),
        ("n", json!(3), "found 3, expected 1 to 2"),
        ("stop", json!(vec!["a"; 17]), "found 17 texts, expected 16 at most"),
        ("stop", json!(""), "found a text of 0 bytes"),
        ("stop", json!("a".repeat(257)), "found a text of 257 bytes"),
        ("logit_bias", json!({"x": 1}), "expected a token"),
        ("logprobs", json!(21), "found 21, expected 0 to 20"),
        ("echo", json!(true), "only false is supported"),
        ("max_token", json!(1), "there is no such field"),
        ("prompt", json!([320]), "token 320 is not in the vocabulary"),
        ("prompt", json!([]), "has no tokens"),
        ("prompt", json!(["a", "b", "c"]), "3"),
        ("prompt", json!({"a": 1}), "did not match"),
    ] {
        let error = server.post(COMPLETION, &with(greedy("a", 3), json!({field: value})));
        assert_eq!(error.fails(400, fragment)["param"], field);
    }
    for (messages, fragment) in [
        (json!([]), "found 0 messages"),
        (json!([{"role": "king", "content": "a"}]), "unknown variant `king`"),
        (json!([{"role": "user"}]), "message 0: it has no `content`"),
        (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "nothing but text"),
    ] {
        let body = with(hello(), json!({"messages": messages}));
        server.post(CHAT, &body).fails(400, fragment);
    }
    let long = server.post(COMPLETION, &greedy(&"the fox ".repeat(200), 3));
    assert_eq!(long.fails(400, "but a text may have 300")["code"], "context_length_exceeded");
    let other = with(hello(), json!({"model": "gpt-9"}));
    assert_eq!(server.post(CHAT, &other).fails(404, "gpt-9")["code"], "model_not_found");
    server.send("POST", CHAT, &[], &hello().to_string()).fails(415, "application/json");
    raw(&format!("{{\"prompt\": \"{}\"}}", "a".repeat(3 << 20))).fails(413, "more than 2097152");
    // After all of it, it answers.
    server.post(COMPLETION, &greedy("the", 3)).json();
}

#[test]
fn full_queue_is_refused_and_a_client_that_goes_makes_room() {
    let server = Server::start(&["--parallel", "1", "--queue", "0", "--context", "40000"]);
    let running = server.begin_text(30000);
    let refused = server.post(COMPLETION, &greedy("the", 3));
    assert_eq!(refused.fails(429, "too many texts")["code"], "queue_full");
    assert!(refused.headers.contains("retry-after: 1"), "{}", refused.headers);
    drop(running);
    server.wait_for("slimllm_texts_running", 0.0);
    assert_eq!(server.metric("slimllm_texts_dropped_total{reason=\"gone\"}"), 1.0);
    server.post(COMPLETION, &greedy("the", 3)).json();
}

#[test]
fn short_text_is_not_kept_waiting_by_a_long_one() {
    let server = Server::start(&["--parallel", "2", "--context", "40000"]);
    let mut running = server.begin_text(30000);
    server.post(COMPLETION, &greedy("the", 20)).json();
    // Its slot is free a moment after its answer; the long one goes on.
    server.wait_for("slimllm_texts_running", 1.0);
    running.read_exact(&mut [0; 4000]).unwrap();
}

#[test]
fn beginning_of_a_text_is_computed_once() {
    let server = Server::start(&["--parallel", "2", "--context", "2000"]);
    let reused = |prompt: &str| {
        let asked = with(greedy(prompt, 4), json!({"seed": null}));
        let json = server.post(COMPLETION, &asked).json();
        json["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let first = "the fox and the dog ".repeat(20);
    assert_eq!(reused(&first), 0);
    assert_eq!(reused("zebra"), 0);
    // The other text did not take its place.
    let more = format!("{first} were friends");
    assert!(reused(&more) > 100);
    // With a seed, whole pieces of such texts only.
    let repeatable = || {
        let json = server.post(COMPLETION, &greedy(&more, 4)).json();
        let usage = &json["usage"];
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (cached, json["choices"][0]["text"].clone())
    };
    let (first, second) = (repeatable(), repeatable());
    assert_eq!((first.0, second.0 % 64), (0, 0));
    assert!(second.0 > 0);
    assert_eq!(first.1, second.1);
}

#[test]
fn server_that_is_to_stop_lets_texts_end() {
    let server = Server::start(&["--context", "40000"]);
    let mut running = server.begin_text(500);
    server.signal("TERM");
    let start = Instant::now();
    let mut answer = String::new();
    running.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("data: [DONE]"), "{} s", start.elapsed().as_secs_f64());
    let (code, log) = server.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stopping: "), "{log}");
    let line = log.lines().find(|line| line.contains("POST /v1/completions 200")).unwrap();
    assert!(line.contains("written 500"), "{line}");
}

#[test]
fn second_signal_ends_a_server_at_once() {
    let server = Server::start(&["--context", "40000"]);
    let _running = server.begin_text(30000);
    server.signal("INT");
    std::thread::sleep(std::time::Duration::from_millis(200));
    server.signal("INT");
    assert_eq!(server.end().0, Some(130));
}

#[test]
fn server_that_cannot_be_is_refused() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let serve = ["serve", &model(), "--device", "cpu"];
    let more = |flags: &[&str], fragments: &[&str]| fail(&[&serve[..], flags].concat(), fragments);
    more(&["--port", &port], &["cannot listen at 127.0.0.1:", "hint: another program listens"]);
    more(&["--host", "no.such.host.invalid"], &["`no.such.host.invalid`: no such host"]);
    more(&["--context", "2000000"], &["the model was made for a context of 1048576 tokens"]);
    more(
        &["--port", "0", "--context", "1048576", "--parallel", "1024"],
        &["bytes of memory are free"],
    );
    more(&["--api-key", ""], &["a value is required"]);
}
