//! Functions that a model may call, as Hermes and Qwen write them:
//! `<tool_call>{"name": "now", "arguments": {}}</tool_call>`.

use serde_json::{Map, Value as Json, json};
use slim_runtime::Message;

use crate::{
    grammar::{Form, on_one_line},
    stops::overlap,
};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Whether a template describes tools and writes calls in this form.
pub fn are_written_by(template: &str) -> bool {
    template.contains("tools") && template.contains(OPEN)
}

/// A chat for templates that know nothing of tools: they are described in the system message, calls
/// are texts of the assistant, and what they gave are texts of the user.
pub fn in_words(messages: &[Message], tools: &[Json]) -> Vec<Message> {
    let mut messages: Vec<_> = messages.iter().map(message_in_words).collect();
    if tools.is_empty() {
        return messages;
    }
    if messages.first().is_none_or(|first| first.role != "system") {
        messages.insert(0, Message::new("system", ""));
    }
    let system = &mut messages[0].content;
    let listed: Vec<_> = tools.iter().map(Json::to_string).collect();
    *system = format!(
        "{system}{}You may call these functions:\n{}\n\nTo call one, write a JSON object with its \
         name and arguments:\n{OPEN}\n{{\"name\": NAME, \"arguments\": ARGUMENTS}}\n{CLOSE}",
        if system.is_empty() { "" } else { "\n\n" },
        listed.join("\n"),
    );
    messages
}

fn message_in_words(message: &Message) -> Message {
    if message.role == "tool" {
        let content = format!("<tool_response>\n{}\n</tool_response>", message.content);
        return Message::new("user", content);
    }
    let calls = message.more.get("tool_calls").and_then(Json::as_array).into_iter().flatten();
    let calls = calls.map(|call| format!("{OPEN}\n{}\n{CLOSE}", call["function"]));
    let content = Some(message.content.clone()).filter(|content| !content.is_empty());
    let parts: Vec<_> = content.into_iter().chain(calls).collect();
    Message::new(message.role.as_str(), parts.join("\n"))
}

/// The form of a text that is a call of one of these tools.
pub fn form_of_call(tools: &[Json]) -> Form {
    let call = |tool: &Json| {
        let function = &tool["function"];
        let arguments = match &function["parameters"] {
            Json::Object(schema) => schema.clone(),
            _ => Map::from_iter([("type".to_owned(), "object".into())]),
        };
        json!({
            "type": "object",
            "properties": { "name": { "const": function["name"] }, "arguments": arguments },
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<_> = tools.iter().map(call).collect();
    let schema = on_one_line(&json!({ "anyOf": calls }));
    Form::Lark(format!("start: \"{OPEN}\\n\" call \"\\n{CLOSE}\"\ncall: %json {schema}\n"))
}

/// A call that a model wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub name: String,
    /// JSON, as OpenAI's API has it: in a text.
    pub arguments: String,
}

/// What a text with calls is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    Text(String),
    Call(Call),
}

/// Takes the calls out of a text that comes in pieces.
#[derive(Debug, Default)]
pub struct Calls {
    held: String,
    is_open: bool,
}

impl Calls {
    /// Takes a piece; gives what is certain now.
    pub fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held += piece;
        let mut parts = Vec::new();
        loop {
            let mark = if self.is_open { CLOSE } else { OPEN };
            let Some(start) = self.held.find(mark) else { break };
            let rest = self.held.split_off(start + mark.len());
            let before = std::mem::replace(&mut self.held, rest);
            let before = &before[..start];
            match self.is_open {
                true => parts.push(part_of_call(before)),
                false => parts.extend(text(before.trim_end())),
            }
            self.is_open = !self.is_open;
        }
        if !self.is_open {
            // Line breaks before a call belong to it.
            let certain = self.held.len() - overlap(&self.held, OPEN);
            let certain = self.held[..certain].trim_end().len();
            let held = self.held.split_off(certain);
            parts.extend(text(&std::mem::replace(&mut self.held, held)));
        }
        parts
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        match std::mem::take(&mut self.is_open) {
            // Models leave the last mark off where a stop token follows.
            true => vec![part_of_call(&held)],
            false => text(&held).into_iter().collect(),
        }
    }
}

fn text(text: &str) -> Option<Part> {
    (!text.is_empty()).then(|| Part::Text(text.to_owned()))
}

/// A call, or the text itself if it is none.
fn part_of_call(written: &str) -> Part {
    let json = serde_json::from_str::<Json>(written.trim()).unwrap_or_default();
    let Some(name) = json["name"].as_str() else {
        return Part::Text(format!("{OPEN}{written}"));
    };
    let arguments = match &json["arguments"] {
        Json::Null => "{}".to_owned(),
        Json::String(text) => text.clone(),
        arguments => arguments.to_string(),
    };
    Part::Call(Call { name: name.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(pieces: &[&str]) -> Vec<Part> {
        let mut calls = Calls::default();
        let mut parts: Vec<_> = pieces.iter().flat_map(|piece| calls.push(piece)).collect();
        parts.extend(calls.finish());
        parts
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call(Call { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    #[test]
    fn calls_are_taken_out_of_a_text_in_pieces() {
        let found = parts(&[
            "I look.\n<too",
            "l_call>\n{\"name\": \"f\", \"argum",
            "ents\": {\"a\": 1}}\n</tool_call>",
        ]);
        assert_eq!(found, [Part::Text("I look.".to_owned()), call("f", "{\"a\":1}")]);
        let two = "<tool_call>{\"name\":\"f\"}</tool_call>\n<tool_call>{\"name\":\"g\"}";
        assert_eq!(parts(&[two]), [call("f", "{}"), call("g", "{}")]);
    }

    #[test]
    fn text_that_is_no_call_stays() {
        let whole = |pieces: &[&str]| -> String {
            let text = |part| match part {
                Part::Text(text) => text,
                Part::Call(call) => panic!("{call:?}"),
            };
            parts(pieces).into_iter().map(text).collect()
        };
        assert_eq!(whole(&["a <", "b> ", "\n", "c"]), "a <b> \nc");
        assert_eq!(whole(&["<tool_call>", "no JSON"]), "<tool_call>no JSON");
    }

    #[test]
    fn tools_are_described_to_templates_that_know_none() {
        let mut asked = Message::new("assistant", "");
        let calls = json!([{"function": {"name": "f", "arguments": {}}}]);
        asked.more.insert("tool_calls".to_owned(), calls);
        let chat = [Message::new("user", "hi"), asked, Message::new("tool", "12")];
        let words = in_words(&chat, &[json!({"type": "function"})]);
        assert_eq!(words.len(), 4);
        assert!(words[0].content.starts_with("You may call these functions:\n{\"type\":"));
        assert_eq!(
            words[2].content,
            "<tool_call>\n{\"name\":\"f\",\"arguments\":{}}\n</tool_call>"
        );
        assert_eq!(words[3], Message::new("user", "<tool_response>\n12\n</tool_response>"));
    }
}
