//! How what was written is told: whole, or in pieces.

use std::{
    hash::{BuildHasher, RandomState},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value as Json, json};
use slim_runtime::Tokenizer;

use super::{Kind, Parameters};
use crate::{
    engine::{End, Weighed},
    tools::{Call, Calls, Part},
};

/// The answer to a request, as far as it is known.
pub struct Reply {
    kind: Kind,
    id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    include_usage: bool,
    tells_logprobs: bool,
    /// Whether calls of tools are taken out of the texts.
    has_tools: bool,
    prompt_tokens: usize,
    choices: Vec<Choice>,
}

/// One of its texts.
#[derive(Default)]
struct Choice {
    text: String,
    calls: Vec<Call>,
    parser: Calls,
    tokens: Vec<Json>,
    /// Bytes of the text before the tokens that are told next.
    offset: usize,
    end: Option<End>,
}

impl Reply {
    pub fn new(kind: Kind, model: &str, parameters: &Parameters, has_tools: bool) -> Self {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            kind,
            id: format!("{prefix}-{}", random_id()),
            created: since.as_secs(),
            model: model.to_owned(),
            include_usage: parameters.include_usage,
            tells_logprobs: parameters.likely.is_some(),
            has_tools,
            prompt_tokens: 0,
            choices: Vec::new(),
        }
    }

    /// `n` texts for each prompt of so many tokens.
    pub fn expect(&mut self, prompts: impl Iterator<Item = usize>, n: usize) {
        for tokens in prompts {
            self.prompt_tokens += tokens;
            self.choices.extend((0..n).map(|_| Choice::default()));
        }
    }

    /// Whether all texts have ended.
    pub fn is_whole(&self) -> bool {
        self.choices.iter().all(|choice| choice.end.is_some())
    }

    /// Tokens of the prompts, those that were not computed again, and those written.
    pub fn counts(&self) -> [usize; 3] {
        let ends = || self.choices.iter().filter_map(|choice| choice.end);
        let (reused, written) =
            (ends().map(|end| end.reused).sum(), ends().map(|end| end.written).sum());
        [self.prompt_tokens, reused, written]
    }

    /// The first piece of a stream: who speaks, of a chat.
    pub fn opening(&self) -> Vec<Json> {
        let role = |index| self.piece(index, json!({"role": "assistant", "content": ""}), None);
        match self.kind {
            Kind::Chat => (0..self.choices.len()).map(role).collect(),
            Kind::Completion => Vec::new(),
        }
    }

    /// Takes more of a text; gives it as pieces of a stream.
    pub fn push(
        &mut self,
        index: usize,
        text: &str,
        tokens: &[Weighed],
        end: Option<End>,
        tokenizer: &Tokenizer,
    ) -> Vec<Json> {
        let choice = &mut self.choices[index];
        let told = match self.kind {
            Kind::Chat => tokens.iter().map(|token| chat_token(token, tokenizer)).collect(),
            Kind::Completion => {
                tokens.iter().map(|token| completion_token(token, choice, tokenizer)).collect()
            }
        };
        let parts = choice.parts(self.has_tools, text, end.is_some());
        let first_call = choice.calls.len();
        for part in &parts {
            match part {
                Part::Text(text) => choice.text += text,
                Part::Call(call) => choice.calls.push(call.clone()),
            }
        }
        choice.tokens.extend(Vec::clone(&told));
        choice.end = end;
        let logprobs = self.tells_logprobs.then(|| self.logprobs(told));
        self.pieces(index, parts, first_call, logprobs, end)
    }

    /// All of it, at the end.
    pub fn whole(&mut self) -> Json {
        let choices: Vec<_> =
            (0..self.choices.len()).map(|index| self.whole_choice(index)).collect();
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices, "usage": self.usage(),
        })
    }

    /// The last piece of a stream, if it was asked for.
    pub fn closing(&self) -> Option<Json> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = self.usage();
            chunk
        })
    }

    fn pieces(
        &self,
        index: usize,
        parts: Vec<Part>,
        first_call: usize,
        mut logprobs: Option<Json>,
        end: Option<End>,
    ) -> Vec<Json> {
        let mut call = first_call;
        let mut pieces = Vec::new();
        for part in parts {
            let delta = match part {
                Part::Text(text) => json!({ "content": text }),
                Part::Call(written) => {
                    let mut told = self.call(index, call, &written);
                    told["index"] = call.into();
                    call += 1;
                    json!({ "tool_calls": [told] })
                }
            };
            pieces.push(self.piece(index, delta, logprobs.take()));
        }
        if let Some(end) = end {
            let mut last = self.piece(index, json!({}), logprobs);
            last["choices"][0]["finish_reason"] = self.reason(index, end).into();
            pieces.push(last);
        } else if logprobs.as_ref().is_some_and(has_tokens) {
            pieces.push(self.piece(index, json!({}), logprobs));
        }
        pieces
    }

    fn piece(&self, index: usize, delta: Json, logprobs: Option<Json>) -> Json {
        let mut choice = json!({ "index": index });
        match self.kind {
            Kind::Chat => choice["delta"] = delta,
            Kind::Completion => {
                choice["text"] = delta.get("content").cloned().unwrap_or_else(|| "".into());
            }
        }
        choice["logprobs"] = logprobs.unwrap_or_default();
        choice["finish_reason"] = Json::Null;
        self.chunk(json!([choice]))
    }

    fn chunk(&self, choices: Json) -> Json {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = Json::Null;
        }
        chunk
    }

    fn whole_choice(&mut self, index: usize) -> Json {
        let tokens = std::mem::take(&mut self.choices[index].tokens);
        let logprobs = self.tells_logprobs.then(|| self.logprobs(tokens));
        let Choice { text, calls, end, .. } = &self.choices[index];
        let reason = end.map(|end| self.reason(index, end));
        if self.kind == Kind::Completion {
            return json!({
                "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason,
            });
        }
        let mut message = json!({ "role": "assistant", "content": text, "refusal": null });
        if !calls.is_empty() {
            if text.is_empty() {
                message["content"] = Json::Null;
            }
            let told = calls.iter().enumerate().map(|(place, call)| self.call(index, place, call));
            message["tool_calls"] = told.collect();
        }
        json!({
            "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason,
        })
    }

    fn call(&self, index: usize, place: usize, call: &Call) -> Json {
        let id = self.id.split_once('-').map_or("", |(_, id)| id);
        json!({
            "id": format!("call_{id}{index}{place}"), "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        })
    }

    fn reason(&self, index: usize, end: End) -> &'static str {
        match (end.is_cut, self.choices[index].calls.is_empty()) {
            (true, _) => "length",
            (false, true) => "stop",
            (false, false) => "tool_calls",
        }
    }

    fn usage(&self) -> Json {
        let [prompt, reused, written] = self.counts();
        json!({
            "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": { "cached_tokens": reused },
        })
    }

    /// Tokens with their probabilities, in the form of the endpoint.
    fn logprobs(&self, tokens: Vec<Json>) -> Json {
        match self.kind {
            Kind::Chat => json!({ "content": tokens, "refusal": null }),
            Kind::Completion => {
                let column =
                    |key: &str| tokens.iter().map(|token| token[key].clone()).collect::<Json>();
                json!({
                    "tokens": column("token"), "token_logprobs": column("logprob"),
                    "top_logprobs": column("top"), "text_offset": column("offset"),
                })
            }
        }
    }
}

