//! `/v1/chat/completions`.

use serde_json::Value as Json;

use super::{
    ApiError, Asked, Kind, Limits, ask,
    fields::Fields,
    messages::{Sent, to_messages},
    parameters::{MAX_LIKELY, Parameters},
    reply::Reply,
};
use crate::{served::Served, tools::form_of_call};

/// Functions that may be called, at most.
const MAX_TOOLS: usize = 128;

pub fn read(mut fields: Fields, served: &Served, limits: &Limits) -> Result<Asked, ApiError> {
    if !served.has_chats() {
        return Err(ApiError::bad(
            "the model has no chat template: continue texts instead, with `/v1/completions`",
        ));
    }
    let messages = fields.take::<Vec<Sent>>("messages")?;
    let messages = to_messages(messages.unwrap_or_default())?;
    let mut parameters = Parameters::take(&mut fields, served, limits)?;
    parameters.take_response_format(&mut fields)?;
    let tools = take_tools(&mut fields, &mut parameters)?;
    let likely = fields.take_in("top_logprobs", 0..=MAX_LIKELY)?;
    parameters.likely = match (fields.take("logprobs")?.unwrap_or(false), likely) {
        (true, likely) => Some(likely.unwrap_or(0)),
        (false, None) => None,
        (false, Some(_)) => {
            return Err(ApiError::value("top_logprobs", "it needs `logprobs` to be true"));
        }
    };
    fields.finish()?;
    let tokens = served.chat_tokens(&messages, &tools).expect("checked above");
    let tokens = tokens.map_err(|error| ApiError::value("messages", with_reason(&error)))?;
    let reply = Reply::new(Kind::Chat, &limits.name, &parameters, !tools.is_empty());
    ask(vec![tokens], &parameters, reply, served, limits)
}

/// The tools that the model is told of; if it has to call one, that becomes the form of the text.
fn take_tools(fields: &mut Fields, parameters: &mut Parameters) -> Result<Vec<Json>, ApiError> {
    const CHOICE: &str = "tool_choice";
    let tools = fields.take::<Vec<Json>>("tools")?.unwrap_or_default();
    let choice = fields.take::<Json>(CHOICE)?;
    if tools.len() > MAX_TOOLS {
        let message = format!("found {} tools, expected {MAX_TOOLS} at most", tools.len());
        return Err(ApiError::value("tools", message));
    }
    let is_function =
        |tool: &Json| tool["type"] == "function" && tool["function"]["name"].is_string();
    if let Some(index) = tools.iter().position(|tool| !is_function(tool)) {
        return Err(ApiError::value("tools", format!("tool {index} is no function with a name")));
    }
    let called = match &choice {
        None => None,
        Some(Json::String(choice)) if choice == "auto" => None,
        Some(Json::String(choice)) if choice == "none" => return Ok(Vec::new()),
        Some(Json::String(choice)) if choice == "required" => Some(tools.clone()),
        Some(choice) => match choice["function"]["name"].as_str() {
            Some(name) => {
                let named = |tool: &&Json| tool["function"]["name"] == name;
                Some(tools.iter().filter(named).cloned().collect())
            }
            None => {
                let expected = "expected `auto`, `none`, `required` or a function with a name";
                return Err(ApiError::value(CHOICE, expected));
            }
        },
    };
    match called {
        None => {}
        Some(called) if called.is_empty() => {
            return Err(ApiError::value(CHOICE, "there is no such tool"));
        }
        Some(called) => parameters.set_form(form_of_call(&called), CHOICE)?,
    }
    Ok(tools)
}

/// An error with what is behind it.
fn with_reason(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |&error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
