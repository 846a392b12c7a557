//! The messages of a chat, as templates read them.

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};
use slim_runtime::Message;

use super::ApiError;

/// Messages of a chat, at most.
const MAX_MESSAGES: usize = 4096;

/// A message of OpenAI's API.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sent {
    role: Role,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
    #[serde(default)]
    tool_call_id: Option<String>,
    /// What an answer of ours has, too.
    #[serde(default, rename = "refusal")]
    _refusal: Option<String>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Role {
    #[serde(alias = "developer")]
    System,
    User,
    Assistant,
    Tool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Json>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToolCall {
    id: String,
    #[serde(default, rename = "type")]
    _kind: Option<String>,
    #[serde(default, rename = "index")]
    _index: Option<usize>,
    function: Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    /// JSON in a text.
    arguments: String,
}

/// What templates read of messages: calls have their arguments as JSON, not as a text of it.
///
/// # Errors
/// A message that is no text.
pub fn to_messages(sent: Vec<Sent>) -> Result<Vec<Message>, ApiError> {
    if !(1..=MAX_MESSAGES).contains(&sent.len()) {
        let message = format!("found {} messages, expected 1 to {MAX_MESSAGES}", sent.len());
        return Err(ApiError::value("messages", message));
    }
    let message = |(index, sent)| {
        to_message(sent)
            .map_err(|reason| ApiError::value("messages", format!("message {index}: {reason}")))
    };
    sent.into_iter().enumerate().map(message).collect()
}

fn to_message(sent: Sent) -> Result<Message, String> {
    let role = match sent.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    };
    let content = match sent.content {
        None if sent.tool_calls.is_none() => return Err("it has no `content`".to_owned()),
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            parts.iter().map(text_of_part).collect::<Result<Vec<_>, _>>()?.concat()
        }
    };
    let calls = sent.tool_calls.into_iter().flatten().map(call);
    let calls = calls.collect::<Result<Vec<_>, _>>()?;
    let more = [
        ("name", sent.name.map(Json::from)),
        ("tool_calls", (!calls.is_empty()).then(|| calls.into())),
        ("tool_call_id", sent.tool_call_id.map(Json::from)),
    ];
    let more = more.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Ok(Message { more: more.collect::<Map<_, _>>(), ..Message::new(role, content) })
}

fn text_of_part(part: &Json) -> Result<&str, String> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err("a part of its content has no `text`".to_owned()),
        (kind, _) => Err(format!(
            "a part of its content is of type {:?}, but the model reads nothing but text",
            kind.unwrap_or_default()
        )),
    }
}

fn call(call: ToolCall) -> Result<Json, String> {
    let Function { name, arguments } = call.function;
    let arguments: Json = serde_json::from_str(&arguments)
        .map_err(|error| format!("the arguments of `{name}` are no JSON: {error}"))?;
    let function = json!({ "name": name, "arguments": arguments });
    Ok(json!({ "id": call.id, "type": "function", "function": function }))
}