impl Choice {
    fn parts(&mut self, has_tools: bool, text: &str, ends: bool) -> Vec<Part> {
        let mut parts = match has_tools {
            true => self.parser.push(text),
            false => Some(text.to_owned())
                .filter(|text| !text.is_empty())
                .map(Part::Text)
                .into_iter()
                .collect(),
        };
        if ends && has_tools {
            parts.extend(self.parser.finish());
        }
        parts
    }
}

fn has_tokens(logprobs: &Json) -> bool {
    let list = logprobs.get("content").or(logprobs.get("tokens"));
    list.and_then(Json::as_array).is_some_and(|tokens| !tokens.is_empty())
}

fn chat_token(token: &Weighed, tokenizer: &Tokenizer) -> Json {
    let told = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        let text = String::from_utf8_lossy(&bytes);
        json!({ "token": text, "logprob": finite(logprob), "bytes": bytes })
    };
    let mut json = told(token.token, token.logprob);
    let likely = token.likely.iter().map(|likely| told(likely.token, likely.logprob));
    json["top_logprobs"] = likely.collect();
    json
}

fn completion_token(token: &Weighed, choice: &mut Choice, tokenizer: &Tokenizer) -> Json {
    let text = |token| String::from_utf8_lossy(&tokenizer.token_bytes(token)).into_owned();
    let likely = token.likely.iter().map(|likely| (text(likely.token), finite(likely.logprob)));
    let top: Json = likely.map(|(text, logprob)| (text, Json::from(logprob))).collect();
    let offset = choice.offset;
    choice.offset += tokenizer.token_bytes(token.token).len();
    json!({
        "token": text(token.token), "logprob": finite(token.logprob), "top": top, "offset": offset,
    })
}

/// JSON has no infinity: OpenAI's API has this number for what is next to impossible.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

fn random_id() -> String {
    // Its keys come from the system's random numbers.
    format!("{:016x}", RandomState::new().hash_one(0))
}
